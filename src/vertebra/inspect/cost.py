"""What a network costs: parameters, multiply-accumulates, time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..backbone import Backbone
from ..layers import record_attention
from ..mixers.catalogue import MIXERS, Place


@dataclass(frozen=True)
class Cost:
    """Parameters in millions, multiply-accumulates of one sample in billions, median milliseconds of one sample."""

    params_m: float
    gmacs: float
    latency_ms: float


def count_macs(module: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of one call of `module` on an input of `shape`, batch included.

    Counted by torch's FlopCounterMode on a copy without memory (the meta device): matrix products, convolutions and
    attention. Softmax, norms, activations, gathers and bilinear sampling are not counted, as is usual. A network whose
    work depends on what it is given cannot run without memory: then an input of ones is counted, on the CPU.
    """
    try:
        return _macs(copy.deepcopy(module).to("meta"), torch.empty(tuple(shape), device="meta"))
    except NotImplementedError:
        return _macs(copy.deepcopy(module).to("cpu", torch.float32), torch.ones(tuple(shape)))


def _macs(ghost: nn.Module, x: Tensor) -> int:
    # the fused attention kernels have no rule for tensors without memory; the explicit form counts the same products
    ghost.eval().requires_grad_(False)  # the counter stumbles over a parameter that is expanded over the batch
    with FlopCounterMode(display=False) as counter, torch.no_grad(), record_attention():
        ghost(x)
    return counter.get_total_flops() // 2


def mixer_costs(names: Sequence[str], sides: Sequence[int] = (14, 56)) -> dict[str, list[float]]:
    """Thousands of multiply-accumulates per cell of each mixer of the catalogue, on square maps of the given `sides`.

    With 64 channels and 2 heads, as built for the first stage of a pyramid.
    """
    found: dict[str, list[float]] = {}
    for name in names:
        found[name] = []
        for side in sides:
            with torch.device("meta"):
                mixer = MIXERS[name].build(Place(2, 64, 2, (side, side)))
            found[name].append(count_macs(mixer, (1, side, side, 64)) / side**2 / 1e3)
    return found


def measure_cost(model: Backbone, sides: Sequence[int], repeats: int = 9) -> Cost:
    """The cost of `model` on one sample of spatial `sides`, where it lies, in evaluation mode."""
    shape = (1, model.in_chans, *sides)
    params = sum(p.numel() for p in model.parameters())
    where = next(model.parameters())
    x = torch.randn(shape, device=where.device, dtype=where.dtype)
    training, times = model.training, []
    model.eval()
    with torch.inference_mode():
        for i in range(repeats + 2):
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            if i >= 2:
                times.append(time.perf_counter() - start)
    model.train(training)
    return Cost(params / 1e6, count_macs(model, shape) / 1e9, 1e3 * statistics.median(times))
