"""Images to train and measure on: folders, torchvision's and Hugging Face's data sets, and Python objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Subset

from convrewrite.errors import ConvrewriteError, closest
from convrewrite.registry import Registry

__all__ = ["DATA", "DataError", "Images", "open_images"]


class DataError(ConvrewriteError):
    """Images or labels could not be read, or do not fit the model."""


@dataclass(frozen=True)
class Images:
    """Images to train on and others to measure on.

    Attributes:
        train, val: map-style: ``len()``, and ``[i]`` gives (image, label), {"image": ..., "label": ...} or an
            image; an image is a PIL image, a uint8 tensor (C, H, W), a uint8 array (H, W, C), or a float
            tensor (C, H, W), which is taken as it is. `val` is None where a source has but one part.
        classes: names of the classes; their number if they have no names; None if unknown or not labelled.
        name: for messages.
        labelled: False for a source that has no labels at all.
    """

    train: Any
    val: Any
    classes: tuple[str, ...] | int | None
    name: str
    labelled: bool = True

    @property
    def count(self) -> int | None:
        """Number of classes, None if unknown."""
        return self.classes if isinstance(self.classes, int) or self.classes is None else len(self.classes)


DATA: Registry[Callable[[str, bool], Images]] = Registry("kind of data", package="convrewrite.data")
"""Name before the colon -> function of what stands behind it, and whether it may be downloaded."""


def open_images(data: Any, val: Any = None, *, fraction: float, seed: int, download: bool = False) -> Images:
    """Images from what a user calls them.

    Args:
        data: ``imagefolder:PATH``, ``torchvision:NAME[:ROOT][?option=value]``, ``hf:NAME``, or a map-style dataset.
        val: other images to measure on, in any of these forms; by default the source's own, and if it has
            none, `fraction` of the images, drawn by `seed`, which are then not trained on.
        download: allow torchvision to download.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    found = _open(data, download=download)
    if val is not None:
        other = _open(val, download=download)
        if found.count is not None and other.count is not None and found.classes != other.classes:
            counts = f"{found.count} classes to train on, {other.count} to measure on"
            raise DataError(counts if found.count != other.count else "the classes differ", where=f"{other.name}")
        found = replace(found, val=other.val if other.val is not None else other.train)
    for part, images in (("train on", found.train), ("measure on", found.val)):
        if images is not None and len(images) == 0:
            raise DataError(f"there are no images to {part}", where=found.name)
    return found if found.val is not None else _split(found, fraction, seed)


def _open(data: Any, *, download: bool) -> Images:
    if isinstance(data, Images):
        return data
    if isinstance(data, str):
        kind, colon, rest = data.partition(":")
        if not colon or kind not in DATA:
            hint = closest(kind, DATA.names()) if colon else None
            forms = "write imagefolder:PATH, torchvision:NAME or hf:NAME"
            raise DataError(f"'{data}' is no source of images", fix=f"{hint} {forms}" if hint else forms)
        return DATA.get(kind)(rest, download)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        fix = "give an object with len() and [i], or imagefolder:PATH"
        raise DataError(f"a {type(data).__name__} is no data set", fix=fix)
    return Images(data, None, classes_of(data), type(data).__name__)


def classes_of(dataset: Any) -> tuple[str, ...] | int | None:
    """Classes of a map-style dataset as far as it says: ``classes``, ``num_classes``, or integer labels in a tensor."""
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return tuple(str(name) for name in classes)
    number = getattr(dataset, "num_classes", None)
    if isinstance(number, int):
        return number
    tensors = getattr(dataset, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2 and tensors[1].dtype == torch.int64 and tensors[1].numel():
        return int(tensors[1].max()) + 1
    return None


def _split(found: Images, fraction: float, seed: int) -> Images:
    count = len(found.train)
    held = round(count * fraction) or 1
    if count < 2:
        fix = "give more, or others to measure on with --val"
        raise DataError("one image cannot be both trained and measured on", where=found.name, fix=fix)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    rest, kept = sorted(order[held:]), sorted(order[:held])
    return replace(found, train=Subset(found.train, rest), val=Subset(found.train, kept))
