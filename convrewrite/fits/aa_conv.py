"""Attention-augmented convolution: most filters as they are, the given-up ones from heads that look at single offsets.

Each head attends to one tap of the kernel: row and column logits can single out any offset. The queries have no bias,
so the logits stand on a nearly constant function of the pixel (`fits.constant`); without images there is none,
the attention then adds nothing, and the given-up channels are lost. At the map's border an offset that leads outside
finds other pixels where the convolution finds zeros; the expected NMSE leaves that out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.blocks.aa_conv import AAConv, AAConvOptions
from convrewrite.blocks.base import BlockOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.constant import STEADY, nearly_one
from convrewrite.fits.reduced import busiest_taps, reduced_heads, reduced_kernel
from convrewrite.fits.target import Target
from convrewrite.sites import ConvSpec, Place

SHARPNESS = 1.5
"""Logits are so much larger than what a single offset needs to win over the whole map."""


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, AAConvOptions) and place.conv is not None
    if options.form == "residual":
        return "the form residual gives no channel up (wanted: concat, or start exact)"
    if options.position != "relative":
        return f"position {options.position} cannot single out an offset (wanted: relative)"
    if options.pool != 1:
        return f"pool {options.pool} averages the offsets away (wanted: 1)"
    if options.outputs == "chosen" and place.conv.groups > 1:
        return f"outputs chosen would tear {place.conv.groups} groups apart (wanted: last)"
    return None


@dataclass
class _Heads:
    """taps (N,), values V (d_v, C), mix W_o (d_v, d_v)."""

    taps: Tensor
    values: Tensor
    mix: Tensor

    def kernel(self, taps: int) -> Tensor:
        """(rows, C, T)."""
        return reduced_kernel(self.values, self.mix, torch.eye(taps, dtype=torch.float64)[self.taps])


@fit_of("aa_conv", refuse=_refuse)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Keep the filters, choose which to give up (outputs "chosen"), and let the heads come near those."""
    assert isinstance(block, AAConv)
    one, share = nearly_one(target)
    usable = _usable(spec) if share >= STEADY and block.keys // block.options.heads >= sum(spec.kernel) else []
    centred = block.attn_out.bias is not None
    choices = [torch.arange(block.out_channels)[-block.values :]]
    if block.options.outputs == "chosen":
        choices.append(_power(target).argsort()[: block.values].sort().values)
        if usable:  # those that heads for all channels leave the least of
            everything = _solve(target, torch.arange(block.out_channels), block, usable, centred=centred)
            choices.append(_left(target, everything).argsort()[: block.values].sort().values)
    tried = [(c, _solve(target, c, block, usable, centred=centred) if usable else None) for c in choices]
    given, heads = min(tried, key=lambda pair: _lost(target, *pair))
    kernel = target.weight.clone()
    kernel[given] = heads.kernel(target.taps) if heads else 0.0
    bias = target.best_bias(kernel) if centred else torch.zeros_like(target.bias)
    _write(block, spec, target, heads, given, bias, one)
    return target.nmse(kernel, bias)


def _usable(spec: ConvSpec) -> list[int]:
    """Taps that attention between the positions of the outputs can look at."""
    found = []
    for row in range(spec.kernel[0]):
        for column in range(spec.kernel[1]):
            offset = _offset(spec, row * spec.kernel[1] + column)
            if offset is not None:
                found.append(row * spec.kernel[1] + column)
    return found


def _offset(spec: ConvSpec, tap: int) -> tuple[int, int] | None:
    """Where a tap lies from the window's centre, in outputs; None between two of them."""
    place = []
    for i, at in enumerate((tap // spec.kernel[1], tap % spec.kernel[1])):
        centre = spec.dilation[i] * (spec.kernel[i] - 1) // 2
        apart = at * spec.dilation[i] - centre
        if apart % spec.stride[i]:
            return None
        place.append(apart // spec.stride[i])
    return place[0], place[1]


def _power(target: Target) -> Tensor:
    variance = (target.times(target.weight) * target.weight).sum((1, 2))
    return variance * target.scale.square()


def _lost(target: Target, given: Tensor, heads: _Heads | None) -> float:
    """Weighted error of all output channels when `given` come from `heads`."""
    gap = target.weight[given] - (heads.kernel(target.taps) if heads else 0.0)
    return float(((target.times(gap) * gap).sum((1, 2)) * target.scale[given].square()).sum())


def _left(target: Target, heads: _Heads) -> Tensor:
    gap = target.weight - heads.kernel(target.taps)
    return (target.times(gap) * gap).sum((1, 2)) * target.scale.square()


def _solve(target: Target, rows: Tensor, block: AAConv, usable: list[int], *, centred: bool) -> _Heads:
    """Heads for the output channels `rows`: offsets by energy, then each head's values and mix."""
    count = block.options.heads
    width = block.values // count
    taps = busiest_taps(target, rows, usable, count, width)
    patterns = torch.eye(target.taps, dtype=torch.float64)[taps]
    values, mix = reduced_heads(target, patterns, rows, width, centred=centred)
    return _Heads(taps, values, mix)


def _write(
    block: AAConv, spec: ConvSpec, target: Target, heads: _Heads | None, given: Tensor, bias: Tensor, one: Tensor
) -> None:
    kept = torch.ones(block.out_channels, dtype=torch.bool)
    kept[given] = False
    each = spec.in_channels // spec.groups
    with torch.no_grad():
        if block.conv_out is not None:
            weight = target.weight.view(*target.weight.shape[:2], *spec.kernel)[kept]
            own = torch.arange(block.out_channels)[kept] * spec.groups // block.out_channels
            block.conv_out.weight.copy_(
                torch.stack([w[g * each : (g + 1) * each] for w, g in zip(weight, own.tolist(), strict=True)])
            )
            if block.conv_out.bias is not None:
                block.conv_out.bias.copy_(bias[kept])
        if block.attn_out.bias is not None:
            block.attn_out.bias.copy_(bias[given])
        if block.order is not None:
            block.order[torch.cat([torch.arange(block.out_channels)[kept], given])] = torch.arange(
                block.out_channels, device=block.order.device
            )
        if heads is None:
            block.attn_out.weight.zero_()
            return
        _point(block, spec, heads, one)
        block.qkv_conv.weight[2 * block.keys :].copy_(heads.values[:, :, None, None])
        block.attn_out.weight.copy_(heads.mix[:, :, None, None])


def _point(block: AAConv, spec: ConvSpec, heads: _Heads, one: Tensor) -> None:
    """Queries and relative tables that make each head look at its tap; keys are zero, with a gradient that is not."""
    assert block.key_rel_h is not None and block.key_rel_w is not None
    count = block.options.heads
    dim = block.keys // count
    height, width = (len(table) // 2 for table in (block.key_rel_h, block.key_rel_w))
    level = SHARPNESS * math.log(20 * (height + width + 2)) * dim**0.5
    query = one.new_zeros(count, dim, len(one))
    block.key_rel_h.zero_()
    block.key_rel_w.zero_()
    for h, tap in enumerate(heads.taps.tolist()):
        offset = _offset(spec, tap)
        assert offset is not None
        row, column = tap // spec.kernel[1], spec.kernel[0] + tap % spec.kernel[1]
        if abs(offset[0]) <= height:
            block.key_rel_h[height + offset[0], row] = level**0.5
        if abs(offset[1]) <= width:
            block.key_rel_w[width + offset[1], column] = level**0.5
        query[h, row] = query[h, column] = level**0.5 * one
    block.qkv_conv.weight[: block.keys].copy_(query.flatten(0, 1)[:, :, None, None])
    block.qkv_conv.weight[block.keys : 2 * block.keys].zero_()
