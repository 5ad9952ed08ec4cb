"""The contract every model keeps, written once: input check, the loop over stages, features, head, checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .layers.kernels import Linear
from .layers.space import BatchNorm, channels_first

Rules = Sequence[tuple[str, str | Callable]]


def plus_one(match) -> str:
    """The number in the first group, counted from one: official names often do."""
    return str(int(match[1]) + 1)


def conv_norms(ours: str, theirs: str, step: int = 3) -> tuple[str, Callable]:
    """The rule for a sequence `ours` of convolutions with norms that officially lies flat in a sequence `theirs`.

    `step` official entries (convolution, norm, activation) make up one of ours.
    """
    return rf"^{ours}\.(\d+)\.(conv|norm)\.", lambda m: f"{theirs}.{step * int(m[1]) + (m[2] == 'norm')}."


def four_taps(depth: int) -> tuple[int, ...]:
    """Four blocks of a network without stages, spread evenly over the depth, the last among them."""
    return tuple(sorted({max(depth * k // 4 - 1, 0) for k in (1, 2, 3, 4)}))


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms of `module` leave their running statistics alone: a recomputed forward must not count twice.

    They still take part, at momentum zero, because the recomputation must save the same tensors as the first pass.
    """
    norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Stage(nn.Module):
    """What lies between two feature maps: an optional way `down`, then blocks, then an optional norm.

    The state (a map, or whatever object the model's blocks pass on) is one argument.
    """

    def __init__(self, blocks: Sequence[nn.Module], down: nn.Module | None = None, norm: nn.Module | None = None):
        super().__init__()
        self.down = down or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()
        self.checkpointing = False

    def forward(self, state: Any) -> Any:
        state = self.down(state)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                contexts = lambda block=block: (contextlib.nullcontext(), _frozen_statistics(block))  # noqa: E731
                state = checkpoint(block, state, use_reentrant=False, context_fn=contexts)
            else:
                state = block(state)
        return self.norm(state)


class Backbone(nn.Module):
    """Base of all models: ``embed -> stages -> finish -> outputs``, run by one loop.

    A model sets in its constructor ``stages`` (its ``Stage`` modules, one per feature map), ``feature_info`` through
    `describe`, and its head through `make_head`; it defines ``embed(x)`` and where needed ``finish(state)``,
    ``to_map(state, index)``, ``output_norm(map, index)``, ``pre_logits(features)``, ``outputs(features)``. Inside, maps
    are (B, *S, C); the public methods speak (B, C, *S).

    Class attributes: `tokens` True where ``forward_features`` gives (B, N, C); `heads` the names of the linear heads;
    `prediction` the output that model(x) returns; `OFFICIAL` the rules our names -> official names; `CONSTANT` patterns
    of official buffers that hold no weights; `ndims` the ranks that the idea exists in; `EXPORT` why an exported
    program keeps one input size ("" where it takes any); `any_layout` that ``embed`` reads any memory order.
    """

    tokens: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("head",)
    prediction: ClassVar[str] = "logits"
    ndims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    OFFICIAL: ClassVar[Rules] = ()
    CONSTANT: ClassVar[Sequence[str]] = ()
    EXPORT: ClassVar[str] = ""
    any_layout: ClassVar[bool] = False

    stages: nn.ModuleList
    feature_info: list[dict[str, Any]]
    num_features: int
    default_indices: tuple[int, ...] | None = None
    load_report: Any = None  # what loading did, where create_model was given a checkpoint
    deploy_report: Any = None  # what `vertebra.deploy` did
    computes: torch.dtype | None = None  # set by `vertebra.deploy`: what floating inputs are cast to

    def __init__(
        self,
        ndim: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        out_indices: Sequence[int] | int | None = None,
    ):
        super().__init__()
        if ndim not in self.ndims:
            raise ValueError(f"{type(self).__name__} exists at rank {self.ndims}, not at ndim={ndim}")
        for name, value, least in (("in_chans", in_chans, 1), ("num_classes", num_classes, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices needs features_only=True (or call forward_intermediates(x, indices))")
        self.ndim, self.in_chans, self.num_classes = ndim, in_chans, num_classes
        self.features_only, self._wanted = features_only, out_indices
        self.output_norms: nn.ModuleList | None = (
            None  # the dense version's norm on each output, where the paper has them
        )
        self.recipe: dict[str, Any] = {}  # how create_model built this one: class, name, arguments; see checkpoint.py

    # --- what a model's constructor calls ---------------------------------------------------------------------------

    def describe(self, channels: Sequence[int], reductions: Sequence[int]) -> None:
        """Record channels and stride of each stage's map; the last is what the head reads."""
        self.num_features = channels[-1]
        self.feature_info = [
            {"num_chs": c, "reduction": r, "module": f"stages.{i}"}
            for i, (c, r) in enumerate(zip(channels, reductions, strict=True))
        ]
        self.out_indices = self._indices(self._wanted if self._wanted is not None else self.default_indices)

    def make_head(self, dim: int | None = None) -> None:
        """The linear heads named in `heads`; none in the dense version, identities for num_classes=0."""
        self.head_features = dim or self.num_features
        if not self.features_only:
            for name in self.heads:
                self.add_module(name, self._new_head())

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_features, self.num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def init_weights(self) -> None:
        """Linear layers truncated normal 0.02 with zero bias, the field's default for transformers."""
        for module in self.modules():
            if type(module) in (nn.Linear, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # --- what a model defines or overrides --------------------------------------------------------------------------

    def embed(self, x: Tensor, **context: Any) -> Any:
        """Image (B, *S, in_chans) -> the state that the first stage takes.

        `context` is what some models read beside the input, such as the `lengths` of padded sequences.
        """
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        """The last state -> what the head reads: a map (B, *S, C), tokens (B, N, C), or a tuple with the map first."""
        return state

    def to_map(self, state: Any, index: int) -> Tensor:
        """The feature map (B, *S, C) in the state after stage `index`."""
        return state

    def output_norm(self, x: Tensor, index: int) -> Tensor:
        """The map that the dense version gives out for stage `index`: with `output_norms`, through its norm."""
        return x if self.output_norms is None else self.output_norms[index](x)

    def pre_logits(self, features: Any) -> Tensor:
        """What the head's linear layer reads, (B, head_features); by default the mean over the map."""
        return features.flatten(1, -2).mean(1)

    def outputs(self, features: Any) -> dict[str, Tensor]:
        """Every named output; the one named by `prediction` is what model(x) returns."""
        return {"logits": self.head(self.pre_logits(features))}

    @classmethod
    def translate(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of another framework under the official PyTorch names; by default as it is."""
        return state

    def adopt(self, constants: dict[str, Tensor]) -> None:
        """Take the constant buffers of an official file, by official name; most models compute their own."""

    # --- the contract -----------------------------------------------------------------------------------------------

    def _check(self, x: Tensor) -> None:
        least = self.min_size
        if x.ndim != self.ndim + 2:
            raise ValueError(
                f"input has shape {tuple(x.shape)}: ndim={self.ndim} needs (B, C, *S), {self.ndim + 2} axes in all"
            )
        if x.shape[1] != self.in_chans:
            raise ValueError(f"input has {x.shape[1]} channels, this model needs in_chans={self.in_chans}")
        if not torch.compiler.is_compiling() and min(x.shape[2:]) < least:
            raise ValueError(f"input of size {tuple(x.shape[2:])} is too small: every side needs at least {least}")

    @property
    def min_size(self) -> int:
        """The smallest side that every axis of an input needs: the largest stride."""
        return max(info["reduction"] for info in self.feature_info)

    def _indices(self, indices: Sequence[int] | int | None) -> tuple[int, ...]:
        count = len(self.feature_info)
        if indices is None:
            return tuple(range(count))
        if isinstance(indices, int):  # the last n maps, as timm means it
            if not 1 <= indices <= count:
                raise ValueError(f"the last {indices} feature maps are not to be had, the model has {count}")
            indices = range(count - indices, count)
        wanted = tuple(i + count if i < 0 else i for i in indices)
        if not wanted or any(not 0 <= i < count for i in wanted):
            raise ValueError(f"feature indices {tuple(indices)} are not all in 0..{count - 1}")
        return wanted

    def through(self, state: Any, taps: Sequence[int] = (), span: tuple[int, int] | None = None):
        """Run the stages of `span` (default: all) -> (state, {index: map (B, *S, C)} for the indices in `taps`)."""
        maps = {}
        for index in range(*(span or (0, len(self.stages)))):
            state = self.stages[index](state)
            if index in taps:
                maps[index] = self.output_norm(self.to_map(state, index), index)
        return state, maps

    def _embed(self, x: Tensor, **context: Any) -> Any:
        self._check(x)
        if self.computes is not None:
            x = x.to(self.computes)
        x = x.movedim(1, -1)
        return self.embed(x if self.any_layout else x.contiguous(), **context)

    def _features(self, x: Tensor, **context: Any) -> Any:
        if self.features_only:
            raise ValueError("a features_only model has no head: use model(x) or forward_intermediates(x)")
        return self.finish(self.through(self._embed(x, **context))[0])

    def _public(self, features: Any) -> Any:
        if isinstance(features, tuple):
            return (self._public(features[0]), *features[1:])
        return features if self.tokens else channels_first(features)

    def _internal(self, features: Any) -> Any:
        if isinstance(features, tuple):
            return (self._internal(features[0]), *features[1:])
        return features if self.tokens else features.movedim(1, -1)

    def forward(self, x: Tensor, **context: Any):
        """(B, C, *S) -> logits (B, num_classes); pooled features for num_classes=0; list of maps if features_only."""
        if self.features_only:
            return self.forward_intermediates(x, self.out_indices, **context)
        return self.outputs(self._features(x, **context))[self.prediction]

    def forward_features(self, x: Tensor, **context: Any) -> Any:
        """What the head reads: the last map (B, C', *S'), tokens (B, N, C'), or a tuple with the map first."""
        return self._public(self._features(x, **context))

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """`forward_features`' result -> logits, or with `pre_logits` what the linear head reads."""
        inside = self._internal(features)
        return self.pre_logits(inside) if pre_logits else self.outputs(inside)[self.prediction]

    def forward_outputs(self, x: Tensor, **context: Any) -> dict[str, Tensor]:
        """Every named output as a dict (several heads, losses); the one named by `prediction` is model(x)'s."""
        return self.outputs(self._features(x, **context))

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | int | None = None, **context: Any
    ) -> list[Tensor]:
        """Feature maps (B, C_i, *S_i) of the stages `indices` (default all; an int means the last n)."""
        wanted = self._indices(indices)
        _, maps = self.through(self._embed(x, **context), wanted, (0, max(wanted) + 1))
        return [channels_first(maps[i]) for i in wanted]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace every head by a fresh one of `num_classes` outputs (0: none)."""
        if self.features_only:
            raise ValueError("a features_only model has no classifier to reset")
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be a whole number of at least 0, got {num_classes!r}")
        self.num_classes = num_classes
        where = next(self.parameters())
        for name in self.heads:
            self.add_module(name, self._new_head().to(device=where.device, dtype=where.dtype).train(self.training))
        self.recipe.get("kwargs", {})["num_classes"] = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that their layers exempt from weight decay (position tables, tokens)."""
        names = set()
        for prefix, module in self.named_modules():
            for name in getattr(module, "no_decay", ()):
                names.add(f"{prefix}.{name}" if prefix else name)
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups for layer-wise learning rates: the stem, then stages or blocks, then the rest."""
        ends = "|".join(["norm", "output_norms", "neck", "fc_norm", *self.heads])
        first = rf"^(?!stages\.|{ends})"
        if coarse:
            return {"stem": first, "blocks": r"^stages\.(\d+)"}
        last = (rf"^(?:{ends})", (99999,))
        if not isinstance(self.stages[0], Stage):
            return {"stem": first, "blocks": [(r"^stages\.(\d+)", None), last]}
        return {
            "stem": first,
            "blocks": [
                (r"^stages\.(\d+)\.down", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),  # timm's number for "with the group before"
                last,
            ],
        }


class _Unfilled(TorchFunctionMode):
    """No random numbers for tensors that hold none: on the meta device, drawing them is half the time of a build."""

    DRAWS = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_", "kaiming_uniform_", "kaiming_normal_"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build(recipe: dict[str, Any], device: str | None = None, **changes: Any) -> Backbone:
    """A model from a `recipe` (as `create_model` leaves it on the model), without weights."""
    kwargs = recipe["kwargs"] | changes
    where = torch.device(device or torch.get_default_device())
    with where, _Unfilled() if where.type == "meta" else contextlib.nullcontext():
        model = recipe["cls"](**kwargs)
    model.recipe = {"cls": recipe["cls"], "name": recipe["name"], "kwargs": dict(kwargs)}
    return model
