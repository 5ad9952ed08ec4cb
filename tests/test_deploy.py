"""vertebra.deploy: the same outputs and contract from packed weights, every family, files that come back, errors."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import vertebra
from test_contract import NETS, image, make, ranks
from vertebra.deploy.deploying import _prepared, _tensors
from vertebra.deploy.packing import PackedConv, PackedLinear, pack
from vertebra.layers import Conv, DynamicPositionBias, kernels
from vertebra.layers.conv import ConvNorm
from vertebra.layers.kernels import activation, plus

ROUTED = {"biformer", "biformer_nchw"}  # a last bit of bfloat16 sends a cell elsewhere
ACTS = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(0.2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def pack_all(monkeypatch):
    """However small a product is: the nets here are."""
    monkeypatch.setattr(kernels, "SMALL", 0)


def error(y, x) -> float:
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(_tensors(y), _tensors(x)))


@pytest.mark.parametrize("act", ACTS, ids=repr)
@pytest.mark.parametrize("layer", ["linear", "conv1", "conv2", "conv3", "depthwise", "pointwise", "sampled"])
def test_a_packed_layer_is_the_layer(layer, act):
    torch.manual_seed(0)
    build = {
        "linear": (lambda: nn.Linear(24, 32), (2, 5, 24)),
        "conv1": (lambda: Conv(1, 24, 32, 3, 2), (2, 9, 24)),
        "conv2": (lambda: Conv(2, 24, 32, (3, 5), 2, bias=False), (2, 9, 8, 24)),
        "conv3": (lambda: Conv(3, 24, 32, 3), (1, 4, 5, 6, 24)),
        "depthwise": (lambda: Conv(2, 24, 24, 5, groups=24, dilation=2), (2, 9, 8, 24)),
        "pointwise": (lambda: Conv(2, 24, 32), (2, 9, 8, 24)),
        "patches": (lambda: Conv(2, 3, 720, 22, 22, 0), (2, 45, 44, 3)),
        "sampled": (lambda: Conv(2, 24, 32, stride=2), (2, 9, 8, 24)),
    }[layer]
    plain, x = build[0](), torch.randn(build[1])
    net = nn.Sequential(plain, act).eval().requires_grad_(False)
    packed = copy.deepcopy(net)
    assert pack(packed) == 1
    assert isinstance(packed[0], PackedLinear if layer == "linear" else PackedConv)
    assert isinstance(packed[1], nn.Identity) or activation(act) is None
    assert list(packed.state_dict()) == list(net.state_dict())
    want = act(plain(x))
    assert error(packed(x), want) <= 1e-5
    assert packed(x).shape == want.shape and len(packed[0]._packed) == 1
    assert error(packed(torch.cat([x, x])), torch.cat([want, want])) <= 1e-5  # packed for another batch
    half = copy.deepcopy(packed).bfloat16()
    assert error(half(x.bfloat16()), want) <= 0.02 and len(half[0]._packed) == kernels.present(torch.bfloat16)

    shortcut = torch.randn_like(want)
    summed = act(plain(x) + shortcut)
    after = packed[1]  # the activation, where oneDNN has none of this kind
    assert error(after(packed[0](x, shortcut=shortcut)), summed) <= 1e-5
    assert error(after(packed[0](x, shortcut=shortcut.mT.contiguous().mT)), summed) <= 1e-5  # as it lies in memory
    assert error(after(half[0](x.bfloat16(), shortcut=shortcut.bfloat16())), summed) <= 0.02
    assert error(packed[0](x, act, shortcut), summed) <= 1e-5


def test_a_changed_weight_is_packed_anew():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
    pack(net)
    x = torch.randn(3, 8)
    net(x)
    for change in (
        lambda: net[0].weight.mul_(2),
        lambda: net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}),
        lambda: setattr(net[0], "weight", nn.Parameter(torch.randn(8, 8), requires_grad=False)),
        lambda: net.double(),
        lambda: net.float(),
    ):
        change()
        layer, y = net[0], x.to(net[0].weight.dtype)
        assert error(net(y), F.relu(F.linear(y, layer.weight, layer.bias))) <= 1e-5


@pytest.mark.parametrize("layer", [nn.Linear(16, 32), Conv(2, 16, 32, 3), Conv(2, 16, 32)])
def test_a_small_product_in_float32_is_the_plain_one(layer, monkeypatch):
    layer = copy.deepcopy(layer).requires_grad_(False)
    plain, x = copy.deepcopy(layer), torch.randn(1, 4, 5, 16)
    pack(nn.ModuleList([layer]))
    products = x.numel() * layer.weight.numel() // 16
    monkeypatch.setattr(kernels, "SMALL", products + 1)
    assert torch.equal(layer(x), plain(x)) and not layer._packed
    assert error(layer(x, shortcut=plain(x)), 2 * plain(x)) == 0
    layer.bfloat16()(x.bfloat16())
    assert bool(layer._packed) == kernels.present(torch.bfloat16)
    monkeypatch.setattr(kernels, "SMALL", products)
    assert error(layer.float()(x), plain.bfloat16().float()(x)) <= 1e-5 and layer._packed


def test_a_packed_layer_steps_aside():
    """Where a gradient is wanted, under autocast and for another dtype the plain layer runs, with its activation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    packed = copy.deepcopy(net)
    pack(packed)
    x = torch.randn(3, 8, requires_grad=True)
    got, want = (torch.autograd.grad(n(x).sum(), [x, n[0].weight]) for n in (packed, net))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed(x), net(x))
    twin = pickle.loads(pickle.dumps(packed))
    assert torch.equal(twin(x), net(x))
    assert packed(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_shortcut_is_added_before_the_activation(kernel, act):
    torch.manual_seed(0)
    conv = ConvNorm(2, 8, 8, kernel, act=act)
    x, shortcut = torch.randn(2, 6, 5, 8), torch.randn(2, 6, 5, 8)
    conv(x)  # statistics that are not those of a fresh norm
    conv.eval().requires_grad_(False)
    want = (act or nn.Identity)()(conv.norm(conv.conv(x)) + shortcut)
    assert error(conv(x, shortcut), want) <= 1e-6
    folded = conv.fuse(published=False)
    assert error(folded(x, shortcut), want) <= 1e-5
    pack(folded)
    assert folded.sums == conv.sums == (act is None)
    assert error(folded(x, shortcut), want) <= 1e-5
    assert error(plus(folded, x, shortcut), folded(x) + shortcut) <= 1e-6
    seen = []
    folded.register_forward_hook(lambda module, args, y: seen.append(y))
    assert error(plus(folded, x, shortcut), folded(x) + shortcut) <= 1e-6
    assert error(seen[0], folded(x)) == 0  # who watches the layer sees its own output


# every rank of every net with -m parity_all; without, rank 2 and below a few others
each_place = [
    pytest.param(net, ndim, marks=[] if ndim == 2 or len(ranks(net)) == 1 else [pytest.mark.parity_all])
    for net in sorted(NETS)
    for ndim in ranks(net)
]


@pytest.mark.parametrize(("net", "ndim"), each_place)
def test_every_family_deploys(net, ndim):
    model = make(net, ndim).eval()
    x = image(model, batch=1)
    with torch.inference_mode():
        before = model(x)
        ready, packed = _prepared(model, "float32")
        assert packed > 0
        for _ in range(2):  # at first tables are made and weights packed, then both are used
            assert error(ready(x), before) <= 1e-5
        half, _ = _prepared(model, "bfloat16")
        assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in _tensors(half(x)))
        assert error(half(x), before) <= (0.2 if net in ROUTED else 0.05)


@pytest.mark.parametrize("net", ["swin", "crossformer", "mobilenet_v2", "smt", "fastvit"])
@pytest.mark.parametrize("ndim", [1, 3])
def test_other_ranks_deploy(net, ndim):
    model = make(net, ndim).eval()
    x = image(model, batch=1)
    with torch.inference_mode():
        assert error(_prepared(model, "float32")[0](x), model(x)) <= 1e-5


def test_tables_are_kept_once_deployed_only():
    torch.manual_seed(0)
    position = DynamicPositionBias(2, 32, 2).eval().requires_grad_(False)
    assert position((3, 3)) is not position((3, 3))
    position.kept = {}
    assert position((3, 3)) is position((3, 3)) and not position((3, 3)).is_inference()
    first = position((3, 3))
    position.pos3[2].weight.mul_(2)
    assert not torch.equal(position((3, 3)), first)
    for size in itertools.product(range(1, 6), repeat=2):
        position(size)
    assert len(position.kept) == 4
    assert position.double()((3, 3)).dtype == torch.float64


def test_the_contract_stays(tmp_path):
    model = make("swin").eval()
    ready = vertebra.deploy(model, sizes=[48, (40, 33)])
    x = image(model)
    assert ready.deploy_report.sizes == ((48, 48), (40, 33)) and ready.deploy_report.samples == 32
    assert ready.deploy_report.error <= 1e-5 and ready.deploy_report.agreement == 1.0
    with torch.no_grad():
        for a, b in zip(ready.forward_intermediates(x), model.forward_intermediates(x)):
            assert a.shape == b.shape and error(a, b) <= 1e-5
        assert error(ready.forward_head(ready.forward_features(x)), model(x)) <= 1e-5
        assert not any(p.requires_grad for p in ready.parameters())
        ready.reset_classifier(3)
        assert ready(x).shape == (2, 3)
    assert model.deploy_report is None and type(model.head) is nn.Linear  # the model itself is left alone


def test_reports_measure_the_drift():
    model = make("vit").eval()
    x = torch.randn(6, 2, 64, 64)
    ready = vertebra.deploy(model, "bfloat16", samples=x)
    with torch.inference_mode():
        a, b = model(x), ready(x)
    report = ready.deploy_report
    assert report.samples == 6 and report.sizes == ((64, 64),) and report.precision == "bfloat16"
    assert report.agreement == (a.argmax(1) == b.argmax(1)).float().mean().item()
    assert 0 < report.error <= 0.05
    assert report.packed == sum(isinstance(m, PackedLinear | PackedConv) for m in ready.modules())
    assert "bfloat16" in str(report) and f"{report.error:.1e}" in str(report)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_files_come_back_whole(tmp_path, precision):
    model = make("fastvit_t").eval()
    ready = vertebra.deploy(model, precision, sizes=[48])
    path = tmp_path / "ready.safetensors"
    vertebra.save_deployed(ready, path)
    back = vertebra.load_deployed(path)
    x = image(model)
    with torch.inference_mode():
        assert torch.equal(back(x), ready(x))
    assert back.deploy_report == ready.deploy_report
    assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in ready.state_dict().items()}


def test_files_that_are_not_what_they_say(tmp_path):
    model = make("vit").eval()
    path, good = tmp_path / "x.safetensors", tmp_path / "good.safetensors"
    with pytest.raises(ValueError, match=r"what vertebra\.deploy returned"):
        vertebra.save_deployed(model, path)
    assert not path.exists()
    vertebra.save_deployed(vertebra.deploy(model, sizes=[64]), good)
    path.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(vertebra.CheckpointError, match=r"x\.safetensors"):
        vertebra.load_deployed(path)
    vertebra.save_checkpoint(model, path)
    with pytest.raises(vertebra.CheckpointError, match="holds no deployed model"):
        vertebra.load_deployed(path)
    with pytest.raises(vertebra.CheckpointError, match="cannot be read"):
        vertebra.load_deployed(tmp_path / "none")
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    report = {"precision": "float32", "compiled": False, "packed": 1, "sizes": [[64, 64]], "samples": 1}
    report |= {"error": 0.0, "agreement": None}
    for facts in (
        {"name": "nothing", "options": {}, "report": report},
        {"name": "vit_tiny_patch16_224", "options": {"checkpoint": "/etc/passwd"}, "report": report},
        {"name": "vit_tiny_patch16_224", "options": {"depth": 1}, "report": report},
        {"name": "vit_tiny_patch16_224", "options": {}, "report": {}},
        {"name": "vit_tiny_patch16_224", "options": {}, "report": report | {"precision": "int8"}},
        [],
    ):
        save_file(state, path, {"format": "vertebra deployed model 1", "model": json.dumps(facts)})
        with pytest.raises(vertebra.CheckpointError, match="does not hold the deployed model"):
            vertebra.load_deployed(path)


def test_wrong_requests():
    model = make("vit")
    with pytest.raises(ValueError, match="training mode"):
        vertebra.deploy(model)
    with pytest.raises(ValueError, match="'int8' is unknown; use float32 or bfloat16"):
        vertebra.deploy(model.eval(), "int8")
    with pytest.raises(ValueError, match="too small"):
        vertebra.deploy(model, sizes=[3])
    with pytest.raises(ValueError, match="2 are needed"):
        vertebra.deploy(model, sizes=[(32, 32, 32)])
    with pytest.raises(ValueError, match="takes the float32 model"):
        vertebra.deploy(copy.deepcopy(model).bfloat16())


def test_segmenters_deploy():
    torch.manual_seed(0)
    small = dict(dims=(16, 32, 40, 64), depths=(1, 1, 1, 1))
    model = vertebra.segmentation("pvt_v2_b0", head="segformer", num_classes=3, head_options={"channels": 16}, **small)
    model = model.eval()
    ready = vertebra.deploy(model, "bfloat16", sizes=[(64, 48)])
    x = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        assert error(ready(x), model(x)) <= 0.05
    assert 0.8 <= ready.deploy_report.agreement <= 1  # of cells
    assert vertebra.deploy(model, sizes=[(64, 48)]).deploy_report.error <= 1e-5
