"""Export to torch.export programs, ONNX and ahead-of-time compiled packages, at any batch and any size.

The program is traced once, with symbolic batch and sizes. torch writes down for every trace the conditions that held
for the example: most say only that no symbolic size is one, because that decides which strides its fake tensors have.
They would make a program refuse a batch of one, a stage with one window or a last map of one cell, although the graph
computes the same there. They are replaced by what the model itself promises (every side at least ``min_size``), and the
file is run at sizes on both sides of those conditions and compared with the model before it takes its name.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import secrets
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..layers.cached import one_trace
from ..layers.space import ntuple
from .fusing import fuse as fuse_model
from .inputs import usual_sides

FORMATS = {"torch-export": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
TOLERANCE = {"torch-export": 1e-5, "onnx": 1e-4, "aoti": 1e-4}  # relative, of float32; one step of rounding in others
OPSET = 20
NOTES = "vertebra.json"  # the name of the metadata inside a .pt2 file; in ONNX it is the property "vertebra"
BATCHES = (1, 3)


class ExportError(RuntimeError):
    """A model that cannot be exported, or an artefact whose outputs differ; no file is left."""


@dataclass
class ExportReport:
    """What `export` made."""

    format: str
    path: Path
    seconds: float  # tracing, conversion and writing, without the verification
    bytes: int
    dynamic: tuple[str, ...]  # the input's axes that are free: "batch", "side 0", ...
    errors: dict[str, float] = field(default_factory=dict)  # input shape -> worst relative error; {} if not verified
    metadata: dict[str, Any] = field(default_factory=dict)  # what the file itself holds


class Exported:
    """An exported network: called with a tensor (B, C, *S) it gives what the model gave, a tensor or a list of maps.

    `format` is one of `FORMATS`, `metadata` what `export` wrote into the file.
    """

    def __init__(self, format: str, metadata: dict[str, Any], run: Callable[[Tensor], Sequence[Tensor]]):
        self.format, self.metadata, self._run = format, metadata, run

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        """Raises ValueError for an input that the file was not made for; machine code itself would not notice."""
        self._check(x)
        with torch.no_grad():
            found = list(self._run(x))
        return found if self.metadata.get("features") else found[0]

    def _check(self, x: Tensor) -> None:
        keys = ("in_chans", "ndim", "batch", "sizes", "min_size", "multiple")
        given, (chans, ndim, batch, sizes, least, multiple) = tuple(x.shape), (self.metadata[key] for key in keys)
        if len(given) != ndim + 2 or given[1] != chans:
            raise ValueError(f"input {given}: the file takes (B, {chans}, *S) with {ndim} sizes")
        if batch != "any" and given[0] != batch:
            raise ValueError(f"input {given}: the file takes batches of {batch}")
        if sizes == "any":
            if min(given[2:]) < least or any(side % multiple for side in given[2:]):
                of = f" and be a multiple of {multiple}" if multiple > 1 else ""
                raise ValueError(f"input {given}: every side must be at least {least}{of}")
        elif list(given[2:]) != list(sizes):
            raise ValueError(f"input {given}: the file takes sides {tuple(sizes)}")


class _Flat(nn.Module):
    """The network with a tuple of tensors as output, what all three formats can hold."""

    def __init__(self, model: nn.Module, maps: bool):
        super().__init__()
        self.model, self.maps = model, maps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.model.forward_intermediates(x) if self.maps else self.model(x)
        return tuple(y) if isinstance(y, list | tuple) else (y,)


# --- what is exported -------------------------------------------------------------------------------------------------


def _backbone(model: nn.Module) -> Backbone:
    """The backbone of what can be exported; ValueError for anything else."""
    inner = model if isinstance(model, Backbone) else getattr(getattr(model, "pyramid", None), "backbone", None)
    if not isinstance(inner, Backbone) or not isinstance(getattr(model, "min_size", None), int):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: a backbone or a segmentation network is needed"
            " (a detector's output is not a fixed set of tensors; export its backbone)"
        )
    if getattr(inner, "deploy_report", None) is not None:
        raise ValueError("a deployed model holds packed weights: export the model that it was made from")
    training = next((name or "the model" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(f"{training} is in training mode: call model.eval() before export")
    return inner


def _called(backbone: Backbone) -> str:
    """The model in messages."""
    return backbone.recipe.get("name") or type(backbone).__name__


def _up(side: int, multiple: int) -> int:
    """The next multiple."""
    return -(-side // multiple) * multiple


def _traced(least: int, ndim: int, multiple: int = 1) -> tuple[int, ...]:
    """The example's sides: no multiple of a window or a stride, several cells and windows in every stage."""
    unit = max(least, multiple)
    cells = (17, 19, 18) if unit <= 16 else (9, 10, 9)
    return tuple(_up(n * unit + 3 * (axis % 2), multiple) for axis, n in zip(range(ndim), cells, strict=False))


def _shapes(model: Any, usual: tuple[int, ...], free: bool, dynamic: bool, multiple: int) -> list[tuple[int, ...]]:
    """Input shapes at which an artefact is run: default, odd and minimum size, and one side of the minimum alone."""
    least, chans = model.min_size, model.in_chans
    sizes = [usual]
    if free:
        more = (5, 13, 21) if multiple == 1 else (multiple, 3 * multiple, 5 * multiple)
        sizes.append(tuple(side + n for side, n in zip(usual, more, strict=False)))
        sizes.append((_up(least, multiple),) * model.ndim)
        if model.ndim > 1:
            sizes.append((_up(least, multiple), *(_up(2 * least + 3, multiple) for _ in usual[1:])))
    return [(batch, chans, *size) for size in sizes for batch in (BATCHES if dynamic else (1,))]


def _metadata(model: Any, backbone: Backbone, usual: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """What a user of the file must know to feed it: plain values only."""
    from .. import __version__
    from ..registry import model_info

    name = backbone.recipe.get("name", "")
    found = {
        "vertebra": __version__,
        "model": name,
        "network": type(model).__name__,
        "in_chans": model.in_chans,
        "ndim": model.ndim,
        "min_size": model.min_size,
        "size": list(usual),
        "num_classes": getattr(model, "num_classes", 0),
    }
    inputs = model_info(name).inputs if name else None
    if inputs is not None and model.ndim == 2 and len(inputs.mean) == model.in_chans:
        found |= {key: getattr(inputs, key) for key in ("mean", "std", "channels", "crop", "interpolation")}
    return json.loads(json.dumps(found | more))  # tuples as lists, as they come back from the file


# --- tracing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_attention(format: str) -> Iterator[None]:
    """ONNX takes attention as its formula: the fused kernels' strides stop the conversion."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH) if format == "onnx" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(model: Any, example: Tensor, free: Sequence[int], multiple: int = 1) -> torch.export.ExportedProgram:
    """The program of `model` with the axes `free` of its input symbolic, sides as multiples of `multiple`."""
    from torch.fx.experimental import _config
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    dims: dict[int, Any] = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    if multiple > 1:
        dims |= {axis: multiple * torch.export.Dim(f"cells{axis - 2}") for axis in free if axis}
    with torch.no_grad(), one_trace(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(model, (example,), dynamic_shapes=(dims,) if free else None)
    value = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "x").meta["val"]
    for axis in free:
        if isinstance(value.shape[axis], int):
            raise ExportError(f"axis {axis} of the input became fixed at {value.shape[axis]} while tracing")
        least = 1 if axis == 0 else model.model.min_size
        side = value.shape[axis].node.expr
        program.range_constraints[side] = ValueRanges(_up(least, multiple) if axis else 1, int_oo)
        for symbol in side.free_symbols - {side}:
            program.range_constraints[symbol] = ValueRanges(_up(least, multiple) // multiple, int_oo)
    _drop_casts(program.graph)
    program._guards_code = []  # the example's conditions; see the top of this file
    return program


def _drop_casts(graph: torch.fx.Graph) -> None:
    """Without casts of what has the type already and the checks before them: a twelfth of TransNeXt's nodes."""
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is torch.ops.aten.to.dtype and node.args[1:] == (node.args[0].meta["val"].dtype,):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


# --- the three formats ------------------------------------------------------------------------------------------------


def _write_program(program: torch.export.ExportedProgram, file: Path, notes: dict[str, Any]) -> None:
    torch.export.save(program, file, extra_files={NOTES: json.dumps(notes)})


def _write_onnx(program: torch.export.ExportedProgram, file: Path, notes: dict[str, Any]) -> None:
    _need("onnx", "onnxscript")
    names = [f"map{i}" for i in range(notes["outputs"])] if notes["features"] else ["output"]
    made = torch.onnx.export(
        program, None, dynamo=True, opset_version=OPSET, verbose=False, input_names=["x"], output_names=names,
        custom_translation_table={torch.ops.aten.remainder.Scalar: _remainder}, optimize=False,
    )  # fmt: skip
    if made is None:
        raise ExportError("torch gave no ONNX program")
    _simplify(made.model)
    made.model.metadata_props["vertebra"] = json.dumps(notes)
    made.save(str(file), external_data=False)


def _simplify(model: Any) -> None:
    """Constants folded, what is twice there once: in place.

    torch's own `optimize` also rewrites patterns, one of them in the square of the nodes (240 s for TransNeXt, 3 s
    here), and drops "+ 1e-8". onnxruntime fuses what pays when it opens the file: six networks ran within 2 % of each
    other from either.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _remainder(x: Any, n: Any) -> Any:
    """x % n in ONNX, for a symbolic n too: onnxscript 0.7 takes numbers alone. Window tables count with it."""
    from onnxscript import opset20 as op

    n = op.CastLike(n, x)
    if x.dtype is not None and x.dtype.is_floating_point():
        return op.Sub(x, op.Mul(op.Floor(op.Div(x, n)), n))
    return op.Mod(x, n)


def _write_aoti(program: torch.export.ExportedProgram, file: Path, notes: dict[str, Any]) -> None:
    from torch._inductor import aoti_compile_and_package

    options = {"aot_inductor.metadata": {"vertebra": json.dumps(notes)}}
    aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


_WRITERS = {"torch-export": _write_program, "onnx": _write_onnx, "aoti": _write_aoti}


def _need(*names: str) -> None:
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"this needs {name}: pip install 'vertebra[export]'")


def _open_onnx(path: Path) -> Exported:
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own kinds, one for each stage of reading
        raise ExportError(f"{path}: onnxruntime cannot open it ({_line(error)})") from None
    notes = session.get_modelmeta().custom_metadata_map.get("vertebra")
    given = session.get_inputs()[0].name

    def run(x: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {given: x.detach().cpu().numpy()})]

    return Exported("onnx", _notes(notes, path), run)


def _open_program(path: Path) -> Exported:
    extra = {NOTES: ""}
    program = torch.export.load(path, extra_files=extra)
    return Exported("torch-export", _notes(extra[NOTES], path), program.module())


def _open_package(path: Path) -> Exported:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))
    return Exported("aoti", _notes(package.get_metadata().get("vertebra"), path), package)


def _notes(text: str | bytes | None, path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(text or "")
    except ValueError:
        notes = None
    if not isinstance(notes, dict):
        raise ExportError(f"{path}: not written by vertebra.export (its metadata is missing)")

    def counts(*values: Any) -> bool:
        return all(type(value) is int and value > 0 for value in values)

    batch, sizes = notes.get("batch"), notes.get("sizes")
    right = counts(*(notes.get(key) for key in ("in_chans", "ndim", "min_size")), notes.setdefault("multiple", 1))
    right = right and (batch == "any" or counts(batch))
    if not right or not (sizes == "any" or (isinstance(sizes, list) and counts(*sizes))):
        raise ExportError(f"{path}: its metadata does not say what the file takes")
    return notes


def _line(error: BaseException, length: int = 300) -> str:
    """The first words of what an error began with, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def load_exported(path: str | os.PathLike[str], trusted: bool = False) -> Exported:
    """Open a file that `export` wrote: a callable on tensors (B, C, *S) with `format` and `metadata`.

    ONNX files are plain data, parsed and checked by onnxruntime. A .pt2 file is not: torch unpickles and evaluates what
    is in it, and an "aoti" package is machine code. Both are opened with ``trusted=True`` only, for files from
    where one would run a program from.

    Raises ValueError for a .pt2 file without that and FileNotFoundError, ExportError for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if not zipfile.is_zipfile(path):
        return _open_onnx(path)
    if not trusted:
        raise ValueError(
            f"{path}: a .pt2 file can run code when it is opened: pass trusted=True if you trust its origin"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = any("/data/aotinductor/" in f"/{name}" for name in archive.namelist())
        with _quiet():
            return _open_package(path) if compiled else _open_program(path)
    except ExportError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ExportError(f"{path}: cannot be read ({_line(error)})") from None


# --- verification -----------------------------------------------------------------------------------------------------


def _outputs(y: Any) -> list[Tensor]:
    return list(y) if isinstance(y, list | tuple) else [y]


def _worst(found: Any, wanted: Any) -> float:
    """Largest difference over all outputs, relative to each one's largest value; infinite where shapes differ."""
    worst = 0.0
    for y, t in zip(_outputs(found), _outputs(wanted), strict=True):
        t = t.cpu().double()
        y = y.cpu().double()
        if y.shape != t.shape or not y.isfinite().all():
            return float("inf")
        worst = max(worst, ((y - t).abs().max() / t.abs().max().clamp(min=1e-12)).item())
    return worst


def _verify(run: Exported, model: nn.Module, shapes: Sequence[tuple[int, ...]], example: Tensor) -> dict[str, float]:
    """Worst relative error of `run` against `model` at each of `shapes`, on seeded noise; ExportError if too large."""
    limit = max(TOLERANCE[run.format], 2 * torch.finfo(example.dtype).eps)
    errors = {}
    for shape in shapes:
        name = "x".join(map(str, shape))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(example)
        with torch.no_grad():
            wanted = model(x)
        try:
            errors[name] = _worst(run(x), wanted)
        except Exception as error:  # a runtime's own kinds
            raise ExportError(f"the {run.format} file does not run at {name}: {_line(error)}") from None
        if not errors[name] <= limit:
            raise ExportError(f"the {run.format} file differs by {errors[name]:.1e} at {name}, allowed are {limit:.0e}")
    return errors


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str = "torch-export",
    *,
    sides: int | Sequence[int] | None = None,
    dynamic: bool | Literal["batch"] = True,
    multiple: int = 1,
    fuse: bool = True,
    features: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Write `model` to `path` so that it runs without its source code.

    Args:
        model: a backbone, or a segmentation network of `vertebra.segmentation`, in evaluation mode; it is not changed.
        to: "torch-export" (a program for `torch.export.load`), "onnx" (opset 20, weights inside), or "aoti" (machine
            code made by a C++ compiler for this machine's processor, for `torch._inductor.aoti_load_package`). The
            files of the first and the last end in .pt2.
        sides: the size to verify first, and the only one of a static file (default: the model's own, if need be rounded
            up to `multiple`).
        dynamic: free batch and sizes, from `model.min_size` up; "batch" fixes `sides`, False batch 1 too. A model whose
            `EXPORT` gives a reason keeps its size either way.
        multiple: free sizes are multiples of this; "aoti" takes minutes for most networks with 1, a minute or two with
            their largest stride, 32: rounded-up divisions become plain ones.
        fuse: export the fused network (`vertebra.fuse` with published=False); same outputs.
        features: export the list of feature maps: `forward` of a features_only model, else `forward_intermediates`.
        verify: run the file at the default, an odd and the smallest size, batches 1 and 3, and compare with the model:
            1e-5 relative for "torch-export", 1e-4 for the others.

    The file holds a JSON text of what its user must know (`ExportReport.metadata`): name, channels, smallest size,
    normalisation. It is written under another name and takes its own when it is verified. Raises ValueError for what
    cannot be asked, ExportError where tracing, writing or verifying fails: an older file at `path` stays as it was.
    """
    path = Path(path)
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; there are: {', '.join(FORMATS)}")
    if path.suffix != FORMATS[to]:
        raise ValueError(f"a file of format {to!r} is named *{FORMATS[to]}, got {path.name!r}")
    backbone = _backbone(model)
    maps = features or (backbone is model and backbone.features_only)
    if features and backbone is not model:
        raise ValueError("features=True exports a backbone's maps, a segmentation network has none")
    usual = usual_sides(backbone) if sides is None else ntuple(sides, backbone.ndim, "sides")
    if min(usual) < model.min_size:
        raise ValueError(f"sides {usual} are too small: every side needs at least {model.min_size}")
    if dynamic not in (True, "batch", False):
        raise ValueError(f'dynamic is True, "batch" or False, got {dynamic!r}')
    if multiple < 1 or (multiple > 1 and dynamic is not True):
        raise ValueError(f"multiple is at least 1, and 1 where sizes are not free (dynamic=True), got {multiple}")
    free = dynamic is True and not backbone.EXPORT
    if free and sides is None:
        usual = tuple(_up(side, multiple) for side in usual)
    elif free and any(side % multiple for side in usual):
        raise ValueError(f"sides {usual} are no multiples of {multiple}")
    axes = [0, *(range(2, 2 + backbone.ndim) if free else ())] if dynamic else []

    start = time.perf_counter()
    exported = copy.deepcopy(model) if not fuse else fuse_model(model, published=False)
    flat = _Flat(exported, maps and not backbone.features_only).eval().requires_grad_(False)
    traced = _traced(model.min_size, backbone.ndim, multiple) if free else usual
    example = next(model.parameters()).new_zeros((2 if dynamic else 1, backbone.in_chans, *traced))
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")  # beside it, for an atomic rename
    errors: dict[str, float] = {}
    try:
        try:
            with _quiet(), _plain_attention(to):
                program = _trace(flat, example, axes, multiple if free else 1)
                count = len(program.graph_signature.user_outputs)
                about = {"format": to, "features": maps, "outputs": count, "batch": "any" if dynamic else 1}
                about |= {"sizes": "any" if free else list(usual), "multiple": multiple if free else 1}
                notes = _metadata(model, backbone, usual, **about)
                _WRITERS[to](program, temporary, notes)
        except (ExportError, OSError):
            raise
        except Exception as error:  # each exporter has kinds of its own
            raise ExportError(f"{_called(backbone)} cannot be exported to {to}: {_line(error)}") from error
        seconds = time.perf_counter() - start
        size = temporary.stat().st_size
        if verify:
            shapes = _shapes(model, usual, free, bool(dynamic), multiple)
            errors = _verify(load_exported(temporary, True), flat, shapes, example)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    freed = tuple("batch" if axis == 0 else f"side {axis - 2}" for axis in axes)
    return ExportReport(to, path, seconds, size, freed, errors, notes)
