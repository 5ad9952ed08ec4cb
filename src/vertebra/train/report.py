"""report.html: one file to look at, with nothing outside it."""

import base64
import html
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data import Source, Split
from .files import write_atomic
from .run import Run
from .task import Scores

# position in the test split -> past (n, length), truth and forecast (n, horizon)
Windows = Callable[[int], tuple[Tensor, Tensor, Tensor]]
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } .big { font-size: 2.6rem; font-weight: 600 }
img { max-width: 100% } .mistakes { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 9rem } figure img { width: 9rem; height: 9rem; object-fit: contain;
image-rendering: pixelated; background: #eee }
figcaption { font-size: .8rem; overflow-wrap: anywhere } pre, td { font-size: .85rem }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto } td { padding-right: 1rem; overflow-wrap: anywhere }
"""


def write_report(
    run: Run,
    source: Source,
    history: list[dict[str, Any]],
    scores: Scores,
    summary: dict[str, Any],
    most: int = 24,
    windows: Windows | None = None,
    drawn: str = "",
) -> None:
    """Write report.html: figures, curves, classes, confusion, the `most` worst mistakes, skipped files, settings.

    Of several labels their AUC and ROC curves; of a forecast the worst and the best windows, which `windows` predicts
    again; of segmentation and detection the samples `drawn` already, as HTML.
    """
    config, name = run.config, html.escape(f"{run.config.model} on {source.name}")
    score, skipped = summary["score"], summary["skipped"]
    best = "-" if summary[f"val_{score}"] is None else _shown(score, summary[f"val_{score}"])
    one = scores.confusion is not None
    said = f"test {score}"
    if one:
        wrong = int((scores.rows[:, 1] != scores.rows[:, 2]).sum())
        said += f": {wrong} of {len(scores.rows)} samples wrong"
    parts = [
        f"<h1>{name}</h1>",
        f"<p><span class=big>{_shown(score, scores.metrics[score])}</span> {said}</p>",
        f"<p>{', '.join(f'{key} {value:.4f}' for key, value in scores.metrics.items())}</p>",
        f"<p>Best epoch {summary['best_epoch']} of {config.epochs} with {best} on validation; "
        f"{summary['seconds']:.0f} s of training. The test split was used once, at the end.</p>",
        f"<p>{html.escape('; '.join(source.notes))}</p>" if source.notes else "",
        f"<h2>Training</h2>{_curves(history, score)}",
        _by_class(scores) if scores.classes else "",
        _ranking(scores, run.classes) if config.task == "multi" else "",
        _ahead(source.splits["test"], run.classes, scores.rows, windows) if windows and not scores.classes else "",
        f"<h2>Confusion</h2>{_confusion(scores.confusion, run.classes)}" if scores.confusion is not None else "",
        f"<h2>Worst mistakes</h2>{_mistakes(source.splits['test'], run.classes, scores.rows, most)}" if one else "",
        f"<h2>Test samples</h2>{drawn}" if drawn else "",
        _skipped(skipped) if skipped else "",
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config.model_dump(), indent=1))}</pre>",
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    write_atomic(run.folder / "report.html", (head + "\n".join(parts) + "</html>\n").encode("utf-8", "replace"))


def _shown(score: str, value: float) -> str:
    return f"{value:.2%}" if score == "accuracy" else f"{value:.4f}"


def _by_class(scores: Scores) -> str:
    """The figures of each class as a table."""
    columns = list(next(iter(scores.classes.values())))
    head = "".join(f"<th>{column}" for column in ("class", *columns))
    lines = (
        f"<tr><td>{html.escape(name)}" + "".join(f"<td>{figures[column]:.4g}" for column in columns)
        for name, figures in scores.classes.items()
    )
    return f"<h2>Classes</h2><table><tr>{head}{''.join(lines)}</table>"


def _curves(history: list[dict[str, Any]], score: str) -> str:
    figure = Figure((10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, what in ((left, "loss"), (right, score)):
        for part in ("train", "val"):
            if f"{part}_{what}" in history[0]:
                axes.plot(epochs, [row[f"{part}_{what}"] for row in history], marker=".", label=part)
        axes.set(xlabel="epoch", title=what)
        axes.grid(alpha=0.3)
        axes.legend()
    note = "<p>The training loss includes label smoothing and augmentation, the validation loss does not.</p>"
    note = note if "val_loss" in history[0] else ""  # a detector has none in testing
    return _figure(figure, f"curves of loss and {score}") + note


def _confusion(confusion: Tensor, classes: tuple[str, ...]) -> str:
    counts = confusion.numpy()
    few = len(classes) <= 30
    side = min(3 + 0.4 * len(classes), 10)
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if few:
        labels = [_label(name) for name in classes]
        axes.set_xticks(range(len(classes)), labels, rotation=90)
        axes.set_yticks(range(len(classes)), labels)
        for i, j in zip(*np.nonzero(counts)):
            shade = "white" if counts[i, j] * 2 > counts[i].sum() else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=shade, fontsize=8)
    return _figure(figure, "confusion matrix")


def _ranking(scores: Scores, classes: tuple[str, ...], most: int = 40, drawn: int = 10) -> str:
    """AUC of each class as bars, worst first, and the ROC curves of the `drawn` worst ones."""
    from sklearn.metrics import roc_curve

    known = [(figures["auc"], i) for i, figures in enumerate(scores.classes.values()) if np.isfinite(figures["auc"])]
    if not known:
        return "<h2>ROC</h2><p>No class is both there and not there in the test split.</p>"
    known.sort()
    shown = known[:most][::-1]
    figure = Figure((10, max(4.0, 0.22 * len(shown))), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    bars.barh(range(len(shown)), [auc for auc, _ in shown])
    bars.set_yticks(range(len(shown)), [_label(classes[i]) for _, i in shown])
    bars.set(xlabel="AUC", xlim=(0, 1))
    for auc, i in known[:drawn]:
        false, true, _ = roc_curve(scores.rows[:, 2 + i].numpy(), scores.rows[:, 2 + len(classes) + i].numpy())
        curves.plot(false, true, label=f"{_label(classes[i])} {auc:.3f}")
    curves.plot([0, 1], [0, 1], color="grey", linewidth=0.7)
    curves.set(xlabel="false positives, share", ylabel="true positives, share", aspect="equal")
    curves.legend(fontsize=8)
    told = f"<p>Worst first; the curves are of the {min(drawn, len(known))} with the lowest AUC.</p>"
    return f"<h2>ROC</h2>{_figure(figure, 'AUC and ROC curves')}{told}"


def _ahead(test: Split, variables: tuple[str, ...], rows: Tensor, again: Windows, each: int = 3) -> str:
    """The windows with the largest and with the smallest error, of each its most and its least wrong variable."""
    order = rows[:, 1].argsort(descending=True, stable=True).tolist()
    items = []
    for row in dict.fromkeys([*order[:each], *order[-each:]]):
        position, mse = int(rows[row, 0]), float(rows[row, 1])
        past, truth, ahead = again(position)
        error = (truth - ahead).square().mean(1)
        which = list(dict.fromkeys([int(error.argmax()), int(error.argmin())]))
        figure = Figure((10, 2.2), layout="constrained")
        for axes, variable in zip(figure.subplots(1, len(which), squeeze=False)[0], which, strict=True):
            before = past[variable, -3 * truth.shape[1] :].numpy()
            steps = range(1, truth.shape[1] + 1)
            axes.plot(range(1 - len(before), 1), before, color="grey", label="past")
            axes.plot(steps, truth[variable].numpy(), color="black", label="truth")
            axes.plot(steps, ahead[variable].numpy(), color="tab:red", label="forecast")
            axes.set_title(f"{_label(variables[variable])}: mse {float(error[variable]):.4g}", fontsize=9)
            axes.legend(fontsize=7)
        items.append(f"<p>{html.escape(test.names[position])}: mse {mse:.4g}</p>{_figure(figure, 'forecast')}")
    return f"<h2>Windows</h2><p>The worst first, the best last.</p>{''.join(items)}"


def _label(name: str) -> str:
    """As text in a figure: a dollar would start a formula."""
    return name.replace("$", r"\$")[:20]


def _mistakes(test: Split, classes: tuple[str, ...], rows: Tensor, most: int) -> str:
    """The mistakes with the largest loss; where there are few, the hardest of the others after them."""
    order = sorted(rows.tolist(), key=lambda row: (row[1] == row[2], -row[4]))
    items = []
    for position, label, guess, probability, _ in order[:most]:
        verdict = f"taken for {classes[int(guess)]}" if label != guess else "right"
        caption = f"{classes[int(label)]}, {verdict} ({probability:.0%}) · {test.names[int(position)]}"
        picture = _picture(test.read(int(position)))
        items.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return (
        f"<p>Ordered by loss; right ones follow where mistakes are few.</p><div class=mistakes>{''.join(items)}</div>"
    )


def _skipped(skipped: dict[str, str]) -> str:
    lines = "".join(f"<tr><td>{html.escape(p)}<td>{html.escape(why)}" for p, why in list(skipped.items())[:200])
    return f"<h2>Skipped files: {len(skipped)}</h2><table>{lines}</table>"


def _picture(image: Tensor) -> str:
    """An image as it is, a signal as curves, of a volume the middle slice."""
    from PIL import Image

    if image.ndim == 2:
        figure = Figure((2.4, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(image.T.numpy(), linewidth=0.7)
        axes.axis("off")
        return _figure(figure, "")
    if image.dtype != torch.uint8:
        while image.ndim > 3:
            image = image[:, image.shape[1] // 2]
        low, high = image.min(), image.max()
        image = ((image[:1] - low) / (high - low).clamp(min=1e-9) * 255).to(torch.uint8)
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    picture.thumbnail((288, 288))
    png = io.BytesIO()
    picture.save(png, "PNG")
    return _embed(png, "")


def _figure(figure: Figure, alt: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return _embed(png, alt)


def _embed(png: io.BytesIO, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
