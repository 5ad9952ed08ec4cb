"""`vertebra.deploy`: a trained network made ready to run, with the same outputs, and what that changed measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..layers import kernels, ntuple
from .fusing import fuse
from .inputs import usual_sides
from .packing import pack

Precision = Literal["float32", "bfloat16"]
FORMAT = "vertebra deployed model 1"  # in the metadata of a saved file
_SEED, _NOISE = 0, 16  # inputs that drift is measured on where no samples are given


@dataclass(frozen=True)
class DeployReport:
    """What `deploy` did and what it changed.

    `error` is the largest difference of an output from the model's own in float32, relative to the model's largest;
    `agreement` the share of `samples` inputs whose largest logit is the same (None without logits). Both were measured
    on the inputs of `sizes`: seeded noise unless samples were given, and noise says little about real images.
    """

    precision: str
    compiled: bool
    packed: int  # linear layers and convolutions that oneDNN's kernels may run, where an input is large enough
    sizes: tuple[tuple[int, ...], ...]
    samples: int
    error: float
    agreement: float | None

    def __str__(self) -> str:
        agree = "" if self.agreement is None else f", top-1 agreement {self.agreement:.4f}"
        sizes = ", ".join("x".join(map(str, s)) for s in self.sizes)
        return (
            f"{self.precision}, {self.packed} layers packed{', compiled' if self.compiled else ''}; "
            f"on {self.samples} inputs ({sizes}): largest relative error {self.error:.1e}{agree}"
        )


def deploy(
    model: Backbone,
    precision: Precision = "float32",
    compile: bool = False,
    sizes: Sequence[int | Sequence[int]] | None = None,
    samples: Tensor | None = None,
) -> Backbone:
    """A copy of `model` for inference: the same outputs, sooner; what was measured is its ``deploy_report``.

    Batch norms are folded and branches merged (`fuse` with published=False), weights are frozen, on the CPU laid out
    once for oneDNN with shortcuts and activations inside its kernels (small float32 products stay torch's own), and
    position biases and masks are kept per input size. In bfloat16 weights and activations are, and inputs of another
    floating type are cast; the maps and logits that come out are bfloat16. The copy keeps the model's whole contract,
    features and state dict of the fused structure included, and can be saved (`save_deployed`). Plain and packed
    weights are both held in memory.

    Args:
        compile: also run through torch.compile in one graph (compiled at the first call, for minutes on a CPU).
        sizes: sides of inputs to prepare for, (*S) or one number each (default: the size the model is published with).
        samples: inputs (N, C, *S) to measure drift on, prepared as for the model; else noise of each of `sizes`.

    Raises ValueError for a model in training mode, an unknown precision and sizes the model cannot take.
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision {precision!r} is unknown; use float32 or bfloat16")
    if next(model.parameters()).dtype != torch.float32:
        raise ValueError(f"deploy takes the float32 model and casts it; this one is {next(model.parameters()).dtype}")
    wanted = [ntuple(s, model.ndim, "size") for s in sizes or [usual_sides(_backbone(model))]]
    ready, packed = _prepared(model, precision)
    if compile:
        ready.compile(fullgraph=True, options={"freezing": True} if _on_cpu(ready) else None)
    inputs = [samples] if samples is not None else [_noise(model, sides) for sides in wanted]
    error, agreement = _drift(model, ready, inputs)
    ready.deploy_report = DeployReport(
        precision,
        compile,
        packed,
        tuple(tuple(x.shape[2:]) for x in inputs),
        sum(len(x) for x in inputs),
        error,
        agreement,
    )
    return ready


def _prepared(model: Backbone, precision: str) -> tuple[Backbone, int]:
    """Everything that `deploy` does to the network but for measuring, and how many layers were packed."""
    dtype = getattr(torch, precision)
    with torch.inference_mode(False):  # in inference mode a weight would not count its changes
        ready = fuse(model, published=False).requires_grad_(False)
        ready.to(dtype)
    packed = pack(ready) if _on_cpu(ready) and kernels.present(dtype) else 0
    for module in ready.modules():
        module.__dict__["kept"] = {}  # see layers.cached.settled
    for part in ready.modules():
        if isinstance(part, Backbone):
            part.computes = dtype
    return ready, packed


def _backbone(model: nn.Module) -> Backbone:
    """The model itself, or the backbone under a head."""
    return next(m for m in model.modules() if isinstance(m, Backbone))


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _noise(model: Backbone, sides: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    x = torch.randn(_NOISE, model.in_chans, *sides, generator=generator)
    return x.to(next(model.parameters()).device)


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for part in parts for t in _tensors(part)]


def _drift(model: Backbone, ready: Backbone, inputs: Sequence[Tensor]) -> tuple[float, float | None]:
    """Worst relative error of `ready` on the inputs, and how often both name the same class."""
    error, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for x in inputs:
            for part in x.split(4):
                before, after = _tensors(model(part)), _tensors(ready(part))
                for a, b in zip(before, after, strict=True):
                    error = max(error, ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item())
                if model.prediction == "logits" and not getattr(model, "features_only", False) and model.num_classes:
                    hits = before[0].argmax(1) == after[0].argmax(1)  # (N,), or of every cell (N, *S)
                    same, count = same + int(hits.sum()), count + hits.numel()
    return error, same / count if count else None


# --- files ------------------------------------------------------------------------------------------------------------


def save_deployed(model: Backbone, path: str | os.PathLike) -> None:
    """Write a deployed model's weights, and what is needed to build it again, as one safetensors file.

    Raises ValueError for a model that `deploy` did not make, or that was built with options that no file can name.
    """
    from ..checkpoint import save_checkpoint
    from ..registry import model_info

    report: DeployReport | None = model.deploy_report
    if report is None:
        raise ValueError("save_deployed takes what vertebra.deploy returned; use save_checkpoint for other models")
    name = model.recipe["name"]
    usual = model_info(name).config
    options = {k: v for k, v in model.recipe["kwargs"].items() if v is not None and (k not in usual or usual[k] != v)}
    facts = {"name": name, "options": options, "report": asdict(report)}
    try:
        text = json.dumps(facts)
    except TypeError as error:
        raise ValueError(f"{model.recipe['name']} was built with an option that no file can hold: {error}") from None
    save_checkpoint(model, path, {"format": FORMAT, "model": text})


def load_deployed(path: str | os.PathLike) -> Backbone:
    """The deployed model of a file that `save_deployed` wrote, ready to run.

    Only names, numbers and tensors are read, nothing of the file is executed. Raises CheckpointError for a file that
    is no such file, is damaged, or does not fit the model it names.
    """
    from safetensors import SafetensorError, safe_open

    from ..checkpoint import CheckpointError
    from ..registry import create_model

    try:
        with safe_open(Path(path), framework="pt") as file:
            facts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no deployed model: save it with vertebra.save_deployed")
    try:
        found = json.loads(facts["model"])
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in found["options"].items()}
        report = DeployReport(**found["report"] | {"sizes": tuple(map(tuple, found["report"]["sizes"]))})
        if report.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision {report.precision!r} is unknown")
        for unwanted in ("pretrained", "checkpoint"):
            if unwanted in options:
                raise ValueError(f"option {unwanted!r} has no place in a file")
        ready, packed = _prepared(create_model(found["name"], **options).eval(), report.precision)
        ready.load_state_dict(state)
        ready.deploy_report = replace(report, compiled=False, packed=packed)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold the deployed model it names: {error}") from error
    return ready
