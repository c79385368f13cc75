"""Calibration images: from a folder, a data set or any iterable to batches as the model wants them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import ConvrewriteError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 0.875
"""Share of the shorter side that is kept, as ImageNet is evaluated."""
KEYS = ("image", "img", "pixel_values", "images", "x")


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes the model's input.

    Attributes:
        shape: (C, H, W). mean, std: per channel, of values from 0 to 1.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, example: tuple[Any, ...]) -> Preparation:
        """The size of the example input; mean and deviation as the model's timm configuration says, else ImageNet's.

        A model of one channel takes grey values from 0 to 1; of other numbers of channels only tensors are taken.
        """
        tensors = [value for value in example if isinstance(value, Tensor)]
        if len(example) != 1 or len(tensors) != 1 or tensors[0].dim() != 4:
            raise ConvrewriteError(
                f"the model takes {len(example)} inputs", fix="calibration feeds one batch of images"
            )
        channels, height, width = tensors[0].shape[1:]
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        mean, std = (0.0,) * channels, (1.0,) * channels
        if channels == 3:
            mean, std = (tuple(config.get(key) or known) for key, known in (("mean", MEAN), ("std", STD)))
        return cls((channels, height, width), mean, std)

    def picture(self, image: Any) -> Tensor:
        """A PIL picture -> (C, H, W): shorter side to H / 0.875, centre crop; a picture of that very size stays.

        Grey pictures are repeated for a model of three channels, and colour becomes grey for a model of one.
        """
        import numpy
        from PIL import Image

        channels, height, width = self.shape
        if channels not in (1, 3):
            fix = "give tensors"
            raise ConvrewriteError(f"a picture has 1 or 3 channels, the model takes {channels}", fix=fix)
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            scale = max(height / image.height, width / image.width) / CROP
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return self.normalise(torch.from_numpy(numpy.array(image)).view(height, width, channels).permute(2, 0, 1))

    def normalise(self, values: Tensor) -> Tensor:
        """Bytes (C, H, W) -> float32, mean and deviation taken out."""
        mean, std = (torch.tensor(t)[:, None, None] for t in (self.mean, self.std))
        return (values.float() / 255 - mean) / std

    def tensor(self, values: Tensor, where: str) -> Tensor:
        """One image as a tensor (C, H, W): bytes are normalised, floats are taken as they are."""
        if tuple(values.shape) != self.shape:
            seen, wanted = ("x".join(map(str, shape)) for shape in (values.shape, self.shape))
            what = f"an image is {seen}, the model takes {wanted}"
            if values.dim() == 3 and values.shape[0] != self.shape[0]:
                what = f"an image has {values.shape[0]} channels, the model takes {self.shape[0]}"
            raise ConvrewriteError(what, where=where, fix="prepare the images as for the model")
        if values.dtype == torch.uint8:
            return self.normalise(values)
        if not values.is_floating_point():
            raise ConvrewriteError(f"an image is of {values.dtype}", where=where, fix="give floats, or bytes (uint8)")
        if not bool(torch.isfinite(values).all()):
            raise ConvrewriteError("an image holds NaN or infinity", where=where, fix="leave it out")
        return values.detach().float().cpu()


@dataclass(frozen=True)
class Images:
    """Calibration images, and others held out to measure on.

    Attributes:
        fit, held_out: (N, C, H, W), float32 on the CPU.
    """

    fit: Tensor
    held_out: Tensor


def read_images(data: Any, preparation: Preparation, *, limit: int, seed: int) -> Images:
    """At most `limit` images of `data`; every fifth of them, in an order drawn by the seed, is held out.

    Args:
        data: a folder (all pictures below it), a data set with indices (torchvision, Hugging Face), a tensor
            (N, C, H, W), or an iterable of images or batches, from which the first are taken. An item may be a picture,
            a tensor, a pair (image, label), or a dict with an image under "image", "img", "pixel_values" or "x".

    Raises:
        ConvrewriteError: no images, fewer than two, or one that does not fit the model or cannot be read.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [image for _, image in zip(range(limit), _each(data, preparation, limit, generator), strict=False)]
    where = str(data) if isinstance(data, (str, Path)) else type(data).__name__
    if len(found) < 2:
        few = "no images" if not found else "one image, two are needed (one to fit on, one to measure on)"
        raise ConvrewriteError(f"there are {few}" if not found else f"there is {few}", where=where)
    order = torch.randperm(len(found), generator=generator)
    stacked = torch.stack(found)[order]
    apart = torch.arange(len(found)) % 5 == 1
    return Images(stacked[~apart], stacked[apart])


def _each(data: Any, preparation: Preparation, limit: int, generator: torch.Generator) -> Iterator[Tensor]:
    if isinstance(data, (str, Path)):
        yield from _of_folder(Path(data), preparation, limit, generator)
        return
    where = type(data).__name__
    items: Iterable[Any] = ()
    if isinstance(data, (bytes, Mapping)):
        pass
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items = (data[i] for i in _some(len(data), limit, generator))
    elif isinstance(data, Iterable):
        items = data
    if isinstance(data, (bytes, Mapping)) or not (hasattr(data, "__getitem__") or isinstance(data, Iterable)):
        raise ConvrewriteError(f"no images can be read from a {where}", fix="give a folder, a data set or an iterable")
    for number, item in enumerate(items):
        yield from _of_item(item, preparation, f"{where}[{number}]")


def _of_item(item: Any, preparation: Preparation, where: str) -> Iterator[Tensor]:
    """The images of one item: one, or all of a batch."""
    if isinstance(item, Mapping):
        key = next((k for k in KEYS if k in item), None)
        if key is None:
            known = f"an image is looked for under {', '.join(KEYS)}"
            raise ConvrewriteError(f"an item has no image, only {', '.join(map(str, item))}", where=where, fix=known)
        item = item[key]
    elif isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Tensor):
        for one in item if item.dim() == 4 else (item,):
            yield preparation.tensor(one, where)
    elif hasattr(item, "convert") and hasattr(item, "size"):
        yield preparation.picture(item)
    elif hasattr(item, "__array__"):
        yield from _of_item(torch.as_tensor(item), preparation, where)
    else:
        raise ConvrewriteError(f"an item is a {type(item).__name__}, not an image", where=where)


def _of_folder(folder: Path, preparation: Preparation, limit: int, generator: torch.Generator) -> Iterator[Tensor]:
    from PIL import Image, UnidentifiedImageError

    if not folder.is_dir():
        raise ConvrewriteError("this is no folder", where=str(folder), fix="name a folder of images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise ConvrewriteError("there are no images", where=str(folder), fix=f"known are {' '.join(ENDINGS)}")
    for i in _some(len(paths), limit, generator):
        try:
            with Image.open(paths[i]) as image:
                yield preparation.picture(image)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, ImportError) as error:  # no plugin
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConvrewriteError(
                f"the image cannot be read: {first}", where=str(paths[i]), fix="leave it out"
            ) from None


def _some(count: int, limit: int, generator: torch.Generator) -> list[int]:
    """At most `limit` of `count` indices, drawn by the generator, in rising order."""
    drawn: list[int] = sorted(torch.randperm(count, generator=generator)[:limit].tolist())
    return drawn
