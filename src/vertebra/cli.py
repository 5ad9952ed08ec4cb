"""The command line: parses, calls, prints. Anything the user can mend is one line on stderr and exit code 2."""

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

app = typer.Typer(
    name="vertebra",
    help="Vision backbones from their papers: train, test and look them up.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


MACHINE = ("accelerator", "devices", "nodes", "strategy", "workers", "threads")  # may change in the middle of a run


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


# What only `train` takes; a name here is a field of train.Config, None means not given.
@app.command()
def train(
    model: Annotated[str | None, typer.Option(help="Name of a variant, as in vertebra list.")] = None,
    data: Annotated[str | None, typer.Option(help="digits, an image folder, or a folder of idx files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/<model>-<data>-<time>].")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, or a run's config.json.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped file of settings; list shows them.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run after its last finished epoch.")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="Over all devices.")] = None,
    lr: Annotated[float | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the square the model is given.")] = None,
    rgb: Annotated[bool | None, typer.Option("--rgb/--grey", help="Three channels or one, whatever the data.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many images a split.")] = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="Start from the published weights.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Start from this file or URL.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes that train together, of each machine.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines; started by torchrun on each.")] = None,
    strategy: Annotated[str | None, typer.Option(help="ddp: weights whole in each process; fsdp: spread.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
) -> None:
    """Train for the task of the data; with no options, a small classifier on handwritten digits in about a minute."""
    given = {key: value for key, value in locals().items() if value is not None}
    for key in ("out", "resume", "settings", "config", "recipe"):
        given.pop(key, None)
    if recipe == "list":
        recipes()
        return
    if rgb is not None:
        given["channels"] = 3 if given.pop("rgb") else 1
    settings = settings or []
    if resume is not None and (out or config or recipe or settings or set(given) - {"data", *MACHINE}):
        _fail("--resume takes its configuration from the run; only --data can be given with it, and the machine's: "
              + ", ".join(f"--{key}" for key in MACHINE))  # fmt: skip
    with _mendable():
        from .train import fit
        from .train import resume as go_on
        from .train.reading import build_config
        from .train.watch import Console

        if resume is not None:
            go_on(resume, data, Console(), **{key: given[key] for key in MACHINE if key in given})
        else:
            fit(build_config(given, settings, config, recipe), out, Console())


@app.command()
def recipes() -> None:
    """List the shipped recipes; vertebra train --recipe NAME takes one."""
    from .train.reading import recipes as found

    _table(("recipe", "what it is"), list(found().items()))


@app.command("lr-range")
def lr_range(
    model: Annotated[str | None, typer.Option(help="As for train.")] = None,
    data: Annotated[str | None, typer.Option(help="As for train.")] = None,
    config: Annotated[Path | None, typer.Option(help="As for train.")] = None,
    recipe: Annotated[str | None, typer.Option(help="As for train.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of table and plot.")] = Path("lr-range"),
    start: Annotated[float, typer.Option(help="First learning rate.")] = 1e-6,
    end: Annotated[float, typer.Option(help="Last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Batches.")] = 100,
    batch_size: Annotated[int | None, typer.Option()] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many samples a split.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
) -> None:
    """Try learning rates on a network that is thrown away: table, plot and a suggestion."""
    names, here = ("model", "data", "batch_size", "limit", "threads"), locals()
    given = {key: here[key] for key in names if here[key] is not None}
    with _mendable():
        from .train.lr_range import lr_range as run
        from .train.reading import build_config

        found = run(build_config(given, settings or [], config, recipe), out, start, end, steps)
    tried = f"{len(found.rates)} steps from {found.rates[0]:.1e} to {found.rates[-1]:.1e}"
    if found.suggestion is None:
        print(f"{tried}: the loss never falls")
    else:
        print(f"{tried}: the loss falls fastest at {found.suggestion:.1e} and is lowest at {found.lowest:.1e}")
        print(f"try --lr {found.suggestion:.1e}")
    print(f"look at {found.plot}")


@app.command()
def compare(
    models: Annotated[list[str] | None, typer.Argument(help="Variants, or files of parts [default: composed].")] = None,
    mixers: Annotated[str | None, typer.Option(help="Names with commas: one composed model, each in turn.")] = None,
    data: Annotated[str | None, typer.Option(help="As for train.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs [default: runs/compare-<data>-<time>].")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    lr: Annotated[float | None, typer.Option()] = None,
    img_size: Annotated[int | None, typer.Option()] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many images a split.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
) -> None:
    """Train several models, or one with several token mixers, under one budget: accuracy, size, cost and speed."""
    names = ("data", "epochs", "batch_size", "lr", "img_size", "limit", "threads")
    here = locals()
    given = {key: here[key] for key in names if here[key] is not None}
    with _mendable():
        from datetime import datetime

        from .train.comparing import COLUMNS, with_mixers
        from .train.comparing import compare as run
        from .train.config import make_config
        from .train.watch import Console

        chosen = {name: make_config(given | {"model": name}, settings or []) for name in models or ["composed"]}
        if mixers is not None:
            if len(chosen) > 1:
                _fail("--mixers takes one composed model")
            chosen = with_mixers(next(iter(chosen.values())), [name.strip() for name in mixers.split(",")])
        source = next(iter(chosen.values())).data
        folder = out or Path("runs") / f"compare-{Path(source).name}-{datetime.now():%Y%m%d-%H%M%S}"
        rows = run(chosen, folder, seeds, Console())
    _table(COLUMNS, [row.cells() for row in rows if row.error is None])
    print(f"look at {folder / 'compare.html'}")
    for row in rows:
        if row.error is not None:
            print(f"error: {row.name}: {row.error}", file=sys.stderr)
    if any(row.error is not None for row in rows):
        raise typer.Exit(2)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[str | None, typer.Option(help="Other data with the same classes.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="A .csv for name, target, prediction of all.")] = None,
    format: Annotated[Format, typer.Option()] = Format.table,
) -> None:
    """Test a run's best weights on its test split or on other data."""
    with _mendable():
        from .train import evaluate as test

        result = test(run, data, predictions=predictions)
    for path, reason in result.skipped.items():
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if format is Format.json:
        print(json.dumps(_without_nan(vars(result))))
        return
    if format is Format.csv:
        import csv

        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(("class", "figure", "value"))  # a figure of the whole split has no class
        whole = [("", key, value) for key, value in (result.metrics | {"samples": result.samples}).items()]
        each = [(name, key, value) for name, figures in result.classes.items() for key, value in figures.items()]
        lines.writerows((name, key, "" if value != value else value) for name, key, value in [*whole, *each])
        return
    if result.classes:
        header = list(next(iter(result.classes.values())))
        rows = [(name, *(_share(figures[key]) for key in header)) for name, figures in result.classes.items()]
        _table(("class", *header), rows)
    print(", ".join(f"{key} {value:.4f}" for key, value in result.metrics.items()) + f", {result.samples} samples")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    inputs: Annotated[list[str], typer.Argument(help="Files, folders with all below them, - for paths on stdin.")],
    top: Annotated[int, typer.Option(min=1, help="Classes shown for each.")] = 3,
    format: Annotated[Format, typer.Option()] = Format.table,
    out: Annotated[Path | None, typer.Option(help="Write there, not to stdout; of a dense task, a folder.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of an object.")] = 0.5,
) -> None:
    """Ask a run's best weights about images, or about samples as they were trained on.

    Of segmentation and detection --out is a folder for label maps and drawn images, and predictions.json or .csv.
    """
    errors, count = 0, 0
    with _mendable():
        from .train import predict_iter
        from .train.answers import as_text, printable
        from .train.files import write_atomic
        from .train.run import Run

        opened, pictures = Run.open(run), None
        if out is not None and opened.config.task in ("segmentation", "detection"):
            pictures, out = out, None if format is Format.table else out / f"predictions.{format.value}"
        results = predict_iter(run, _paths(inputs), top, pictures, threshold)

        def told() -> Iterator[Any]:
            nonlocal errors, count
            for result in results:
                count += 1
                if result.error is not None:
                    errors += 1
                    print(f"error: {printable(result.image)}: {printable(result.error)}", file=sys.stderr)
                yield result

        pieces = as_text(told(), opened, format.value, top)
        if out is None:
            for piece in pieces:
                print(piece.encode("utf-8", "replace").decode(), end="")
        else:
            write_atomic(out, lambda f: f.writelines(piece.encode("utf-8", "surrogateescape") for piece in pieces))
            print(f"{count} read, {errors} of them could not be: {out}" if errors else f"{count} read: {out}")
    if errors:
        raise typer.Exit(2)


def _paths(inputs: list[str]) -> Iterator[str]:
    """The inputs, those on stdin in place of a dash."""
    for item in inputs:
        if item == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield item


@app.command()
def bench(
    models: Annotated[list[str] | None, typer.Argument(help="Variants, families or patterns, as in 'pvt*'.")] = None,
    families: Annotated[bool, typer.Option("--families", help="The smallest variant of every family.")] = False,
    against: Annotated[str | None, typer.Option(help="timm, or the csv of an earlier run.")] = None,
    train: Annotated[bool, typer.Option("--train", help="The training step too.")] = False,
    deploy: Annotated[bool, typer.Option("--deploy", help="The deployed network too.")] = False,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, float16; several with commas.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1)] = 8,
    img_size: Annotated[int | None, typer.Option(min=1, help="Pixels per side [default: as published].")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each comparison.")] = 9,
    out: Annotated[Path | None, typer.Option(help="Folder of table, facts and plot; a second run goes on.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile on both sides.")] = False,
) -> None:
    """Measure throughput, latency, memory and share of the machine's matmul rate, beside timm's or an earlier run."""
    with _mendable():
        from .inspect.bench import Settings, resolve_names, smallest_of_families
        from .inspect.bench import bench as run
        from .inspect.bench_report import table

        if bool(models) == families:
            _fail("give names of models, families or patterns, or --families for one of each")
        precisions = tuple(part.strip() for part in precision.split(","))
        settings = Settings(
            against, train, deploy, compile, precisions, device, batch, img_size, threads, rounds
        )  # fmt: skip
        names = smallest_of_families(against == "timm") if families else resolve_names(models or [])
        rows = []
        for row in run(names, settings, out):
            rows.append(row)
            what = row["error"] or f"{row['infer_samples_per_sec']:.1f} samples/s"
            print(f"{row['model']} {row['precision']}: {what}", file=sys.stderr, flush=True)
    _table(*table(rows))
    if out is not None:
        print(f"look at {out / 'bench.csv'}")
    failed = [row for row in rows if row["error"]]
    for row in failed:
        print(f"error: {row['model']} {row['precision']}: {row['error']}", file=sys.stderr)
    if failed:
        raise typer.Exit(2)


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, as in 'pvt*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    mixers: Annotated[bool, typer.Option("--mixers", help="The token mixers that compose takes instead.")] = False,
) -> None:
    """List the variants with their published figures, or the token mixers with what they cost."""
    if mixers:
        _list_mixers(pattern)
        return
    with _mendable():
        import vertebra

        infos = [vertebra.model_info(name) for name in vertebra.list_models(pattern, family)]
    if not infos:
        _fail(f"no model matches {pattern!r}; vertebra list shows them all")
    figures = ("params_m", "gmacs", "top1")
    rows = [(i.name, i.family, *(_figure(i.published.get(key)) for key in figures)) for i in infos]
    _table(("name", "family", "params (M)", "GMACs", "top-1 (%)"), rows)


def _list_mixers(pattern: str) -> None:
    from fnmatch import fnmatch

    from .inspect import mixer_costs
    from .mixers.catalogue import MIXERS

    names = [name for name in MIXERS if fnmatch(name, pattern)]
    if not names:
        _fail(f"no mixer matches {pattern!r}; vertebra list --mixers shows them all")
    costs = mixer_costs(names)
    header = ("mixer", "paper", "arXiv", "time", "memory", "kMACs per cell at 14x14", "at 56x56")
    rows = []
    for name in names:
        entry = MIXERS[name]
        rows.append((name, entry.paper, entry.arxiv, entry.time, entry.memory, *(f"{c:.1f}" for c in costs[name])))
    _table(header, rows)
    print("time and memory: growth with the number N of cells; multiply-accumulates measured with 64 channels, 2 heads")


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="Name of a variant, as in vertebra list.")],
    to: Annotated[str, typer.Option(help="torch-export, onnx or aoti.")] = "torch-export",
    out: Annotated[Path | None, typer.Option(help="The file [default: NAME.pt2 or NAME.onnx].")] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Side the model is built for, and the one of a file of one size.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights: a file or URL.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The published weights.")] = False,
    features: Annotated[bool, typer.Option("--features", help="The dense version: a list of maps.")] = False,
    static: Annotated[bool, typer.Option("--static", help="Batch 1 and one size.")] = False,
    fixed_size: Annotated[bool, typer.Option("--fixed-size", help="Any batch, one size; sooner for aoti.")] = False,
    multiple: Annotated[int, typer.Option(help="Any size that is a multiple of this; 32 is sooner for aoti.")] = 1,
    verify: Annotated[bool, typer.Option(help="Run the file at several sizes and compare with the model.")] = True,
) -> None:
    """Write a network as a file that runs without its source code, at any batch and size."""
    with _mendable():
        import vertebra
        from vertebra.deploy.exporting import FORMATS, ExportError

        if to not in FORMATS:
            _fail(f"unknown format {to!r}; there are: {', '.join(FORMATS)}")
        dynamic: bool | Literal["batch"] = "batch" if fixed_size and not static else not static
        model = vertebra.create_model(
            name, img_size=img_size, pretrained=pretrained, checkpoint=checkpoint, features_only=features
        ).eval()
        path = out or Path(Path(name).stem + FORMATS[to])
        try:
            made = vertebra.export(model, path, to, sides=img_size, dynamic=dynamic, multiple=multiple, verify=verify)
        except ExportError as error:
            _fail(str(error), 1)
    free = ", ".join(made.dynamic) or "nothing"
    print(f"{made.path}: {made.bytes / 1e6:.1f} MB in {made.seconds:.0f} s, free: {free}")
    for shape, worst in made.errors.items():
        print(f"verified at {shape}: worst relative error {worst:.1e}")


@app.command()
def info(name: Annotated[str, typer.Argument(help="Name of a variant.")]) -> None:
    """Show a variant's paper, licence, figures, configuration and inputs."""
    with _mendable():
        import torch

        import vertebra

        about = vertebra.model_info(name)
        with torch.device("meta"):
            model = vertebra.create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    rows: list[tuple[str, Any]] = [("name", about.name), ("family", about.family), ("paper", about.paper)]
    rows += [("venue", about.venue), ("arXiv", about.arxiv), ("code", about.code), ("licence", about.licence)]
    rows += [(f"published {key}", value) for key, value in about.published.items()]
    rows += [("measured params_m", f"{count:.3f}")]
    rows += [(f"config {key}", value) for key, value in about.config.items()]
    rows += [(f"input {key}", value) for key, value in vars(about.inputs).items()]
    rows += [(f"weights {key}", value) for key, value in vars(about.weights).items() if value]
    _table(None, [(key, str(value)) for key, value in rows])


def _share(value: float) -> str:
    """A figure of a class: a count, a share, or none where a class is not there."""
    return str(value) if isinstance(value, int) else "-" if value != value else f"{value:.4f}"


def _without_nan(content: Any) -> Any:
    """JSON has no NaN: a figure that does not exist is null."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and content != content else content


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def _table(header: tuple[str, ...] | None, rows: list[tuple[Any, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*(header or ("", "")), show_header=header is not None, box=box.SIMPLE if header else None)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: names from elsewhere are not markup
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not cut what another program will read
    console.print(table)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


class _mendable:
    """Turns the errors that the library raises for what users do into one line and an exit code."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            _fail("interrupted; vertebra train --resume continues a run after its last finished epoch", 130)
        if error is None or isinstance(error, typer.Exit):
            return
        from .checkpoint import CheckpointError
        from .data import DataError
        from .train import ConfigError, RunError, TrainError

        if isinstance(error, TrainError):
            _fail(str(error), 1)
        if isinstance(error, ConfigError | DataError | RunError | CheckpointError) or type(error) is ValueError:
            _fail(str(error))
        if isinstance(error, OSError):  # a full disk, a folder that may not be written
            _fail(f"{error.filename or 'files'}: {error.strerror or error}", 1)


def main() -> None:
    """The console script."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the parser raises for a bad option or argument
            raise
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        code = 2
    code = code if isinstance(code, int) else 0
    processes = sys.modules.get("torch.distributed")
    if processes is not None and processes.is_available() and processes.is_initialized():
        from .train.strategies import leave

        leave(code)
    sys.exit(code)
