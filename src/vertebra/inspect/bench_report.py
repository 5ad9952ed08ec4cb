"""Tables of `bench` as files: csv in and out, the facts beside it, and accuracy against speed as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.files import write_atomic
from .bench_figures import COLUMNS, Row

TEXT = ("model", "family", "precision", "peer", "peer_weights", "peer_format", "peer_train_format", "ratios_of")
SHOWN = {  # column of the terminal -> column of the row
    "model": "model",
    "precision": "precision",
    "samples/s": "infer_samples_per_sec",
    "latency ms": "infer_latency",
    "peak MiB": "infer_peak_mib",
    "of matmul": "infer_matmul_share",
    "ratio": "infer_ratio",
    "latency ratio": "latency_ratio",
    "memory ratio": "infer_peak_ratio",
    "train samples/s": "train_samples_per_sec",
    "train MiB": "train_peak_mib",
    "train ratio": "train_ratio",
    "train memory ratio": "train_peak_ratio",
    "deployed samples/s": "deploy_samples_per_sec",
    "deployed ratio": "deploy_ratio",
    "to float32": "deploy_ratio_float32",
}
RATIOS = tuple(column for column in COLUMNS if "ratio" in column and column != "ratios_of")
LARGEST = 16 * 2**20  # bytes of a csv file; a row of ours has some 600


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """`rows` as csv with all of `COLUMNS`, whole or not at all."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows([_cell(row.get(column)) for column in COLUMNS] for row in rows)
    write_atomic(path, text.getvalue().encode())


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a csv file of ours or of timm's benchmark.py; unknown columns are left out, empty cells are None.

    Raises ValueError that names file and row for anything that is no such table: too large, no text, columns missing
    or double, names of odd characters, figures that are no positive finite numbers, a network twice.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            content = f.read(LARGEST + 1)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    if len(content) > LARGEST:
        raise ValueError(f"{path}: more than {LARGEST // 2**20} MiB, no table of measurements")
    try:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a csv file ({e})") from None
    header = lines[0] if lines else []
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: a column twice")
    if missing := [c for c in ("model", "infer_samples_per_sec") if c not in header]:
        wanted = "it needs those of vertebra bench or of timm's benchmark"
        raise ValueError(f"{path}: no column {', '.join(missing)}; {wanted}")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise ValueError(f"{path}, row {number}: {len(line)} cells under {len(header)} columns")
        given = {column: cell for column, cell in zip(header, line, strict=True) if column in COLUMNS}
        rows.append(dict.fromkeys(COLUMNS) | {c: _value(c, cell, f"{path}, row {number}") for c, cell in given.items()})
    seen = [(row["model"], row["precision"], row["infer_img_size"], row["infer_batch_size"]) for row in rows]
    if len(set(seen)) < len(seen):
        twice = next(key for key in seen if seen.count(key) > 1)
        raise ValueError(f"{path}: {twice[0]} twice at the same precision and size")
    return rows


def _value(column: str, cell: str, where: str) -> Any:
    if cell == "":
        if column == "model":
            raise ValueError(f"{where}: no model")
        return None
    if column == "error":
        return cell[:300] if cell.isprintable() else "unreadable"
    if column in TEXT:
        if re.fullmatch(r"[\w][\w.\-/ ]{0,199}", cell, re.ASCII) is None:
            raise ValueError(f"{where}: {column} is {cell[:40]!a}, which is no name")
        return cell
    try:
        value = float(cell) if len(cell) <= 40 else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0) or (value == 0 and "peak" not in column and "macs" not in column):
        raise ValueError(f"{where}: {column} is {cell[:40]!a}, not a positive number")
    return int(value) if column.endswith(("_size", "rounds")) and value.is_integer() else value


def begin(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> list[Row]:
    """Make `folder` ready; the rows of an earlier run with the same settings, ValueError where they were others."""
    folder.mkdir(parents=True, exist_ok=True)
    about = json.loads(json.dumps({"settings": settings, "machine": facts, "columns": COLUMNS}))
    path = folder / "bench.json"
    if path.exists():
        try:
            old = json.loads(path.read_bytes()[:LARGEST])
            kept = {part: dict(old[part]) for part in ("settings", "machine")}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}: not written by vertebra bench; give another --out") from None
        for part, was in kept.items():
            now = about[part]
            for key in [*now, *(key for key in was if key not in now)]:
                if was.get(key) != now.get(key):
                    other = f"{key} {was.get(key)!a:.80}, now {now.get(key)!r}"
                    raise ValueError(f"{folder} has rows measured with {other}; give another --out")
        table = folder / "bench.csv"
        return read_rows(table) if table.exists() else []
    if (folder / "bench.csv").exists():
        raise ValueError(f"{folder} has a bench.csv without the bench.json that says how it was measured")
    write_atomic(path, (json.dumps(about, indent=1) + "\n").encode())
    return []


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells for a terminal: the columns of `SHOWN` that any row fills; a last row of geometric means."""
    shown = {head: column for head, column in SHOWN.items() if any(row[column] is not None for row in rows)}
    if any(row["peer_weights"] == "unequal" for row in rows):  # then their ratios are to be read with care
        shown["weights"] = "peer_weights"
    cells = [tuple(_short(row[column]) for column in shown.values()) for row in rows]
    means = {column: geometric_mean(row[column] for row in rows) for column in shown.values() if column in RATIOS}
    if len(rows) > 1 and means:
        precisions = sorted({row["precision"] for row in rows}, key=lambda p: (p != "float32", p))
        for precision in precisions:
            own = [row for row in rows if row["precision"] == precision]
            mean: Row = {c: geometric_mean(row[c] for row in own) for c in means}
            mean |= {"model": "geometric mean", "precision": precision}
            cells.append(tuple(_short(mean.get(column)) for column in shown.values()))
    return tuple(shown), cells


def geometric_mean(values: Any) -> float | None:
    """Of what is not None; None of nothing."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 1000 else _cell(value)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Published top-1 accuracy against measured samples a second, a panel per precision; ours, deployed, the peer."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs matplotlib: pip install matplotlib; the table is written") from None
    good = [row for row in rows if isinstance(row["top1"], int | float) and row["infer_samples_per_sec"]]
    precisions = list(dict.fromkeys(row["precision"] for row in good))
    if not precisions:
        return
    figure = Figure((7 * len(precisions), 6), layout="constrained")
    sides = (
        ("infer_samples_per_sec", "o", "vertebra"),
        ("deploy_samples_per_sec", "^", "vertebra, deployed"),
        ("peer_infer_samples_per_sec", "x", "peer"),
    )
    for axes, precision in zip(figure.subplots(1, len(precisions), squeeze=False)[0], precisions, strict=True):
        own = [row for row in good if row["precision"] == precision]
        for column, marker, label in sides:
            points = [(row[column], row["top1"]) for row in own if row[column]]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, s=24, label=label)
        for row in own:
            where = (row["infer_samples_per_sec"], row["top1"])
            axes.annotate(row["model"], where, (3, 3), textcoords="offset points", fontsize=6)
        axes.set(xscale="log", xlabel="samples a second", ylabel="published top-1 accuracy (%)", title=precision)
        axes.grid(alpha=0.3)
        axes.legend()
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bench"}):
        figure.savefig(content, format="png", dpi=120)
    write_atomic(path, content.getvalue())
