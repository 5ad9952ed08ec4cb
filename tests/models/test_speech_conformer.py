"""Conformer for speech: attention and convolution written out, padding that may or may not leak, both forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import Largest, error, spread
from torch import nn

import vertebra
from vertebra.deploy.fusing import _replace
from vertebra.layers import record_attention
from vertebra.mixers import ConvolutionModule, RelativeAttention

A = dict(dim=12, depth=2, heads=3, kernel=5, ndim=1, in_chans=12)
B = dict(dim=12, depth=2, heads=3, kernel=5, in_chans=11, num_classes=7)
FORMS = ("torchaudio_conformer_s", "sooftware_conformer_s")


def small(name="torchaudio_conformer_s", **options):
    torch.manual_seed(0)
    return spread(vertebra.create_model(name, **((A if name.startswith("torchaudio") else B) | options)))


# --- the mixers -----------------------------------------------------------------------------------------------------


def sines(distance: int, dim: int) -> torch.Tensor:
    table = torch.empty(dim, dtype=torch.float64)
    for m in range(dim // 2):
        angle = distance * 10000 ** (-2 * m / dim)
        table[2 * m], table[2 * m + 1] = math.sin(angle), math.cos(angle)
    return table


@pytest.mark.parametrize("sides", [(1,), (2,), (9,), (3, 4), (2, 3, 2)])
def test_relative_attention_is_its_formula(sides):
    torch.manual_seed(1)
    ndim, heads, dim = len(sides), 2, 12
    mixer, x = spread(RelativeAttention(ndim, dim, heads)).double(), torch.randn(2, *sides, dim).double()
    cells, width = list(torch.cartesian_prod(*(torch.arange(s) for s in sides)).reshape(-1, ndim)), dim // heads
    q, k, v = (part(x).reshape(2, len(cells), heads, width) for part in (mixer.query, mixer.key, mixer.value))
    y = torch.empty(2, len(cells), heads, width).double()
    for b in range(2):
        for h in range(heads):
            for i, at in enumerate(cells):
                scores = torch.empty(len(cells)).double()
                for j, to in enumerate(cells):
                    pe = torch.cat([sines(int(a - t), dim // ndim) for a, t in zip(at, to, strict=True)])
                    p = (mixer.pos.weight @ pe)[h * width : (h + 1) * width]
                    content, place = (q[b, i, h] + mixer.u[h]) @ k[b, j, h], (q[b, i, h] + mixer.v[h]) @ p
                    scores[j] = (content + place) / width**0.5
                y[b, i, h] = scores.softmax(0) @ v[b, :, h]
    assert error(mixer(x), mixer.proj(y.flatten(2)).reshape(x.shape)) <= 1e-6  # the table of sines is float32


def test_relative_attention_forms_no_vector_per_pair():
    mixer, length = RelativeAttention(1, 16, 2), 128
    with torch.no_grad(), Largest() as seen:
        mixer(torch.randn(1, length, 16))
    assert seen.numbers == 2 * length * 2 * length  # two heads of (T, 2 T); vectors for pairs would be 8 times that
    assert mixer.no_decay == ("u", "v")
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        RelativeAttention(2, 6, 1)


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("norm", ("batch", "group", "layer"))
def test_convolution_module_is_the_figure(ndim, norm):
    torch.manual_seed(1)
    mixer, x = spread(ConvolutionModule(ndim, 6, 3, norm)), torch.randn(2, *(7, 5, 4)[:ndim], 6)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    y = F.layer_norm(x, (6,), mixer.norm.weight, mixer.norm.bias, 1e-5).movedim(-1, 1)
    y = call(y, mixer.expand.weight, mixer.expand.bias)
    y = y[:, :6] * y[:, 6:].sigmoid()
    y = call(y, mixer.depthwise.weight, mixer.depthwise.bias, padding=1, groups=6)
    n = mixer.inner_norm
    if norm == "batch":
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)
    elif norm == "group":
        y = F.group_norm(y, 1, n.weight, n.bias, 1e-5)
    else:
        y = F.layer_norm(y.movedim(1, -1), (6,), n.weight, n.bias, 1e-5).movedim(-1, 1)
    y = call(y * y.sigmoid(), mixer.project.weight, mixer.project.bias).movedim(1, -1)
    torch.testing.assert_close(mixer(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixer(x, torch.ones_like(x[..., :1], dtype=torch.bool)), y, rtol=1e-4, atol=1e-5)
    folded = _replace(mixer, published=False)
    assert isinstance(folded.inner_norm, nn.Identity) == (norm == "batch")
    torch.testing.assert_close(folded(x), y, rtol=1e-4, atol=1e-5)


def test_convolution_module_refuses():
    with pytest.raises(ValueError, match="must be odd to keep the size, got 32"):
        ConvolutionModule(1, 6, 32)
    with pytest.raises(ValueError, match="one of batch, group, layer, got 'none'"):
        ConvolutionModule(1, 6, 3, "none")


# --- torchaudio's form against its own parts of torch ---------------------------------------------------------------


class Reference(nn.Module):
    """torchaudio's encoder out of torch's modules, under torchaudio's names; (B, T, C)."""

    def __init__(self, dim=12, depth=2, heads=3, kernel=5, group=False, convolution_first=False):
        super().__init__()
        self.first, self.conformer_layers = convolution_first, nn.ModuleList()
        for _ in range(depth):
            layer = nn.Module()
            for name in ("ffn1", "ffn2"):
                ffn = nn.Module()
                ffn.sequential = nn.Sequential(
                    nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Identity(), nn.Linear(4 * dim, dim)
                )
                layer.add_module(name, ffn)
            layer.self_attn_layer_norm = nn.LayerNorm(dim)
            layer.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
            layer.conv_module = nn.Module()
            layer.conv_module.layer_norm = nn.LayerNorm(dim)
            layer.conv_module.sequential = nn.Sequential(
                nn.Conv1d(dim, 2 * dim, 1), nn.GLU(1), nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim),
                nn.GroupNorm(1, dim) if group else nn.BatchNorm1d(dim), nn.SiLU(), nn.Conv1d(dim, dim, 1),
            )  # fmt: skip
            layer.final_layer_norm = nn.LayerNorm(dim)
            self.conformer_layers.append(layer)

    def forward(self, x, lengths=None):
        mask = None if lengths is None else torch.arange(x.shape[1])[None] >= lengths[:, None]
        for layer in self.conformer_layers:
            x = x + 0.5 * layer.ffn1.sequential(x)
            for step in ("conv", "attn") if self.first else ("attn", "conv"):
                if step == "conv":
                    y = layer.conv_module.layer_norm(x).transpose(1, 2)
                    x = x + layer.conv_module.sequential(y).transpose(1, 2)
                else:
                    y = layer.self_attn_layer_norm(x)
                    x = x + layer.self_attn(y, y, y, key_padding_mask=mask, need_weights=False)[0]
            x = layer.final_layer_norm(x + 0.5 * layer.ffn2.sequential(x))
        return x


@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("norm", ("batch", "group"))
@pytest.mark.parametrize("lengths", (None, torch.tensor([17, 11, 1])))
def test_torchaudio_form_equals_torchs_modules(norm, first, lengths):
    model = small(norm=norm, convolution_first=first)
    reference = Reference(group=norm == "group", convolution_first=first).eval()
    report = reference.load_state_dict(vertebra.to_official(model), strict=False)
    assert not report.unexpected_keys and all(k.endswith("num_batches_tracked") for k in report.missing_keys)
    x = torch.randn(3, 12, 17)
    with torch.no_grad():
        ours, theirs = model(x, lengths=lengths), reference(x.transpose(1, 2), lengths).transpose(1, 2)
        assert error(ours, theirs) <= 1e-6  # padded frames too
        if lengths is not None:
            assert error(model(x), theirs) > 1e-2


# --- lengths --------------------------------------------------------------------------------------------------------


def test_published_forms_leak_what_is_padded():
    x = torch.randn(2, 12, 20)
    other = x.clone()
    other[1, :, 13:] = torch.randn(12, 7)
    with torch.no_grad():
        model = small(depth=1)
        a, b = (model(v, lengths=torch.tensor([20, 13]))[1] for v in (x, other))
        assert torch.equal(a[:, :11], b[:, :11])  # keys are masked: one layer reaches two frames by the convolution
        assert error(a[:, 11:13], b[:, 11:13]) > 1e-3
        model, x = small("sooftware_conformer_s"), torch.randn(2, 11, 60)
        assert torch.equal(model(x, lengths=torch.tensor([60, 31])), model(x))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("norm", ("batch", "group", "layer"))
@pytest.mark.parametrize("training", (False, True))
def test_with_mask_padding_a_sequence_does_not_know_its_padding(name, norm, training):
    model = small(name, norm=norm, mask_padding=True).train(training).double()
    x = torch.randn(2, model.in_chans, 61).double()
    # in training batch norm mixes the samples: equal lengths there, so that the batch without padding exists
    lengths = torch.tensor([31, 31] if training else [61, 31])
    start = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        padded = model(x, lengths=lengths)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(start)
        alone = model(x[..., :31]) if training else model(x[1:, :, :31])
    frames = int(model.output_lengths(torch.tensor(31)))
    assert alone.shape[-1] == frames < padded.shape[-1]
    assert error(padded[-1, ..., :frames], alone[-1]) <= 1e-6
    for key, value in model.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7, msg=key)
    assert not training or norm != "batch" or any(not torch.equal(after[k], start[k]) for k in start)


def test_statistics_of_valid_frames_leave_gradients():
    model = small(mask_padding=True).train()
    x = torch.randn(2, 12, 20, requires_grad=True)
    y = model(x, lengths=torch.tensor([20, 13]))
    y[1, :, :13].square().sum().backward()
    assert x.grad[0].abs().max() > 0  # by the statistics of the batch
    assert x.grad[1, :, 13:].abs().max() == 0 and x.grad[1, :, :13].abs().min() > 0


@pytest.mark.parametrize("length", range(7, 31))
def test_output_lengths_are_the_frames_there_are(length):
    model = small("sooftware_conformer_s", depth=1)
    with torch.no_grad():
        frames = model(torch.randn(1, 11, length)).shape[-1]
    assert int(model.output_lengths(torch.tensor([length]))) == frames
    assert frames == length // 4 - 1 + (length % 4 == 3)  # the published count misses a frame there


def test_torchaudio_form_keeps_lengths():
    lengths = torch.tensor([20, 13])
    assert torch.equal(small().output_lengths(lengths), lengths)


@pytest.mark.parametrize("ndim", (2, 3))
def test_lengths_of_several_axes(ndim):
    model = small(ndim=ndim, kernel=3, mask_padding=True, norm="group", head="pool", num_classes=4)
    x = torch.randn(2, 12, *(7, 6, 5)[:ndim])
    lengths = torch.tensor([(7, 6, 5)[:ndim], (4, 6, 3)[:ndim]])
    part = x[1:, :, :4] if ndim == 2 else x[1:, :, :4, :, :3]
    with torch.no_grad():
        assert error(model(x, lengths=lengths)[1:], model(part)) <= 1e-6


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([20, 0], r"lie in 1..20, got \[20, 0\]"),
        ([21, 4], r"lie in 1..20, got \[21, 4\]"),
        ([20], r"shape \(2,\) for this batch, got \(1,\)"),
        ([[20], [4]], r"shape \(2,\)"),
        ([20.0, 4.0], "integers, got torch.float32"),
        ([True, True], "integers, got torch.bool"),
    ],
)
def test_bad_lengths_are_named(lengths, words):
    for given in (lengths, torch.tensor(lengths)):
        with pytest.raises(ValueError, match=words):
            small()(torch.randn(2, 12, 20), lengths=given)


def test_sooftware_form_refuses_lengths_that_give_no_frame():
    with pytest.raises(ValueError, match=r"lie in 7..20, got \[20, 6\]"):
        small("sooftware_conformer_s")(torch.randn(2, 11, 20), lengths=[20, 6])
    with pytest.raises(ValueError, match="shape"):
        small(ndim=2)(torch.randn(2, 12, 4, 4), lengths=[4, 4])


# --- the models -----------------------------------------------------------------------------------------------------


def test_pooled_head_reads_valid_frames_alone():
    model = small(head="pool", in_chans=2, num_classes=5)
    x, lengths = torch.randn(3, 2, 19), torch.tensor([19, 8, 1])
    with torch.no_grad():
        out = model.forward_outputs(x, lengths=lengths)
        assert set(out) == {"frames", "logits"} and out["frames"].shape == (3, 12, 19)
        means = torch.stack([f[:, :n].mean(1) for f, n in zip(out["frames"], lengths, strict=True)])
        torch.testing.assert_close(out["logits"], model.head(means), rtol=1e-5, atol=1e-6)
        features = model.forward_features(x, lengths=lengths)
        assert torch.equal(features[0], out["frames"]) and torch.equal(model.forward_head(features), out["logits"])
        assert error(model.forward_outputs(x)["logits"], model.head(model.forward_features(x).mean(2))) <= 1e-6
        maps = model.forward_intermediates(x, lengths=lengths)
        assert torch.equal(maps[-1], out["frames"]) and not torch.equal(model.forward_intermediates(x)[0], maps[0])


def test_frames_are_what_torchaudio_gives():
    model, x = small(), torch.randn(2, 12, 9)
    with torch.no_grad():
        assert model(x).shape == (2, 12, 9) and torch.equal(model(x), model.forward_features(x))
    assert not any(name.startswith(("head", "stem")) for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="no classifier"):
        model.reset_classifier(3)
    assert [n for n, _ in small(in_chans=2).named_parameters() if n.startswith("stem")] == ["stem.weight", "stem.bias"]
    assert small(stem=True).stem.weight.shape == (12, 12, 1)


def test_subsampling_reads_bins_as_an_image():
    model, x = small("sooftware_conformer_s"), torch.randn(2, 11, 23)
    first, second = model.subsampling[0], model.subsampling[2]
    with torch.no_grad():
        y = F.conv2d(x.transpose(1, 2)[:, None], first.weight, first.bias, stride=2).relu()
        y = F.conv2d(y, second.weight, second.bias, stride=2).relu()  # (B, d, T', F')
        y = torch.cat([y[:, c] for c in range(12)], -1)  # (B, T', d * F'), channels outer
        torch.testing.assert_close(model.embed(x.transpose(1, 2))[0], model.proj(y), rtol=1e-4, atol=1e-5)


def test_sooftware_form_ends_in_log_probabilities():
    model, x = small("sooftware_conformer_s"), torch.randn(2, 11, 40)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 7, 9)
        torch.testing.assert_close(y.exp().sum(1), torch.ones(2, 9))
        logits = torch.einsum("bct,kc->bkt", model.forward_features(x), model.head.weight)
        torch.testing.assert_close(y, logits.log_softmax(1), rtol=1e-5, atol=1e-5)
    assert model.head.bias is None
    model.reset_classifier(4)
    assert model.head.bias is None and model(x).shape == (2, 4, 9)


def test_a_line_is_a_map_of_height_one():
    line, flat = small(mask_padding=True), small(ndim=2, mask_padding=True)
    state = {
        k: F.pad(v[:, :, None], (0, 0, 2, 2)) if "depthwise.weight" in k else v for k, v in line.state_dict().items()
    }
    state = {k: v.unsqueeze(2) if v.ndim == 3 else v for k, v in state.items()}
    flat.load_state_dict(state)
    x, lengths = torch.randn(2, 12, 15), torch.tensor([15, 6])
    with torch.no_grad():
        wide = flat(x[:, :, None], lengths=torch.stack([torch.ones_like(lengths), lengths], 1))
        assert error(wide[:, :, 0], line(x, lengths=lengths)) <= 1e-6


def test_masked_keys_get_no_weight_and_autocast_stays_finite():
    for name, options in ((FORMS[0], {}), (FORMS[1], dict(mask_padding=True))):
        model = small(name, **options)
        x, lengths = torch.randn(2, model.in_chans, 60), torch.tensor([60, 15])
        frames = int(model.output_lengths(lengths)[1])
        with torch.no_grad():
            with record_attention() as seen:
                full = model(x, lengths=lengths)
            assert len(seen) == 2 and all(w[1, ..., frames:].max() == 0 and w[1].isfinite().all() for w in seen)
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype=dtype):
                    half = model(x, lengths=lengths)
                assert half.isfinite().all() and error(half.float(), full) <= 0.05


class WithLengths(nn.Module):
    """torch's export (2.15) cannot check the sizes of tensors that come in by ``**context``: positions instead."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lengths):
        return self.model(x, lengths=lengths)


def test_lengths_export_and_compile():
    from torch.fx.experimental import _config

    dynamic, lengths = torch.export.Dim.DYNAMIC, torch.tensor([45, 21])
    shapes = ({0: dynamic, 2: dynamic}, {0: dynamic})
    model = small("sooftware_conformer_s", mask_padding=True, depth=1)
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):
        given = (torch.randn(2, 11, 45), lengths)
        program = torch.export.export(WithLengths(model), given, dynamic_shapes=shapes).module()
        other, sizes = torch.randn(3, 11, 70), torch.tensor([31, 70, 7])
        assert error(program(other, sizes), model(other, lengths=sizes)) <= 1e-5
    model, x = small(mask_padding=True, head="pool", num_classes=5, depth=1), torch.randn(2, 12, 45)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert error(compiled(x, lengths=lengths), model(x, lengths=lengths)) <= 1e-5


def test_dropout_acts_in_training_alone():
    model, x = small(dropout=0.3), torch.randn(2, 12, 9)
    with torch.no_grad():
        assert torch.equal(model(x), small()(x)) and not torch.equal(model.train()(x), model(x))
    layer = model.stages[0].blocks[0]
    assert [m.p for m in (layer.drop, layer.ffn1.drop, layer.ffn2.mlp.middle)] == [0.3] * 3
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        small(dropout=1)


def test_published_configurations():
    with torch.device("meta"):
        models = {n: vertebra.create_model(n) for n in vertebra.list_models(family="speech_conformer")}
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
    assert counts["torchaudio_conformer_s"] == 7_771_392 and counts["sooftware_conformer_s"] == 8_831_808
    for name, model in models.items():
        dim, depth, heads = {"s": (144, 16, 4), "m": (256, 16, 4), "l": (512, 17, 8)}[name[-1]]
        layer = model.stages[0].blocks[0]
        assert (model.num_features, len(model.stages), layer.attn.heads) == (dim, depth, heads)
        assert layer.conv.depthwise.kernel == (31,) and layer.ffn1.mlp.fc1.out_features == 4 * dim
        assert (layer.conv.depthwise.bias is None) == name.startswith("sooftware")
        assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-5}
        assert (model.ndim, model.in_chans) == (1, 80 if name.startswith("sooftware") else dim)
    info = vertebra.model_info("torchaudio_conformer_l")
    assert (info.published["wer_clean"], info.published["wer_other_lm"], info.weights.status) == (2.1, 3.9, "none")


def test_dense_version_gives_four_layers():
    model = small(depth=8, features_only=True)
    assert model.out_indices == (1, 3, 5, 7) and len(model(torch.randn(1, 12, 9))) == 4


def test_bad_options_are_named():
    for name, options, words in (
        ("torchaudio_conformer_s", dict(head="mean"), "frames or pool, got 'mean'"),
        ("torchaudio_conformer_s", dict(stem=False, in_chans=3), "dim=12, got 3"),
        ("torchaudio_conformer_s", dict(depth=0), "at least 1, got 0"),
        ("sooftware_conformer_s", dict(in_chans=6), "at least 7 bins, got 6"),
        ("sooftware_conformer_s", dict(ndim=2), "not at ndim=2"),
        ("sooftware_conformer_s", dict(heads=5), "do not divide into 5 heads"),
    ):
        with pytest.raises(ValueError, match=words):
            small(name, **options)
    with pytest.raises(ValueError, match="at least 7"):
        small("sooftware_conformer_s")(torch.randn(1, 11, 6))
