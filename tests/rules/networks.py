"""Sites written by hand: ResNet-50 at 224 pixels from the paper's table, and small odd cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convrewrite.sites import ConvSpec, Cost, Site

RESNET50_BLOCKS = (3, 4, 6, 3)


def site(path: str, index: int = 0, **facts: Any) -> Site:
    """A 3x3 convolution 64 -> 64 on 56 x 56 with stride 1, unless `facts` say otherwise."""
    spec: dict[str, Any] = {
        "in_channels": 64,
        "out_channels": 64,
        "kernel": (3, 3),
        "stride": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
    }
    spec = {key: facts.pop(key, value) for key, value in spec.items()}
    size = facts.pop("size", (56, 56))
    conv = ConvSpec(**spec, padding=(spec["kernel"][1] // 2,) * 2 + (spec["kernel"][0] // 2,) * 2)
    out = conv.out_size(*size)
    cost = Cost(params=conv.params, flops=conv.flops(1, *out))
    shapes = {"in_shape": (1, conv.in_channels, *size), "out_shape": (1, conv.out_channels, *out)}
    return Site(path, index, conv, **{"cost": cost, **shapes, **facts})


def resnet50() -> list[Site]:
    """Its 53 convolutions: 1 stem, 16 bottlenecks of 3, 4 downsampling shortcuts."""
    sites = [site("conv1", in_channels=3, kernel=(7, 7), stride=(2, 2), size=(224, 224), role="stem", stage=0)]
    channels = 64
    for stage, (blocks, size) in enumerate(zip(RESNET50_BLOCKS, (56, 28, 14, 7), strict=True), 1):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            strides = 2 if stage > 1 and block == 0 else 1
            sites += _bottleneck(stage, block, blocks, channels, width, size, strides)
            channels = 4 * width
    return [replace(s, index=i) for i, s in enumerate(sites)]


def _bottleneck(stage: int, block: int, blocks: int, channels: int, width: int, size: int, stride: int) -> list[Site]:
    path = f"layer{stage}.{block}"
    place: dict[str, Any] = {
        "stage": stage,
        "stage_from_end": 5 - stage,
        "block": block,
        "block_from_end": blocks - block,
        "block_path": path,
        "block_entry": path,
        "stage_path": f"layer{stage}",
        "inside": ((f"layer{stage}", "Sequential"), (path, "Bottleneck")),
    }
    big, out = (size * stride, size * stride), 4 * width
    one: dict[str, Any] = {"kernel": (1, 1), "role": "pointwise"}
    after = ("batch_norm", "relu")
    sites = [
        site(
            f"{path}.conv1",
            in_channels=channels,
            out_channels=width,
            size=big,
            position=1,
            precedes=after,
            **one,
            **place,
        ),
        site(
            f"{path}.conv2",
            in_channels=width,
            out_channels=width,
            stride=(stride, stride),
            size=big,
            role="bottleneck_spatial",
            position=2,
            precedes=after,
            follows=("relu", "batch_norm", "conv2d"),
            **place,
        ),
        site(f"{path}.conv3", in_channels=width, out_channels=out, size=(size, size), position=3, **one, **place),
    ]
    if block == 0:
        spec: dict[str, Any] = {
            "kernel": (1, 1),
            "stride": (stride, stride),
            "in_channels": channels,
            "out_channels": out,
        }
        sites.append(site(f"{path}.downsample.0", size=big, role="downsample", position=1, **spec, **place))
    return sites


def resnext50() -> list[Site]:
    """The same net with 32 groups in every 3x3."""
    return [replace(s, conv=replace(s.conv, groups=32)) if s.role == "bottleneck_spatial" else s for s in resnet50()]


def ids(sites: Any) -> list[str]:
    return [s.id for s in sites]
