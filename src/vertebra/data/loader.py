"""Batches whose order and augmentation depend on (seed, epoch, sample) alone.

The number of workers, of processes or of earlier epochs makes no difference, so a resumed run sees what the
uninterrupted one would have seen.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .source import DataError, Skipped, Split


class Batch(NamedTuple):
    """Samples (B, C, *S), targets (B, ...), positions in the split (B,), and what could not be read.

    Samples of different sizes are a list of (C, *S); targets that are no tensors or of different sizes are a list too.
    """

    images: Any
    targets: Any
    positions: Tensor
    skipped: list[Skipped]


def derive(*parts: int) -> int:
    """A 63-bit seed from integers; distinct tuples give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class TrainOrder:
    """Batches of (epoch, position). Set `epoch` before iterating.

    With `weights` (n,) samples are drawn in proportion to them instead of each once; what comes again in an epoch is
    (epoch, position, how often before), so that it is augmented otherwise.

    `repeats` gives each sample of an epoch so many times in a row, which is that many fewer samples an epoch (repeated
    augmentation, arXiv 1901.09335).

    `batch` counts samples over all processes: process `rank` of `world` takes every world-th sample of each batch, so
    the gradients averaged over processes are those of one process, each weighed by its samples. An incomplete last
    batch is dropped, unless it is the only one.
    """

    def __init__(
        self,
        n: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        weights: Tensor | None = None,
        repeats: int = 1,
    ) -> None:
        self.weights, self.repeats = weights, repeats
        self.batch = min(batch, n)
        if self.batch < world:
            raise DataError(f"batches of {min(batch, n)} images cannot be shared by {world} processes")
        self.n, self.seed, self.rank, self.world, self.epoch = n, seed, rank, world, 0

    def __len__(self) -> int:
        return self.n // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        generator = torch.Generator().manual_seed(derive(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        if self.weights is not None:
            order = drawn(self.weights, order, generator)
        if self.repeats > 1:
            order = order[: -(-self.n // self.repeats)].repeat_interleave(self.repeats)[: self.n]
        copies: Counter[int] = Counter()
        keys: list[tuple[int, ...]] = []
        for i in order.tolist():
            keys.append((self.epoch, i, copies[i]) if copies[i] else (self.epoch, i))
            copies[i] += 1
        for b in range(len(self)):
            yield keys[b * self.batch : (b + 1) * self.batch][self.rank :: self.world]


def drawn(weights: Tensor, order: Tensor, generator: torch.Generator) -> Tensor:
    """As many samples as there are, in random order, each as often as its weight: n w / sum(w) rounded up or down.

    The points 0 + u, 1 + u, ..., u one random number, fall into the weights laid end to end in the `order` given
    (systematic sampling): the chance of each is exact, and the numbers vary least.
    """
    order = order[weights[order].argsort(stable=True)]  # equal weights lie together: a class's number varies by one
    ends = weights.double()[order].cumsum(0)
    points = torch.arange(len(order), dtype=torch.float64) + torch.rand((), generator=generator, dtype=torch.float64)
    found = torch.searchsorted(ends, points * (ends[-1] / len(order)), right=True).clamp_max(len(order) - 1)
    return order[found][torch.randperm(len(order), generator=generator)]


class Samples(Dataset):
    """(epoch, position) -> (sample, target, position), or Skipped. `target` makes a tensor of what the split says."""

    def __init__(
        self,
        split: Split,
        transform: Callable[..., Any],
        seed: int = 0,
        target: Callable[[Any], Tensor] = torch.as_tensor,
    ) -> None:
        self.split, self.transform, self.seed, self.target = split, transform, seed, target

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, Tensor, int] | Skipped:
        epoch, i, *again = key
        try:
            image = self.split.read(i)
        except DataError as e:
            path, _, reason = str(e).partition(": ")
            return Skipped(path, reason)
        return self.made(image, lambda: self.split.target(i), lambda: self.split.names[i], (epoch, i, *again))

    def made(
        self, image: Tensor, target: Callable[[], Any], name: Callable[[], str], key: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, int] | Skipped:
        """What was read, as the model is given it; `key` is (epoch, position, ...)."""
        # torchvision draws from the global generator: lend it a seed of this sample's own
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(derive(self.seed, *key))
        try:
            if getattr(self.transform, "joint", False):  # the target goes where the pixels go
                return *self.transform(image, target()), key[1]
            return self.transform(image), self.target(target()), key[1]
        except DataError as e:
            return Skipped(name(), str(e))
        finally:
            torch.set_rng_state(state)


def collate(samples: list[tuple[Tensor, Tensor, int] | Skipped]) -> Batch | list[Skipped]:
    """A Batch of what could be read; only the Skipped if nothing could."""
    good = [s for s in samples if not isinstance(s, Skipped)]
    bad = [s for s in samples if isinstance(s, Skipped)]
    if not good:
        return bad
    images, targets, positions = zip(*good)
    if isinstance(targets[0], dict):  # objects: their images may be of any size in another batch
        return Batch(list(images), list(targets), torch.tensor(positions), bad)
    return Batch(_together(images), _together(targets), torch.tensor(positions), bad)


def _together(items: Sequence[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(list(items)) if len({item.shape for item in items}) == 1 else list(items)


def train_loader(images: Samples, order: TrainOrder, workers: int) -> DataLoader:
    from .stream import StreamSplit, stream_loader

    if isinstance(images.split, StreamSplit):
        return stream_loader(images, images.split, order, workers)
    return _loader(images, order, workers)


def eval_loader(images: Samples, batch: int, workers: int, rank: int = 0, world: int = 1) -> DataLoader:
    """Every sample exactly once over all processes, in order."""
    mine = [(0, i) for i in range(rank, len(images.split), world)]
    return _loader(images, [mine[i : i + batch] for i in range(0, len(mine), batch)], workers)


def _loader(images: Samples, batches: object, workers: int) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the model's generator
    )
