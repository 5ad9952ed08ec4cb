"""Several processes: weights that each has whole (ddp) or a share of (fsdp), and what both need around them.

A file never knows how a run was spread: states are gathered whole before they are written, and scattered after reading.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..backbone import Stage
from ..layers.space import BatchNorm
from .config import Config, ConfigError


class Replicated(DDPStrategy):
    """DDP; `unused` says that some parameters get no gradient, which costs a walk through the graph a step."""

    unused = False

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        self._ddp_kwargs["find_unused_parameters"] = self.unused
        return super().setup_module(module)


class _EveryPart(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return nullcontext()


class Sharded(DDPStrategy):
    """FSDP2 on DDP's processes: the module comes here sharded already (`spread_out`).

    Each part of an accumulated batch is reduced at once: to keep gradients for later would take the memory that
    sharding saves, and a step that is left out could not forget them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._backward_sync_control = _EveryPart()  # type: ignore[assignment]

    def setup_module(self, module: nn.Module) -> Any:
        return module


def make_fabric(config: Config) -> Fabric:
    """Fabric as the configuration says, launched: by itself, or as one of the processes that torchrun started.

    Raises ConfigError for devices that are not there, and where torchrun started another number of processes.
    """
    world = config.devices * config.nodes
    if config.strategy == "fsdp" and config.precision == "16-mixed":
        raise ConfigError("precision: 16-mixed scales its loss per process, strategy fsdp needs bf16-mixed or 32-true")
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) != world:
        raise ConfigError(
            f"devices: torchrun started {os.environ['WORLD_SIZE']} processes, "
            f"but {config.devices} devices on {config.nodes} nodes were asked for"
        )
    strategy: Any = "auto"
    if config.strategy == "fsdp":
        strategy = Sharded()
    elif config.strategy == "ddp" or world > 1:
        strategy = Replicated()
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            strategy=strategy,
            devices=config.devices,
            num_nodes=config.nodes,
            precision=config.precision,
        )
        fabric.launch()
    except (RuntimeError, ValueError, ImportError) as e:  # no such device, or fewer than asked for
        raise ConfigError(" ".join(str(e).split())) from e
    return fabric


def leave(code: int) -> NoReturn:
    """End this process, one of several, with exit status `code`; the interpreter is not taken down.

    The threads of gloo drop the last tensors when they come to it, which takes an interpreter: one that is going aborts
    the whole run after its last file was written (pytorch/pytorch#179291). A destroyed group may still have them.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def spread_out(net: nn.Module, fabric: Fabric) -> nn.Module:
    """Spread the parameters of `net`, which must be the same everywhere, over all processes; in place.

    A block of a Stage is a unit: it is gathered when it runs and given up again, what is outside blocks likewise.
    Raises ConfigError for a network that cannot be spread.
    """
    fabric.to_device(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # convolutions keep theirs channels last, what is cut cannot be
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,))
    try:
        for stage in reversed([module for module in net.modules() if isinstance(module, Stage)]):  # inner ones first
            for block in stage.blocks:
                if next(block.parameters(), None) is not None and not isinstance(block, Stage):
                    fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # the outermost unit too gives its weights up: kept ones would go stale when averages move without a backward
        fully_shard(net, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(net, "forward_outputs")
    except (ValueError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"strategy: fsdp cannot spread this model ({' '.join(str(e).split())}); use ddp") from e
    return net


def is_sharded(net: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in net.parameters())


def whole(tree: Any, keep: bool) -> Any:
    """A state with every spread tensor gathered, on the CPU. All processes must call it; who does not `keep` it gets
    nothing in its place, so that only one holds the whole.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(tree, Tensor):
        return tree.detach().cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value, keep) for value in tree)
    return tree


def _like(tensor: Any, there: Any) -> Any:
    """A whole tensor spread as `there` is, where that is spread and of the same shape."""
    if not isinstance(there, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != there.shape:
        return tensor
    there_device = there.device_mesh.device_type
    # every process has read the same file: each takes its share, nothing is sent
    return distribute_tensor(tensor.to(there_device), there.device_mesh, there.placements, src_data_rank=None)


def load_whole(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`net.load_state_dict` of a whole state, spread or not."""
    there = net.state_dict()
    net.load_state_dict({key: _like(value, there.get(key)) for key, value in state.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of a whole state, spread or not."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owner = dict(zip(numbers, params, strict=True))
    spread = {
        number: {key: _like(value, owner[number]) for key, value in one.items()}
        for number, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def has_unused(net: nn.Module, loss: Tensor) -> bool:
    """Whether `loss` leaves a parameter without a gradient. Needs no gradients to be there, and leaves none."""
    params = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return any(gradient is None for gradient in found)


# --- batch norm ------------------------------------------------------------------------------------------------------


class SyncedBatchNorm(BatchNorm):
    """Batch norm whose statistics are those of all processes' samples, on any device: (B, *S, C) -> (B, *S, C).

    torch's own refuses the CPU. Two sums travel a call, with their gradients; variance is taken around the common
    mean, so nothing cancels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        flat = x.reshape(-1, x.shape[-1])
        exact = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        sums = all_reduce(torch.cat([exact.sum(0), exact.new_full((1,), len(exact))]))
        count = sums[-1].detach()
        centred = exact - sums[:-1] / count
        var = all_reduce(centred.square().sum(0)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked or 1)
                self.running_mean.lerp_((sums[:-1] / count).to(self.running_mean), share)
                self.running_var.lerp_((var * count / (count - 1)).to(self.running_var), share)
        y = centred * (var + self.eps).rsqrt()
        if self.weight is not None:
            y = torch.addcmul(self.bias, y, self.weight)
        return y.to(x.dtype).view(x.shape)


def batch_norms(net: nn.Module) -> list[_BatchNorm]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def synchronise_norms(net: nn.Module) -> None:
    """Every batch norm of `net` becomes a SyncedBatchNorm, in place, weights and names as they were.

    Raises ConfigError for a kind of batch norm that is not this library's own.
    """
    for norm in batch_norms(net):
        if type(norm) is not BatchNorm:
            raise ConfigError(f"sync_bn: {type(norm).__name__} cannot be synchronised")
        norm.__class__ = SyncedBatchNorm


@torch.no_grad()
def average_statistics(nets: Iterable[nn.Module], fabric: Fabric) -> None:
    """Batch norms' running statistics become their mean over processes, so that all test, keep and go on alike."""
    if fabric.world_size == 1:
        return
    for net in nets:
        for norm in batch_norms(net):
            for buffer in (norm.running_mean, norm.running_var):
                if buffer is not None:
                    buffer.copy_(fabric.all_reduce(buffer.clone(), reduce_op="mean"))  # type: ignore[arg-type]
