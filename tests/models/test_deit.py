"""DeiT: timm as the live oracle, two heads, the table of positions on loading and in the forward pass."""

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.models.deit import FAMILY

timm = pytest.importorskip("timm")
PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


def small(name=DISTILLED, **options):
    return vertebra.create_model(name, depth=2, num_classes=7, **options).eval()


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
@pytest.mark.parametrize("sides", [(224, 224), (192, 272), (100, 224)])
def test_equals_timm(name, sides):
    theirs = fill(timm.create_model(name, depth=2, num_classes=7, dynamic_img_size=True, dynamic_img_pad=True))
    ours = small(name, checkpoint={"model": theirs.state_dict()})
    assert set(vertebra.to_official(ours)) == set(theirs.state_dict())
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        assert error(ours.forward_features(x), theirs.forward_features(x)) <= 1e-5
        pooled = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (ours, theirs)]
        assert error(*pooled) <= 1e-5
        if name == DISTILLED:
            theirs.set_distilled_training(True)
            by_class, by_teacher = theirs.train()(x)
            outputs = ours.train().forward_outputs(x)
            assert error(outputs["class_logits"], by_class) <= 1e-5
            assert error(outputs["dist_logits"], by_teacher) <= 1e-5
            assert error(ours(x), (by_class + by_teacher) / 2) <= 1e-5  # never a pair


def test_loading_into_another_size_does_not_antialias():
    """Fine-tuning code: bicubic as it is, prefix rows kept. The forward pass antialiases, so the two differ."""
    plain = fill(small())
    state = vertebra.to_official(plain)
    built = small(img_size=160, checkpoint=state)
    table = state["pos_embed"]
    cells = table[:, 2:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(cells, size=(10, 10), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(built.pos_embed.table[:, 2:], expected)
    assert torch.equal(built.pos_embed.table[:, :2], table[:, :2])
    assert error(plain.pos_embed((10, 10))[:, 2:], expected) > 0.1


def test_reset_replaces_both_heads():
    model = small()
    model.reset_classifier(3)
    assert {k: tuple(v.shape) for k, v in model.forward_outputs(torch.randn(1, 3, 32, 32)).items()} == {
        "logits": (1, 3), "class_logits": (1, 3), "dist_logits": (1, 3),
    }  # fmt: skip
    model.reset_classifier(0)
    tokens = model.forward_features(x := torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(model(x), tokens[:, :2].mean(1))


def test_distillation_token_comes_second():
    model = fill(small())
    tokens, grid = model._embed(torch.randn(1, 3, 32, 48))
    table = model.pos_embed(grid)
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0] + table[0, 0])
    torch.testing.assert_close(tokens[0, 1], model.dist_token[0, 0] + table[0, 1])
    assert grid == (2, 3) and tokens.shape == (1, 8, 192)
    assert model.no_weight_decay() == {"cls_token", "dist_token", "pos_embed.table"}


def test_distilled_pools_no_average():
    with pytest.raises(ValueError, match="global_pool must be one of token"):
        small(global_pool="avg")
    assert small(PLAIN, global_pool="avg")(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(("ndim", "sides", "grid"), [(1, (50,), (4,)), (3, (16, 33, 20), (1, 3, 2))])
def test_other_ranks_train(ndim, sides, grid):
    model = small(ndim=ndim, img_size=32).train()
    model(torch.randn(2, 3, *sides)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    dense = small(ndim=ndim, img_size=32, features_only=True, checkpoint=vertebra.to_official(model))
    assert [tuple(m.shape) for m in dense(torch.randn(1, 3, *sides))] == [(1, 192, *grid)] * 2
    assert sorted(dense.load_report.unused) == [
        "head.bias", "head.weight", "head_dist.bias", "head_dist.weight", "norm.bias", "norm.weight",
    ]  # fmt: skip


def test_initialisation_of_prefix_tokens():
    model = small()
    assert 0.014 < model.cls_token.std() < 0.026 and 0.014 < model.dist_token.std() < 0.026


@pytest.mark.parametrize("name", FAMILY.variants)
def test_published_count_of_parameters(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in vertebra.create_model(name).parameters()) / 1e6
    assert count == pytest.approx(FAMILY.variants[name].published["params_m"], abs=0.0051)
    weights = FAMILY.variants[name].weights
    assert weights.status == "direct" and weights.location.endswith(f"{name}-{weights.sha256}.pth")
