"""Small networks, one trait each, for tests that need a real module and not a real model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a skip."""

    def __init__(self, channels: int = 8, stride: int = 1, groups: int = 1, out: int | None = None) -> None:
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(channels, out, 1, stride=stride) if stride > 1 or out != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.skip(x))


class Residual(nn.Module):
    """A ResNet in small: stem, two stages of bottlenecks, dropout, linear head; has its own method and attribute."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.num_classes = classes
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Bottleneck(), Bottleneck())
        self.layer2 = nn.Sequential(Bottleneck(stride=2), Bottleneck())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.forward_features(x).mean((2, 3))))


class Plain(nn.Module):
    """A chain of three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Shared(nn.Module):
    """One convolution called twice, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.conv(F.max_pool2d(x, 2))


class Aliased(nn.Module):
    """One convolution registered under two names, called by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.stem(x))


class Functional(nn.Module):
    """A convolution called as a function with a parameter of the module, and a buffer that nothing uses."""

    def __init__(self, *, mode_dependent: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("unused", torch.ones(2))
        self.mode_dependent = mode_dependent

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        if self.mode_dependent:
            y = F.dropout(y, 0.5, self.training)
        return F.relu(y)


class WithFunctional(nn.Module):
    """A functional convolution between two modules."""

    def __init__(self, *, mode_dependent: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = Functional(mode_dependent=mode_dependent)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.stem(x)))


class Branching(nn.Module):
    """Control flow on data inside a block: fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.inner = Bottleneck()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 0 and int(x.dim()) == 4:
            x = self.inner(self.conv(x))
        for _ in range(int(x.shape[1] > 4)):
            x = x * 1
        return x


class Opaque(nn.Module):
    """Holds a block that has to stay opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class TwoOutputs(nn.Module):
    """Features and logits, and in train mode an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Bottleneck()
        self.aux = nn.Conv2d(8, 2, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.block(self.stem(x))
        if self.training:
            return {"out": self.head(x), "aux": self.aux(x)}
        return {"out": self.head(x)}


class Dense(nn.ModuleDict):
    """A dense block as torchvision writes it: a ModuleDict with its own forward."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.add_module(f"layer{i}", nn.Conv2d(4 + 4 * i, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Stem, dense block, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.dense = Dense()
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.stem(x)))


NETS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "plain": Plain,
    "shared": Shared,
    "aliased": Aliased,
    "functional": WithFunctional,
    "opaque": Opaque,
    "two_outputs": TwoOutputs,
    "dense": DenseNet,
}
SHAPE = (2, 3, 12, 12)
