"""MLP-Mixer: timm as the live oracle, JAX files, other sizes and ranks, the token MLP written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.mixers import TokenMlp
from vertebra.models.mlp_mixer import FAMILY, MlpMixer

timm = pytest.importorskip("timm")
NAME = "mixer_s16_224"


def small(name=NAME, **options):
    return vertebra.create_model(name, **(dict(depth=2, dim=32, num_classes=7, img_size=64) | options)).eval()


@pytest.mark.parametrize(
    ("name", "patch", "dim", "sides"),
    [(NAME, 16, 512, (224, 224)), (NAME, 16, 512, (48, 80)), ("mixer_b32_224", 32, 768, (64, 96))],
)
def test_equals_timm(name, patch, dim, sides):
    theirs = timm.models.mlp_mixer.MlpMixer(
        patch_size=patch, num_blocks=2, embed_dim=dim, num_classes=7, img_size=sides
    )
    fill(theirs)
    ours = vertebra.create_model(name, depth=2, num_classes=7, img_size=sides, checkpoint=theirs.state_dict()).eval()
    assert set(vertebra.to_official(ours)) == set(theirs.state_dict())
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        assert error(ours.forward_features(x).flatten(2).mT, theirs.forward_features(x)) <= 1e-5
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for mine, other in zip(ours.forward_intermediates(x), maps, strict=True):
            assert error(mine, other) <= 1e-5


@pytest.mark.parametrize(("grid", "sides"), [((5,), (5,)), ((2, 3), (2, 3)), ((2, 2, 2), (2, 2, 2)), ((2, 3), (7, 5))])
def test_token_mlp_mixes_each_channel_alike(grid, sides):
    mixer = fill(TokenMlp(grid, 6))
    x = torch.randn(2, *sides, 4)
    got = torch.empty_like(x)
    with torch.no_grad():
        for b in range(2):
            for c in range(4):
                cells = x[b, ..., c]
                if sides != grid:
                    cells = F.interpolate(cells[None, None], size=grid, mode="bilinear", antialias=True)[0, 0]
                hidden = F.gelu(mixer.fc1.weight @ cells.flatten() + mixer.fc1.bias)
                mixed = (mixer.fc2.weight @ hidden + mixer.fc2.bias).reshape(grid)
                if sides != grid:
                    mixed = F.interpolate(mixed[None, None], size=sides, mode="bilinear", antialias=True)[0, 0]
                got[b, ..., c] = mixed
        assert error(mixer(x), got) <= 1e-6


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("side", [4, 16])
def test_built_for_another_size_equals_the_stored_one_met_by_it(ndim, side):
    """Loading joins the token MLP's weights with the resampling that the stored model does in each forward pass."""
    plain = fill(small(ndim=ndim, patch=2, img_size=8))
    sides = (side, side + 3, side)[:ndim]
    built = small(ndim=ndim, patch=2, img_size=sides, checkpoint=vertebra.to_official(plain))
    assert len(built.load_report.adapted) == 2 * 3 and not built.load_report.missing
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(built(x), plain(x)) <= 1e-5
        assert error(built(x), small(ndim=ndim, patch=2, img_size=sides)(x)) > 0.1


def test_a_file_of_an_unknown_grid_is_refused():
    state = vertebra.to_official(small(img_size=(32, 96)))  # twelve cells are no square
    with pytest.raises(vertebra.CheckpointError, match="mlp_tokens"):
        small(checkpoint=state)
    wide = vertebra.to_official(small(token_ratio=1.0))
    with pytest.raises(vertebra.CheckpointError, match="mlp_tokens"):
        small(img_size=128, checkpoint=wide)


def jax_file(path, dim, depth, cells, patch=16, classes=7):
    """Random arrays under the official JAX names."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    arrays = {
        "stem/kernel": draw(patch, patch, 3, dim), "stem/bias": draw(dim),
        "pre_head_layer_norm/scale": draw(dim) + 1, "pre_head_layer_norm/bias": draw(dim),
        "head/kernel": draw(dim, classes), "head/bias": draw(classes),
    }  # fmt: skip
    for i in range(depth):
        for j in range(2):
            arrays[f"MixerBlock_{i}/LayerNorm_{j}/scale"] = draw(dim) + 1
            arrays[f"MixerBlock_{i}/LayerNorm_{j}/bias"] = draw(dim)
        for part, size, hidden in (("token", cells, dim // 2), ("channel", dim, 4 * dim)):
            for j, (a, b) in enumerate([(size, hidden), (hidden, size)]):
                arrays[f"MixerBlock_{i}/{part}_mixing/Dense_{j}/kernel"] = draw(a, b)
                arrays[f"MixerBlock_{i}/{part}_mixing/Dense_{j}/bias"] = draw(b)
    np.savez(path, **arrays)
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def test_jax_files_give_what_their_arrays_mean(tmp_path):
    """The forward pass of the JAX code on the arrays themselves, in its layout (B, H, W, C), with the exact GELU."""
    dim, side, patch = 32, 64, 16
    w = jax_file(tmp_path / "mixer.npz", dim, 2, 16)
    ours = small(checkpoint=tmp_path / "mixer.npz")
    assert ours.load_report.naming == "official" and not ours.load_report.missing

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}/scale"] + w[f"{name}/bias"]

    def mlp(x, name):
        x = F.gelu(x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
        return x @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]

    image = torch.randn(2, side, side, 3)
    cut = image.reshape(2, 4, patch, 4, patch, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 16, -1)
    x = cut @ w["stem/kernel"].reshape(-1, dim) + w["stem/bias"]
    for i in range(2):
        block = f"MixerBlock_{i}"
        x = x + mlp(norm(x, f"{block}/LayerNorm_0").mT, f"{block}/token_mixing").mT
        x = x + mlp(norm(x, f"{block}/LayerNorm_1"), f"{block}/channel_mixing")
    logits = norm(x, "pre_head_layer_norm").mean(1) @ w["head/kernel"] + w["head/bias"]
    with torch.no_grad():
        assert error(ours(image.movedim(-1, 1)), logits) <= 1e-5


def test_the_bias_after_the_token_mlp_cannot_matter():
    """It adds one number to all channels of a token, which every later norm takes away."""
    model, x = fill(small()), torch.randn(2, 3, 64, 64)
    before = model(x)
    grads = torch.autograd.grad(before.sum(), [model.stages[1].blocks[0].attn.fc2.bias, model.stem.proj.bias])
    assert grads[0].abs().max() <= 1e-4 * grads[1].abs().max()
    with torch.no_grad():
        model.stages[0].blocks[0].attn.fc2.bias.add_(torch.randn(16))
        assert error(model(x), before) <= 1e-5


def test_the_norm_comes_before_the_mean():
    model, x = fill(small()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        last = model.forward_intermediates(x)[-1].movedim(1, -1)
        normed = F.layer_norm(last, (32,), model.norm.weight, model.norm.bias, 1e-6)
        assert error(model(x), model.head(normed.mean((1, 2)))) <= 1e-6
        assert error(model(x), model.head(model.norm(last.mean((1, 2))))) > 1e-2


def test_one_dimension_equals_two_of_one_patch_high():
    """A signal is the first row of an image one patch high, if the kernels' other rows are zero."""
    line, plane = fill(small(ndim=1)), small(img_size=(16, 64))
    state = dict(line.state_dict())
    kernel = torch.zeros_like(plane.stem.proj.weight)
    kernel[:, :, 0] = state["stem.proj.weight"]
    plane.load_state_dict(state | {"stem.proj.weight": kernel})
    for length in (64, 96, 33):
        x = torch.randn(2, 3, length)
        with torch.no_grad():
            assert error(line(x), plane(F.pad(x.unsqueeze(2), (0, 0, 0, 15)))) <= 1e-5


def test_a_ragged_end_is_filled_with_zeros():
    model, x = fill(small()), torch.randn(1, 3, 37, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(F.pad(x, (0, 0, 0, 11))))


def test_published_facts():
    assert set(FAMILY.variants) == {f"mixer_{s}_224" for s in ("s32", "s16", "b32", "b16", "l32", "l16", "h14")}
    for name, (depth, dim, cells) in {
        "mixer_s32_224": (8, 512, 49), "mixer_b16_224": (12, 768, 196), "mixer_l16_224": (24, 1024, 196),
        "mixer_h14_224": (32, 1280, 256),
    }.items():  # fmt: skip
        with torch.device("meta"):
            model = vertebra.create_model(name)
        block = model.stages[-1].blocks[0]
        assert (len(model.stages), block.attn.fc1.in_features, block.attn.fc1.out_features) == (depth, cells, dim // 2)
        assert block.mlp.fc1.out_features == 4 * dim
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
        assert type(block.attn.act) is torch.nn.GELU and block.attn.act.approximate == "none"
    info = vertebra.model_info("mixer_l16_224")
    assert info.inputs.mean == info.inputs.std == (0.5, 0.5, 0.5)
    assert info.weights.location.endswith("mixer_models/imagenet1k/Mixer-L_16.npz")


def test_fresh_weights_keep_the_scale_of_their_inputs():
    torch.manual_seed(0)
    model = vertebra.create_model(NAME, depth=1)
    for weight in (
        model.stem.proj.weight,
        *(p for n, p in model.stages.named_parameters() if n.endswith("fc1.weight")),
    ):
        assert weight.std().item() * weight[0].numel() ** 0.5 == pytest.approx(1, abs=0.02)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="depth must be at least 1"):
        small(depth=0)
    with pytest.raises(ValueError, match="img_size"):
        small(img_size=0)
    with pytest.raises(ValueError, match="at least 16"):
        small()(torch.randn(1, 3, 15, 32))
    assert MlpMixer.tokens is False
    assert vertebra.create_model(NAME, depth=8, features_only=True).out_indices == (1, 3, 5, 7)
