"""T2T-ViT: soft splits, Performer and token layers against loops and sums written out, tables, ranks, quirks."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import unfold
from vertebra.mixers import PerformerAttention
from vertebra.models.t2t_vit import FAMILY, TokensToToken, ValueAttention, performer_layer, sinusoid, transformer_layer

NAME, SOFT = "t2t_vit_7", "t2t_vit_t_14"


def small(name=NAME, **options):
    return vertebra.create_model(name, **(dict(depth=2, dim=32, heads=2, num_classes=7, img_size=64) | options)).eval()


def columns(x, kernel, stride, padding):
    """The soft split of (B, *S, C) by loops: one row per window, channel by channel."""
    batch, *sides, dim = x.shape
    x = F.pad(x, [0, 0] + [padding, padding] * len(sides))
    out = [(s + 2 * padding - kernel) // stride + 1 for s in sides]
    rows = torch.empty(batch, *out, dim * kernel ** len(sides))
    for place in product(*map(range, out)):
        window = x[(slice(None), *(slice(p * stride, p * stride + kernel) for p in place))]
        rows[(slice(None), *place)] = window.movedim(-1, 1).flatten(1)
    return rows


@pytest.mark.parametrize("sides", [(20,), (9, 14), (7, 8, 6)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, 2), (3, 2, 1), (2, 1, 0)])
def test_unfold_equals_loops(sides, kernel, stride, padding):
    x = torch.randn(2, *sides, 3)
    got = unfold(x, kernel, stride, padding)
    assert torch.equal(got, columns(x, kernel, stride, padding))
    if len(sides) == 2:
        assert torch.equal(got.flatten(1, 2).mT, F.unfold(x.movedim(-1, 1), kernel, 1, padding, stride))


def plain_performer(mixer, x, order="kqv"):
    """out = sum over keys of phi(q).phi(k) v / sum of phi(q).phi(k), pair by pair in float64."""
    width = mixer.proj.in_features
    parts = F.linear(x, mixer.kqv.weight, mixer.kqv.bias).double().flatten(1, -2).split(width, -1)
    k, q, v = (parts[order.index(n)].unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for n in "kqv")
    w = mixer.w.double()
    phi = lambda u: (u @ w.T - u.norm(dim=-1, keepdim=True) ** 2 / 2).exp() / math.sqrt(len(w))  # noqa: E731
    kernel = phi(q) @ phi(k).mT
    y = (kernel @ v) / (kernel.sum(-1, keepdim=True) + 1e-8)
    y = F.linear(y.transpose(1, 2).flatten(2).float(), mixer.proj.weight, mixer.proj.bias)
    y = y + parts[order.index("v")].float() if mixer.value_residual else y
    return y.reshape(*x.shape[:-1], width)


@pytest.mark.parametrize("sides", [(11,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize(
    "options", [dict(width=8, value_residual=True), dict(heads=2), dict(heads=3, features=7), dict(width=24)]
)
def test_performer_equals_the_sum_over_pairs(sides, options):
    torch.manual_seed(0)
    mixer = PerformerAttention(12, **options).eval()
    with torch.no_grad():
        for p in (mixer.kqv.weight, mixer.kqv.bias, mixer.proj.bias):
            p.normal_(std=0.5)
        x = torch.randn(2, *sides, 12)
        assert error(mixer(x), plain_performer(mixer, x)) <= 1e-5
        assert error(mixer(x), plain_performer(mixer, x, "qkv")) > 1e-2


def test_performer_comes_close_to_softmax():
    """With many features the kernel is exp(q . k), which softmax attention without a scale has."""
    torch.manual_seed(0)
    mixer = PerformerAttention(8).eval()
    with torch.no_grad():
        mixer.kqv.weight.normal_(std=0.1)
        mixer.kqv.weight[16:].normal_()  # the values
        for bias in (mixer.kqv.bias, mixer.proj.bias):
            bias.zero_()
        x = torch.randn(1, 30, 8)
        k, q, v = mixer.kqv(x).chunk(3, -1)
        want = mixer.proj((q @ k.mT).softmax(-1) @ v)
        draws = torch.randn(200_000, 8)
        for w, least, most in ((draws, 0.0, 0.05), (0 * draws, 0.5, math.inf)):
            mixer.w = torch.nn.Parameter(w, requires_grad=False)
            assert least <= error(mixer(x), want) <= most


def test_features_stay_float32_under_autocast():
    torch.manual_seed(0)
    mixer = PerformerAttention(16, width=64).eval()
    kinds = []
    inner = mixer.features
    mixer.features = lambda u: kinds.append(inner(u)) or kinds[-1]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(torch.randn(1, 9, 16))
    assert [k.dtype for k in kinds] == [torch.float32] * 2 and y.dtype == torch.bfloat16
    u = torch.randn(1, 9, 64)
    with torch.no_grad():
        assert error(kinds[0], kinds[0].bfloat16().float()) > 1e-4  # a bfloat16 product would have rounded
        assert (inner(u) > 0).all()


@pytest.mark.parametrize("sides", [(9,), (3, 4), (2, 2, 3)])
def test_value_attention_scales_by_the_input_width(sides):
    mixer = fill(ValueAttention(10, 6))
    with torch.no_grad():
        mixer.qkv.weight.normal_()
        mixer.proj.weight.normal_()
        x = torch.randn(2, *sides, 10)
        q, k, v = mixer.qkv(x).flatten(1, -2).split(6, -1)
        right, wrong = (v + mixer.proj((q @ k.mT * d**-0.5).softmax(-1) @ v) for d in (10, 6))
        assert error(mixer(x).flatten(1, -2), right) <= 1e-6
        assert error(mixer(x).flatten(1, -2), wrong) > 1e-2
    assert mixer.qkv.bias is None


@pytest.mark.parametrize("layer", [performer_layer, transformer_layer])
@pytest.mark.parametrize("sides", [(70,), (24, 19), (16, 16, 24)])
def test_tokens_to_token_equals_its_steps(layer, sides):
    module = fill(TokensToToken(len(sides), 2, 20, layer))
    x = torch.randn(1, *sides, 2)
    with torch.no_grad():
        y = columns(x, 7, 4, 2)
        for part in (module.attention1, module.attention2):
            y = part.attn(F.layer_norm(y, y.shape[-1:], part.norm1.weight, part.norm1.bias, 1e-5))
            z = F.layer_norm(y, (64,), part.norm2.weight, part.norm2.bias, 1e-5)
            z = F.gelu(z @ part.mlp.fc1.weight.T + part.mlp.fc1.bias) @ part.mlp.fc2.weight.T + part.mlp.fc2.bias
            y = columns(y + z, 3, 2, 1)
        assert error(module(x), module.project(y)) <= 1e-5


def test_the_grid_is_what_the_soft_splits_give():
    for side in (16, 17, 18, 19, 33, 50, 51, 64, 224):
        model = small(ndim=1, img_size=side)
        with torch.no_grad():
            built = model.patch_embed(torch.randn(1, side, 3)).shape[1]
        assert model.pos_embed.grid == (built,)
    assert small(img_size=18).pos_embed.grid == (1, 1) and small(img_size=19).pos_embed.grid == (2, 2)
    assert small(img_size=(224, 160)).pos_embed.grid == (14, 10)


def test_positions_are_sines_of_the_running_number():
    table = sinusoid(197, 256)
    assert table.sum().item() == pytest.approx(16111.465, abs=2e-3)
    assert table[1, :4].tolist() == pytest.approx([0.8415, 0.5403, 0.8020, 0.5974], abs=1e-4)
    for row, column in ((0, 0), (5, 7), (196, 254)):
        angle = row / 10000 ** (2 * (column // 2) / 256)
        want = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[row, column].item() == pytest.approx(want, abs=1e-7)
    assert torch.equal(small().pos_embed.table, sinusoid(17, 32)[None])


def test_tables_are_stored_but_not_trained():
    model = small()
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"pos_embed.table", "patch_embed.attention1.attn.w", "patch_embed.attention2.attn.w"}
    for layer in (model.patch_embed.attention1, model.patch_embed.attention2):
        w = layer.attn.w
        assert w.shape == (32, 64) and torch.allclose(w @ w.T, 32 * torch.eye(32), atol=1e-4)
    state = {k: torch.randn_like(v) for k, v in vertebra.to_official(model).items()}
    vertebra.load_checkpoint(model, {"state_dict_ema": {f"module.{k}": v for k, v in state.items()}})
    assert torch.equal(model.pos_embed.table, state["pos_embed"]) and not model.pos_embed.table.requires_grad
    assert torch.equal(model.patch_embed.attention2.attn.w, state["tokens_to_token.attention2.w"])


def test_table_of_another_grid_is_resampled_alike_on_loading_and_in_the_forward_pass():
    plain = fill(small())
    state = vertebra.to_official(plain)
    built = small(img_size=(96, 48), checkpoint=state)
    old = state["pos_embed"]
    want = F.interpolate(old[:, 1:].mT.reshape(1, 32, 4, 4), size=(6, 3), mode="bicubic").flatten(2).mT
    assert built.load_report.adapted == ["pos_embed"]
    torch.testing.assert_close(built.pos_embed.table.detach(), torch.cat([old[:, :1], want], 1))
    x = torch.randn(2, 3, 96, 48)
    with torch.no_grad():
        assert error(built(x), plain(x)) <= 1e-6


def test_the_encoder_has_no_qkv_bias_and_scales_by_the_head():
    model = fill(small())
    block = model.stages[0].blocks[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        q, k, v = block.attn.qkv(x).reshape(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert error(block.attn(x), block.attn.proj(y)) <= 1e-6
    assert block.attn.qkv.bias is None
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(("name", "expected"), [(NAME, True), (SOFT, False)])
def test_performer_layers_drop_out_in_training_only(name, expected):
    model, x = fill(small(name)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert torch.equal(model(x), model(x)) is not expected


def test_official_names():
    performer, soft = (set(vertebra.to_official(small(n))) for n in (NAME, SOFT))
    first = "tokens_to_token.attention1."
    assert {
        f"{first}{n}" for n in ("w", "kqv.bias", "proj.weight", "norm1.bias", "mlp.0.weight", "mlp.2.bias")
    } <= performer
    assert {f"{first}{n}" for n in ("attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias")} <= soft
    assert {"pos_embed", "cls_token", "tokens_to_token.project.weight", "blocks.1.mlp.fc1.weight"} <= performer & soft
    assert f"{first}attn.qkv.bias" not in soft and "blocks.0.attn.qkv.bias" not in performer


def test_published_facts():
    for name, (dim, depth, heads, hidden) in {
        "t2t_vit_12": (256, 12, 4, 512), "t2t_vit_19": (448, 19, 7, 1344), "t2t_vit_t_24": (512, 24, 8, 1536),
        "t2t_vit_14_resnext": (384, 14, 32, 1152), "t2t_vit_14_wide": (768, 4, 12, 2304),
    }.items():  # fmt: skip
        with torch.device("meta"):
            model = vertebra.create_model(name)
        block = model.stages[-1].blocks[0]
        assert (model.num_features, len(model.stages), block.attn.heads) == (dim, depth, heads)
        assert block.mlp.fc1.out_features == hidden
        first = model.patch_embed.attention1
        assert isinstance(first.attn, ValueAttention if "_t_" in name else PerformerAttention)
        assert first.norm1.normalized_shape == (147,) and model.patch_embed.attention2.norm1.normalized_shape == (576,)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in vertebra.create_model("t2t_vit_12", img_size=s).parameters()) for s in (224, 256)
        ]
    assert counts[1] - counts[0] == 60 * 256 and round(counts[1] / 1e6, 3) == 6.957
    file = FAMILY.variants["t2t_vit_t_19"].weights.location
    assert file.endswith("releases/download/main/82.4_T2T_ViTt_19.pth.tar")
    assert FAMILY.variants[NAME].inputs.crop == 0.9


@pytest.mark.parametrize("name", [NAME, SOFT])
@pytest.mark.parametrize(("ndim", "sides", "grid"), [(1, (53,), (4,)), (3, (16, 20, 35), (1, 2, 3))])
def test_other_ranks_have_a_class_token_and_maps(name, ndim, sides, grid):
    model = small(name, ndim=ndim, img_size=32)
    x = torch.randn(2, 3, *sides)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + math.prod(grid), 32)
    with torch.no_grad():
        assert torch.equal(model(x), model.head(tokens[:, 0]))
    assert model.forward_intermediates(x, 1)[0].shape == (2, 32, *grid)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="patches of 16, not of 8"):
        small(patch=8)
    with pytest.raises(ValueError, match="img_size must be at least 3"):
        small(img_size=2)
    with pytest.raises(ValueError, match="global_pool must be one of token"):
        small(global_pool="avg")
    with pytest.raises(ValueError, match="do not divide"):
        PerformerAttention(10, heads=3)
    with pytest.raises(ValueError, match="at least 16"):
        small()(torch.randn(1, 3, 15, 32))
