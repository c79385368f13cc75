"""Position attention (PAM of DANet): every position attends to every other, and the result is added."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import largest
from convrewrite.blocks.tokens import (
    FLOAT_BYTES,
    attend,
    attend_elements,
    gated,
    pointwise,
    refuse_change,
    to_map,
    to_tokens,
)
from convrewrite.sites import Cost, Place


class PositionAttentionOptions(BlockOptions):
    """Options of `PositionAttention`."""

    reduction: int = Field(default=8, ge=1, description="queries and keys have C / reduction channels, at least one")


@register_block("position_attention")
class PositionAttention(Block):
    """Softmax attention over all positions of the map, added to the map through a gate that starts at zero.

    With q = Wq x, k = Wk x (C -> r = max(1, C // reduction)) and v = Wv x (C -> C), 1 x 1 with bias:

        y_i = x_i + gamma sum_j softmax_j(q_i . k_j) v_j        over all L = HW positions j, not scaled

    gamma is a scalar, 0 at the start: inserted, the block is the exact identity. In place of a convolution
    (stride 1, equal channels and size) stands the same y, x included. Wk's bias adds the same to all logits of a
    query, cancels in the softmax, and is kept for the authors' checkpoints alone.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters:
        2 (C + 1) r + (C + 1) C + 1

    FLOPs (2 per multiply-add; softmax and elementwise work are not counted):
        B L (2 C (2 r + C) + 2 L (r + C))

    Reference:
        Fu et al. 2019, arXiv 1809.02983: our q, k, v are B, C, D, gamma is alpha.
        Parameter names and shapes are those of the authors' code (junfu1115/DANet, PAM_Module), so its state
        dict loads as it is.

    Facts found in the authors' code:
        - It holds the L x L attention in memory, and again in the backward pass.
        - With fewer than 8 channels its queries are empty and every position gets the mean; here r is at least 1.
    """

    Options = PositionAttentionOptions
    actions = ("insert", "replace")
    exact = True
    silent = ("key_conv.bias",)
    paper = "Fu et al. 2019, arXiv 1809.02983"

    def __init__(self, place: Place, options: PositionAttentionOptions) -> None:
        super().__init__(place, options)
        channels = self.in_channels
        reduced = max(1, channels // options.reduction)
        self.query_conv = nn.Conv2d(channels, reduced, 1)
        self.key_conv = nn.Conv2d(channels, reduced, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        return refuse_change(cls.name, place)

    def plain(self) -> nn.Identity | None:
        return nn.Identity() if self.content() == 0 else None

    def content(self) -> float:
        return largest(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, self.gamma, to_map(self._attention(x), x))

    def _attention(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        q = pointwise(self.query_conv, tokens)  # no loop: torch 2.11 cannot compile a `del` of what one closes over
        k = pointwise(self.key_conv, tokens)
        v = pointwise(self.value_conv, tokens)
        del tokens  # the memory is needed elsewhere
        return attend(q, k, v)  # (B, H*W, C)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, PositionAttentionOptions)
        batch, channels, height, width = place.in_shape
        size, reduced = height * width, max(1, channels // options.reduction)
        alive, kept = attend_elements(size, size, reduced, channels)
        return Cost(
            params=2 * (channels + 1) * reduced + (channels + 1) * channels + 1,
            flops=batch * size * (2 * channels * (2 * reduced + channels) + 2 * size * (reduced + channels)),
            act_infer=FLOAT_BYTES * batch * (size * (channels + 2 * reduced) + max(size * channels, alive)),
            act_train=FLOAT_BYTES * batch * (size * channels + kept),
        )
