"""ViT: timm as the live oracle, JAX files, the two rules for tables of positions, other ranks."""

import numpy as np
import pytest
import torch
from oracle import error, fill

import vertebra
from vertebra.models.vit import FAMILY, from_jax

timm = pytest.importorskip("timm")
NAME = "vit_tiny_patch16_224"


def small(name=NAME, **options):
    return vertebra.create_model(name, depth=2, num_classes=7, **options).eval()


@pytest.mark.parametrize(
    ("name", "sides"),
    [(NAME, (224, 224)), (NAME, (250, 189)), (NAME, (16, 16)), ("vit_small_patch32_224", (96, 128))],
)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_equals_timm(name, sides, pool):
    """Also off the table's grid and where the image ends in part of a patch."""
    options = dict(depth=2, num_classes=7, global_pool=pool)
    theirs = fill(timm.create_model(name, dynamic_img_size=True, dynamic_img_pad=True, **options))
    ours = vertebra.create_model(name, checkpoint=theirs.state_dict(), **options).eval()
    assert set(vertebra.to_official(ours)) == set(theirs.state_dict())
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        assert error(ours.forward_features(x), theirs.forward_features(x)) <= 1e-5
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for mine, other in zip(ours.forward_intermediates(x), maps, strict=True):
            assert error(mine, other) <= 1e-5


def test_table_of_another_grid_on_loading_equals_timms():
    """timm antialiases here as in the forward pass: a model built for the size equals the plain one run on it."""
    from timm.layers import resample_abs_pos_embed

    plain = fill(small())
    state = vertebra.to_official(plain)
    built = small(img_size=(256, 160), checkpoint=state)
    expected = resample_abs_pos_embed(state["pos_embed"], (16, 10), (14, 14), num_prefix_tokens=1)
    assert built.pos_embed.table.shape == (1, 161, 192) and built.load_report.adapted == ["pos_embed"]
    torch.testing.assert_close(built.pos_embed.table, expected)
    x = torch.randn(1, 3, 256, 160)
    with torch.no_grad():
        assert error(built(x), plain(x)) <= 1e-6


def jax_file(path, dim, depth, heads, classes, big_vision=False):
    """Random arrays under the official JAX names."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.05 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    second, attention, mlp = ("1", "0", "0") if big_vision else ("2", "1", "3")
    width = dim // heads
    arrays = {
        "cls": draw(1, 1, dim), "Transformer/posembed_input/pos_embedding": draw(1, 197, dim),
        "embedding/kernel": draw(16, 16, 3, dim), "embedding/bias": draw(dim),
        "head/kernel": draw(dim, classes), "head/bias": draw(classes),
        "Transformer/encoder_norm/scale": draw(dim) + 1, "Transformer/encoder_norm/bias": draw(dim),
    }  # fmt: skip
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("0", second):
            arrays[f"{block}LayerNorm_{norm}/scale"] = draw(dim) + 1
            arrays[f"{block}LayerNorm_{norm}/bias"] = draw(dim)
        for part in ("query", "key", "value"):
            arrays[f"{block}MultiHeadDotProductAttention_{attention}/{part}/kernel"] = draw(dim, heads, width)
            arrays[f"{block}MultiHeadDotProductAttention_{attention}/{part}/bias"] = draw(heads, width)
        arrays[f"{block}MultiHeadDotProductAttention_{attention}/out/kernel"] = draw(heads, width, dim)
        arrays[f"{block}MultiHeadDotProductAttention_{attention}/out/bias"] = draw(dim)
        for layer, (a, b) in enumerate([(dim, 4 * dim), (4 * dim, dim)]):
            arrays[f"{block}MlpBlock_{mlp}/Dense_{layer}/kernel"] = draw(a, b)
            arrays[f"{block}MlpBlock_{mlp}/Dense_{layer}/bias"] = draw(b)
    np.savez(path, **arrays)
    return arrays


def test_jax_files_load_as_timm_loads_them(tmp_path):
    path = tmp_path / "vit.npz"
    jax_file(path, 192, 2, 3, 7)
    theirs = timm.create_model(NAME, depth=2, num_classes=7).eval()
    theirs.load_pretrained(str(path))
    ours = small(checkpoint=path)
    assert ours.load_report.naming == "official" and not ours.load_report.missing
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5


def test_both_numberings_of_jax_files_mean_the_same(tmp_path):
    one, two = (
        from_jax({k: torch.from_numpy(v) for k, v in jax_file(tmp_path / "x.npz", 192, 1, 3, 7, big).items()})
        for big in (False, True)
    )
    assert set(one) == set(two) == set(vertebra.to_official(vertebra.create_model(NAME, depth=1)))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_arrays_that_hold_objects_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, cls=np.array([{"a": 1}], dtype=object))
    with pytest.raises(vertebra.CheckpointError, match="plain arrays"):
        small(checkpoint=path)


def test_one_dimension_equals_two_of_one_patch_high():
    """A signal is the first row of an image one patch high, if the kernels' other rows are zero."""
    line = fill(small(ndim=1, img_size=64))
    plane = small(img_size=(16, 64))
    state = dict(line.state_dict())
    kernel = torch.zeros_like(plane.patch_embed.proj.weight)
    kernel[:, :, 0] = state["patch_embed.proj.weight"]
    plane.load_state_dict(state | {"patch_embed.proj.weight": kernel})
    for length in (64, 96, 33):
        x = torch.randn(2, 3, length)
        image = torch.nn.functional.pad(x.unsqueeze(2), (0, 0, 0, 15))
        with torch.no_grad():
            assert error(line(x), plane(image)) <= 1e-5


@pytest.mark.parametrize(("ndim", "sides", "grid"), [(1, (35,), (3,)), (3, (16, 17, 40), (1, 2, 3))])
def test_other_ranks_train(ndim, sides, grid):
    model = small(ndim=ndim, img_size=48, drop_path_rate=0.1).train()
    model(torch.randn(2, 3, *sides)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.forward_intermediates(torch.randn(1, 3, *sides), 1)[0].shape == (1, 192, *grid)


def test_taps_are_spread_over_the_depth():
    model = vertebra.create_model(NAME, features_only=True)
    assert model.out_indices == (2, 5, 8, 11)
    assert "norm.weight" not in model.state_dict()
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 40, 32))] == [(1, 192, 3, 2)] * 4
    assert small(features_only=True).out_indices == (0, 1)


def test_without_classes_the_pooled_token_comes_out():
    model = small()
    model.reset_classifier(0)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_features(x)[:, 0])


def test_checkpointing_changes_no_gradient():
    model, x = fill(small()).train(), torch.randn(1, 3, 32, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="global_pool must be one of token, avg"):
        vertebra.create_model(NAME, global_pool="map")
    with pytest.raises(ValueError, match="depth must be at least 1"):
        vertebra.create_model(NAME, depth=0)
    with pytest.raises(ValueError, match="at least 16"):
        small()(torch.randn(1, 3, 15, 32))


def test_norms_and_weight_decay():
    model = small()
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    assert model.no_weight_decay() == {"cls_token", "pos_embed.table"}
    assert model.cls_token.std() < 1e-5 and 0.015 < model.pos_embed.table.std() < 0.025


@pytest.mark.parametrize("name", FAMILY.variants)
def test_published_count_of_parameters(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in vertebra.create_model(name).parameters()) / 1e6
    assert count == pytest.approx(FAMILY.variants[name].published["params_m"], abs=0.051 if count < 600 else 0.5)
