"""A convolution and the block that is to take its place, side by side, faded from the one to the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import Block
from convrewrite.blocks.folding import Affine, followed, is_plain
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Cost, Place

FLOAT_BYTES = 4


class Blend(nn.Module):
    """y = (1 - a) conv(x) + a block(x), where a = gate + anneal (1 - gate).

    `gate` is learned per channel and starts at 0, so a freshly blended network computes what the
    original did, bit for bit, while the gradient already reaches the gate. `anneal` is a buffer that
    training moves from 0 to 1; at 1 the output is the block's, bit for bit, and `finalize` drops the convolution.
    The weighted sum is exact at both ends and, unlike conv + a (block - conv), cannot overflow there.

    With `draws` on, training replaces `anneal` by a draw: 1 with probability `anneal`, else 0, so that each step
    runs with some sites replaced entirely (Xu et al. 2020, BERT-of-Theseus, arXiv 2002.02925, eq. 4).

    Shape: (B, C_in, H, W) -> (B, C_out, Ho, Wo), as both parts.

    State dict: ``conv.*``, ``block.*``, ``gate`` (C_out, 1, 1), ``anneal`` ().

    Attributes such as ``in_channels``, ``stride`` and ``weight`` are the convolution's, since some models read them.
    """

    gate: nn.Parameter
    anneal: Tensor

    def __init__(self, conv: nn.Conv2d, block: Block) -> None:
        super().__init__()
        self.conv = conv
        self.block = block
        like = next(conv.parameters())  # not conv.weight: reading a spectral norm's weight changes its buffers
        self.gate = nn.Parameter(like.new_zeros(conv.out_channels, 1, 1))
        self.register_buffer("anneal", like.new_zeros(()))
        self._draws = False  # of training, not of the architecture: `identity` does not count it

    @property
    def draws(self) -> bool:
        """Whether training draws conv or block at random instead of mixing them."""
        return self._draws

    @draws.setter
    def draws(self, value: bool) -> None:
        self._draws = value

    def forward(self, x: Tensor) -> Tensor:
        old: Tensor = self.conv(x)
        new: Tensor = self.block(x)
        anneal = self.anneal
        if self._draws and self.training:  # rand < 1, so that at 1 it is the block every time
            anneal = (torch.rand((), device=anneal.device) < anneal).to(anneal.dtype)
        keep = (1 - self.gate) * (1 - anneal)
        take = self.gate * (1 - anneal) + anneal  # exactly 1 at anneal = 1, whatever the gate
        return old * keep.to(old.dtype) + new.to(old.dtype) * take.to(old.dtype)

    def finalize(self) -> nn.Module:
        """The block alone, once it has taken over; an error while ``anneal`` is below 1."""
        anneal = float(self.anneal)
        if anneal != 1.0:
            raise ConvrewriteError(
                f"the convolution still takes part (anneal is {anneal:g})",
                fix="set anneal to 1 and train on before finalizing",
            )
        return self.block

    def fused(self, after: Affine | None = None) -> nn.Module | None:
        """What may stand in its place at inference, followed by `after`: the block, the convolution, or both, weighed.

        The convolution goes where its share is exactly 0, and the block where gate and anneal are.
        """
        gate, anneal = self.gate.detach().double().flatten(), self.anneal.double()
        keep, take = (1 - gate) * (1 - anneal), gate * (1 - anneal) + anneal
        if not bool(keep.any()):
            return self.block.fused(after) or (self.block if after is None else None)
        if not is_plain(self.conv):
            return self.conv if after is None and not bool(take.any()) else None
        after = after or Affine(torch.ones_like(keep), torch.zeros_like(keep))
        conv = followed(self.conv, after.of(keep))
        if not bool(take.any()):
            return conv
        weights = Affine(after.scale * take, torch.zeros_like(take))
        block = self.block.fused(weights)
        return Sum(conv, block) if block is not None else Sum(conv, self.block.fused() or self.block, weights.scale)

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.conv.kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        return self.conv.stride

    @property
    def padding(self) -> str | tuple[int, ...]:
        return self.conv.padding

    @property
    def dilation(self) -> tuple[int, ...]:
        return self.conv.dilation

    @property
    def groups(self) -> int:
        return self.conv.groups

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias


class Sum(nn.Module):
    """conv(x) + scale block(x): a `Blend` with its shares multiplied into the weights, as far as they can be.

    Args:
        scale: (C_out,); None if the block's output is scaled already.
    """

    scale: Tensor | None

    def __init__(self, conv: nn.Module, block: nn.Module, scale: Tensor | None = None) -> None:
        super().__init__()
        self.conv, self.block = conv, block
        like = next(conv.parameters())
        self.register_buffer("scale", None if scale is None else scale.view(-1, 1, 1).to(like))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        old: Tensor = self.conv(x)
        new: Tensor = self.block(x).to(old.dtype)
        return old + new if self.scale is None else torch.addcmul(old, new, self.scale.to(old.dtype))


def blend_cost(conv: ConvSpec, place: Place, block_cost: Cost) -> Cost:
    """Of a `Blend`: both parts and the gate, with the two outputs alive at once (elementwise work not counted)."""
    batch, channels, height, width = place.out_shape
    output = FLOAT_BYTES * batch * channels * height * width
    return Cost(
        params=conv.params + block_cost.params + channels,
        flops=conv.flops(batch, height, width) + block_cost.flops,
        act_infer=output + max(block_cost.act_infer, 2 * output),
        act_train=block_cost.act_train + 2 * output,
    )
