"""Speed, latency, memory and share of the machine's matmul rate of networks, beside the same ones of timm.

Everything that is set beside something else runs in turn with it in one process, round by round; a ratio is taken in
each round and its median reported, so that a slow moment of the machine touches both sides. One row is one network in
one precision; `COLUMNS` says what it holds and in which units.
"""

from __future__ import annotations

import copy
import gc
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ntuple
from ..registry import ModelInfo, create_model, list_families, list_models, model_info
from . import peers
from .bench_figures import COLUMNS, Row, against_rows, inference_figures, memory_ratios, training_figures
from .cost import count_macs
from .memory import peak_bytes

FORMATS = {"nchw": torch.contiguous_format, "cl": torch.channels_last}
PRECISIONS = ("float32", "bfloat16", "float16")
WARM_UP = 2
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # of the two square matrices whose product stands for the machine

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Settings:
    """What is measured and how; a table of one folder has one of these.

    `against` None, "timm" or the name of a csv file; `precision` of `PRECISIONS`; `img_size` None for what each
    network was published with; `threads` None for torch's own choice.
    """

    against: str | None = None
    train: bool = False
    deploy: bool = False
    compile: bool = False
    precision: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    batch: int = 8
    img_size: int | None = None
    threads: int | None = None
    rounds: int = 9

    def __post_init__(self) -> None:
        wrong = [p for p in self.precision if p not in PRECISIONS]
        if wrong or not self.precision or len(set(self.precision)) < len(self.precision):
            given = ", ".join(self.precision) or "none"
            raise ValueError(f"precision: each of {', '.join(PRECISIONS)} at most once, got {given}")
        if self.device not in MATMUL_SIDE:
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch finds no such device here")
        for key in ("batch", "img_size", "threads", "rounds"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")


# --- which networks ---------------------------------------------------------------------------------------------------


def resolve_names(names: Iterable[str]) -> list[str]:
    """Variants from variants, families and shell patterns, in the order given, each once; ValueError for none."""
    known, found = set(list_models()), dict[str, None]()
    for name in names:
        if name in known:
            chosen = [name]
        elif any(c in name for c in "*?["):
            chosen = list_models(name)
            if not chosen:
                raise ValueError(f"no model matches {name!r}; vertebra list shows them all")
        elif name in list_families():
            chosen = list_models(family=name)
        else:
            model_info(name)  # raises, and says what is near
            chosen = [name]
        found |= dict.fromkeys(chosen)
    return list(found)


def smallest_of_families(with_peer: bool = False) -> list[str]:
    """The variant with the fewest published parameters of each family; `with_peer` prefers those that timm has."""
    found = []
    for family in list_families():
        infos = [model_info(name) for name in list_models(family=family)]
        if with_peer:
            infos = [i for i in infos if peers.has_peer(i.name)] or infos
        found.append(min(infos, key=lambda i: (i.published.get("params_m", math.inf), i.inputs.size, i.name)).name)
    return found


# --- timing -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired(calls: Calls, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, round by round; every other round runs in reverse, so that no one always comes first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            t = seconds(calls[name], device)
            if i >= WARM_UP:
                times[name].append(t)
    return times


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call that runs `model` on `x` without gradients, in evaluation mode."""
    model.eval()

    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def training(model: nn.Module, x: Tensor, target: Tensor | None) -> Callable[[], object]:
    """A call that takes one step of SGD with momentum: cross-entropy with `target`, mean squares where it is None."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def call() -> object:
        y = model(x)
        if target is not None:
            loss = F.cross_entropy(y.float(), target)
        else:  # maps or a forecast
            maps = y if isinstance(y, list | tuple) else [y]
            loss = torch.stack([m.float().square().mean() for m in maps]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return call


def peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `call` holds at one time beyond what was there before. Calls it twice."""
    if device.type == "cpu":
        return peak_bytes(call)
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- one network -----------------------------------------------------------------------------------------------------


def _matmul(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A large matrix product in this precision, and its multiply-accumulates."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), side**3


def _deployed(model: nn.Module, precision: str, compiled: bool) -> nn.Module:
    from ..deploy.deploying import deploy

    return deploy(model, precision=precision, compile=compiled)  # type: ignore[arg-type]


class _Bench:
    """The networks of one row's model and what was measured of them."""

    def __init__(self, name: str, settings: Settings):
        self.info, self.settings = model_info(name), settings
        self.device = torch.device(settings.device)
        torch.manual_seed(0)
        options = {} if settings.img_size is None else {"img_size": settings.img_size}
        self.model = create_model(name, drop_path_rate=0.0, **options).eval()  # type: ignore[arg-type]
        self.row: Row = dict.fromkeys(COLUMNS) | {"model": name, "family": self.info.family}
        self.row |= {"param_count": sum(p.numel() for p in self.model.parameters()) / 1e6}
        self.row |= {"top1": self.info.published.get("top1"), "rounds": settings.rounds}
        self.shape = (self.model.in_chans, *ntuple(settings.img_size or self.info.inputs.size, self.model.ndim))
        self.size = self.shape[-1]
        self.macs = count_macs(self.model, (1, *self.shape))
        self.row |= {"infer_batch_size": settings.batch, "infer_img_size": self.size, "infer_gmacs": self.macs / 1e9}
        self.peer = self._peer(name, options.get("img_size")) if settings.against == "timm" else None
        self.errors: dict[str, str] = {}

    def _peer(self, name: str, img_size: int | None) -> nn.Module | None:
        if not peers.has_peer(name) or self.model.ndim != 2 or self.model.features_only:
            return None
        from timm.layers import set_fused_attn

        set_fused_attn(True)
        peers.unsettle(self.model, torch.Generator().manual_seed(1))
        peer = peers.peer_model(name, self.model.num_classes, img_size)
        x = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(2))
        error = peers.copy_weights(self.model, peer, x)
        theirs = peers.PEERS.get(name, name)
        self.row["peer"] = theirs if "." in theirs else f"timm.{theirs}"
        self.row["peer_weights"] = "equal" if error <= peers.TOLERANCE else "unequal"
        self.row["ratios_of"] = "paired"
        return peer

    def _input(self, batch: int, precision: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(batch, *self.shape, generator=generator).to(self.device, getattr(torch, precision))

    def _placed(self, model: nn.Module, precision: str, memory_format: torch.memory_format | None = None) -> nn.Module:
        placed = copy.deepcopy(model).to(self.device, getattr(torch, precision))
        return placed if memory_format is None else placed.to(memory_format=memory_format)

    def _compiled(self, model: nn.Module) -> Any:
        return torch.compile(model) if self.settings.compile else model

    def networks(self) -> dict[str, nn.Module]:
        """All that take part in inference, with the precision behind the name.

        "infer" and "deploy" are ours, "nchw" and "cl" the peer's formats, "merged nchw" and "merged cl" those of the
        peer as it is deployed.
        """
        found: dict[str, nn.Module] = {}
        merged = peers.merged(self.peer) if self.settings.deploy and self.peer is not None else None
        theirs = {kind: net for kind, net in (("", self.peer), ("merged ", merged)) if net is not None}
        for precision in self.settings.precision:
            found[f"infer {precision}"] = self._compiled(self._placed(self.model, precision))
            for kind, peer in theirs.items():
                for layout, memory_format in FORMATS.items():
                    placed = self._placed(peer, precision, memory_format)
                    found[f"{kind}{layout} {precision}"] = self._compiled(placed)
            if self.settings.deploy:
                plain = self._placed(self.model, "float32")
                found[f"deploy {precision}"] = _deployed(plain, precision, self.settings.compile)
        return found

    def inferences(self, networks: Mapping[str, nn.Module], batch: int) -> tuple[Calls, dict[str, str]]:
        """Calls on `batch` samples, of the peer only the better format under "peer"; and which format that is.

        Of a merged peer the better format is under "merged".
        """
        calls: Calls = {}
        formats: dict[str, str] = {}
        for precision in self.settings.precision:
            x = self._input(batch, precision)
            for side in ("infer", "deploy"):
                if (key := f"{side} {precision}") in networks:
                    calls[key] = inference(networks[key], x)
            for side, kind in (("peer", ""), ("merged", "merged ")):
                tried = {
                    key: inference(networks[key], x.contiguous(memory_format=memory_format))
                    for layout, memory_format in FORMATS.items()
                    if (key := f"{kind}{layout} {precision}") in networks
                }
                self._add_peer(calls, formats if side == "peer" else {}, precision, tried, side)
        return calls, formats

    def _add_peer(
        self, calls: Calls, formats: dict[str, str], precision: str, tried: Calls, side: str = "peer"
    ) -> None:
        """The faster of the formats that run (least of two calls after one to warm up), and its name."""
        if tried := self.working(tried):
            best = next(iter(tried))
            if len(tried) > 1:
                best = min(tried, key=lambda key: min(seconds(tried[key], self.device) for _ in range(2)))
            formats[precision] = best.partition(" ")[0]
            calls[f"{side} {precision}"] = tried[best]

    def trainings(self) -> tuple[Calls, dict[str, str]]:
        """Training steps of ours and of the peer in its better format, per precision."""
        calls: Calls = {}
        formats: dict[str, str] = {}
        batch, generator = self.settings.batch, torch.Generator().manual_seed(4)
        with torch.inference_mode():
            y = self.model(torch.zeros(1, *self.shape))
        classes = y.shape[1] if isinstance(y, Tensor) and y.dim() == 2 else 0
        target = torch.randint(classes, (batch,), generator=generator).to(self.device) if classes else None
        for precision in self.settings.precision:
            x = self._input(batch, precision)
            calls[f"train {precision}"] = training(self._compiled(self._placed(self.model, precision)), x, target)
            if self.peer is None:
                continue
            tried: Calls = {}
            for layout, memory_format in FORMATS.items():
                if layout == "cl" and peers.corrupts_memory(self.peer, x.dtype, self.device):
                    continue
                network = self._compiled(self._placed(self.peer, precision, memory_format))
                xs = x.contiguous(memory_format=memory_format)
                tried[f"{layout} {precision}"] = training(network, xs, target)
            self._add_peer(calls, formats, precision, tried)
        return calls, formats

    def working(self, calls: Calls) -> Calls:
        """Those that run; why the others do not is kept per precision."""
        found = {}
        for name, call in calls.items():
            try:
                call()
                found[name] = call
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
                side, _, precision = name.rpartition(" ")
                self.errors.setdefault(precision, f"{side}: {type(e).__name__}: {e}")
        return found

    def measure(self) -> list[Row]:
        settings, device = self.settings, self.device
        rows = {p: self.row | {"precision": p} for p in settings.precision}
        matmuls = {p: _matmul(getattr(torch, p), device) for p in settings.precision}
        products: Calls = {f"matmul {p}": call for p, (call, _) in matmuls.items()}
        macs = {p: count for p, (_, count) in matmuls.items()}

        networks = self.networks()
        calls, formats = self.inferences(networks, settings.batch)
        calls = self.working(calls)
        for name, call in calls.items():
            side, _, precision = name.partition(" ")
            if side != "merged":
                rows[precision][f"{'peer_infer' if side == 'peer' else side}_peak_mib"] = peak(call, device) / 2**20
        times = paired(calls | products, settings.rounds, device)
        alone = paired(self.working(self.inferences(networks, 1)[0]), settings.rounds, device)
        for precision, row in rows.items():
            row["peer_format"] = formats.get(precision)
            row |= inference_figures(precision, times, alone, settings.batch, self.macs, macs[precision])
        del networks, calls
        gc.collect()

        if settings.train:
            calls, formats = self.trainings()
            calls = self.working(calls)
            for name, call in calls.items():
                side, _, precision = name.partition(" ")
                rows[precision][f"{'peer_train' if side == 'peer' else side}_peak_mib"] = peak(call, device) / 2**20
            times = paired(calls | products, settings.rounds, device)
            for precision, row in rows.items():
                row["peer_train_format"] = formats.get(precision)
                row |= {"train_batch_size": settings.batch, "train_img_size": self.size}
                row |= training_figures(precision, times, settings.batch, self.macs, macs[precision])
        for precision, row in rows.items():
            row |= memory_ratios(row)
            row["error"] = self.errors.get(precision)
        return list(rows.values())


def measure(name: str, settings: Settings) -> list[Row]:
    """The rows of the variant `name`, one per precision; where it cannot run, the row says so under "error"."""
    began = time.perf_counter()
    try:
        rows = _Bench(name, settings).measure()
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:  # this network; the next one may run
        info: ModelInfo = model_info(name)
        row: Row = dict.fromkeys(COLUMNS) | {"model": name, "family": info.family, "error": f"{type(e).__name__}: {e}"}
        rows = [row | {"precision": p} for p in settings.precision]
    for row in rows:
        row["seconds"] = time.perf_counter() - began
        if row["error"] is not None:
            row["error"] = " ".join(row["error"].split())[:300]
    gc.collect()
    return rows


def machine_facts(settings: Settings) -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the computer."""
    import vertebra

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    facts: dict[str, Any] = {"cpu": found[1] if found else platform.processor() or platform.machine()}
    if settings.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    facts |= {"threads": settings.threads or torch.get_num_threads(), "torch": torch.__version__}
    facts |= {"vertebra": vertebra.__version__}
    if settings.against == "timm":
        facts["timm"] = peers.import_timm().__version__
    return facts


def bench(names: Sequence[str], settings: Settings, out: str | Path | None = None) -> Iterator[Row]:
    """Measure the variants `names` one by one; rows as they come, those that the folder `out` already has first.

    `out` gets bench.csv and bench.json, whole after every network, and bench.png at the end. A folder with other
    settings, or of another machine or version, raises ValueError, as does a file to compare with that cannot be read.
    """
    from . import bench_report

    others = bench_report.read_rows(settings.against) if settings.against not in (None, "timm") else []
    facts, before = machine_facts(settings), torch.get_num_threads()
    rows = [] if out is None else bench_report.begin(Path(out), asdict(settings), facts)
    have = {row["model"] for row in rows} - {row["model"] for row in rows if row["error"]}  # what failed is tried again
    rows = [row for row in rows if row["model"] in have]
    yield from (row for row in rows if row["model"] in names)
    try:
        torch.set_num_threads(settings.threads or before)
        for name in (name for name in names if name not in have):
            fresh = [row | against_rows(row, others) for row in measure(name, settings)]
            rows += fresh
            if out is not None:
                bench_report.write_rows(Path(out) / "bench.csv", rows)
            yield from fresh
    finally:
        torch.set_num_threads(before)
    if out is not None:
        bench_report.plot(Path(out) / "bench.png", rows)
