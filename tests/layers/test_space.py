"""Rank-dependent primitives against torch's channels-first calls: values, gradients, memory."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vertebra.layers import (
    BatchNorm,
    Conv,
    ConvTranspose,
    GroupNorm,
    OneGroup,
    adaptive_avg_pool,
    avg_pool,
    crop,
    grid_sample,
    max_pool,
    ntuple,
    pad_to,
    resize,
    space,
    space_to_depth,
    windows,
)
from vertebra.layers.space import _cubic, channels_first, channels_last

RANKS = (1, 2, 3)
SIDES = {1: (13,), 2: (9, 11), 3: (7, 6, 9)}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

torch.set_num_threads(1)


def first(x):
    return x.movedim(-1, 1)


def last(x):
    return x.movedim(1, -1)


def field(ndim, dim=4, batch=2, sides=None, seed=0):
    """A float64 map (B, *S, C)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *(sides or SIDES[ndim]), dim, generator=generator, dtype=torch.float64)


def same(ours, theirs, *leaves, tolerance=1e-11):
    """Equal values, and equal gradients of a fixed random functional with respect to every leaf."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(7))
    got = torch.autograd.grad((ours * weight).sum(), leaves)
    want = torch.autograd.grad((theirs * weight).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "dense": dict(kernel=3, padding=1),
    "grouped": dict(kernel=3, groups=2, padding=1),
    "depthwise": dict(kernel=5, groups=4, padding=2),
    "dilated": dict(kernel=3, dilation=2, padding=2),
    "strided": dict(kernel=3, stride=2, padding=1),
    "patches": dict(kernel=4, stride=4, padding=0),
    "pointwise": dict(kernel=1, padding=0),
    "pointwise strided": dict(kernel=1, stride=2, padding=0),
    "pointwise padded": dict(kernel=1, padding=1),
    "pointwise grouped": dict(kernel=1, groups=2, padding=0),
    "no bias": dict(kernel=3, padding=1, bias=False),
}


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_conv(ndim, case):
    options = CASES[case]
    layer = Conv(ndim, 4, 8, **options).double()
    x = field(ndim).requires_grad_()
    reference = CONV[ndim](
        first(x), layer.weight, layer.bias, options.get("stride", 1), options["padding"],
        options.get("dilation", 1), options.get("groups", 1),
    )  # fmt: skip
    same(layer(x), last(reference), x, *layer.parameters())
    assert layer.weight.shape == (8, 4 // options.get("groups", 1), *(options["kernel"],) * ndim)


@pytest.mark.parametrize("ndim", (2, 3))
def test_conv_takes_one_number_per_axis(ndim):
    kernel, stride, padding, dilation = (3, 5, 1)[:ndim], (1, 2, 3)[:ndim], (2, 1, 0)[:ndim], (2, 1, 1)[:ndim]
    layer = Conv(ndim, 4, 6, kernel, stride, padding, dilation).double()
    x = field(ndim).requires_grad_()
    reference = CONV[ndim](first(x), layer.weight, layer.bias, stride, padding, dilation)
    same(layer(x), last(reference), x, *layer.parameters())


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (7, 1), (3, 3), (1, 1)])
def test_conv_keeps_the_size_by_default(ndim, kernel, dilation):
    x = field(ndim)
    assert Conv(ndim, 4, 2, kernel, dilation=dilation).double()(x).shape == (*x.shape[:-1], 2)


@pytest.mark.parametrize("ndim", RANKS)
def test_conv_starts_as_torch_does(ndim):
    torch.manual_seed(3)
    ours = Conv(ndim, 6, 8, 3, groups=2)
    torch.manual_seed(3)
    theirs = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim](6, 8, 3, groups=2)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_conv_refuses_channels_that_do_not_divide():
    for dim, out in ((6, 8), (8, 6)):
        with pytest.raises(ValueError, match=rf"channels {dim} -> {out} do not divide into 4 groups"):
            Conv(2, dim, out, 3, groups=4)
    with pytest.raises(ValueError, match=r"kernel .* has 3 entries, 2 are needed"):
        Conv(2, 4, 4, (3, 3, 3))


@pytest.mark.parametrize("ndim", (1, 2))
@pytest.mark.parametrize("groups", (1, 16))
@pytest.mark.parametrize("stride", (1, 2))
def test_conv_copies_nothing(ndim, groups, stride, monkeypatch):
    """The kernel reads the map's own memory, channels last, and what it writes is handed on as it lies."""
    seen = {}
    raw = space._CONV[2]

    def spy(x, *args):
        seen["in"], seen["out"] = x, raw(x, *args)
        return seen["out"]

    monkeypatch.setitem(space._CONV, 2, spy)
    x = torch.randn(2, *SIDES[ndim], 16)
    y = Conv(ndim, 16, 16, 3, stride, groups=groups)(x)
    assert seen["in"].data_ptr() == x.data_ptr()
    assert seen["in"].is_contiguous(memory_format=torch.channels_last)
    assert seen["out"].data_ptr() == y.data_ptr()
    assert seen["out"].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous()


@pytest.mark.parametrize(
    "call",
    [lambda x: max_pool(x, 3, 2, 1), lambda x: avg_pool(x, 2), lambda x: resize(x, (5, 17))],
    ids=["max_pool", "avg_pool", "resize"],
)
def test_other_kernels_stay_channels_last(call, monkeypatch):
    raw = []
    for table in (space._MAX_POOL, space._AVG_POOL):
        kernel = table[2]
        monkeypatch.setitem(table, 2, lambda *a, kernel=kernel, **k: raw.append(kernel(*a, **k)) or raw[-1])
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: raw.append(interpolate(*a, **k)) or raw[-1])
    y = call(torch.randn(2, 9, 11, 16))
    assert len(raw) == 1
    assert raw[0].data_ptr() == y.data_ptr()
    assert y.is_contiguous()


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel=2, stride=2),
        dict(kernel=4, stride=2, padding=1),
        dict(kernel=3, stride=2, dilation=2, groups=2),
        dict(kernel=3, stride=1, padding=1, bias=False),
    ],
    ids=str,
)
def test_conv_transpose(ndim, options):
    layer = ConvTranspose(ndim, 4, 6, **options).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = field(ndim).requires_grad_()
    reference = CONV_TRANSPOSE[ndim](
        first(x), layer.weight, layer.bias, options["stride"], options.get("padding", 0), 0,
        options.get("groups", 1), options.get("dilation", 1),
    )  # fmt: skip
    same(layer(x), last(reference), x, *layer.parameters())


@pytest.mark.parametrize("ndim", RANKS)
def test_batch_norm(ndim):
    ours, theirs = BatchNorm(4).double(), NORM[ndim](4).double()
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    for step in range(3):
        x = (field(ndim, seed=step) * 3 + 1).requires_grad_()
        a, b = ours(x), last(theirs(first(x)))
        same(a, b, x)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    same(ours(x), last(theirs(first(x))), x)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("ndim", RANKS)
def test_batch_norm_on_a_view(ndim):
    """A map whose memory is not in order (a movedim, a slice) is normed as its contiguous copy."""
    norm = BatchNorm(4).double()
    x = field(ndim, dim=7).movedim(-1, 1).contiguous().movedim(1, -1)[..., 1:5]
    assert not x.is_contiguous()
    torch.testing.assert_close(norm(x), norm(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_group_norm(ndim, groups):
    layer = GroupNorm(groups, 4).double()
    nn.init.uniform_(layer.weight), nn.init.normal_(layer.bias)
    x = field(ndim).requires_grad_()
    y = layer(x)
    same(y, last(F.group_norm(first(x), groups, layer.weight, layer.bias)), x, *layer.parameters())
    assert y.is_contiguous()


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, None, 0), (3, 1, 1)])
def test_pools(ndim, kernel, stride, padding):
    x = (field(ndim) - 5).requires_grad_()  # negative: zero padding would show in the maximum
    same(max_pool(x, kernel, stride, padding), last(MAX[ndim](first(x), kernel, stride, padding)), x)
    for count in (True, False):
        ours = avg_pool(x, kernel, stride, padding, count_include_pad=count)
        same(ours, last(AVG[ndim](first(x), kernel, stride, padding, count_include_pad=count)), x)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("size", (1, 2, 5, 12))
def test_adaptive_average(ndim, size):
    x = field(ndim).requires_grad_()
    same(adaptive_avg_pool(x, size), last(ADAPTIVE[ndim](first(x), size)), x)


def test_adaptive_average_by_axis():
    x = field(2).requires_grad_()
    same(adaptive_avg_pool(x, (9, 4)), last(F.adaptive_avg_pool2d(first(x), (9, 4))), x)
    assert adaptive_avg_pool(x, (9, 11)) is x


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_adaptive_average_keeps_the_dtype(dtype):
    x = field(2, sides=(7, 5)).to(dtype)
    y = adaptive_avg_pool(x, 3)
    assert y.dtype == dtype
    want = last(F.adaptive_avg_pool2d(first(x.double()), 3))
    assert (y.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


# --- resize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("mode", ("nearest", "linear"))
@pytest.mark.parametrize("size", (4, 9, 15))
def test_resize(ndim, mode, size):
    x = field(ndim).requires_grad_()
    options = dict(mode="nearest") if mode == "nearest" else dict(mode=LINEAR[ndim], align_corners=False)
    same(resize(x, size, mode), last(F.interpolate(first(x), size=(size,) * ndim, **options)), x)


@pytest.mark.parametrize("mode", ("linear", "cubic"))
@pytest.mark.parametrize("antialias", (False, True))
@pytest.mark.parametrize("size", ((4, 4), (20, 5), (9, 6)))
def test_resize_antialias_and_cubic_in_the_plane(mode, antialias, size):
    x = field(2).requires_grad_()
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    reference = F.interpolate(first(x), size=size, mode=name, align_corners=False, antialias=antialias)
    same(resize(x, size, mode, antialias), last(reference), x)


def cubic_matrix(side, size):
    """Cubic weights (a = -0.75) of each output on each input, ends repeated: torch's bicubic along a line."""
    a = -0.75

    def kernel(t):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(size, side, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) * side / size - 0.5
        base = int(centre // 1)
        for j in range(base - 1, base + 3):
            matrix[i, min(max(j, 0), side - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize(("side", "size"), [(7, 13), (13, 7), (5, 5), (1, 4), (4, 1), (56, 64)])
def test_cubic_resizing_is_a_matrix_in_exported_programs(side, size, monkeypatch):
    torch.testing.assert_close(_cubic(side, size, torch.float64), cubic_matrix(side, size), rtol=0, atol=1e-5)
    x = torch.randn(2, side, 3, 5)
    want = resize(x, (size, 4), "cubic")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(resize(x, (size, 4), "cubic"), want, rtol=1e-5, atol=1e-5)


def triangle_matrix(side, size):
    """Antialiased linear weights: a triangle as wide as the step, cut at the ends and normalised."""
    step = max(side / size, 1.0)
    matrix = torch.zeros(size, side, dtype=torch.float64)
    for i in range(size):
        centre = (i + 0.5) * side / size
        for j in range(side):
            matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / step)
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(("mode", "antialias"), [("cubic", False), ("linear", True)])
@pytest.mark.parametrize("size", (4, 12))
def test_resize_is_separable(ndim, mode, antialias, size):
    x = field(ndim).requires_grad_()
    build = triangle_matrix if antialias else cubic_matrix
    want = x
    for axis, side in enumerate(SIDES[ndim], start=1):
        want = torch.tensordot(build(side, size), want.movedim(axis, 0), 1).movedim(0, axis)
    same(resize(x, size, mode, antialias), want, x, tolerance=1e-9)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("mode", ("nearest", "linear", "cubic"))
def test_resize_is_the_identity_at_equal_size(ndim, mode):
    x = field(ndim)
    assert resize(x, SIDES[ndim], mode, antialias=mode != "nearest") is x


def test_resize_one_axis_of_a_volume_leaves_the_others():
    x = field(3)
    y = resize(x, (7, 6, 4))
    rows = F.interpolate(x.movedim(3, -1).flatten(0, 2), size=4, mode="linear").reshape(2, 7, 6, 4, 4).movedim(-1, 3)
    torch.testing.assert_close(y, rows, rtol=1e-12, atol=1e-12)


def test_resize_refuses_unknown_modes():
    with pytest.raises(ValueError, match=r"mode 'bilinear' is unknown; use nearest, linear or cubic"):
        resize(field(2), 4, "bilinear")


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("mode", ("linear", "nearest"))
@pytest.mark.parametrize("padding_mode", ("zeros", "border"))
def test_grid_sample(ndim, mode, padding_mode):
    x = field(ndim).requires_grad_()
    grid = torch.rand(2, *(5, 4, 3)[:ndim], ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grid = (grid * 2.6 - 1.3).requires_grad_()
    ours = grid_sample(x, grid, mode, padding_mode)
    if ndim > 1:
        name = "bilinear" if mode == "linear" else mode
        reference = last(F.grid_sample(first(x), grid, name, padding_mode, align_corners=False))
    else:  # by hand: cells around (g + 1) L / 2 - 1 / 2
        side = x.shape[1]
        place = (grid[..., 0] + 1) * side / 2 - 0.5
        if padding_mode == "border":
            place = place.clamp(0, side - 1)
        low = (place.round() if mode == "nearest" else place.floor()).detach()
        reference = 0
        for cell in (low,) if mode == "nearest" else (low, low + 1):
            weight = 1.0 if mode == "nearest" else 1 - (place - cell).abs()
            weight = weight * ((cell >= 0) & (cell < side)).double()
            picked = torch.stack([x[b, cell[b].long().clamp(0, side - 1)] for b in range(2)])
            reference = reference + weight[..., None] * picked
    same(ours, reference, *((x, grid) if mode == "linear" else (x,)))


def test_grid_sample_refuses_another_rank():
    with pytest.raises(ValueError, match=r"does not fit a map of rank 2: needs \(B, \*S, 2\)"):
        grid_sample(field(2), torch.zeros(2, 4, 4, 3))
    with pytest.raises(ValueError, match="linear or nearest"):
        grid_sample(field(2), torch.zeros(2, 4, 4, 2).double(), "cubic")


@pytest.mark.parametrize("ndim", RANKS)
def test_pad_and_crop(ndim):
    x = field(ndim).requires_grad_()
    y = pad_to(x, 4)
    assert y.shape[1:-1] == tuple(-(-s // 4) * 4 for s in SIDES[ndim])
    inside = tuple(slice(0, s) for s in SIDES[ndim])
    assert torch.equal(y[:, *inside], x)
    assert y.sum().item() == pytest.approx(x.sum().item(), abs=1e-12)
    assert torch.equal(crop(y, SIDES[ndim]), x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    assert pad_to(x, 1) is x
    assert crop(x, SIDES[ndim]) is x


def test_pad_to_by_axis():
    assert pad_to(torch.zeros(1, 5, 7, 2), (4, 7)).shape == (1, 8, 7, 2)
    with pytest.raises(ValueError, match="multiple"):
        pad_to(torch.zeros(1, 5, 7, 2), (4, 7, 2))


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("factor", (2, 3))
@pytest.mark.parametrize("fastest", (False, True))
def test_space_to_depth(ndim, factor, fastest):
    sides = (6, 12, 6)[:ndim]
    x = field(ndim, dim=3, sides=sides)
    y = space_to_depth(x, factor, fastest)
    parts = []
    for offset in itertools.product(range(factor), repeat=ndim):
        offset = offset[::-1] if fastest else offset
        parts.append(x[:, *(slice(o, None, factor) for o in offset)])
    assert torch.equal(y, torch.cat(parts, -1))


def test_space_to_depth_is_swins_order():
    x = field(2, sides=(4, 6))
    x0, x1, x2, x3 = x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]
    assert torch.equal(space_to_depth(x, 2, first_axis_fastest=True), torch.cat([x0, x1, x2, x3], -1))
    unshuffled = F.pixel_unshuffle(first(x), 2)  # channel slowest, offset row-major
    want = last(unshuffled).unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(space_to_depth(x, 2), want)


def test_ntuple():
    assert ntuple(3, 2) == (3, 3)
    assert ntuple([1, 2, 3], 3) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"stride \(1, 2\) has 2 entries, 3 are needed"):
        ntuple((1, 2), 3, "stride")


def test_tables_made_on_the_meta_device_are_not_kept_for_others():
    """A model built on the meta device must not leave its tables behind for the next one built on a real device."""
    from vertebra.layers import relative_index, sincos

    with torch.device("meta"):
        assert sincos((3, 29), 8).is_meta
        assert relative_index((3, 29)).is_meta
        assert windows((3, 29), (3, 29)).there.is_meta
    assert not sincos((3, 29), 8).is_meta
    assert not relative_index((3, 29)).is_meta
    assert not windows((3, 29), (3, 29)).there.is_meta


def test_tables_made_in_inference_mode_serve_training():
    x = field(2, sides=(31, 3)).requires_grad_()
    with torch.inference_mode():
        adaptive_avg_pool(x.detach(), 2)
    adaptive_avg_pool(x, 2).sum().backward()
    assert x.grad.sum().item() == pytest.approx(2 * 4 * 4)


@pytest.mark.parametrize("ndim", (1, 2))
def test_bfloat16_convolution_of_two_channels_with_a_large_kernel(ndim):
    torch.manual_seed(0)
    layer, x = Conv(ndim, 2, 8, 32, 4, padding=14), torch.randn(2, *(45, 53)[:ndim], 2)
    with torch.no_grad():
        full = layer(x)
        half = layer.bfloat16()(x.bfloat16()).float()
    assert ((half - full).norm() / full.norm()).item() <= 0.02


@pytest.fixture
def freed_memory_is_garbage():
    """glibc fills what is freed, so that reading it shows (MALLOC_PERTURB_ from within)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-6, 165)
    yield
    if mallopt is not None:
        mallopt(-6, 0)


@pytest.mark.parametrize("autocast", (True, False))
@pytest.mark.parametrize(
    ("sides", "channels", "kernel", "stride", "groups"),
    [
        ((1, 1), 64, 3, 2, 1),  # the coarsest maps of a detector; the weight's gradient was NaN now and then
        ((2, 1), 64, 3, 2, 64),
        ((64, 2), 16, 3, 2, 1),  # a tall map; wrong outputs
        ((3, 3), 16, 7, 4, 1),
        ((40, 3), 40, 2, 2, 1),
        ((16, 16), 16, 4, 4, 1),  # patches of few channels; wrong outputs
        ((48,), 12, 8, 8, 1),
        ((8, 8, 2), 16, 3, 2, 1),
        ((2, 2, 6), 16, 3, 1, 16),  # a flat volume, depthwise
    ],
)
def test_bfloat16_convolutions_that_torch_gets_wrong(
    sides, channels, kernel, stride, groups, autocast, freed_memory_is_garbage
):
    torch.manual_seed(0)
    padding = 0 if stride in (kernel, 1) and groups == 1 else kernel // 2
    layer = Conv(len(sides), channels, 64 if groups == 1 else channels, kernel, stride, padding, groups=groups)
    x = torch.randn(2, *sides, channels, requires_grad=True)
    y = layer(x)
    given = torch.randn_like(y)
    wanted = (y, *torch.autograd.grad(y, (x, *layer.parameters()), given))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        inputs = (x, *layer.parameters())
    else:
        layer.bfloat16()
        x = x.detach().bfloat16().requires_grad_()
        y, inputs = layer(x), (x, *layer.parameters())
    assert y.dtype == torch.bfloat16
    found = (y, *torch.autograd.grad(y, inputs, given.bfloat16()))
    for a, b in zip(found, wanted, strict=True):
        assert ((a.float() - b).norm() / b.norm()).item() <= 0.03


@pytest.mark.parametrize("count", (True, False))
@pytest.mark.parametrize("sides", [(2, 2, 2), (1, 3, 2), (5, 4, 6)])
def test_average_pooling_of_volumes_smaller_than_the_window(sides, count):
    torch.manual_seed(0)
    x = torch.randn(2, *sides, 3)
    y = avg_pool(x, 3, 1, 1, count_include_pad=count)
    for cell in itertools.product(*map(range, sides)):
        near = x[(slice(None), *(slice(max(c - 1, 0), c + 2) for c in cell))].flatten(1, -2)
        expected = near.sum(1) / (27 if count else near.shape[1])
        torch.testing.assert_close(y[(slice(None), *cell)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_one_group_is_a_group_norm_of_one_group(ndim):
    torch.manual_seed(0)
    norm, x = OneGroup(5, 1e-3), 2 + 3 * torch.randn(2, *(4, 5, 3)[:ndim], 5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    y = F.group_norm(x.movedim(-1, 1).contiguous(), 1, norm.weight, norm.bias, 1e-3).movedim(1, -1)
    torch.testing.assert_close(norm(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", (3, 5, 6, 7, 9))
def test_gradients_of_strided_depthwise_volumes_with_a_large_kernel(depth):
    torch.manual_seed(0)
    layer, x = Conv(3, 32, 32, 7, 2, groups=32), torch.randn(2, depth, 6, 7, 32)
    exact, y = Conv(3, 32, 32, 7, 2, groups=32).double(), x.double().movedim(-1, 1).contiguous()
    exact.load_state_dict(layer.state_dict())
    layer(x).square().sum().backward()
    F.conv3d(y, exact.weight, exact.bias, 2, 3, 1, 32).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert ((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize("stride", (1, 2))
def test_a_kernel_of_13_has_a_rim_of_zeros_without_a_gradient(ndim, stride, monkeypatch):
    """Same values with and without a gradient, those of torch; the rim is only there without one."""
    torch.manual_seed(0)
    layer = Conv(ndim, 4, 4, (13, *(3,) * (ndim - 1)), stride, groups=4)
    x, seen, plain = torch.randn(2, *SIDES[ndim], 4), [], space.conv
    monkeypatch.setattr(
        space, "conv", lambda x, weight, *rest: seen.append(max(weight.shape)) or plain(x, weight, *rest)
    )
    wanted = CONV[ndim](x.movedim(-1, 1), layer.weight, layer.bias, stride, layer.padding, groups=4).movedim(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert list(dict.fromkeys(seen)) == [15, 13]  # rank 1 passes twice, as rank 2 of height one


def _worst(y, x) -> float:
    return ((y.float() - x).abs().max() / x.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ndim", "kernel", "dim", "out", "sides"),
    [
        (1, 512, 1, 520, (1030,)),
        (2, 32, 3, 400, (67, 96)),
        (2, 2, 300, 1000, (6, 5)),
        (3, (8, 16, 16), 1, 600, (8, 33, 16)),
    ],
)
def test_patches_that_do_not_overlap_are_a_product(ndim, kernel, dim, out, sides, dtype, monkeypatch):
    torch.manual_seed(0)
    conv, x = Conv(ndim, dim, out, kernel, kernel, 0), torch.randn(2, *sides, dim).requires_grad_()
    assert conv.patches and conv.weight.numel() > 2**18
    want = channels_last(CONV[ndim](channels_first(x), conv.weight, conv.bias, conv.stride))
    slope = torch.randn_like(want)
    grads = torch.autograd.grad(want, (x, *conv.parameters()), slope)
    monkeypatch.setattr(space, "conv", lambda *a, **k: pytest.fail("a convolution ran"))
    conv, y = conv.to(dtype), x.detach().to(dtype).requires_grad_()
    got = conv(y)
    limit = 1e-5 if dtype == torch.float32 else 0.01
    assert got.shape == want.shape and _worst(got, want) <= limit
    for a, b in zip(torch.autograd.grad(got, (y, *conv.parameters()), slope.to(dtype)), grads):
        assert a.shape == b.shape and _worst(a, b) <= limit


def test_which_patches_stay_convolutions(monkeypatch):
    calls = []
    monkeypatch.setattr(space, "conv", lambda *a, run=space.conv: calls.append(1) or run(*a))
    x = torch.randn(1, 32, 32, 3)
    for conv, count in (
        (Conv(2, 3, 8, 16, 16, 0), (0, 1)),  # a product in training, not in inference, where its weight is small
        (Conv(2, 3, 1400, 16, 16, 0), (0, 0)),
        (Conv(2, 3, 8, 4, 4, 0), (1, 1)),
        (Conv(2, 3, 8, 16, 8, 0), (1, 1)),
        (Conv(2, 3, 8, 16, 16, 1), (1, 1)),
        (Conv(2, 3, 9, 16, 16, 0, groups=3), (1, 1)),
    ):
        for grad, wanted in zip((True, False), count):
            calls.clear()
            with torch.set_grad_enabled(grad):
                conv(x)
            assert len(calls) == wanted, (conv, grad)
