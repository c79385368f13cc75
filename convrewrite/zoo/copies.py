"""A block that is the convolution itself, to show that the way through editing and back changes nothing."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block, BlockOptions, register_block
from convrewrite.sites import Cost, Place

NAME = "equal_copy"

if NAME not in BLOCKS:

    @register_block(NAME)
    class EqualCopy(Block):
        """A deep copy of the convolution, of whatever class, whose tensors keep their state-dict keys.

        Only the zoo imports this file, so that rule files do not know the block.
        """

        actions = ("replace",)

        def __init__(self, place: Place, options: BlockOptions) -> None:
            super().__init__(place, options)
            self._held: list[nn.Module] = []  # in a list: its tensors are registered here, not a second time below

        @classmethod
        def cost(cls, place: Place, options: BlockOptions) -> Cost:
            assert place.conv is not None
            n, _, h, w = place.out_shape
            return Cost(place.conv.params, place.conv.flops(n, h, w), 0, 0)

        @classmethod
        def holds(cls, place: Place, options: BlockOptions) -> bool:
            return True

        def load_conv(self, conv: nn.Conv2d) -> None:
            twin = copy.deepcopy(conv)
            self._held = [twin]
            for name, value in vars(twin).items():  # DaViT's forward reads kernel_size off its convolution
                if not name.startswith("_") and name not in vars(self):
                    setattr(self, name, value)
            for name, parameter in twin._parameters.items():
                self.register_parameter(name, parameter)
            for name, buffer in twin._buffers.items():
                self.register_buffer(name, buffer, persistent=name not in twin._non_persistent_buffers_set)
            for name, child in twin._modules.items():
                self.add_module(name, child)

        def forward(self, x: Tensor) -> Tensor:
            held: Tensor = self._held[0].train(self.training)(x)
            return held
