"""Several models under one budget: trained alike, tested alike, and what each costs."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..inspect import Cost, measure_cost, training_memory
from ..inspect.cost import record_attention
from .build import blank, expand, make_loss, make_model, make_task, threads
from .config import Config, ConfigError
from .dense import DENSE
from .files import write_atomic
from .fitting import fit, resume
from .loop import TrainError
from .plots import write_plots
from .run import Run, RunError
from .watch import Watch

COLUMNS = (
    "model",
    "accuracy",
    "spread",
    "params (M)",
    "GMACs",
    "latency (ms)",
    "training (samples/s)",
    "training memory (MiB)",
)


@dataclass(frozen=True)
class Comparison:
    """One model: test accuracy (or the task's other figure; mean over seeds, largest minus smallest), and its cost.

    GMACs and median latency are of one sample as it was trained, latency and training throughput on this machine;
    `memory_mib` is what forward and backward of one batch hold at most on the CPU, weights not counted (as worked off:
    a part of a batch where `accumulate` is above 1). What a detector costs depends on what it finds; of a cost that
    cannot be had the figure is NaN. One that failed has an `error` and figures that are NaN.
    """

    name: str
    accuracy: float
    spread: float
    params_m: float
    gmacs: float
    latency_ms: float
    images_per_second: float
    memory_mib: float
    accuracies: tuple[float, ...]
    score: str = "accuracy"
    error: str | None = None

    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        if self.error is not None:
            return (self.name, f"failed: {self.error}", *["-"] * (len(COLUMNS) - 2))
        numbers = (
            f"{self.params_m:.3f}",
            f"{self.gmacs:.4f}",
            f"{self.latency_ms:.2f}",
            f"{self.images_per_second:.0f}",
            f"{self.memory_mib:.1f}",
        )
        return (self.name, f"{self.accuracy:.4f}", f"{self.spread:.4f}", *numbers)


def with_mixers(config: Config, mixers: Sequence[str]) -> dict[str, Config]:
    """The same composed network once with each of the `mixers` in all of its stages, by the mixer's name.

    Raises ConfigError where the configuration's model is not composed.
    """
    config = expand(config)
    if config.model != "composed":
        raise ConfigError(f"mixers can be exchanged in composed networks only, {config.model} is none")
    return {name: config.model_copy(update={"overrides": config.overrides | {"mixers": name}}) for name in mixers}


def compare(
    configs: Mapping[str, Config], out: str | Path, seeds: int = 1, watch: Watch | None = None
) -> list[Comparison]:
    """Train every configuration with `seeds` seeds, each into its folder under `out`, and tabulate them.

    Runs that are in `out` already are continued or, when finished, taken as they are, so that a broken comparison can
    be started again. Writes compare.csv, compare.md, compare.png, .svg and .html (see `plots`). A configuration that
    cannot be used or whose training breaks off is listed with its error, and the others go on; if none is left, that
    error is raised. Raises DataError, and RunError for a folder that holds another run.
    """
    out, rows = Path(out), []
    first: ConfigError | TrainError | None = None
    none = math.nan
    for name, config in configs.items():
        folders = [out / name.replace("/", "_") / f"seed{seed}" for seed in range(seeds)]
        try:
            runs = [_run(config.model_copy(update={"seed": i}), folder, watch) for i, folder in enumerate(folders)]
            rows.append(_row(name, runs, watch or Watch()))
        except (ConfigError, TrainError) as e:
            first = first or e
            rows.append(Comparison(name, none, none, none, none, none, none, none, (), error=str(e)))
        if any(row.error is None for row in rows):
            _write(out, rows)  # after each: what is done is not lost with the rest
    if first is not None and all(row.error is not None for row in rows):
        raise first
    return rows


def _run(config: Config, folder: Path, watch: Watch | None) -> Run:
    if (folder / "config.json").exists():
        run, asked = Run.open(folder), expand(config).model_dump(exclude_defaults=True)
        there = run.config.model_dump()
        other = sorted(key for key, value in asked.items() if there[key] != value)
        if other:
            raise RunError(f"{folder}: holds a run with another {', '.join(other)}; choose another folder")
        if (folder / "last.pt").exists():
            if not (folder / "result.json").exists():
                resume(folder, watch=watch)
            return run
        (folder / "config.json").unlink()  # it stopped before its first epoch was over: nothing to continue
    fit(config, folder, watch)
    return Run.open(folder)


def _row(name: str, runs: Sequence[Run], watch: Watch) -> Comparison:
    results = [run.read_json("result.json") for run in runs]
    score = results[0]["score"]
    found = [result[f"test_{score}"] for result in results]  # null is a figure that does not exist
    accuracies = tuple(math.nan if value is None else value for value in found)
    config, counts = runs[0].config, runs[0].data["counts"]
    assert config.epochs
    seconds = statistics.mean(result["seconds"] for result in results)
    with threads(config):
        model = make_model(config, runs[0].outputs)
        cost, memory = _cost(name, config, model, watch)
    return Comparison(
        name,
        statistics.mean(accuracies),
        max(accuracies) - min(accuracies),
        cost.params_m,
        cost.gmacs,
        cost.latency_ms,
        counts["train"] * config.epochs / seconds,
        memory / 2**20,
        accuracies,
        score,
    )


def _cost(name: str, config: Config, model: Any, watch: Watch) -> tuple[Cost, float]:
    """Cost of a sample, and bytes of a step; a dense network that refuses the size or the counting has no figures."""
    measure = _detector_cost if config.task == "detection" else measure_cost
    try:
        return measure(model, config.sides), step_memory(config, model)
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as e:
        if config.task not in DENSE:
            raise
        watch.note(f"{name}: its cost at {config.sides} cannot be measured ({' '.join(str(e).split())[:200]})")
        params = sum(p.numel() for p in model.parameters()) / 1e6
        return Cost(params, math.nan, math.nan), math.nan


def _detector_cost(model: Any, sides: Sequence[int], repeats: int = 3) -> Cost:
    """`measure_cost` of a detector, counted as it runs: on nothing but shapes there are no boxes to sort."""
    x, times = torch.rand(1, model.in_chans, *sides), []
    model.eval()
    with torch.no_grad():
        for i in range(repeats + 1):
            start = time.perf_counter()
            model(x)
            if i:
                times.append(time.perf_counter() - start)
        with FlopCounterMode(display=False) as counter, record_attention():
            model(x)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    return Cost(params, counter.get_total_flops() / 2e9, 1e3 * statistics.median(times))


class _Taught(nn.Module):
    """A detector that is given its targets: one object in every image."""

    prediction = "losses"

    def __init__(self, detector: Any, task: Any) -> None:
        super().__init__()
        self.detector, self.task, self.in_chans = detector, task, detector.in_chans

    def forward_outputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        targets = [target for image in x for target in self.task.blank(self.detector.num_classes, tuple(image.shape))]
        return self.task.outputs(self.detector, list(x), targets)


def step_memory(config: Config, model: Any) -> int:
    """Peak bytes of a step with the run's own loss, a teacher's share of it left out."""
    assert config.batch_size
    part = -(-config.batch_size // config.accumulate)
    if config.task == "detection":
        learns, task = make_loss(config, model), make_task(config)
        taught: Any = _Taught(model, task)
        return training_memory(taught, config.sides, part, lambda found: learns(found, None))
    try:
        criterion = make_loss(config, model)
    except ConfigError:  # it needs a teacher
        return training_memory(model, config.sides, part)
    with torch.inference_mode():
        prediction = model.eval()(blank(config))
    target = make_task(config).blank(prediction.shape[1], tuple(prediction.shape[1:]))
    target = target.expand(part, *target.shape[1:])
    return training_memory(model, config.sides, part, lambda found: criterion(found, target))


def _write(out: Path, rows: Sequence[Comparison]) -> None:
    table = io.StringIO(newline="")
    content: list[dict[str, Any]] = [
        {key: "" if value != value else value for key, value in asdict(row).items()} for row in rows
    ]
    writer = csv.DictWriter(table, list(content[0]))
    writer.writeheader()
    writer.writerows(content)
    write_atomic(out / "compare.csv", table.getvalue().encode())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in rows]
    write_atomic(out / "compare.md", ("\n".join(lines) + "\n").encode())
    write_plots(out, rows, COLUMNS)
