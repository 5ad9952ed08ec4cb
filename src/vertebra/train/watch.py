"""What training tells whoever watches; Watch itself says nothing, Console draws a progress bar."""

from types import TracebackType
from typing import Any


class Watch:
    """Every method may be overridden; none needs to be."""

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def start(self, title: str, steps: int, done: int) -> None:
        """Training begins: steps in all, and how many a resumed run has behind it."""

    def step(self, loss: float) -> None:
        """One more step."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """One more epoch; row as in metrics.jsonl."""

    def note(self, text: str) -> None:
        """Something people should know."""

    def finish(self, result: Any) -> None:
        """The run is complete; result is a RunResult."""


class Console(Watch):
    """A progress bar with loss, accuracy and time left; one line an epoch stays."""

    def __init__(self) -> None:
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Rich(stderr=False, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  validation {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task: Any = None

    def __enter__(self) -> "Console":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def start(self, title: str, steps: int, done: int) -> None:
        self.note(title)
        self.task = self.progress.add_task("training", total=steps, completed=done, loss=float("nan"), accuracy="-")

    def step(self, loss: float) -> None:
        self.progress.update(self.task, advance=1, loss=loss)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        self.progress.update(
            self.task, accuracy=f"{row['val_accuracy']:.4f}", description=f"epoch {row['epoch']}/{epochs}"
        )
        self.note(
            f"epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.1e}  train loss {row['train_loss']:.3f}  "
            f"accuracy {row['train_accuracy']:.4f}  validation loss {row['val_loss']:.3f}  "
            f"accuracy {row['val_accuracy']:.4f}  {row['seconds']:.1f} s"
        )

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def finish(self, result: Any) -> None:
        about = f"best epoch {result.best_epoch}, {result.seconds:.0f} s"
        if result.skipped:
            about += f", {len(result.skipped)} files skipped"
        self.progress.stop()
        self.note(f"test accuracy {result.test_accuracy:.4f} ({about})")
        self.note(f"look at {result.folder / 'report.html'}")
