"""PVT v1 and v2: timm as v2's live oracle, the attention's equations, tables of positions, other ranks."""

import re

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.mixers import SpatialReductionAttention
from vertebra.models.pvt import FAMILY

V1, V2, LI = "pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li"
ONCE = dict(depths=(1, 1, 1, 1), num_classes=7)


def small(name, **options):
    return vertebra.create_model(name, **(ONCE | options)).eval()


def from_timm(state):
    """timm renames v2's stages."""
    after = lambda m: str(int(m[1]) + 1)  # noqa: E731
    rules = (
        (r"^patch_embed\.", "patch_embed1."), (r"^stages\.(\d+)\.downsample\.", lambda m: f"patch_embed{after(m)}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{after(m)}."),
        (r"^stages\.(\d+)\.norm\.", lambda m: f"norm{after(m)}."), (r"\.dwconv\.", ".dwconv.dwconv."),
    )  # fmt: skip
    found = {}
    for name, tensor in state.items():
        for rule in rules:
            name = re.sub(*rule, name)
        found[name] = tensor
    return found


@pytest.mark.parametrize("name", [V2, LI])
@pytest.mark.parametrize("sides", [(224, 224), (95, 130), (32, 32)])
def test_v2_equals_timm(name, sides):
    timm = pytest.importorskip("timm")
    theirs = fill(timm.create_model(name, **ONCE))
    ours = small(name, checkpoint=from_timm(theirs.state_dict()))
    assert set(vertebra.to_official(ours)) == set(from_timm(theirs.state_dict()))
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        assert error(ours.forward_features(x), theirs.forward_features(x)) <= 1e-5
        dense = small(name, features_only=True, checkpoint=vertebra.to_official(ours))
        for mine, other in zip(dense(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
            assert error(mine, other) <= 1e-5
    assert sorted(dense.load_report.unused) == ["head.bias", "head.weight"]


@pytest.mark.parametrize(("ndim", "sides"), [(1, (19,)), (2, (9, 14)), (3, (4, 7, 5))])
@pytest.mark.parametrize("linear", [False, True])
def test_attention_as_the_equations_say(ndim, sides, linear):
    mixer, x = fill(SpatialReductionAttention(ndim, 8, 2, 2, linear)), torch.randn(2, *sides, 8)
    maps = x.movedim(-1, 1)
    if linear:
        pooled = getattr(F, f"adaptive_avg_pool{ndim}d")(maps, 7)
        small_map = getattr(F, f"conv{ndim}d")(pooled, mixer.sr.weight, mixer.sr.bias)
    else:
        small_map = getattr(F, f"conv{ndim}d")(maps, mixer.sr.weight, mixer.sr.bias, stride=2)
    read = F.layer_norm(small_map.flatten(2).mT, (8,), mixer.norm.weight, mixer.norm.bias, 1e-5)
    read = F.gelu(read) if linear else read
    q, (k, v) = mixer.q(x.flatten(1, -2)), mixer.kv(read).chunk(2, -1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., h] @ k[..., h].mT * 4**-0.5).softmax(-1) @ v[..., h])
    torch.testing.assert_close(mixer(x), mixer.proj(torch.cat(heads, -1)).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_one_dimension_equals_two_of_height_one():
    """The linear form: where only the kernels' middle row counts, padding above and below adds nothing."""
    line, plane = fill(small(LI, ndim=1)), small(LI)
    state = {}
    for name, want in plane.state_dict().items():
        tensor = line.state_dict()[name]
        if want.shape != tensor.shape:
            wide = torch.zeros_like(want)
            wide[:, :, want.shape[2] // 2] = tensor
            tensor = wide
        state[name] = tensor
    plane.load_state_dict(state)
    x = torch.randn(2, 3, 133)
    with torch.no_grad():
        # straight into the loop: an image one pixel high is below the least size
        maps = plane.through(plane.embed(x.movedim(1, -1).unsqueeze(1).contiguous()), (0, 1, 2, 3))[1]
        for one, two in zip(line.forward_intermediates(x), maps.values(), strict=True):
            assert error(one, two.squeeze(1).movedim(-1, 1)) <= 1e-5


def test_v1_tables_are_resampled_per_stage_bilinearly():
    """At 448 pixels too, where stage 2 has as many cells as stage 1's table."""
    model = fill(small(V1))
    table = model.stages[1].down.pos.table
    assert table.shape == (1, 784, 128)
    for grid in ((56, 56), (11, 30)):
        cells = table.reshape(1, 28, 28, 128).permute(0, 3, 1, 2)
        expected = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False).flatten(2).mT
        torch.testing.assert_close(model.stages[1].down.pos(grid), expected)
    assert model(torch.randn(1, 3, 448, 448)).shape == (1, 7)


def test_v1_loading_into_another_size_equals_resampling_in_the_forward_pass():
    plain = fill(small(V1))
    built = small(V1, img_size=(96, 160), checkpoint=vertebra.to_official(plain))
    assert sorted(built.load_report.adapted) == [f"pos_embed{i}" for i in (1, 2, 3, 4)]
    assert built.stages[3].down.pos.table.shape == (1, 3 * 5 + 1, 512)
    x = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        assert error(built(x), plain(x)) <= 1e-6


def test_v1_class_token_joins_in_the_last_stage():
    model, x = fill(small(V1)), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens, maps = model.forward_features(x), model.forward_intermediates(x)
        assert tokens.shape == (2, 1 + 2 * 3, 512)
        assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 24), (128, 8, 12), (320, 4, 6), (512, 2, 3)]
        torch.testing.assert_close(model.norm(maps[3].flatten(2).mT), tokens[:, 1:])
        torch.testing.assert_close(model(x), model.head(tokens[:, 0]))


def test_v1_dense_has_no_class_token_but_its_row_of_the_table():
    model = fill(small(V1))
    dense = small(V1, features_only=True, checkpoint=vertebra.to_official(model))
    assert sorted(dense.load_report.unused) == ["cls_token", "head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert vertebra.to_official(dense)["pos_embed4"].shape == (1, 50, 512)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = dense(x), model.forward_intermediates(x)
    for i in range(3):
        torch.testing.assert_close(ours[i], theirs[i])
    assert error(ours[3], theirs[3]) > 1e-3  # the class token takes part in the last stage's attention


@pytest.mark.parametrize("name", [V1, V2, LI])
@pytest.mark.parametrize(("ndim", "sides"), [(1, (101,)), (3, (32, 32, 35))])
def test_other_ranks_train(name, ndim, sides):
    options = dict(img_size=64) if name == V1 else {}
    model = small(name, ndim=ndim, drop_path_rate=0.1, dims=(8, 16, 40, 64), **options).train()
    model(torch.randn(2, 3, *sides)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    cells = [tuple((s - s % r if name == V1 else s + -s % r) // r for s in sides) for r in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in model.forward_intermediates(torch.randn(1, 3, *sides))] == cells


@pytest.mark.parametrize("name", [V1, V2, LI])
def test_checkpointing_changes_no_gradient(name):
    model, x = fill(small(name)).train(), torch.randn(1, 3, 64, 40)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [V1, V2])
def test_two_values_of_eps(name):
    for key, module in small(name).named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            outer = "patch_embed" in key or ".down." in key or ".attn." in key
            assert module.eps == (1e-5 if outer else 1e-6), key


def test_initialisation():
    model = small(V2)
    for key, module in model.named_modules():
        if key.endswith("mlp.middle"):  # fan out of a depthwise 3 x 3 is 9
            assert module.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
            assert not module.bias.any()
    assert small(V1).no_weight_decay() == {
        "patch_embed.pos.table", *(f"stages.{i}.down.pos.table" for i in (1, 2, 3)), "stages.3.down.cls_token",
    }  # fmt: skip


@pytest.mark.parametrize("name", [V1, V2])
def test_pooled_features_and_new_input_channels(name):
    x = torch.randn(1, 3, 32, 47)
    model = small(name, num_classes=0)
    assert model(x).shape == (1, model.num_features)
    grey = small(name, in_chans=1, checkpoint=vertebra.to_official(small(name)))
    assert grey(x[:, :1]).shape == (1, 7)
    with pytest.raises(ValueError, match="at least 32"):
        model(x[..., :31])


def test_v1_needs_no_reduction_where_the_class_token_is():
    with pytest.raises(ValueError, match="must be 1"):
        small(V1, ratios=(8, 4, 2, 2))


@pytest.mark.parametrize("name", FAMILY.variants)
def test_published_count_of_parameters(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in vertebra.create_model(name).parameters()) / 1e6
    assert count == pytest.approx(FAMILY.variants[name].published["params_m"], abs=0.051)
