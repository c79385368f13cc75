"""Criss-cross attention (CCNet): every position attends to its row and column, once or several times in turn."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import largest
from convrewrite.blocks.tokens import FLOAT_BYTES, gated, pointwise, refuse_change, softmax32, to_tokens
from convrewrite.sites import Cost, Place


class CrissCrossOptions(BlockOptions):
    """Options of `CrissCross`."""

    reduction: int = Field(default=8, ge=1, description="queries and keys have C / reduction channels, at least one")
    recurrence: int = Field(default=2, ge=1, description="passes R with the same weights; from 2 on all positions meet")


@register_block("criss_cross")
class CrissCross(Block):
    """Softmax attention over a position's row and column, added through a gate that starts at zero, R times.

    With q = Wq x, k = Wk x (C -> r = max(1, C // reduction)) and v = Wv x (C -> C), 1 x 1 with bias:

        y_u = x_u + gamma sum_{w in row or column of u} softmax_w(q_u . k_w) v_w        not scaled

    One softmax runs over the H + W - 1 positions, u itself once. With recurrence R the module is applied R times
    with the same weights (RCCA). gamma is a scalar, 0 at the start: inserted, the block is the exact identity. In
    place of a convolution (stride 1, equal channels and size) stands the same y, x included. Wk's bias cancels in
    the softmax and is kept for the authors' checkpoints alone.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters:
        2 (C + 1) r + (C + 1) C + 1, for every R

    FLOPs (2 per multiply-add; u is computed in its row as well as in its column; softmax and elementwise work are
    not counted):
        R B HW (2 C (2 r + C) + 2 (H + W) (r + C))

    Reference:
        Huang et al. 2019, arXiv 1811.11721 (Q, K, V are q, k, v; gamma stands in the code alone).
        Parameter names and shapes are those of the authors' code (speedinghzl/CCNet), so its state dict loads as it is.

    Facts found in the authors' code:
        - It excludes u from the column by a (B W, H, H) tensor of -inf on the diagonal, built with `.cuda()`, so it
          runs on a GPU only. Here u is excluded from the row, by a W x W mask that the matrix product adds.
        - With fewer than 8 channels its queries are empty and every position gets the mean; here r is at least 1.
        - R is an argument of the network around it (`recurrence`, 2 in the paper).
    """

    Options = CrissCrossOptions
    actions = ("insert", "replace")
    exact = True
    silent = ("key_conv.bias",)
    paper = "Huang et al. 2019, arXiv 1811.11721"

    def __init__(self, place: Place, options: CrissCrossOptions) -> None:
        super().__init__(place, options)
        channels = self.in_channels
        reduced = max(1, channels // options.reduction)
        self.recurrence = options.recurrence
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
        for _ in range(self.recurrence):
            x = gated(x, self.gamma, self._attention(x).permute(0, 3, 1, 2))
        return x

    def _attention(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, C)."""
        batch, _, height, width = x.shape
        tokens = to_tokens(x)
        q = pointwise(self.query_conv, tokens).view(batch, height, width, self.query_conv.out_channels)
        k = pointwise(self.key_conv, tokens).view(batch, height, width, self.key_conv.out_channels)
        v = pointwise(self.value_conv, tokens).view(batch, height, width, self.value_conv.out_channels)
        del tokens
        weights = self._weights(q, k)  # (B, H, W, H + W)
        del q, k
        in_column = weights[..., :height].transpose(1, 2).flatten(0, 1)  # (B*W, H, H)
        in_row = weights[..., height:].flatten(0, 1)  # (B*H, W, W)
        column = torch.bmm(in_column, v.transpose(1, 2).flatten(0, 1))  # (B*W, H, C)
        row = torch.bmm(in_row, v.flatten(0, 1))  # (B*H, W, C)
        return row.view(v.shape).add_(column.view(batch, width, height, v.shape[3]).transpose(1, 2))

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax over column and row, u itself in the column: (B, H, W, H + W)."""
        batch, height, width, _ = q.shape
        itself = torch.eye(width, dtype=torch.bool, device=q.device)
        mask = torch.zeros(width, width, dtype=q.dtype, device=q.device).masked_fill(itself, float("-inf"))
        row = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))  # (B*H, W, W)
        q, k = q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1)  # (B*W, H, r)
        column = torch.bmm(q, k.transpose(1, 2)).view(batch, width, height, height).transpose(1, 2)  # (B, H, W, H)
        logits = torch.cat([column, row.view(batch, height, width, width)], -1)
        del row, column
        return softmax32(logits).to(logits.dtype)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, CrissCrossOptions)
        batch, channels, height, width = place.in_shape
        reduced, size, reach = max(1, channels // options.reduction), height * width, height + width
        passes = options.recurrence
        alive = max(channels + 4 * reduced + 2 * reach, 3 * channels + reach + height) + (channels if passes > 1 else 0)
        kept = passes * (4 * channels + 4 * reduced + reach + height)
        return Cost(
            params=2 * (channels + 1) * reduced + (channels + 1) * channels + 1,
            flops=passes * batch * size * 2 * (channels * (2 * reduced + channels) + reach * (reduced + channels)),
            act_infer=FLOAT_BYTES * batch * size * alive,
            act_train=FLOAT_BYTES * batch * size * kept,
        )
