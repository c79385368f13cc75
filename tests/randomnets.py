"""Random CNNs for hypothesis: a stem and a list of drawn pieces, each with a trait that breaks naive rewriters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4


class Conv(nn.Module):
    """One convolution with drawn geometry and a norm."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, **options)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Sum(nn.Module):
    """Residual, with or without a projection on the skip arm."""

    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(WIDTH, WIDTH, 1)
        self.b = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.c = nn.Conv2d(WIDTH, WIDTH, 1)
        self.skip = nn.Conv2d(WIDTH, WIDTH, 1) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))) + (x if self.skip is None else self.skip(x))


class Cat(nn.Module):
    """Two branches side by side and a 1x1 back to the width."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(WIDTH, 3, (1, 3), padding=(0, 1))])
        self.mix = nn.Conv2d(5, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([b(x) for b in self.branches], 1))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, 2, 1)
        self.up = nn.Conv2d(2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Free(nn.Module):
    """A functional convolution: own weight, computed weight, or one that is used twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2 if self.kind == "computed" else self.weight
        x = F.conv2d(x, weight, padding=1)
        return F.conv2d(x, weight, padding=1) if self.kind == "twice" else x


class Same(nn.Conv2d):
    """A subclass with a forward of its own: pads as it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Moody(nn.Module):
    """Another convolution in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(WIDTH, WIDTH, 1)
        self.two = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.two(x), 0.2, True) if self.training else self.one(x)


class Wild(nn.Module):
    """Control flow on values: cannot be traced, and not run on meta tensors either."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.detach().sum()) > -1e9 else x


class Coordinates(nn.Module):
    """Makes tensors in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.arange(x.shape[-1], dtype=x.dtype)


def _normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 3, padding=1))


class Net(nn.Module):
    """Stem, pieces, and one of several kinds of output; `shared` pieces run a second time."""

    def __init__(self, pieces: list[nn.Module], repeat: list[int], output: str, *, extra: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.pieces = nn.ModuleList(pieces)
        self.repeat = repeat
        self.output = output
        if extra:
            self.never_called = nn.Conv2d(WIDTH, WIDTH, 3)
        if output == "line":
            self.line = nn.Conv1d(WIDTH, 2, 1)
        if output == "up":
            self.up = nn.ConvTranspose2d(WIDTH, 2, 2, stride=2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = self.stem(x) * scale
        for i, piece in enumerate(self.pieces):
            x = piece(x)
            if i in self.repeat:
                x = piece(x)
        if self.output == "dict":
            return {"out": x, "pooled": x.mean((2, 3))}
        if self.output == "tuple":
            return x.mean((2, 3)), x
        if self.output == "line":
            return self.line(x.flatten(2))
        return self.up(x) if self.output == "up" else x


_GEOMETRY = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 2, 3, (1, 3), (3, 1), 5]),
        "stride": st.sampled_from([1, 1, 2]),
        "padding": st.sampled_from([0, 1, 2, (0, 1)]),
        "dilation": st.sampled_from([1, 1, 2]),
        "groups": st.sampled_from([1, 1, 2, WIDTH]),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]),
    }
)
_PIECES = st.one_of(
    st.builds(Conv, _GEOMETRY),
    st.builds(lambda k: nn.Conv2d(WIDTH, WIDTH, k, padding="same"), st.sampled_from([2, 3, 5])),
    st.builds(Sum, st.booleans()),
    st.builds(Cat),
    st.builds(Gate),
    st.builds(Free, st.sampled_from(["own", "computed", "twice"])),
    st.builds(lambda: Same(WIDTH, WIDTH, 3)),
    st.builds(Moody),
    st.builds(Wild),
    st.builds(Coordinates),
    st.builds(_normed),
    st.builds(lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout2d(0.3))),
)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """(model, input shape); some of them do not run on that input at all."""
    torch.manual_seed(draw(st.integers(0, 3)))
    pieces = draw(st.lists(_PIECES, max_size=4))
    if pieces and draw(st.booleans()):
        pieces.append(draw(st.sampled_from(pieces)))  # registered and called twice
    repeat = draw(st.lists(st.integers(0, 4), max_size=1))
    output = draw(st.sampled_from(["plain", "dict", "tuple", "line", "up"]))
    model = Net(pieces, repeat, output, extra=draw(st.booleans()))
    if draw(st.booleans()):
        model.eval()
    size = draw(st.sampled_from([(1, 1), (2, 3), (5, 5), (8, 7)]))
    return model, (draw(st.sampled_from([1, 2])), 3, *size)


@st.composite
def rule_sets(draw: st.DrawFn) -> dict[str, Any]:
    """A rule that takes some or all convolutions and does something to them."""
    match = draw(
        st.sampled_from(
            [
                {"op": "conv2d"},
                {"kernel": 3},
                {"role": ["basic_spatial", "bottleneck_spatial", "stem"]},
                {"stage": ">=1"},
                {"where": "in_channels >= 3 and groups == 1"},
                {"not": {"role": "stem"}},
            ]
        )
    )
    change = draw(
        st.sampled_from(
            [
                {"replace": {"block": "test_copy"}},
                {"replace": {"block": "acmix", "heads": 2, "window": 3}},
                {"replace": {"block": "acmix", "heads": 1, "window": 2}},
                *({"insert": {"block": "test_tail", "after": a}} for a in ("here", "block", "stage")),
                *({"insert": {"block": "test_tail", "before": a}} for a in ("here", "block")),
            ]
        )
    )
    rule = {"id": "r", "match": match, **change, "start": draw(st.sampled_from(["exact", "fresh"]))}
    if rule["start"] == "fresh" and change.get("replace", {}).get("block") == "test_copy":
        rule["start"] = "exact"  # a copy without its weights is no copy
    if draw(st.booleans()):
        rule["shared"] = "together"
    return {"version": 1, "name": "random", "rules": [rule]}
