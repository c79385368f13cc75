"""Blocks for tests only: an equal copy of the convolution, and an insertable identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block, BlockOptions, register_block
from convrewrite.sites import Cost, Place

if "test_copy" not in BLOCKS:

    @register_block("test_copy")
    class ConvCopy(Block):
        """The convolution itself, with the same state-dict keys."""

        actions = ("replace",)

        def __init__(self, place: Place, options: BlockOptions) -> None:
            super().__init__(place, options)
            conv = place.conv
            assert conv is not None
            self.conv = conv
            self.numbers = (conv.stride, 0, conv.dilation, conv.groups)
            self.source: list[nn.Conv2d] = []
            self.padding: object = None
            shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel)
            self.weight = nn.Parameter(torch.zeros(shape))
            self.register_parameter("bias", nn.Parameter(torch.zeros(conv.out_channels)) if conv.bias else None)

        @classmethod
        def cost(cls, place: Place, options: BlockOptions) -> Cost:
            assert place.conv is not None
            n, _, h, w = place.out_shape
            return Cost(place.conv.params, place.conv.flops(n, h, w), 0, 0)

        @classmethod
        def holds(cls, place: Place, options: BlockOptions) -> bool:
            return True

        def load_conv(self, conv: nn.Conv2d) -> None:
            self.source = [conv]  # in a list: its forward is used, its parameters are not registered twice
            with torch.no_grad():
                self.weight.copy_(conv.weight)
                if conv.bias is not None:
                    assert self.bias is not None
                    self.bias.copy_(conv.bias)

        def forward(self, x: Tensor) -> Tensor:
            if not self.source:  # beside a convolution whose weight is computed, so that it cannot be taken over
                return F.conv2d(self.pad(x), self.weight, self.bias, *self.numbers)
            return self.source[0]._conv_forward(x, self.weight, self.bias)

        def pad(self, x: Tensor) -> Tensor:
            mode = {"zeros": "constant"}.get(self.conv.padding_mode, self.conv.padding_mode)
            return F.pad(x, self.conv.padding, mode=mode)

    @register_block("test_tail")
    class Tail(Block):
        """A gated 1x1 convolution: x + gate * conv(x), the identity at start."""

        actions = ("insert",)
        exact = True

        def __init__(self, place: Place, options: BlockOptions) -> None:
            super().__init__(place, options)
            self.project = nn.Conv2d(self.in_channels, self.in_channels, 1)
            self.gate = nn.Parameter(torch.zeros(()))

        @classmethod
        def cost(cls, place: Place, options: BlockOptions) -> Cost:
            n, c, h, w = place.in_shape
            return Cost(c * c + c + 1, 2 * n * c * c * h * w, 0, 0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.project(x)
