"""A block of your own, registered in one file and used by a rule like any other.

As a command: ``convrewrite plan examples/own_block.py:network --rules examples/own_block.yaml --input 1x3x32x32``.
The block is known there because the file that builds the model registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.blocks.base import Action

FLOAT_BYTES = 4


class GateOptions(cr.BlockOptions):
    """Options of `Gate`."""

    reduction: int = Field(default=4, ge=1, description="channels are divided by this inside")


@cr.register_block("context_gate")
class Gate(cr.Block):
    """One number per channel, computed from the whole map, scales it; the scale starts at one.

    y = x (1 + W2 relu(W1 mean(x))), W2 = 0 at the start.

    Shape: (B, C, H, W) -> (B, C, H, W). Parameters: 2 C (C // r) + C // r + C.
    """

    Options: ClassVar[type[cr.BlockOptions]] = GateOptions
    actions: ClassVar[tuple[Action, ...]] = ("insert",)
    exact: ClassVar[bool] = True  # inserted, it is the exact identity until trained
    paper: ClassVar[str] = "after Hu et al. 2018, arXiv 1709.01507"

    def __init__(self, place: cr.Place, options: cr.BlockOptions) -> None:
        super().__init__(place, options)
        assert isinstance(options, GateOptions)
        self.squeeze = nn.Linear(self.in_channels, self.in_channels // options.reduction)
        self.excite = nn.Linear(self.in_channels // options.reduction, self.in_channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    @classmethod
    def refuse(cls, place: cr.Place, options: cr.BlockOptions) -> str | None:
        assert isinstance(options, GateOptions)
        channels = place.in_shape[1]
        return f"{channels} channels, reduction {options.reduction}" if channels < options.reduction else None

    @classmethod
    def cost(cls, place: cr.Place, options: cr.BlockOptions) -> cr.Cost:
        assert isinstance(options, GateOptions)
        n, c, h, w = place.in_shape
        inner = c // options.reduction
        size = FLOAT_BYTES * n * c * h * w
        params = 2 * c * inner + inner + c
        return cr.Cost(params=params, flops=4 * n * c * inner, act_infer=2 * size, act_train=2 * size)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=(2, 3))  # (B, C)
        scale = self.excite(torch.relu(self.squeeze(context)))  # (B, C)
        return x * (1 + scale[:, :, None, None])


class Residual(nn.Module):
    """x + conv(conv(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(x + self.body(x))
        return out


def network() -> nn.Sequential:
    """A small residual network for 1x3x32x32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), Residual(16), nn.MaxPool2d(2), Residual(16), nn.Flatten(), nn.Linear(4096, 10)
    )


def main() -> None:
    model = network().eval()
    new, report = cr.rewrite(model, Path(__file__).with_suffix(".yaml"), example=(1, 3, 32, 32))
    for edit in report.plan.edits:
        print(f"{edit.id}: {edit.block}, {edit.after.params} parameters, start {edit.start} ({edit.how})")
    image = torch.randn(2, 3, 32, 32)
    print("laws held:", report.ok)
    print("same output, bit for bit:", torch.equal(model(image), new(image)))


if __name__ == "__main__":
    main()
