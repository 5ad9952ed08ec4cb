"""A run folder: what is in it, written whole, read with care."""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Source
from .config import Config, ConfigError, make_config
from .files import write_atomic


class RunError(ValueError):
    """A folder that is no run, or a run that cannot be used so; the message is one line."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    config.json      the configuration with nothing left open, the classes and the data's fingerprint
    metrics.jsonl    one line an epoch (also metrics.csv)
    best.safetensors, last.safetensors    weights: best on validation, and after the last epoch
    last.pt          all that resuming needs; loads with weights_only=True
    result.json, report.html              the test, at the end
    """

    folder: Path
    config: Config
    data: dict[str, Any]  # name, kind, classes, fingerprint, counts, notes

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.data["classes"])

    @property
    def outputs(self) -> int:
        """How many outputs the model has."""
        return self.data.get("outputs", len(self.classes))

    @classmethod
    def create(cls, folder: Path, config: Config, source: Source) -> "Run":
        """A new run; RunError if the folder holds one already."""
        if (folder / "config.json").exists():
            raise RunError(f"{folder}: holds a run already; continue it with --resume or choose another --out")
        data = {
            "name": source.name,
            "kind": source.kind,
            "classes": list(source.classes),
            "fingerprint": source.fingerprint(),
            "counts": {key: len(split) for key, split in source.splits.items()},
            "notes": list(source.notes),
            "outputs": len(source.classes) if source.horizon is None else source.horizon,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"{folder}: cannot be made ({e.strerror})") from e
        run = cls(folder, config, data)
        run.write_json("config.json", {"config": config.model_dump(), "data": data})
        return run

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """An existing run; RunError if it is none."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "config.json").read_bytes())
            return cls(folder, make_config(content["config"]), content["data"])
        except FileNotFoundError as e:
            raise RunError(f"{folder}: not a run folder (no config.json in it)") from e
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as e:
            raise RunError(f"{folder / 'config.json'}: cannot be used ({e})") from e

    def write_json(self, name: str, content: Any) -> None:
        write_atomic(self.folder / name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError) as e:
            raise RunError(f"{self.folder / name}: cannot be read ({e})") from e

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """All epochs so far, rewritten whole: after a resume there is neither a gap nor a double line."""
        lines = "".join(json.dumps({key: _known(value) for key, value in row.items()}) + "\n" for row in history)
        write_atomic(self.folder / "metrics.jsonl", lines.encode())
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in history for key in row)))
        writer.writeheader()
        writer.writerows(history)
        write_atomic(self.folder / "metrics.csv", table.getvalue().encode())

    def write_weights(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        state = {key: t.detach().cpu().contiguous().clone() for key, t in state.items()}
        about = {"model": self.config.model, "classes": json.dumps(self.classes)}
        write_atomic(self.folder / name, save(state, about))

    def write_state(self, state: dict[str, Any]) -> None:
        try:
            write_atomic(self.folder / "last.pt", lambda f: torch.save(state, f))
        except RuntimeError as e:  # torch's archive complains of its own trouble where the disk is full
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise

    def read_state(self) -> dict[str, Any]:
        path = self.folder / "last.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as e:
            raise RunError(f"{self.folder}: nothing to resume, no epoch was finished (no last.pt)") from e
        except Exception as e:  # a damaged or hostile file: pickle and zip errors of many kinds
            raise RunError(f"{path}: cannot be read ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from e


def _known(value: Any) -> Any:
    """JSON has no NaN: a figure that does not exist is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
