"""Batches of images in an order that is a function of the seed, so that a run can go on where another stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convrewrite.data import DataError
from convrewrite.errors import ConvrewriteError
from convrewrite.randomness import number_from, seeded

Key = tuple[int, int]
"""(epoch, index): what is asked of a data set; the epoch is part of an augmentation's seed."""


class Batch(NamedTuple):
    """Images (N, C, H, W) float32, labels (N,) int64 (-1: none), and where they stand in the data set."""

    images: Tensor
    labels: Tensor
    indices: tuple[int, ...]


class _Problem(NamedTuple):
    """An error of a reading process, which must not travel as an exception: torch would add its traceback."""

    what: str
    where: str | None
    fix: str | None


class Prepared:
    """A data set with its transform; what a sample draws depends on the seed, the epoch and its index alone."""

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor], *, seed: int, name: str) -> None:
        self.dataset, self.transform, self.seed, self.name = dataset, transform, seed, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int] | _Problem:
        epoch, index = key
        with seeded(self.seed, "sample", epoch, index):
            try:
                image, label = _pair(self.dataset[index])
                return self.transform(image), label, index
            except DataError as error:
                return _Problem(error.what, error.where or f"{self.name}, image {index}", error.fix)
            except Exception as error:  # a user's data set may raise anything
                lines = str(error).strip().splitlines()
                text = f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
                return _Problem(text, f"{self.name}, image {index}", None)


@dataclass(frozen=True)
class Order:
    """Which images make which batch. Every epoch is a new permutation; its last, incomplete batch is left out.

    Attributes:
        count: images. batch: images of one process in a batch. rank, world: this process, and how many there are.
            Two processes together see what one with the doubled batch sees.
        start, end: batches counted over all epochs.
    """

    count: int
    batch: int
    seed: int
    start: int
    end: int
    rank: int = 0
    world: int = 1

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.count // (self.batch * self.world)

    def __len__(self) -> int:
        return max(self.end - self.start, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        known, order = -1, torch.empty(0)
        for number in range(self.start, self.end):
            epoch, place = divmod(number, self.per_epoch)
            if epoch != known:
                generator = torch.Generator().manual_seed(number_from(self.seed, "order", epoch))
                known, order = epoch, torch.randperm(self.count, generator=generator)
            first = (place * self.world + self.rank) * self.batch
            yield [(epoch, int(index)) for index in order[first : first + self.batch]]


def batches(data: Prepared, keys: Any, *, workers: int | None) -> Iterator[Batch]:
    """Batches of `keys`, an iterable of lists of keys.

    Args:
        workers: processes that read; None: by the machine, at most 4.

    Raises:
        DataError: an image cannot be read, is not finite, or has another size than its neighbours.
    """
    if workers is None:
        workers = max(0, min(4, len(os.sched_getaffinity(0)) - 1)) if hasattr(os, "sched_getaffinity") else 0
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=keys,
        collate_fn=_collate,
        num_workers=workers,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    for found in loader:
        if isinstance(found, _Problem):
            raise DataError(found.what, where=found.where, fix=found.fix)
        finite = torch.isfinite(found.images).flatten(1).all(1)
        if not finite.all():
            index = found.indices[int(finite.logical_not().nonzero()[0])]
            raise DataError("the image holds NaN or infinite values", where=f"{data.name}, image {index}")
        yield found


def measured(data: Prepared, *, batch: int, rank: int, world: int, workers: int | None) -> Iterator[Batch]:
    """Every image once, in order, this process's share of them."""
    own = list(range(rank, len(data), world))
    keys = [[(0, index) for index in own[i : i + batch]] for i in range(0, len(own), batch)]
    return batches(data, keys, workers=workers)


def drawn(data: Prepared, count: int, seed: int) -> Tensor:
    """At most `count` images (N, C, H, W), drawn by the seed."""
    generator = torch.Generator().manual_seed(number_from(seed, "drawn"))
    chosen = torch.randperm(len(data), generator=generator)[:count].tolist()
    return torch.cat([found.images for found in batches(data, [[(0, index)] for index in chosen], workers=0)])


def check_enough(count: int, batch: int, world: int, name: str) -> None:
    """Refuse a data set that does not fill one batch."""
    if count < batch * world:
        what = f"{count} images to train on do not fill one batch of {batch * world}"
        raise ConvrewriteError(what, where=name, fix=f"--batch-size {max(count // world, 1)}")


def _pair(sample: Any) -> tuple[Any, int]:
    """(image, label) of one sample in any of the usual forms."""
    if isinstance(sample, dict):
        image = next((sample[key] for key in ("image", "img", "pixel_values") if key in sample), None)
        label = next((sample[key] for key in ("label", "labels") if key in sample), -1)
    elif isinstance(sample, tuple | list):
        image, label = (sample[0], sample[1]) if len(sample) > 1 else (sample[0], -1)
    else:
        image, label = sample, -1
    if image is None:
        raise DataError("the sample holds no image", fix="give (image, label) or {'image': ..., 'label': ...}")
    try:
        return image, int(label)
    except (TypeError, ValueError):
        raise DataError(f"the label {str(label)[:40]!r} is no class number") from None


def _collate(samples: list[Any]) -> Batch | _Problem:
    problem = next((sample for sample in samples if isinstance(sample, _Problem)), None)
    if problem is not None:
        return problem
    images, labels, indices = zip(*samples, strict=True)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        one, other = sorted(sizes)[:2]
        fix = "give PIL images or uint8 tensors, which are resized, or tensors of one size"
        return _Problem(f"float tensors of several sizes: {one} and {other}", None, fix)
    return Batch(torch.stack(images), torch.tensor(labels, dtype=torch.int64), indices)
