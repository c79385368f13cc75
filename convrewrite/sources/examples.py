"""Example inputs from an input shape, for models that take something else than one batch of images.

A shape stays what users write and plans store, (N, C, H, W); how it is passed to the model is decided here:
torchvision's detectors take a list of images and, in train mode, targets; its optical-flow models two frames; video
models clips.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.registry import Registry
from convrewrite.sites import Shape

FRAMES = 16
"""Length of a clip where the shape does not say it."""

Maker = Callable[[nn.Module, Shape, torch.dtype], tuple[Any, ...] | None]
EXAMPLES: Registry[Maker] = Registry("example")
"""Functions (model, shape, dtype) -> inputs, or None where the model is not of their kind."""


def inputs_of(model: nn.Module, shape: Shape) -> tuple[Any, ...]:
    """Inputs for `model` of the planned shape; images are meta tensors in the model's dtype, targets have values.

    Args:
        shape: (N, C, H, W); of a detector N images of C x H x W, of a video model also (N, C, T, H, W).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name in EXAMPLES.names():
        found = EXAMPLES.get(name)(model, tuple(shape), dtype)
        if found is not None:
            return found
    return (_blank(shape, dtype),)


def shape_of(example: tuple[Any, ...]) -> Shape:
    """The shape that `inputs_of` would make these inputs from; () if there are no tensors in them."""
    first = example[0] if example else None
    if isinstance(first, Tensor):
        return tuple(first.shape)
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], Tensor):
        return (len(first), *first[0].shape)
    return next((tuple(t.shape) for t in tensors_in(example)), ())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, change) for v in value)
    if isinstance(value, dict):
        changed = ((k, mapped(v, change)) for k, v in value.items())
        return OrderedDict(changed) if isinstance(value, OrderedDict) else dict(changed)
    return value


@EXAMPLES.register("detection")
def detection(model: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """torchvision's detectors: a list of images, and one box with its label for each (used in train mode only)."""
    if len(shape) != 4 or not _comes_from(model, "torchvision.models.detection"):
        return None
    count, channels, height, width = shape
    heads = getattr(model, "roi_heads", None)
    masks = getattr(heads, "mask_predictor", None) is not None
    predictor = getattr(heads, "keypoint_predictor", None)
    images = [_blank((channels, height, width), dtype) for _ in range(count)]
    return images, [_target(height, width, dtype, masks=masks, keypoints=_keypoints(predictor)) for _ in range(count)]


def _target(height: int, width: int, dtype: torch.dtype, *, masks: bool, keypoints: int) -> dict[str, Tensor]:
    """One box of half the image's height and width in its middle, labelled 1."""
    left, top, right, bottom = width // 4, height // 4, width - width // 4, height - height // 4
    target = {"boxes": torch.tensor([[left, top, right, bottom]], dtype=dtype), "labels": torch.tensor([1])}
    if masks:
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, top:bottom, left:right] = 1
        target["masks"] = mask
    if keypoints:
        point = torch.tensor([(left + right) / 2, (top + bottom) / 2, 1], dtype=dtype)
        target["keypoints"] = point.expand(1, keypoints, 3).clone()
    return target


def _keypoints(predictor: nn.Module | None) -> int:
    """How many key points the last convolution of the predictor gives; 0 without a predictor."""
    if predictor is None:
        return 0
    return next((int(getattr(m, "out_channels", 0)) for m in reversed(list(predictor.modules())) if _is_conv(m)), 17)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


@EXAMPLES.register("optical_flow")
def optical_flow(model: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """torchvision's RAFT: two frames of one size."""
    if len(shape) != 4 or not _comes_from(model, "torchvision.models.optical_flow"):
        return None
    return _blank(shape, dtype), _blank(shape, dtype)


@EXAMPLES.register("video")
def video(model: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Models that begin with a 3-D convolution: a shape of four numbers becomes clips of sixteen frames."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    if not isinstance(first, nn.Conv3d) or len(shape) != 4:
        return None
    return (_blank((*shape[:2], FRAMES, *shape[2:]), dtype),)


def _blank(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _comes_from(model: nn.Module, package: str) -> bool:
    """True if the model's class, or one it derives from, is of that package."""
    return any(c.__module__.startswith(package) for c in type(model).__mro__)
