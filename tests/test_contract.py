"""What every family promises, driven by the registry: one small variant each, at ranks 1, 2 and 3."""

from __future__ import annotations

import copy

import pytest
import torch

import vertebra
from vertebra.backbone import build
from vertebra.registry import _find

# The smallest variant of each family, cut to a few blocks so that three ranks of everything take seconds.
SMALL: dict[str, tuple[str, dict]] = {
    "mlp_mixer": ("mixer_s16_224", dict(dim=48, depth=4, img_size=64)),
    "t2t_vit": ("t2t_vit_7", dict(dim=48, depth=4, heads=3)),
    "ceit": ("ceit_tiny_patch16_224", dict(dim=48, depth=4, heads=3)),
    "crossformer": ("crossformer_pp_small", dict(dim=32, depths=(1, 1, 4, 1), heads=(2, 2, 4, 4))),
    "gcvit": (
        "gc_vit_small",
        dict(dim=16, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), layer_scale=0.5, window=(2, 2, 4, 2)),
    ),
    "maxvit": ("maxvit_tiny_tf_224", dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1), stem=8, window=2)),
    "swin": ("swin_tiny_patch4_window7_224", dict(dim=24, depths=(2, 1, 2, 1), heads=(2, 2, 4, 4))),
    "vit": ("vit_tiny_patch16_224", dict(dim=48, depth=4, heads=3)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(dim=48, depth=4, heads=3)),
    "pvt": ("pvt_v2_b0", dict(dims=(16, 32, 40, 64), depths=(1, 1, 2, 1))),
    "resnet": ("resnet18", dict(layers=(1, 1, 1, 1))),
    "repvgg": ("repvgg_a0", dict(blocks=(1, 1, 2, 1), widths=(16, 16, 32, 48, 64))),
    "lightvit": ("lightvit_tiny", dict(dims=(32, 32, 64), depths=(1, 1, 2), heads=(1, 1, 2))),
    "biformer": ("biformer_tiny", dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1))),
    "svit": (
        "svit_base",
        dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), scales=(None, None, 0.5, 0.5)),
    ),
    "dualtoken_vit": ("dualtoken_vit_mini", dict(dims=(32, 32, 64), depths=(1, 1, 2), heads=(1, 1, 2))),
    "dilateformer": ("dilateformer_tiny", dict(dim=24, depths=(1, 1, 1, 1), heads=(3, 3, 3, 3))),
    "dat": ("dat_tiny", dict(dims=(16, 32, 48, 64), depths=(2, 1, 2, 1), heads=(2, 2, 3, 4), groups=(1, 1, 3, 2))),
    "crossvit": ("crossvit_9_dagger_224", dict(dims=(24, 32), depths=(1, 2), heads=2, img_size=32)),
    "twins": ("twins_svt_small", dict(dims=(16, 32, 40, 64), depths=(2, 1, 2, 1), heads=(1, 2, 2, 4))),
    "shunted": ("shunted_t", dict(dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), heads=(2, 4, 4, 8))),
    "dual_vit": ("dualvit_s", dict(stem=8, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))),
    "cf_vit": ("cf_deit_small", dict(dim=32, depth=4, heads=2, img_size=64)),
    "agent_attention": (
        "agent_swin_tiny",
        dict(dim=24, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), agent_blocks=(1, 1, 1, 0), window=2, img_size=64),
    ),
    "cvt": ("cvt_13", dict(dims=(16, 48, 64), depths=(1, 1, 2), heads=(1, 3, 4))),
    "focal_transformer": (
        "focal_tiny_patch4_window7_224",
        dict(dim=24, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=3, expand=1, focals=(3, 3, 3, 1)),
    ),
    "msg_transformer": ("msg_tiny_p4_win7_224", dict(dim=32, depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), window=3)),
    "mobilenet_v2": ("mobilenet_v2_w0_35", {}),
    "mobilevit": ("mobilevit_xx_small", dict(dims=(8, 16, 24, 24, 32), widths=(16, 16, 24), depths=(1, 1, 1), stem=8)),
    "separable_attention": ("mobilevitv2_050", dict(width=0.25, depths=(1, 1, 1))),
    "shufflenet": ("shufflenet_v1_x0_5_g3", dict(stem=6, dims=(24, 48, 96))),
    "metaformer": ("caformer_s18", dict(dims=(16, 24, 32, 64), depths=(1, 1, 2, 1))),
    "convnext": ("convnext_tiny", dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))),
    "inception_transformer": (
        "iformer_small",
        dict(
            dims=(16, 24, 32, 40),
            depths=(1, 1, 2, 1),
            heads=(2, 3, 4, 5),
            low_heads=((1,), (1,), (2, 3), (4,)),
            img_size=64,
            layer_scales=(None, None, 0.5, 0.5),
        ),
    ),
    "scopevit": ("scopevit_tiny", dict(dims=(8, 16, 32, 64), depths=(1, 1, 2, 1), layer_scale=0.5, dilation=3)),
    "inception_next": ("inceptionnext_tiny", dict(dims=(32, 32, 40, 48), depths=(1, 1, 2, 1))),
    "conv2former": ("conv2former_t", dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1), kernel=5)),
    "smt": ("smt_tiny", dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), heads=(4, 4, 3, 4))),
    "transnext": ("transnext_micro", dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))),
    "edgevit": ("edgevit_xxs", dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))),
    "fastvit": ("fastvit_sa12", dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), layer_scale=0.5)),
    "cmt": (
        "cmt_ti",
        dict(stem=8, dims=(16, 24, 32, 40), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), img_size=64),
    ),
    "unireplknet": (
        "unireplknet_t",
        dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1), kernels=((3,), (7,), (7, 3), (7,))),
    ),
    "repnext": ("repnext_m0", dict(dim=16, depths=(1, 1, 2, 1))),
    "cloformer": (
        "cloformer_xxs",
        dict(dims=(16, 24, 32, 40), depths=(2, 1, 2, 1), heads=(2, 2, 4, 4), shares=((1, 1), (1, 1), (2, 2), (1, 3))),
    ),
    "fat": ("fat_b0", dict(dims=(16, 24, 32, 40), depths=(2, 1, 2, 1), heads=(2, 2, 4, 4))),
    "stvit": ("stvit_r_swin_tiny", dict(dim=24, depths=(1, 1, 6, 1), heads=(2, 2, 4, 4), use_global=True)),
    "mobile_former": (
        "mobile_former_96m",
        dict(
            rows=(((2, 0, 8, 1), (2, 2, 12, 2)), ((2, 2, 16, 2), (3, 16)), ((2, 2, 24, 2),), ((2, 2, 32, 2), (2, 40))),
            stem=8,
            tokens=(3, 16),
            neck=32,
        ),
    ),
    "pathformer": (
        "pathformer_etth1_96",
        dict(dim=4, patches=((6, 4, 12), (8, 3, 2)), top=2, hidden=8, img_size=24),
    ),
    "speech_conformer": ("torchaudio_conformer_s", dict(dim=24, depth=4, heads=3, kernel=5, head="pool")),
    "efficientvit": (
        "efficientvit_m0",
        dict(dims=(32, 48, 64), depths=(1, 1, 2), heads=(2, 3, 4), kernels=(5, 3, 3, 3), window=4),
    ),
    "emo": ("emo_1m", dict(dims=(16, 24, 40, 42), depths=(1, 2, 2, 2), stem=8, window=4)),
    "conformer": ("conformer_tiny_patch16", dict(dims=(16, 24, 32), depths=(2, 1, 2), embed_dim=24, heads=3, stem=8)),
    "litv2": ("litv2_s", dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), alpha=0.5)),
    "glnet": ("glnet_4g", dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=16)),
    "vit_adapter": ("vit_adapter_tiny_det", dict(dim=48, depth=4, heads=3, prior=8, window=3, img_size=64)),
}
MORE = {
    "speech_conformer_sooftware": ("sooftware_conformer_s", dict(dim=24, depth=4, heads=3, kernel=5, in_chans=11)),
    "composed": (
        "composed",
        dict(
            mixers=("inception", ["window", "shunted"]),
            dims=(24, 48),
            depths=(1, 2),
            heads=(2, 4),
            channels="conv_mlp",
            position="conv",
            stem="deep",
        ),
    ),
    "vit_adapter_seg": ("vit_adapter_tiny_seg", dict(dim=48, depth=5, heads=3, prior=8, img_size=64)),
    "focal_fast": (
        "focalv2_tiny_useconv_patch4_window7_224",
        dict(dim=24, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=3, top=16),
    ),
    "agent_deit": ("agent_deit_tiny", dict(dim=48, depth=3, heads=3, agents=9, agent_blocks=2, img_size=64)),
    "agent_pvt": ("agent_pvt_tiny", dict(dims=(16, 32, 40, 64), depths=(1, 1, 2, 1), agent_blocks=(1, 1, 1, 1))),
    "agent_cswin": (
        "agent_cswin_tiny",
        dict(dim=16, depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), agent_blocks=(1, 1, 1, 0), stripes=(1, 1, 2, 2)),
    ),
    "conformer_patch32": (
        "conformer_small_patch32",
        dict(dims=(16, 24, 32), depths=(1, 1, 3), embed_dim=24, heads=3, stem=8),
    ),
    "t2t_vit_t": ("t2t_vit_t_14", dict(dim=48, depth=4, heads=3)),
    "twins_pcpvt": ("twins_pcpvt_small", dict(dims=(16, 32, 40, 64), depths=(1, 1, 2, 1))),
    "maxvit_tv": ("torchvision_maxvit_t", dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1), stem=8, window=2)),
    "cf_lvvit": ("cf_lvvit_small", dict(dim=32, depth=4, heads=2, img_size=64)),
    "stvit_swin": ("stvit_swin_tiny", dict(dim=24, depths=(1, 1, 5, 1), heads=(2, 2, 4, 4), relative_pos=True)),
    "stvit_deit": ("stvit_deit_tiny", dict(dim=48, depth=4, heads=3, keep=1)),
    "shufflenet_v2": ("shufflenet_v2_x0_5", dict(stem=8, dims=(16, 32, 64), last=64)),
    "shufflenet_megvii": ("shufflenet_v2_x0_5_megvii", dict(stem=8, dims=(16, 32, 64), last=64)),
    "fastvit_t": ("fastvit_t8", dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), layer_scale=0.5)),
    "poolformer": ("poolformer_s12", dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))),
    "randformer": ("randformer_s12", dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1), img_size=64)),
    "convnext_isotropic": ("convnext_isotropic_large", dict(dim=32, depth=4)),
    "pvt_v1": ("pvt_tiny", dict(dims=(16, 32, 40, 64), depths=(1, 1, 2, 1))),
    "separable_attention_cvnets": ("mobilevit_v2_050_cvnets", dict(width=0.25, depths=(1, 1, 1))),
    "biformer_nchw": ("biformer_stl_nchw", dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1))),
    "dat_pp": ("dat_pp_tiny", dict(dims=(8, 16, 24, 32), depths=(2, 1, 2, 1), heads=(2, 2, 3, 4), groups=(1, 2, 3, 2))),
    "mobile_former_groups": (
        "mobile_former_26m",
        dict(
            rows=(((2, 0, 8, 2), (2, 8)), ((2, 2, 16, 2), (3, 16)), ((2, 2, 24, 2),), ((2, 2, 32, 2), (2, 40))),
            stem=8,
            tokens=(3, 16),
            neck=32,
        ),
    ),
    "glnet_stl": ("glnet_stl", dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=16, learned_slots=True)),
    "glnet_tklb": ("glnet_4g_tklb", dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=16)),
}
NETS = SMALL | MORE
# Tracing takes as long as there are blocks: those that only repeat the one before are left out.
SHORT: dict[str, dict] = {
    **{net: {"depth": 2} for net in ["deit", "mlp_mixer", "speech_conformer", "t2t_vit", "vit"]},
    **{net: {"depths": (1, 1, 1)} for net in ["cvt", "dualtoken_vit", "efficientvit", "lightvit"]},
    **{net: {"depths": (2, 1, 1, 1)} for net in ["cloformer", "fat", "swin", "twins"]},
    **{
        net: {"depths": (1, 1, 1, 1)}
        for net in [
            "biformer",
            "cmt",
            "conv2former",
            "convnext",
            "dual_vit",
            "edgevit",
            "fastvit",
            "focal_transformer",
            "glnet",
            "inception_next",
            "litv2",
            "maxvit",
            "metaformer",
            "msg_transformer",
            "pvt",
            "repnext",
            "scopevit",
            "svit",
            "transnext",
        ]
    },
}
NO_DENSE = {"cf_vit", "cf_lvvit", "stvit_swin", "stvit_deit"}  # their idea leaves no dense version
ALWAYS_DENSE = {"vit_adapter", "vit_adapter_seg"}  # their idea has no head
UNPADDED = {"speech_conformer_sooftware"}  # its stem has no padding: maps are a little smaller than size / stride
ONE_SIZE = {"pathformer"}  # the weights are as long as the input


def ranks(net: str) -> tuple[int, ...]:
    """The ranks that a net exists in."""
    family, variant = _find(NETS[net][0])
    return variant.config.get("model", family.model).ndims


each = pytest.mark.parametrize("net", sorted(NETS))
# tracing is slow: further nets of a family are traced with -m parity_all only
each_traced = pytest.mark.parametrize(
    "net", [pytest.param(n, marks=[] if n in SMALL else [pytest.mark.parity_all]) for n in sorted(NETS)]
)
each_rank = pytest.mark.parametrize(("net", "ndim"), [(net, ndim) for net in sorted(NETS) for ndim in ranks(net)])
headed = pytest.mark.parametrize("net", sorted(NETS.keys() - ALWAYS_DENSE))


def make(net: str, ndim: int | None = None, seed: int = 0, **options):
    """A small model of the family, two input channels, five classes, non-trivial norms; of rank 2 where it can be."""
    name, small = NETS[net]
    ndim = ndim or min(ranks(net), key=lambda n: abs(n - 2))
    torch.manual_seed(seed)
    model = vertebra.create_model(name, ndim=ndim, **({"in_chans": 2, "num_classes": 5} | small | options))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def image(model, batch: int = 2, extra: int = 5):
    """Odd sizes a little above the smallest allowed one, different on each axis."""
    torch.manual_seed(1)
    if vertebra.model_info(model.recipe["name"]).family in ONE_SIZE:
        return torch.randn(batch, model.in_chans, model.min_size)
    first, step = (model.min_size + extra, 8) if model.ndim < 3 else (model.min_size + 1, 4)
    return torch.randn(batch, model.in_chans, *(first + step * i for i in range(model.ndim)))


def flat(y) -> torch.Tensor:
    """Logits, another prediction or a list of maps as (B, numbers)."""
    return torch.cat([t.flatten(1) for t in (y if isinstance(y, list) else [y])], 1)


def error(a, b) -> float:
    if isinstance(a, list):
        return max(error(x, y) for x, y in zip(a, b, strict=True))
    return ((a - b).abs().max() / b.abs().max()).item()


def test_every_family_is_tested():
    assert set(SMALL) == set(vertebra.list_families())


@each_rank
def test_forward_backward_reaches_every_parameter(net, ndim):
    model = make(net, ndim)
    y = model(image(model))
    if model.prediction == "logits" and not model.features_only:
        assert y.shape == (2, 5)
    flat(y).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]  # not T2T-ViT's stored tables
    dead = [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()]
    # a map of one cell leaves relative positions other than zero without gradient, but still with a tensor of zeros
    assert dead == []


@each_rank
def test_head_of_features_is_forward(net, ndim):
    if net in ALWAYS_DENSE:
        with pytest.raises(ValueError, match="no head"):
            make(net, ndim).forward_features(image(make(net, ndim)))
        return
    model = make(net, ndim).eval()
    x = image(model)
    with torch.no_grad():
        features = model.forward_features(x)
        logits = model(x)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.forward_outputs(x)[model.prediction], logits)
        pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape[0] == 2 and (pooled.ndim == 2 or model.prediction != "logits")
    first = features[0] if isinstance(features, tuple) else features
    if model.tokens:
        assert first.ndim == 3 and first.shape[2] == model.num_features
    else:
        assert first.ndim == ndim + 2 and first.shape[1] == model.num_features


@each_rank
def test_maps_have_the_promised_channels_and_strides(net, ndim):
    if net in NO_DENSE:
        with pytest.raises(ValueError, match="no dense version"):
            make(net, ndim, features_only=True)
        return
    model = make(net, ndim, features_only=True).eval()
    side = 2 * model.min_size
    x = torch.randn(1, model.in_chans, *(side for _ in range(ndim))) if net not in ONE_SIZE else image(model, batch=1)
    with torch.no_grad():
        maps = model(x)
    assert len(maps) == len(model.out_indices)
    for x_map, index in zip(maps, model.out_indices, strict=True):
        info = model.feature_info[index]
        cells = tuple((s - 3 * (net in UNPADDED)) // info["reduction"] for s in x.shape[2:])
        assert x_map.shape == (1, info["num_chs"], *cells)
        assert model.get_submodule(info["module"]) is model.stages[index]


@each_rank
def test_smallest_and_odd_sizes(net, ndim):
    model = make(net, ndim).eval()
    least, chans = model.min_size, model.in_chans
    with torch.no_grad():
        assert flat(model(torch.randn(1, chans, *(least,) * ndim))).isfinite().all()
        if net not in ONE_SIZE:
            odd = torch.randn(1, chans, *(least + 2 * i + 1 for i in range(ndim)))
            assert flat(model(odd)).isfinite().all()
    for shape, words in (
        ((1, chans, *(least - 1,) * ndim), "too small"),
        ((1, chans + 1, *(least,) * ndim), f"{chans + 1} channels"),
        ((1, chans, *(least,) * (ndim % 3 + 1)), f"ndim={ndim}"),
    ):
        with pytest.raises(ValueError, match=words):
            model(torch.randn(shape))


@each
def test_a_sample_does_not_depend_on_its_batch(net):
    model = make(net).eval()
    x = image(model, batch=3)
    with torch.no_grad():
        assert error(flat(model(x))[1:2], flat(model(x[1:2]))) <= 1e-5


@each
def test_every_other_rank_is_refused(net):
    for ndim in {1, 2, 3} - set(ranks(net)):
        with pytest.raises(ValueError, match=f"not at ndim={ndim}"):
            make(net, ndim)


@each
def test_intermediates_agree_with_features_only_weights(net):
    model = make(net).eval()
    x = image(model)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert len(maps) == len(model.feature_info)
        some = model.forward_intermediates(x, [0, -1])
        assert torch.equal(some[0], maps[0]) and torch.equal(some[1], maps[-1])
        assert torch.equal(model.forward_intermediates(x, 1)[0], maps[-1])
    with pytest.raises(ValueError, match="indices"):
        model.forward_intermediates(x, [99])


@headed
def test_classification_weights_load_into_the_dense_version(net):
    if net in NO_DENSE:
        with pytest.raises(ValueError, match="no dense version"):
            make(net, features_only=True)
        return
    model, dense = make(net), make(net, seed=1, features_only=True)
    report = vertebra.load_checkpoint(dense, model.state_dict())
    ours, theirs = dense.state_dict(), model.state_dict()
    shared = ours.keys() & theirs.keys()
    assert shared and all(torch.equal(ours[k], theirs[k]) for k in shared)
    assert not report.missing and not report.unexpected
    assert {k for k in report.unused if not k.endswith("num_batches_tracked")} == {
        k for k in theirs.keys() - ours.keys() if not k.endswith("num_batches_tracked")
    }


@each
def test_classifier_can_be_reset_and_left_out(net):
    model = make(net).eval()
    if net in ALWAYS_DENSE:
        with pytest.raises(ValueError, match="no classifier"):
            model.reset_classifier(7)
        return
    x = image(model)
    model.reset_classifier(7)
    y = model(x)  # a prediction may have an axis of frames behind it, or of variables before
    assert y.shape[0] == 2 and 7 in (y.shape[1], y.shape[-1]) and model.num_classes == 7
    headless = make(net, num_classes=0).eval()
    pooled = headless(x)
    assert torch.equal(pooled, headless.forward_head(headless.forward_features(x), pre_logits=True))
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


@each
def test_gradient_checkpointing_changes_nothing(net):
    plain = make(net).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    x = image(plain)
    for model in (plain, saving):
        torch.manual_seed(3)
        flat(model(x)).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6 * p.grad.abs().max().item() + 1e-12), name
    for (name, b), c in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(b, c), name


@each
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter(net, coarse):
    from timm.models._manipulate import group_with_matcher

    model = make(net)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(coarse), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    first = next(n for n, _ in model.named_parameters() if not n.startswith(("stages", "norm", "head", "neck")))
    assert groups[first] == 0
    if net not in ALWAYS_DENSE:
        assert {group for n, group in groups.items() if n.startswith(model.heads)} == {max(groups.values())}


@each
def test_no_weight_decay_names_exist(net):
    model = make(net)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


@each
def test_state_dict_round_trips_through_official_names(net, tmp_path):
    model, other = make(net).eval(), make(net, seed=1).eval()
    vertebra.load_checkpoint(other, vertebra.to_official(model))
    x = image(model)
    with torch.no_grad():
        assert torch.equal(flat(model(x)), flat(other(x)))
    vertebra.save_checkpoint(model, tmp_path / "m.safetensors")
    third = make(net, seed=2).eval()
    vertebra.load_checkpoint(third, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(flat(model(x)), flat(third(x)))


@each_rank
def test_fusing_keeps_the_outputs(net, ndim):
    model = make(net, ndim)
    with torch.no_grad():
        model.train()(image(model))  # statistics that are not the initial ones
    with pytest.raises(ValueError, match="training mode"):
        vertebra.fuse(model)
    model.eval()
    x = image(model)
    with torch.no_grad():
        before = model(x)
        for published in (True, False):
            fused = vertebra.fuse(model, published=published)
            assert error(fused(x), before) <= 1e-5
            if ndim == min(ranks(net)):  # copying is what takes time here, and which modules fold has no rank
                again, once = vertebra.fuse(fused, published=published).state_dict(), fused.state_dict()
                assert again.keys() == once.keys() and all(torch.equal(again[k], once[k]) for k in once)
        assert torch.equal(flat(model(x)), flat(before))


@each
def test_meta_construction_names_the_same_tensors(net):
    model = make(net)
    twin = build(model.recipe, "meta")
    assert all(t.is_meta for t in twin.state_dict().values())
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@each
def test_autocast_is_finite_and_close(net):
    model = make(net).eval()
    x = image(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = flat(model(x)).float()
    with torch.no_grad():
        full = flat(model(x))
    assert half.isfinite().all()
    assert error(half, full) <= 0.05  # bf16 keeps 8 bits; a NaN or a dropped mask is far outside


@each_traced
def test_exports_with_dynamic_batch_and_sizes(net):
    from torch.fx.experimental import _config

    model = make(net, **SHORT.get(net, {})).eval()
    least, ndim = model.min_size, model.ndim
    dims = {0: torch.export.Dim.DYNAMIC}
    # sizes at which every stage has several cells and windows: a program holds within one such regime
    sides, more = ([17, 19, 18], 3) if least <= 16 else ([9, 10, 9], 3)
    shape = [side * least + more * (i % 2) for i, side in enumerate(sides[:ndim])]
    other = [side + least + (least - 1) * (i % 2) for i, side in enumerate(shape)]
    if net in ONE_SIZE:
        shape = other = [least]
    else:
        dims |= dict.fromkeys(range(2, 2 + ndim), torch.export.Dim.DYNAMIC)
    x = torch.randn(2, model.in_chans, *shape)
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (x,), dynamic_shapes=(dims,)).module()
        for size in (shape, other):
            y = torch.randn(3, model.in_chans, *size)
            assert error(program(y), model(y)) <= 1e-5


class Compiled:
    """`model` compiled in one graph by a backend that runs the graph as it is, and counts the graphs."""

    def __init__(self, model):
        torch._dynamo.reset()
        self.graphs = 0
        self.model = torch.compile(model, backend=self.backend, fullgraph=True)

    def backend(self, graph, inputs):
        self.graphs += 1
        return graph

    def __call__(self, x):
        return self.model(x)


@each_traced
def test_compiles_without_a_graph_break(net):
    model = make(net, **SHORT.get(net, {})).eval()
    compiled, x = Compiled(model), image(model)
    with torch.no_grad():
        assert error(compiled(x), model(x)) <= 1e-5
    assert compiled.graphs == 1


# A graph for any size takes several times as long to trace as one for one size: a few kinds of nets, and what there is
# of training and of dense versions; with -m parity_all every net.
EVERY = sorted(NETS.keys() - ONE_SIZE)


def slow(*values):
    return pytest.param(*values, marks=[pytest.mark.parity_all])


@pytest.mark.parametrize(
    ("net", "graphs", "dense"),
    [("crossvit", 2, False), ("deit", 2, False), ("convnext", 2, True)]
    + [slow(net, 3, False) for net in EVERY]
    + [slow(net, 3, True) for net in EVERY if net not in NO_DENSE],
)
def test_two_recompilations_over_three_sizes_at_most(net, graphs, dense):
    model = make(net, **({"features_only": True} if dense else {}), **SHORT.get(net, {})).eval()
    compiled = Compiled(model)
    with torch.no_grad():
        for batch, extra in ((2, 5), (3, 12), (2, 19)):
            x = image(model, batch, extra)
            assert error(compiled(x), model(x)) <= 1e-5
    assert 2 <= compiled.graphs <= graphs


@pytest.mark.parametrize(("net", "graphs"), [("resnet", 2), ("vit", 2)] + [slow(net, 3) for net in EVERY])
def test_two_recompilations_in_training_at_most(net, graphs):
    # float64: in float32 a gradient of 1e-7, what sums leave of much larger parts, is rounding in either program. Some
    # are zero by nature, as of a bias in front of a batch norm: they are known to the last digits of the largest one
    model = make(net, **SHORT.get(net, {})).train().double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0  # a program of any size draws for places that are only padding too (ScopeViT's offsets)
    plain = copy.deepcopy(model)
    compiled = Compiled(model)
    for batch, extra in ((2, 5), (3, 12), (2, 19)):
        x = image(model, batch, extra).double()
        outputs = []
        for call in (compiled, plain):
            torch.manual_seed(3)
            outputs.append(flat(call(x)))
            outputs[-1].square().sum().backward()
        assert error(*outputs) <= 1e-5
    largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if p.requires_grad:
            floor = max(1e-5 * q[1].grad.abs().max().item(), 1e-13 * largest)
            assert torch.allclose(p.grad, q[1].grad, rtol=1e-4, atol=floor), name
    assert 2 <= compiled.graphs <= graphs


@pytest.mark.parametrize("name", vertebra.list_models())
def test_published_parameter_counts(name):
    info = vertebra.model_info(name)
    with torch.device("meta"):
        model = vertebra.create_model(name)
    measured = sum(p.numel() for p in model.parameters()) / 1e6
    published = info.published["params_m"]
    # papers print one decimal or whole millions, and some truncate: within one unit of the last printed digit
    digits = len(str(published).partition(".")[2])
    unit = 10.0 ** -(digits if "." in str(published) else 0)
    assert abs(measured - published) <= unit, f"{measured:.4f} M measured, {published} M published"


# MSG-Transformer writes messengers into windows, which a concatenation would copy too; RepNeXt pads its kernels
@pytest.mark.parametrize("net", sorted(set(EVERY) - {"msg_transformer", "repnext"}))
def test_nothing_is_written_into_views_in_training(net):
    """Autograd would copy the whole gradient of such a map."""
    model = make(net, **SHORT.get(net, {})).train()
    waiting, seen = [flat(model(image(model))).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    assert not [node for node in seen if "CopySlices" in node.name()]
