"""Checkpoints in and out: official files or ours, safetensors or torch, checked before anything is changed.

Each model class says in ``OFFICIAL`` how our names map to the official ones, in one direction. The other direction is
the same rules read backwards over the model's own state; what a model lacks or gains against the published network (no
head, output norms, fused form) is found by comparing with a twin of it on the meta device.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, build
from .download import fetch

_WRAPPERS = ("state_dict_ema", "model_ema", "ema_model", "ema", "state_dict", "model_state", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_SHOWN = 6


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the model is as it was."""


@dataclass
class LoadReport:
    """What `load_checkpoint` did: names in the naming of the file where they come from it, else ours."""

    naming: str = "ours"  # "ours" or "official"
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # the model has them, the file should have had them
    fresh: list[str] = field(
        default_factory=list
    )  # the model has them, the published network does not: left as they were
    unused: list[str] = field(default_factory=list)  # the published network has them, this model does not (its head)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)  # resampled tables, adapted stems


# --- reading -------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: a folder, not a file" if path.is_dir() else f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":  # eight bytes of length, then JSON
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
    if path.suffix == ".npz":
        import numpy

        try:
            with numpy.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except Exception as error:  # zip, header and dtype faults are of many kinds
            raise CheckpointError(f"{path}: not a whole archive of plain arrays ({str(error)[:200]})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # official files keep their options; plain data
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?i)unsupported (?:global|class)\S*(?: GLOBAL)? (\S+)", str(error))
        if named is None:
            raise CheckpointError(f"{path}: cannot be read, truncated or no checkpoint") from None
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values ({named[1]}) and could run code when "
            "opened. Save its state dict alone: torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be read, truncated or no checkpoint ({str(error)[:200]})") from None


def _unwrap(found: Any, what: str) -> dict[str, Tensor]:
    """The state dict inside wrapper keys, without prefixes that all its names share."""
    for _ in range(4):
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{what}: holds {type(found).__name__}, not a state dict")
        inner = next((found[k] for k in _WRAPPERS if isinstance(found.get(k), Mapping) and found[k]), None)
        if inner is None:
            break
        found = inner
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f"{what}: holds no tensors under names")
    return state


def strip_prefixes(state: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers: while that makes more names known, or all share one and none is known."""
    for _ in range(4):
        shared = next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
        if shared and not known & state.keys():
            state = {k.removeprefix(shared): v for k, v in state.items()}
            continue
        best, hits = None, len(known & state.keys())
        for prefix in _PREFIXES:
            shorter = {k.removeprefix(prefix): v for k, v in state.items()}
            if len(shorter) == len(state) and len(known & shorter.keys()) > hits:
                best, hits = shorter, len(known & shorter.keys())
        if best is None:
            break
        state = best
    return state


def _source(source: Any, sha256: str) -> tuple[dict[str, Tensor], str]:
    if isinstance(source, Mapping):
        return _unwrap(source, "the given state dict"), "the given state dict"
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"a checkpoint is a path, a URL or a state dict, not {type(source).__name__}")
    text = os.fspath(source)
    path = fetch(text, sha256=sha256) if re.match(r"https?://", text) else Path(text).expanduser()
    return _unwrap(_read_file(path), text), text


def read_checkpoint(source: Any, sha256: str = "") -> dict[str, Tensor]:
    """The tensors of `source` (path, URL or state dict) by name, read safely; CheckpointError where they cannot be."""
    return _source(source, sha256)[0]


# --- names ----------------------------------------------------------------------------------------------------------


def official_name(model: Backbone, name: str) -> str:
    """The official name of our tensor `name`: its rules, applied in order."""
    for pattern, replacement in model.OFFICIAL:  # a class attribute, or a property where it depends on the sizes
        name = re.sub(pattern, replacement, name)
    return name


def _names(model: Backbone) -> dict[str, str]:
    """Official name of each of the model's tensors; RuntimeError where two of ours meet (a fault in the rules)."""
    names = {ours: official_name(model, ours) for ours in model.state_dict()}
    if len(set(names.values())) != len(names):
        raise RuntimeError(f"the name rules of {type(model).__name__} are not one to one")
    return names


def to_official(model: Backbone | nn.Module) -> dict[str, Tensor]:
    """The official state dict of `model`: parameters and running statistics under the official names.

    Of a network from `vertebra.segmentation`, mmsegmentation's.
    """
    if not isinstance(model, Backbone):  # a whole network around one
        from .tasks.whole import whole_official

        return whole_official(model)
    names = _names(model)
    return {names[k]: v.detach() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def _twin(model: Backbone) -> Backbone | None:
    """The published classification network of `model` (with a head, whatever the model has), on the meta device."""
    from .deploy import fuse

    if not model.recipe:
        return None
    classes = model.recipe["kwargs"].get("num_classes") or 1000
    try:
        twin = build(model.recipe, "meta", features_only=False, out_indices=None, num_classes=classes).eval()
    except ValueError:  # the variant exists as a dense version only
        return None
    fused = model.recipe.get("fused")
    return twin if fused is None else fuse(twin, published=fused)


# --- loading --------------------------------------------------------------------------------------------------------


def _stem_weight(model: Backbone, ours: str, tensor: Tensor, want: torch.Size) -> Tensor | None:
    """An image stem's weight (O, 3, *K) for other input channels: repeated, rescaled to equal response.

    One channel gets the sum, so that a grey image gives what its three equal channels gave.
    """
    same = tensor.ndim == len(want) and tensor.shape[0] == want[0] and tensor.shape[2:] == want[2:]
    if not same or ours.startswith("stages.") or want[1] != model.in_chans:
        return None
    if want[1] == 1:
        return tensor.sum(1, keepdim=True)
    repeats = -(-want[1] // tensor.shape[1])
    wide = tensor.repeat(1, repeats, *(1,) * (tensor.ndim - 2))[:, : want[1]]
    return wide * (tensor.shape[1] / want[1])


def _adapted(model: Backbone, ours: str, tensor: Tensor) -> Tensor | None:
    owner, _, leaf = ours.rpartition(".")
    adapt = getattr(model.get_submodule(owner), "adapt", None)
    return adapt(leaf, tensor) if callable(adapt) else None


def load_checkpoint(
    model: Backbone | nn.Module,
    source: Any,
    strict: bool = True,
    *,
    new_head: bool = False,
    new_stem: bool = False,
    sha256: str = "",
) -> LoadReport:
    """Load `source` (path, URL or state dict; official naming or ours, recognised by itself) into `model`.

    Wrapper keys (model, state_dict, ema, ...) and prefixes (module., backbone.) are taken off; position tables of
    another size are resampled; constant buffers of the official code may be there or not. new_head leaves a head of
    another number of classes as it is; new_stem fits an image stem to another number of input channels. With
    strict=False what fits is loaded and the rest is reported.

    Raises CheckpointError, leaving the model untouched, for a file that cannot be read safely or does not fit; it names
    what is missing, unexpected or misshapen.
    """
    state, what = _source(source, sha256)
    if not isinstance(model, Backbone):  # a whole network around one
        from .tasks.whole import load_whole

        return load_whole(model, state, what, strict, new_head, new_stem)
    state = model.translate(state)
    names = _names(model)
    twin = _twin(model)
    known_ours = set(names) | (set(twin.state_dict()) if twin is not None else set())
    known_theirs = set(names.values()) | (set(_names(twin).values()) if twin is not None else set())
    ours_first, theirs_first = strip_prefixes(state, known_ours), strip_prefixes(state, known_theirs)
    official = len(known_theirs & theirs_first.keys()) > len(known_ours & ours_first.keys())
    state = theirs_first if official else ours_first
    key = names if official else {k: k for k in names}  # ours -> the file's name
    twin_keys = (
        (set(_names(twin).values()) if official else set(twin.state_dict())) if twin is not None else set(key.values())
    )
    report = LoadReport("official" if official else "ours")
    constants = {
        k: state.pop(k)
        for k in list(state)
        if k not in twin_keys and any(re.search(p, k) for p in type(model).CONSTANT)
    }

    own = model.state_dict()
    heads = tuple(f"{h}." for h in type(model).heads)
    new: dict[str, Tensor] = {}
    for ours, theirs in key.items():
        want = own[ours]
        if theirs not in state:
            if not ours.endswith("num_batches_tracked"):
                expected = theirs in twin_keys and not (new_head and ours.startswith(heads))
                (report.missing if expected else report.fresh).append(theirs)
            continue
        tensor = state.pop(theirs)
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            report.misshapen.append(f"{theirs}: not a plain dense tensor")
            continue
        if tensor.is_floating_point() != want.is_floating_point():
            report.misshapen.append(f"{theirs}: {tensor.dtype} in the file, {want.dtype} in the model")
            continue
        if tensor.shape != want.shape:
            fitted = None
            if ours.startswith(heads) and new_head:
                report.fresh.append(theirs)
                continue
            if new_stem and tensor.ndim == want.ndim:
                fitted = _stem_weight(model, ours, tensor, want.shape)
            fitted = _adapted(model, ours, tensor) if fitted is None else fitted
            if fitted is None or fitted.shape != want.shape:
                report.misshapen.append(
                    f"{theirs}: {tuple(tensor.shape)} in the file, {tuple(want.shape)} in the model"
                )
                continue
            report.adapted.append(theirs)
            tensor = fitted
        new[ours] = tensor
        report.loaded.append(theirs)
    for theirs in state:
        if theirs.endswith("num_batches_tracked") and theirs not in twin_keys:
            continue
        (report.unused if theirs in twin_keys else report.unexpected).append(theirs)
    if (report.missing or report.unexpected or report.misshapen) and (strict or not report.loaded):
        raise CheckpointError(_complaint(model, what, report, len(key)))
    model.load_state_dict(own | new)
    model.adopt(constants)
    return report


def _complaint(model: Backbone, what: str, report: LoadReport, total: int) -> str:
    def some(label: str, names: list[str]) -> str:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{more}" if names else ""

    parts = [
        some("missing", report.missing), some("unexpected", report.unexpected), some("misshapen", report.misshapen),
    ]  # fmt: skip
    name = model.recipe.get("name", type(model).__name__)
    misfit = "; ".join(p for p in parts if p)
    return f"{what} does not fit {name} ({report.naming} naming): {misfit}. {_advice(model, report, total)}"


def _advice(model: Backbone, report: LoadReport, total: int) -> str:
    """What to do, from the kind of misfit."""
    have = set(report.unexpected)
    fused = "fused" in model.recipe
    if have and model.recipe and not fused:
        from .deploy import fuse

        plain = _twin(model)
        names = {} if plain is None else _names(fuse(plain))
        deployed = set(names.values() if report.naming == "official" else names)
        if deployed and len(deployed & have) > len(have) / 2:
            return "The file holds the fused (deploy) structure: load it into vertebra.fuse(model.eval())."
    if fused and report.missing:
        return "The model is fused; load an unfused checkpoint before vertebra.fuse."
    heads = tuple(f"{h}." for name in type(model).heads for h in (name, official_name(model, f"{name}.")[:-1]))
    if report.misshapen and not report.missing and not report.unexpected:
        if all(m.startswith(heads) for m in report.misshapen):
            return "For another number of classes pass num_classes to create_model(checkpoint=...), or new_head=True."
        return "Build the model with the file's options; create_model(in_chans=..., checkpoint=...) fits a stem."
    if len(report.loaded) < total / 2:
        return "Is it a file of another model? See vertebra.list_models()."
    return "Build the variant the file belongs to, or pass strict=False to load what fits."


def save_checkpoint(model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's weights in our naming as safetensors: to a temporary file beside `path`, then renamed."""
    from safetensors.torch import save_file

    target = Path(path)
    name = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with open(name, "xb") as empty:
        mode = os.fstat(empty.fileno()).st_mode & 0o777
    try:
        tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, name, dict(metadata or {}))
        os.chmod(name, mode)  # safetensors makes files for their owner alone
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, target)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
