"""Sliding windows in tiles against loops over cells."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.layers import tile_side, tiles

torch.set_num_threads(1)


def window(cell, sides, kernel, interval, clamped):
    """Cells in the window of `cell`, None where outside of the map, each with its flat offset."""
    axes = []
    for c, side, k, i in zip(cell, sides, kernel, interval):
        if clamped:
            first = min(max(c - k // 2, 0), side - k)
            axes.append([(y, y - c + k - 1, 2 * k - 1) for y in range(first, first + k)])
        else:
            places = [c + (o - k // 2) * i for o in range(k)]
            axes.append([(y if 0 <= y < side else None, o, k) for o, y in enumerate(places)])
    for keys in itertools.product(*axes):
        offset = 0
        for _, o, rows in keys:
            offset = offset * rows + o
        place = tuple(y for y, _, _ in keys)
        yield (None if None in place else place), offset


def naive(q, k, v, table, sides, kernel, interval, clamped):
    batch, heads, _, dim = q.shape
    maps = [t.reshape(batch, heads, *sides, dim) for t in (q, k, v)]
    out = torch.zeros_like(maps[0])
    for cell in itertools.product(*(range(s) for s in sides)):
        logits, values = [], []
        for place, offset in window(cell, sides, kernel, interval, clamped):
            key, value = (torch.zeros(batch, heads, dim) if place is None else t[:, :, *place] for t in maps[1:])
            bias = 0 if table is None else table[:, offset]
            logits.append((maps[0][:, :, *cell] * key).sum(-1) * dim**-0.5 + bias)
            values.append(value)
        weights = torch.stack(logits, -1).softmax(-1)
        out[:, :, *cell] = (weights.unsqueeze(-1) * torch.stack(values, -2)).sum(-2)
    return out.flatten(2, -2)


def check(sides, size, kernel, interval=None, clamped=False, bias=True):
    plan = tiles(sides, size, kernel, interval, clamped)
    heads, count = 2, math.prod(sides)
    rows = math.prod(2 * k - 1 if clamped else k for k in kernel)
    q, k, v = torch.randn(3, 2, heads, count, 4)
    table = torch.randn(heads, rows) if bias else None
    got = plan.attend(q, k, v, plan.bias(heads, table))
    want = naive(q, k, v, table, sides, kernel, interval or (1,) * len(sides), clamped)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(plan.join(plan.split_queries(q), heads), q)
    return plan


@pytest.mark.parametrize("sides", [(9,), (8, 7), (3, 4, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_windows_equal_loops(sides, bias):
    ndim = len(sides)
    check(sides, (4, 3, 2)[:ndim], (3,) * ndim, bias=bias)
    check(sides, (4, 3, 2)[:ndim], (3,) * ndim, (2, 3, 2)[:ndim], bias=bias)
    check(sides, (4, 3, 2)[:ndim], (3,) * ndim, clamped=True, bias=bias)


axis = st.tuples(st.integers(1, 9), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(axis, min_size=1, max_size=2), st.booleans(), st.booleans())
def test_any_size(axes, clamped, bias):
    sides, size, kernel, interval = zip(*axes)
    if clamped:
        check(tuple(max(s, k) for s, k in zip(sides, kernel)), size, kernel, clamped=True, bias=bias)
    else:
        check(sides, size, kernel, interval, bias=bias)


def test_gradients_equal_those_of_loops():
    plan = tiles((5, 6), (4, 4), (3, 3), clamped=True)
    parts = [torch.randn(1, 2, 30, 4, requires_grad=True) for _ in range(3)]
    table = torch.randn(2, 25, requires_grad=True)
    weight = torch.randn(1, 2, 30, 4)
    got = torch.autograd.grad((plan.attend(*parts, plan.bias(2, table)) * weight).sum(), [*parts, table])
    want = torch.autograd.grad((naive(*parts, table, (5, 6), (3, 3), (1, 1), True) * weight).sum(), [*parts, table])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("ndim", "kernel", "most"), [(1, 7, 1.2), (2, 7, 3.5), (3, 7, 15.7), (2, 3, 2.3)])
def test_keys_are_not_copied_once_per_window_place(ndim, kernel, most):
    side = tile_side(ndim, kernel)
    sides = (2 * side,) * ndim
    plan = tiles(sides, (side,) * ndim, (kernel,) * ndim, clamped=True)
    assert plan.keys.numel() / math.prod(sides) <= most < kernel**ndim


def test_what_is_kept_per_size_is_no_larger_than_the_gathers():
    plan = tiles((56, 56), (7, 7), (7, 7), clamped=True)
    assert sum(o.numel() for o in plan.offsets) < plan.queries.numel()
    assert tiles((56, 56), (7, 7), (7, 7), clamped=True) is plan


def test_impossible_windows_are_errors():
    with pytest.raises(ValueError, match="odd"):
        tiles((8, 8), (4, 4), (3, 4))
    with pytest.raises(ValueError, match="interval"):
        tiles((8, 8), (4, 4), (3, 3), (2, 2), clamped=True)
