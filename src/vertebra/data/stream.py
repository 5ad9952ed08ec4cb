"""Shards at URLs, streamed by the webdataset library: nothing is stored, and samples come in the order of the shards.

An epoch is a stated number of samples. Shards are shuffled from (seed, epoch) and shared out to processes and their
workers; each passes over its own as often as it takes; samples are shuffled in a buffer. So the order depends on the
number of workers too, and is the same again for the same number. A shard cut off inside a member is noticed; one cut
off between two looks whole, as webdataset reads it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .loader import Batch, Samples, TrainOrder, collate, derive
from .shards import (
    LABELS,
    Classes,
    Members,
    check_name,
    data_of,
    decode,
    index_shards,
    is_url,
    read_label,
    split_of,
)
from .source import DataError, Skipped, Source, Split

MOST_BAD = 1000  # samples that may be unreadable in one batch before it goes without them
SAFE = re.compile(r"(https?://|file:)[A-Za-z0-9._~:/?#\[\]@!$&()*+,;=%-]+")


def webdataset() -> Any:
    """The library's tariterators. Raises DataError if it is not installed."""
    try:
        from webdataset import tariterators
    except ImportError as e:
        raise DataError("shards at URLs are read by webdataset: pip install 'vertebra[data]'") from e
    return tariterators


@dataclass(frozen=True)
class StreamSplit(Split):
    """A training split that can only be passed through: `names` are its shards, its length the samples of an epoch."""

    urls: tuple[str, ...] = ()
    known: Classes = field(default_factory=Classes, repr=False)
    label: str = "label"
    channels: int = 3
    shuffle: int = 1000  # samples in the buffer
    stop: bool = False  # at a damaged shard

    def limit(self, n: int) -> Split:
        return self if n >= len(self) else replace(self, labels=self.labels[:n], index=self.index[:n])

    def take(self, positions: np.ndarray) -> Split:
        raise DataError(f"{self.urls[0]}: samples of a stream cannot be chosen")

    def lanes(self, workers: int, world: int) -> int:
        """How many workers of a process get shards."""
        if len(self.urls) < world:
            raise DataError(f"{self.urls[0]}: {len(self.urls)} shards cannot be shared by {world} processes")
        return max(1, min(workers, len(self.urls) // world))


def open_stream(
    root: str,
    places: Mapping[str, list[str]],
    classes: int | str | Sequence[str] | None,
    label: str,
    channels: int,
    samples: int | None,
    shuffle: int,
    stop: bool,
) -> Source:
    """Training shards at URLs; validation and test shards are local, for tests see every sample once and in order."""
    webdataset()
    for key in ("val", "test"):
        if key not in places:
            raise DataError(f"{root}: a stream cannot be split: name local shards with data_options.{key}")
        if remote := [place for place in places[key] if is_url(place)]:
            raise DataError(f"{remote[0]}: {key} shards must be local files; URLs are for training")
    if local := [place for place in places["train"] if not is_url(place)]:
        raise DataError(f"{local[0]}: training shards are either all local or all URLs")
    for url in places["train"]:
        if not SAFE.fullmatch(url):  # webdataset hands them to a shell
            raise DataError(f"{url[:200]!r}: a URL with characters that are not allowed in one")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise DataError(f"{root}: a stream needs data_options.samples, the samples of an epoch, got {samples!r}")
    if isinstance(shuffle, bool) or not isinstance(shuffle, int) or shuffle < 1:
        raise DataError(f"{root}: shuffle, the samples to draw from, must be at least 1, got {shuffle!r}")
    known = Classes.of(root, classes)
    if not known.names:
        raise DataError(f"{root}: a stream needs data_options.classes: names, their number, or a file of names")
    if channels not in (1, 3):
        raise DataError(f"{root}: channels must be 1 or 3, got {channels!r}")
    urls, zeros = tuple(places["train"]), np.zeros(samples, np.int64)
    head = Head()
    train = StreamSplit(
        urls, zeros, head, np.arange(samples),
        urls=urls, known=known, label=label, channels=channels, shuffle=shuffle, stop=stop,
    )  # fmt: skip
    head.split = train
    splits: dict[str, Split] = {"train": train}
    bad: list[Skipped] = []
    for key in ("val", "test"):
        base = os.path.commonpath([os.path.dirname(os.path.abspath(place)) for place in places[key]])
        members = index_shards(places[key], base, label, bad)
        if not members:
            raise DataError(f"{places[key][0]}: no whole sample in the {key} shards")
        splits[key] = split_of(members, known, Members(members, channels))
    if bad and stop:
        raise DataError(f"{bad[0].path}: {bad[0].reason}")
    notes = f"{len(urls)} shards streamed, {samples} samples an epoch; local validation and test shards"
    return Source("shards", "folder", known.names, channels, splits, tuple(bad), (notes,))


class Head:
    """Reads the i-th sample of the first shards, for statistics: only forwards, one after the other."""

    def __init__(self) -> None:
        self.split: StreamSplit | None = None
        self.samples: Iterator[Any] | None = None
        self.next = 0

    def __call__(self, i: int) -> Tensor:
        assert self.split is not None
        if self.samples is None or i < self.next:
            self.samples, self.next = passing(self.split, self.split.urls), 0
        while True:
            found = next(self.samples, None)
            if found is None:
                raise DataError(f"{self.split.urls[0]}: has no sample {i}")
            if isinstance(found, Skipped):
                continue
            self.next += 1
            if self.next > i:
                self.samples = self.samples if i < 2000 else None
                return decode(found.content, found.suffix, found.name, self.split.channels)

    def __getstate__(self) -> dict[str, Any]:
        return {"split": self.split, "samples": None, "next": 0}  # an open stream stays where it is


@dataclass(frozen=True)
class Raw:
    """A sample as it came: its shard's URL and key, bytes, suffix and class number."""

    name: str
    content: bytes
    suffix: str
    target: int


def passing(split: StreamSplit, urls: Sequence[str]) -> Iterator[Raw | Skipped]:
    """All samples of these shards in order, what is damaged as Skipped; DataError for that with `stop`."""
    library, failed = webdataset(), []

    def handler(error: BaseException) -> bool:
        failed.append(" ".join(str(error.args[0] if error.args else error).split())[:200])
        return True

    for url in urls:
        failed.clear()
        count = 0
        for sample in library.tarfile_samples(iter([{"url": url}]), handler=handler):
            name = f"{url}/{sample.get('__key__', '?')}"
            try:
                yield _raw(sample, name, split)
                count += 1
            except DataError as e:
                if failed:
                    continue  # the sample that the cut has robbed of a member
                yield _bad(Skipped(name if name.isprintable() else ascii(name), str(e)), split)
        if failed:
            yield _bad(Skipped(url, f"{failed[0]}: {count} whole samples before it are used"), split)


def _bad(skipped: Skipped, split: StreamSplit) -> Skipped:
    if split.stop:
        raise DataError(f"{skipped.path}: {skipped.reason}")
    return skipped


def _raw(sample: Mapping[str, Any], name: str, split: StreamSplit) -> Raw:
    check_name(str(sample["__key__"]))
    parts = {key: value for key, value in sample.items() if not key.startswith("__")}
    suffix = data_of(parts)
    found = next((suffix for suffix in LABELS if suffix in parts), None)
    if found is None:
        raise DataError(f"no label (.{', .'.join(LABELS)}) beside it")
    label = read_label(parts[found], found, split.label)
    try:
        return Raw(name, parts[suffix], suffix, split.known.number(label))
    except KeyError as e:
        raise DataError(f"label {label[:40]!r} is not among the {len(split.known.names)} classes") from e


class Streamed(IterableDataset):
    """Batches of one process, for a loader without a sampler; `order` is a TrainOrder, whose epoch and shares count.

    Skipped samples come with the batch that they were to be in, and others take their places.
    """

    def __init__(self, samples: Samples, split: StreamSplit, order: TrainOrder, lanes: int) -> None:
        self.samples, self.split, self.order, self.lanes = samples, split, order, lanes

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch | list[Skipped]]:
        worker = get_worker_info()
        lane = 0 if worker is None else worker.id
        order, urls = self.order, self.split.urls
        generator = torch.Generator().manual_seed(derive(order.seed, order.epoch))
        shards = [urls[i] for i in torch.randperm(len(urls), generator=generator).tolist()]
        mine = shards[order.rank :: order.world][lane :: self.lanes]
        draw = torch.Generator().manual_seed(derive(order.seed, order.epoch, order.rank, lane))
        share, stream = len(range(order.rank, order.batch, order.world)), self._shuffled(mine, draw)
        for _ in range(lane, len(order), self.lanes):  # a loader takes a batch of each worker in turn
            batch: list[Any] = []
            good = 0
            while good < share and len(batch) < share + MOST_BAD:
                found = next(stream)
                batch.append(self._made(found) if isinstance(found, Raw) else found)
                good += not isinstance(batch[-1], Skipped)
            yield collate(batch)

    def _made(self, raw: Raw) -> Any:
        """Augmented as (seed, epoch, name) say, whatever batch the sample is in."""
        try:
            image = decode(raw.content, raw.suffix, raw.name, self.split.channels)
        except DataError as e:
            return Skipped(raw.name, str(e).removeprefix(f"{raw.name}: "))
        place = int.from_bytes(hashlib.blake2b(raw.name.encode(), digest_size=6).digest(), "little")
        return self.samples.made(image, lambda: raw.target, lambda: raw.name, (self.order.epoch, place))

    def _shuffled(self, urls: Sequence[str], draw: torch.Generator) -> Iterator[Raw | Skipped]:
        """The samples of these shards again and again, each drawn from a buffer of `shuffle`."""
        buffer: list[Raw] = []
        while True:
            good = 0
            for found in passing(self.split, urls):
                if isinstance(found, Skipped):
                    yield found
                    continue
                good += 1
                if len(buffer) < self.split.shuffle:
                    buffer.append(found)
                    continue
                i = int(torch.randint(len(buffer), (), generator=draw))
                found, buffer[i] = buffer[i], found
                yield found
            if not good:
                raise DataError(f"{urls[0]}: not one sample could be read of this and {len(urls) - 1} other shards")
            while buffer:  # to the end of a pass: each sample once before any comes again
                i = int(torch.randint(len(buffer), (), generator=draw))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                yield buffer.pop()


def stream_loader(samples: Samples, split: StreamSplit, order: TrainOrder, workers: int) -> DataLoader:
    """Batches of an epoch; workers start anew with each, as they carry its number."""
    if order.weights is not None or order.repeats > 1:
        raise DataError(f"{split.urls[0]}: samples of a stream can be neither weighed nor repeated")
    lanes = split.lanes(workers, order.world)
    return DataLoader(
        Streamed(samples, split, order, lanes),
        batch_size=None,
        num_workers=lanes if workers else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
