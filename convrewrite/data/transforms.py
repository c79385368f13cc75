"""From an image as it is stored to the tensor a model takes: channels, size, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from convrewrite import provenance
from convrewrite.data import DataError
from convrewrite.errors import closest

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AUGMENTATIONS = ("crop", "flip", "randaugment")


@dataclass(frozen=True)
class Form:
    """What a model takes.

    Attributes:
        channels, size: of its input, `size` is (H, W). mean, std: one value a channel; () does not normalise.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def form_of(model: nn.Module, *, image_size: int | None, normalize: str) -> Form:
    """The input of a rewritten `model`: its plan's shape, and the mean and deviation of its own source.

    Args:
        normalize: auto (timm's configuration, torchvision's weights of that name, else ImageNet's for three
            channels and 0.5 for others), imagenet, half (0.5 and 0.5), or none.
    """
    note = provenance.of(model)
    shape = note.plan.input_shape if note is not None else (1, 3, 224, 224)
    channels, size = shape[1], (image_size, image_size) if image_size else (shape[2], shape[3])
    half = ((0.5,) * channels, (0.5,) * channels)
    if normalize == "imagenet" and channels != 3:
        raise DataError(f"ImageNet's mean is of 3 channels, the model takes {channels}", fix="--normalize half")
    chosen = {"none": ((), ()), "half": half, "imagenet": IMAGENET}.get(normalize)
    mean, std = chosen if chosen is not None else _own(model) or (IMAGENET if channels == 3 else half)
    if len(mean) not in (0, channels):
        mean, std = half
    return Form(channels, size, tuple(mean), tuple(std))


def _own(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation that the model's source names."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        return tuple(config["mean"]), tuple(config["std"])
    note = provenance.of(model)
    recipe = note.source if note is not None else None
    while recipe and recipe.get("kind") == "rewritten":
        recipe = recipe["base"]
    if not recipe or recipe.get("kind") != "torchvision":
        return None
    from torchvision.models import get_model_weights

    try:
        preset: Any = next(iter(get_model_weights(recipe["name"]))).transforms()
    except (ValueError, StopIteration):
        return None
    mean, std = getattr(preset, "mean", None), getattr(preset, "std", None)
    return (tuple(mean), tuple(std)) if mean and std else None


def augmentations(text: str) -> frozenset[str]:
    """``crop,flip`` as a set; ``none`` is the empty one."""
    names = frozenset(part.strip() for part in text.split(",") if part.strip()) - {"none"}
    for name in sorted(names):
        if name not in AUGMENTATIONS:
            raise DataError(f"unknown augmentation '{name}'", fix=closest(name, AUGMENTATIONS) or "crop,flip or none")
    return names


def transform_for(form: Form, augment: frozenset[str]) -> Callable[[Any], Tensor]:
    """Image -> float32 tensor (C, H, W). Without augmentations: the shorter side resized, the centre cropped.

    ``crop`` takes 35 to 100 % of the area at an aspect of 3:4 to 4:3, ``randaugment`` is that of Cubuk et al. 2020 with
    torchvision's defaults. A float tensor is taken as it is, but for a grey one that is given three channels.
    """
    if "crop" in augment:
        steps: list[Any] = [v2.RandomResizedCrop(form.size, scale=(0.35, 1.0), antialias=True)]
    elif form.size[0] == form.size[1]:
        steps = [v2.Resize(form.size[0], antialias=True), v2.CenterCrop(form.size)]
    else:
        steps = [v2.Resize(form.size, antialias=True)]
    if "flip" in augment:
        steps.append(v2.RandomHorizontalFlip())
    if "randaugment" in augment:
        steps.append(v2.RandAugment())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    if form.mean:
        steps.append(v2.Normalize(list(form.mean), list(form.std)))
    chain = v2.Compose(steps)

    def apply(image: Any) -> Tensor:
        tensor = as_tensor(image, form.channels)
        done: Tensor = tensor if tensor.is_floating_point() else chain(tensor)
        return done.as_subclass(Tensor)

    return apply


def as_tensor(image: Any, channels: int) -> Tensor:
    """Any image as a tensor (channels, H, W): uint8, or the float tensor that it was.

    A grey image is repeated for a model of three channels; a PIL image of any mode becomes grey for one channel.
    """
    if hasattr(image, "convert"):
        if channels not in (1, 3):
            raise DataError(f"the model takes {channels} channels, an image has 1 or 3", fix="give tensors")
        image = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(f"an array of {image.dtype} {image.shape} is no image", fix="give uint8 (H, W, C)")
        image = torch.from_numpy(image.copy())
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise DataError(f"a {type(image).__name__}{shape} is no image", fix="give a PIL image or a tensor (C, H, W)")
    image = image[None] if image.ndim == 2 else image
    if image.shape[0] == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if image.shape[0] != channels:
        raise DataError(f"an image has {image.shape[0]} channels, the model takes {channels}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise DataError(f"a tensor of {image.dtype} is no image", fix="give uint8 or float")
    done: Tensor = image
    return done if done.dtype == torch.uint8 else done.float()
