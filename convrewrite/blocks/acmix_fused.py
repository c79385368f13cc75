"""ACmix for inference: all that depends on weights alone is computed once, and a batch norm after it is part of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from convrewrite.blocks.acmix import ACmix, in_groups
from convrewrite.blocks.folding import Affine, conv_of, frozen
from convrewrite.sites import ConvSpec


class FusedACmix(ACmix):
    """What an `ACmix` computes in eval mode, and what `after` makes of it.

        y = a att + conv'        a = scale rate1,  conv' = scale rate2 conv + shift

    fc, the grouped convolution, rate2, scale and shift are one grouped convolution of q, k, v with a bias. It is not
    multiplied into one dense convolution of x: q, k, v are there for the attention anyway, and 3 N channels a group are
    less work than C_in (on CPU 1.3 to 13 times less time at 64 to 512 channels, stride 1). k's bias is in the
    convolution alone, since it cancels in the softmax.

    Shape: (B, C_in, H, W) -> (B, C_out, Ho, Wo), as `ACmix`.
    """

    def __init__(self, block: ACmix, after: Affine | None) -> None:
        nn.Module.__init__(self)
        for name, value in vars(block).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        scale = torch.ones(1, dtype=torch.float64, device=block.rate1.device) if after is None else after.scale
        like, dim = block.conv1.weight, block.head_dim
        self.rate1 = frozen((block.rate1.detach().double() * scale).to(like))
        weight, bias = block._projection(maps=False)
        self.weight, self.weight_in_groups = frozen(weight), frozen(in_groups(weight, dim))
        used = bias if bias is not None and bool(bias.any()) else None  # a fitted start has zeros there
        self.bias = None if used is None else frozen(used)
        self.bias_in_groups = None if used is None else frozen(in_groups(used, dim))
        self.conv_p = copy.deepcopy(block.conv_p).requires_grad_(requires_grad=False)
        filters = _filters(block)
        if block.options.layout == "ordered" and after is not None:
            after = Affine(in_groups(after.scale, dim), in_groups(after.shift, dim))
        self.filters = frozen((filters if after is None else after.weight(filters)).to(like))
        self.shift = None if after is None else after.bias(None, like)
        self.eval()

    def plain(self) -> None:
        return None

    def content(self) -> None:
        return None

    def folded(self, after: Affine | None) -> None:
        return None  # it was done

    def _projection(self, *, maps: bool) -> tuple[Tensor, Tensor | None]:
        return (self.weight_in_groups, self.bias_in_groups) if maps else (self.weight, self.bias)

    def _filters(self) -> tuple[Tensor, Tensor | None]:
        return self.filters, self.shift


def plain_acmix(block: ACmix) -> nn.Conv2d | None:
    """The dense convolution that the block is where its attention has the rate 0 and the projections no bias.

    A bias would count in the middle of the map and not where the path's own zero padding is.
    """
    weight, bias = block._projection(maps=False)
    spec = _geometry(block)
    if block.content() != 0 or spec is None or (bias is not None and bool(bias.any())):
        return None
    heads, dim = block.options.heads, block.head_dim
    filters = _filters(block).view(dim, heads, 3 * heads, *block.dep_conv.kernel_size)  # (d, N, 3*N, kc, kc)
    projections = in_groups(weight.detach().double(), dim).view(dim, 3 * heads, -1)  # (d, 3*N, C_in)
    kernel = torch.einsum("dnsyx,dsc->dncyx", filters, projections)
    if block.options.layout == "ordered":
        kernel = kernel.transpose(0, 1)
    return conv_of(spec, kernel.flatten(0, 1), None, like=block.conv1.weight)


def _filters(block: ACmix) -> Tensor:
    """fc, the grouped convolution and rate2 as one: (C, 3*N, kc, kc) in float64, in the order of the groups."""
    weight = torch.einsum("otyx,ts->osyx", block.dep_conv.weight.double(), block.fc.weight.double().flatten(1))
    rate = block.rate2.double()
    if block.options.layout == "ordered" and rate.numel() > 1:
        rate = in_groups(rate, block.head_dim)
    return (weight * rate.view(-1, 1, 1, 1)).detach()


def _geometry(block: ACmix) -> ConvSpec | None:
    """The replaced convolution with the kernel of the block's own path, centred as before; None if torch has none."""
    spec, side = block.spec, block.options.kernel_conv
    if spec.kernel == (side, side):
        return replace(spec, bias=False)
    padding: list[int] = []
    for axis, before, after in ((1, *spec.padding[:2]), (0, *spec.padding[2:])):
        old, new = (spec.dilation[axis] * (kernel - 1) for kernel in (spec.kernel[axis], side))
        first = new // 2 - old // 2 + before
        padding += [first, before + after - old + new - first]
    left, right, top, bottom = padding
    if min(padding) < 0 or left != right or top != bottom:
        return None
    return replace(spec, kernel=(side, side), padding=(left, right, top, bottom), bias=False)
