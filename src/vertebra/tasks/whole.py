"""Checkpoints of whole networks: a backbone in a pyramid, and the necks and heads on it.

The published files of mmsegmentation have ``backbone.``, ``neck.``, ``decode_head.`` and ``auxiliary_head.``: the
first goes through the backbone's own rules, the others by name through the network's ``OFFICIAL`` rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..checkpoint import CheckpointError, LoadReport, load_checkpoint, strip_prefixes, to_official

INSIDE, OUTSIDE = "pyramid.backbone.", "backbone."  # where the backbone's tensors lie: ours, theirs
_OPTIONAL = ("auxiliary_head.",)  # parts that a file may hold without the network having them


def _official(model: nn.Module, name: str) -> str:
    rules: Sequence[tuple[str, str]] = getattr(model, "OFFICIAL", ())
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _rest(model: nn.Module) -> dict[str, str]:
    """Official name of each tensor outside of the backbone."""
    return {name: _official(model, name) for name in model.state_dict() if not name.startswith(INSIDE)}


def _check(model: Any) -> None:
    if not hasattr(model, "pyramid"):
        raise TypeError(f"a checkpoint is for a model of this package, not for {type(model).__name__}")


def whole_official(model: Any) -> dict[str, Tensor]:
    """The official state dict of a whole network: parameters and running statistics under the official names."""
    _check(model)
    own = model.state_dict()
    rest = {theirs: own[ours].detach() for ours, theirs in _rest(model).items() if not ours.endswith("batches_tracked")}
    return {OUTSIDE + name: tensor for name, tensor in to_official(model.pyramid.backbone).items()} | rest


def load_whole(
    model: Any, state: dict[str, Tensor], what: str, strict: bool = True, new_head: bool = False, new_stem: bool = False
) -> LoadReport:
    """What `load_checkpoint` does, for a network with a `pyramid`: all of it or, with CheckpointError, nothing.

    `new_head` leaves the layers named in the network's `last_layers` as they are where the file's are of another
    number of classes.
    """
    _check(model)
    own, backbone = model.state_dict(), model.pyramid.backbone
    theirs_known = {OUTSIDE + k for k in to_official(backbone)} | set(_rest(model).values())
    ours_first, theirs_first = strip_prefixes(state, set(own)), strip_prefixes(state, theirs_known)
    official = len(theirs_known & theirs_first.keys()) > len(set(own) & ours_first.keys())
    state = dict(theirs_first if official else ours_first)
    prefix = OUTSIDE if official else INSIDE
    inner = {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)}
    if official and inner and getattr(model, "own_heads", False):  # published heads are of another layout
        report = LoadReport("official", fresh=list(_rest(model)), unused=list(state))
        return _with_backbone(report, backbone, inner, prefix, what, strict, new_stem)
    if not any(name in state for name in (_rest(model).values() if official else _rest(model))):
        raise CheckpointError(
            f"{what}: holds a backbone alone, none of this network's heads: load it into model.pyramid.backbone"
        )
    if not inner:
        raise CheckpointError(f"{what}: holds heads alone, nothing under {prefix!r}")
    report = LoadReport("official" if official else "ours")
    new: dict[str, Tensor] = {}
    for ours, official_name in _rest(model).items():
        name, want = official_name if official else ours, own[ours]
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                # the levels that a pyramid adds are ours: no published network has them
                (report.fresh if official and ours.startswith("pyramid.") else report.missing).append(name)
            continue
        tensor = state.pop(name)
        if tensor.layout != want.layout or tensor.is_meta or tensor.is_floating_point() != want.is_floating_point():
            report.misshapen.append(f"{name}: {tensor.dtype} in the file, {want.dtype} in the model, both plain")
        elif tensor.shape != want.shape:
            if new_head and ours.startswith(tuple(f"{layer}." for layer in model.last_layers)):
                report.fresh.append(name)
            else:
                report.misshapen.append(f"{name}: {tuple(tensor.shape)} in the file, {tuple(want.shape)} in the model")
        else:
            new[ours] = tensor
            report.loaded.append(name)
    absent = tuple(part for part in _OPTIONAL if getattr(model, part[:-1], None) is None)
    for name in state:
        (report.unused if absent and name.startswith(absent) else report.unexpected).append(name)
    if strict and (report.missing or report.unexpected or report.misshapen):
        raise CheckpointError(_complaint(model, what, report))
    # the backbone first: it is what may still refuse
    report = _with_backbone(report, backbone, inner, prefix, what, strict, new_stem)
    model.load_state_dict(model.state_dict() | new)
    return report


def _with_backbone(
    report: LoadReport, backbone: Any, inner: dict[str, Tensor], prefix: str, what: str, strict: bool, new_stem: bool
) -> LoadReport:
    """Load `inner` into the backbone and put what that did in front of `report`."""
    try:
        found = load_checkpoint(backbone, inner, strict, new_stem=new_stem)
    except CheckpointError as error:
        raise CheckpointError(f"{what}, the part under {prefix!r}: {error}") from None
    for kind in ("loaded", "missing", "fresh", "unused", "unexpected", "misshapen", "adapted"):
        getattr(report, kind)[:0] = [prefix + name for name in getattr(found, kind)]
    return report


def _complaint(model: Any, what: str, report: LoadReport) -> str:
    kinds = {"missing": report.missing, "unexpected": report.unexpected, "misshapen": report.misshapen}
    parts = [f"{len(v)} {k}: {', '.join(v[:6])}{' ...' if len(v) > 6 else ''}" for k, v in kinds.items() if v]
    advice = "Build the network with the file's head and options, or pass strict=False to load what fits."
    if report.misshapen and not report.missing and not report.unexpected:
        last = [n for n in report.misshapen if n.startswith(tuple(f"{x}." for x in model.last_layers))]
        if len(last) == len(report.misshapen):
            advice = "For another number of classes pass num_classes as in the file, or new_head=True."
    elif report.missing and all(n.startswith(_OPTIONAL) for n in report.missing):
        advice = "Pass auxiliary=False: the file has no auxiliary head."
    return f"{what} does not fit this network ({report.naming} naming): {'; '.join(parts)}. {advice}"
