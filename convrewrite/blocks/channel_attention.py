"""Channel attention (CAM of DANet): every channel attends to every other, and the result is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import largest
from convrewrite.blocks.tokens import FLOAT_BYTES, attend, attend_elements, gated, refuse_change, whole_precision
from convrewrite.sites import Cost, Place


class ChannelAttentionOptions(BlockOptions):
    """`ChannelAttention` has no options."""


@register_block("channel_attention")
class ChannelAttention(Block):
    """Softmax attention of channels over channels, added to the map through a gate that starts at zero.

    With x_c the L = HW values of channel c:

        y_c = x_c + beta sum_d softmax_d( -x_c . x_d ) x_d        over all C channels d

    The minus is the authors': a channel gathers from those that it resembles least. It is attention with channels
    as tokens and positions as features, so large C x C maps are never held in memory. beta is a scalar, 0 at the
    start: inserted, the block is the exact identity. In place of a convolution (stride 1, equal channels and size)
    stands the same y, x included.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters:
        1

    FLOPs (2 per multiply-add; softmax and elementwise work are not counted):
        B 4 C^2 L

    Reference:
        Fu et al. 2019, arXiv 1809.02983. beta is called `gamma` as in the authors'
        code (junfu1115/DANet, CAM_Module), so its state dict loads as it is.

    Facts found in the authors' code:
        - The paper has softmax_d(x_c . x_d); the code takes softmax_d(max_e(x_c . x_e) - x_c . x_d),
          which is the softmax of the negated energies (the maximum cancels). This is the code's form.
        - In float16 its energies overflow from 65,504; here they are summed in float32.
    """

    Options = ChannelAttentionOptions
    actions = ("insert", "replace")
    exact = True
    paper = "Fu et al. 2019, arXiv 1809.02983"

    def __init__(self, place: Place, options: ChannelAttentionOptions) -> None:
        super().__init__(place, options)
        self.gamma = nn.Parameter(torch.zeros(1))

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        return refuse_change(cls.name, place)

    def plain(self) -> nn.Identity | None:
        return nn.Identity() if self.content() == 0 else None

    def content(self) -> float:
        return largest(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return gated(x, self.gamma, self.attention(x))

    def attention(self, x: Tensor) -> Tensor:
        """What is added to `x`, before the gate: (B, C, H, W) -> (B, C, H, W)."""
        channels = x.flatten(2).contiguous()  # (B, C, H*W)
        if whole_precision(x) and channels.shape[1] <= channels.shape[2]:
            return _gathered(channels).view(x.shape)
        # Not scale=-1: kernels that scale inside the exponential take the maximum before it.
        return attend(-channels, channels, channels).view(x.shape)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        batch, channels, height, width = place.in_shape
        size = height * width
        alive, kept = attend_elements(channels, channels, size, size)
        if channels <= size:  # x itself is query, key and value; C x C is never more than what is added and the sum
            alive, kept = 2 * channels * size, kept - 3 * channels * size
        else:
            alive, kept = alive + channels * size, kept - 2 * channels * size  # -x is the query
        return Cost(
            params=1,
            flops=4 * batch * channels**2 * size,
            act_infer=FLOAT_BYTES * batch * alive,
            act_train=FLOAT_BYTES * batch * kept,
        )


def _gathered(x: Tensor) -> Tensor:
    """softmax(-x x^T) x of (B, C, L), C x C held: the minus is taken there, and not of the larger x."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = _Gathered.apply(x)
        return result[0]
    return torch.bmm(torch.bmm(x, x.transpose(1, 2)).neg_().softmax(-1), x)


class _Gathered(torch.autograd.Function):
    """`_gathered`, whose backward uses that both factors of the energies are x: one product in place of two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.bmm(x, x.transpose(1, 2)).neg_().softmax(-1)
        return torch.bmm(weights, x), weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, to_weights: Tensor) -> Tensor:
        x, weights = ctx.saved_tensors
        weighted = torch.baddbmm(to_weights, grad, x.transpose(1, 2)) * weights  # to_weights: of a second derivative
        to_logits = torch.addcmul(weighted, weights, weighted.sum(-1, keepdim=True), value=-1)
        of_values = torch.bmm(weights.transpose(1, 2), grad)
        return torch.baddbmm(of_values, to_logits + to_logits.transpose(1, 2), x, alpha=-1)
