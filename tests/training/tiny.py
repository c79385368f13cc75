"""A network, a rule and images so small that a training step takes milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import convrewrite as cr

from ..nets import Residual

SIDE = 12
SHAPE = (1, 3, SIDE, SIDE)
CLASSES = 5
RULES: dict[str, Any] = {
    "version": 1,
    "name": "t",
    "rules": [
        {"id": "r", "match": {"role": "bottleneck_spatial"}, "replace": {"block": "acmix", "heads": 4, "window": 3}}
    ],
}
QUICK: dict[str, Any] = {"workers": 0, "batch_size": 8, "lr": 1e-3, "val_fraction": 0.2}


@cache
def _rewritten(start: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cr.rewrite(Residual(CLASSES), RULES, example=SHAPE, start=start).model


def rewritten(start: str = "exact") -> nn.Module:
    """The small residual network with ACmix in its four 3x3; the same weights every time."""
    import copy

    return copy.deepcopy(_rewritten(start))


def without_norms() -> nn.Module:
    """The small residual network without batch norms and dropout: an image's loss depends on no other image."""
    model = Residual(CLASSES)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.Identity())
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def images(count: int = 40, *, seed: int = 0) -> TensorDataset:
    """Float images whose class is written in the brightness of their channels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    shift = torch.linspace(-2, 2, CLASSES)[labels].view(-1, 1, 1, 1)
    return TensorDataset(torch.randn(count, *SHAPE[1:], generator=generator) * 0.5 + shift, labels)


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same keys and, bit for bit, the same values."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class Unreadable:
    """Images of which number 3 is what it is given."""

    classes = tuple("abcde")

    def __init__(self, strange: Any, label: Any = 0) -> None:
        self.inner, self.strange, self.label = images(), strange, label

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index != 3:
            return self.inner[index]
        if isinstance(self.strange, Exception):
            raise self.strange
        return self.strange, self.label


def picture(value: float = 0.0) -> Tensor:
    """One float image of one value."""
    return torch.full(SHAPE[1:], value)
