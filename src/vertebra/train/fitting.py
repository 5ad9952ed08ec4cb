"""From a configuration to a finished run folder."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from ..backbone import Backbone
from ..data import Source, open_source
from ..data.loader import Batch, Samples, TrainOrder, derive, eval_loader, train_loader
from ..tasks import Loss
from ..tasks.losses import TEACHER
from .balance import draw_weights
from .board import Board, check_board
from .build import (
    blank,
    expand,
    make_loss,
    make_model,
    make_task,
    make_transforms,
    model_info,
    outputs_of,
    resolve,
    threads,
)
from .config import Config, ConfigError, make_config, suggest
from .dense_report import draw_samples
from .files import remove_leftovers
from .loop import Trainer, eval_epoch, train_epoch
from .reliability import Guarded, lost_workers
from .report import Windows, write_report
from .run import Run, RunError
from .schedules import make_schedule
from .strategies import (
    Replicated,
    average_statistics,
    batch_norms,
    has_unused,
    is_sharded,
    load_whole,
    load_whole_optimizer,
    make_fabric,
    spread_out,
    synchronise_norms,
    whole,
)
from .task import Scores
from .teaching import fingerprint, make_teacher
from .use import load_best
from .watch import Watch


@dataclass(frozen=True)
class RunResult:
    """A finished run: figures of the test and of the best epoch's validation, seconds of both over all sittings.

    `score` names the figure that chose the best epoch: accuracy, auc or mse.
    """

    folder: Path
    score: str
    test: dict[str, float]
    val: dict[str, float]
    best_epoch: int
    seconds: float
    history: list[dict[str, Any]]
    skipped: dict[str, str]  # path -> reason

    @property
    def test_accuracy(self) -> float:
        """Share of right answers, in 0..1; KeyError where a sample has not one label."""
        return self.test["accuracy"]

    @property
    def val_accuracy(self) -> float:
        return self.val["accuracy"]


def fit(config: Config, out: str | Path | None = None, watch: Watch | None = None) -> RunResult:
    """Train a new run into `out` (default runs/<model>-<dataset>-<time>).

    Raises ConfigError, DataError or RunError for what cannot be started, TrainError for a loss that is not finite.
    """
    config = expand(config)
    model_info(config.model)  # an unknown name should not cost a scan of the data
    fabric = make_fabric(config)
    source = open_source(config.data, config.limit, **config.data_options)
    config = resolve(config, source)
    name = f"{config.model}-{source.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(fabric.broadcast(str(out or Path("runs") / name)))
    with threads(config):
        trainer, order = _trainer(config, source, fabric, watch or Watch(), start=True)
        problem = None
        if fabric.is_global_zero:
            try:
                Run.create(folder, config, source)
                remove_leftovers(folder)
            except RunError as e:
                problem = str(e)
        problem = fabric.broadcast(problem)
        if problem is not None:  # for all: nobody is left waiting
            raise RunError(problem)
        return _continue(Run.open(folder), source, trainer, order, {"epoch": 0, "history": [], "best": None})


def resume(folder: str | Path, data: str | None = None, watch: Watch | None = None, **machine: Any) -> RunResult:
    """Continue a run after its last finished epoch, exactly as if it had never stopped (`data`: where it lies now).

    `machine` are settings of MACHINE that are others now: a run of many processes goes on with one, and the other way
    round, with the same batches. Raises RunError if there is nothing to resume or the data is not the same any more,
    ConfigError for any other setting.
    """
    run = Run.open(folder)
    run, state = replace(run, config=_elsewhere(run.config, machine)), run.read_state()
    config = run.config
    fabric = make_fabric(config)
    source = open_source(data or config.data, config.limit, **config.data_options)
    if source.fingerprint() != run.data["fingerprint"]:
        raise RunError(f"{data or config.data}: not the data of {run.folder} any more (files, labels or splits differ)")
    with threads(config):
        trainer, order = _trainer(config, source, fabric, watch or Watch(), start=False)
        _restore(run, trainer, state)
        if state.get("teacher") != fingerprint(trainer.teacher):
            raise RunError(f"{config.teacher}: its weights are not those that taught {run.folder} so far")
        fabric.barrier()
        if fabric.is_global_zero:
            remove_leftovers(run.folder)
        return _continue(run, source, trainer, order, state)


def _restore(run: Run, trainer: Trainer, state: dict[str, Any]) -> None:
    try:
        load_whole(trainer.net, state["model"])
        load_whole_optimizer(trainer.optimizer.optimizer, state["optimizer"])
        trainer.schedule.load_state_dict(state["schedule"])
        if trainer.ema is not None:
            load_whole(trainer.ema.module, state["ema"])
        trainer.saved = str(run.folder / "last.pt")
        trainer.step, trainer.skipped = state["step"], dict(state["skipped"])
    except (KeyError, RuntimeError, ValueError, TypeError) as e:
        raise RunError(f"{run.folder / 'last.pt'}: does not fit the run ({' '.join(str(e).split())[:200]})") from e


MACHINE = ("accelerator", "devices", "nodes", "strategy", "workers", "threads")  # may change in the middle of a run


def _elsewhere(config: Config, machine: dict[str, Any]) -> Config:
    for key in machine:
        if key not in MACHINE:
            raise ConfigError(f"{key}: a run goes on as it began; only {', '.join(MACHINE)} may change")
    config = make_config(config.model_dump() | machine)
    processes = config.devices * config.nodes
    if config.batch_size and config.batch_size % processes:
        raise ConfigError(f"batch_size {config.batch_size} is not a multiple of {processes} processes")
    return config


def _trainer(config: Config, source: Source, fabric: Fabric, watch: Watch, start: bool) -> tuple[Trainer, TrainOrder]:
    assert config.batch_size and config.epochs and config.lr
    check_board(config)
    make_transforms(config)  # a policy that is not known is told before there is a run folder
    torch.manual_seed(derive(config.seed))
    net = make_model(config, outputs_of(source), start)
    teacher = make_teacher(config, source)
    loss, sharded = make_loss(config, net, teacher), config.strategy == "fsdp"
    spare, unused = _spare(config, net, teacher, loss, fabric)
    if isinstance(fabric.strategy, Replicated):
        fabric.strategy.unused = unused
    if fabric.world_size > 1 and batch_norms(net):
        if config.sync_bn:
            synchronise_norms(net)
        elif fabric.is_global_zero:
            share = config.batch_size // fabric.world_size
            (watch or Watch()).note(f"batch norm sees {share} samples at a time; with sync_bn=true it sees them all")
    ema = None
    if sharded:
        ema = _ema(config, net)  # what is spread cannot be copied any more
        for one in (net,) if ema is None else (net, ema.module):
            spread_out(one, fabric)
    try:
        optimizer = create_optimizer_v2(
            net,
            config.opt,
            lr=config.scaled_lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **config.opt_options,
        )
    except (AssertionError, ValueError, TypeError) as e:
        from timm.optim import list_optimizers

        raise ConfigError(
            f"opt: {config.opt!r} cannot be used{suggest(config.opt, map(str, list_optimizers()))} ({e})"
        ) from e
    order = TrainOrder(
        len(source.splits["train"]),
        config.batch_size,
        config.seed,
        fabric.global_rank,
        fabric.world_size,
        draw_weights(config.balance, source.splits["train"]),
        config.repeats,
    )
    steps = config.epochs * len(order)
    schedule = make_schedule(config, optimizer, steps)
    model, wrapped = fabric.setup(net, optimizer, move_to_device=not sharded)
    model.mark_forward_method("forward_outputs")
    ema = ema if sharded else _ema(config, net)
    if config.compile:  # after the copy for the average, which is tested as it is
        net.forward_outputs = torch.compile(net.forward_outputs)  # type: ignore[method-assign]
    watch = watch if fabric.is_global_zero else Watch()
    trainer = Trainer(config, fabric, net, model, make_task(config), loss, wrapped, schedule, ema, watch)
    trainer.teacher = None if teacher is None else fabric.to_device(teacher)
    trainer.blank, trainer.sharded = spare, sharded
    return trainer, order


def _spare(config: Config, net: Any, teacher: Any, loss: Loss, fabric: Fabric) -> tuple[Batch | None, bool]:
    """Of many processes: a batch of one blank sample, and whether the loss leaves parameters without gradient."""
    if fabric.world_size == 1 and config.strategy == "auto":
        return None, False
    image = blank(config)
    if config.task == "detection":  # what gets gradients depends on the objects of a batch
        objects = make_task(config).blank(net.num_classes, tuple(image.shape[1:]))
        return Batch(list(image), objects, torch.zeros(1, dtype=torch.long), []), True  # type: ignore[arg-type]
    with torch.enable_grad():
        outputs = net.eval().forward_outputs(image)
        if teacher is not None:
            outputs = outputs | {TEACHER: teacher(image)}
        prediction = outputs[net.prediction]
        target = make_task(config).blank(prediction.shape[1], tuple(prediction.shape[1:]))
        unused = has_unused(net, loss(outputs, target))
    return Batch(image, target, torch.zeros(1, dtype=torch.long), []), unused


def _ema(config: Config, net: Backbone) -> ModelEmaV3 | None:
    """timm's average of the weights, where it is wanted."""
    return None if config.ema is None else ModelEmaV3(net, decay=config.ema, use_warmup=config.ema_warmup)


def _continue(run: Run, source: Source, t: Trainer, order: TrainOrder, state: dict[str, Any]) -> RunResult:
    config, task = run.config, t.task
    assert config.epochs and config.batch_size and config.workers is not None
    (training, testing), zero = make_transforms(config), t.fabric.is_global_zero
    for bad in source.skipped:
        t.skipped.setdefault(bad.path, bad.reason)
    train = Samples(source.splits["train"], training, config.seed, task.target)
    shard = (2 * order.batch // order.world, config.workers, t.fabric.global_rank, t.fabric.world_size)
    loaders = {
        key: Guarded(
            eval_loader(Samples(source.splits[key], testing, target=task.target), *shard),
            {"val": "validation"}.get(key, key),
            t.skipped,
            config.max_skipped,
        )
        for key in ("val", "test")
    }
    loader = Guarded(train_loader(train, order, config.workers), "training", t.skipped, config.max_skipped)
    history, best = list(state["history"]), state["best"]
    board = Board(run.folder, state["epoch"]) if config.tensorboard and zero else None
    spare = t.fabric.to_device(t.blank.images) if t.sharded and t.blank else None
    with lost_workers(), t.watch as watch:
        for line in (*source.notes, *(f"skipped {path}: {reason}" for path, reason in t.skipped.items())):
            watch.note(line)
        watch.start(_title(run, source, t), config.epochs * len(order), t.step)
        for epoch in range(state["epoch"], config.epochs):
            began = time.perf_counter()
            order.epoch = epoch
            row = {"epoch": epoch + 1} | train_epoch(t, loader, epoch, len(source.classes))
            average_statistics([t.net] if t.ema is None else [t.net, t.ema.module], t.fabric)
            val = eval_epoch(t.fabric, t.tested, loaders["val"], task, source.classes, t.skipped, watch, blank=spare)
            row |= {f"val_{key}": value for key, value in val.metrics.items()}
            row["seconds"] = time.perf_counter() - began
            history.append(row)
            better = task.better(row, best, config.select)
            best = row if better else best
            _save(run, t, history, best, better)
            t.saved = str(run.folder / "last.pt")
            if board is not None:
                board.epoch(row)
            watch.epoch(row, config.epochs, task.score)
        t.fabric.barrier()
        _load_best(run, t.tested)
        scores = eval_epoch(t.fabric, t.tested, loaders["test"], task, source.classes, t.skipped, watch, blank=spare)
        chosen = {key.removeprefix("val_"): value for key, value in best.items() if key.startswith("val_")}
        seconds = sum(row["seconds"] for row in history)
        result = RunResult(run.folder, task.score, scores.metrics, chosen, best["epoch"], seconds, history, t.skipped)
        if zero:
            drawn = partial(_drawn, t, source, testing) if task.dense else None
            _finish(run, source, result, scores, None if t.sharded else _windows(t, source, testing), drawn)
        if board is not None:
            board.close()
        watch.finish(result)
    return result


def _title(run: Run, source: Source, t: Trainer) -> str:
    counts = ", ".join(f"{len(source.splits[key])} {key}" for key in ("train", "val", "test"))
    params = sum(p.numel() for p in t.net.parameters()) / 1e6
    config = run.config
    shape = "x".join(str(side) for side in (*config.sides, config.channels))
    what = f"{len(source.classes)} classes" if source.horizon is None else f"{source.horizon} steps ahead"
    return (
        f"{config.model} ({params:.2f} M parameters) on {source.name}: {counts}, {what}, "
        f"{shape}; {config.epochs} epochs -> {run.folder}"
    )


def _save(run: Run, t: Trainer, history: list[dict[str, Any]], best: dict[str, Any], better: bool) -> None:
    """last.pt comes last: whatever a kill interrupts, resuming from it writes the same other files again.

    All processes must call it; the first writes.
    """
    zero = t.fabric.is_global_zero
    net, optimizer = whole(t.net.state_dict(), zero), whole(t.optimizer.optimizer.state_dict(), zero)
    ema = None if t.ema is None else whole(t.ema.module.state_dict(), zero)
    if not zero:
        return
    if better:
        run.write_weights("best.safetensors", ema or net)
    run.write_weights("last.safetensors", ema or net)
    run.write_metrics(history)
    state = {
        "model": net,
        "optimizer": optimizer,
        "schedule": t.schedule.state_dict(),
        "ema": ema,
        "epoch": history[-1]["epoch"],
        "step": t.step,
        "history": history,
        "best": best,
        "skipped": t.skipped,
        "teacher": fingerprint(t.teacher),
    }
    run.write_state(state)


def _load_best(run: Run, model: Backbone) -> None:
    if is_sharded(model):
        load_whole(model, load_file(run.folder / "best.safetensors"))
    else:
        load_best(run, model)


def _windows(t: Trainer, source: Source, transform: Callable[[Tensor], Tensor]) -> Windows:
    """What the report asks again: position in the test split -> past, truth and forecast (n, steps)."""
    split = source.splits["test"]

    def window(i: int) -> tuple[Tensor, Tensor, Tensor]:
        past = split.read(i)
        with torch.inference_mode(), t.fabric.autocast():
            ahead = t.tested(t.fabric.to_device(transform(past)[None]))[0]
        return past, torch.as_tensor(split.target(i)), ahead.float().cpu()

    return window


def _drawn(t: Trainer, source: Source, transform: Callable[..., Any], scores: Scores) -> str:
    """Some test samples of dense prediction for the report."""

    def ask(sample: Tensor, target: Any) -> Any:
        image = transform(sample, target)[0]
        with torch.inference_mode(), t.fabric.autocast():
            return t.task.predict(t.tested, [t.fabric.to_device(image)])[0]

    t.tested.eval()
    ignore = 255 if t.config.ignore is None else t.config.ignore
    return draw_samples(source.splits["test"], source.classes, t.task, scores, ask, ignore)


def _finish(
    run: Run,
    source: Source,
    result: RunResult,
    scores: Scores,
    windows: Windows | None,
    drawn: Callable[[Scores], str] | None = None,
) -> None:
    summary = {
        "score": result.score,
        **{f"test_{key}": _number(value) for key, value in result.test.items()},
        **{f"val_{key}": _number(value) for key, value in result.val.items()},
        "test_samples": len(scores.rows),
        "classes": {n: {k: _number(v) for k, v in found.items()} for n, found in scores.classes.items()},
        "best_epoch": result.best_epoch,
        "seconds": round(result.seconds, 2),
        "skipped_count": len(result.skipped),
        "skipped": result.skipped,
    }
    run.write_json("result.json", summary)
    pictures = "" if drawn is None else drawn(scores)
    write_report(run, source, result.history, scores, summary, windows=windows, drawn=pictures)


def _number(value: float) -> float | None:
    """JSON has no NaN: a figure that does not exist is null."""
    return value if math.isfinite(value) else None
