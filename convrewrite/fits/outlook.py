"""Outlook attention: learned patterns in the biases, no content, values and projection regressed.

Patterns begin softly on the busiest taps. A centre sees its own window alone, so a weight that should lie outside it
goes to the nearest place inside: patterns are blurred, which the regression knows. At the map's border fewer centres
write; the expected NMSE leaves that out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.outlook import Outlook, OutlookOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.learned import Regressed, bounded, learn, projected
from convrewrite.fits.pooling import pooled_patterns, pooled_window, refuse_pooling
from convrewrite.fits.reduced import busiest_taps
from convrewrite.fits.target import Target, Window
from convrewrite.sites import ConvSpec, Pair, Place

LOCALITY = 0.9
"""Share of a centre's weights on the wanted source; the rest is even, so that logits stay alive."""


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    assert isinstance(options, OutlookOptions)
    return pooled_window(spec, 2 * options.window - 1) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, OutlookOptions) and place.conv is not None
    if options.step > 1:
        return f"step {options.step} shares weights between pixels (wanted: 1)"
    if Window.over(place.conv, (2 * options.window - 1,) * 2) is None:
        return f"the taps of window {options.window} fall between those of the kernel"
    return refuse_pooling(place.conv)


@fit_of("outlook", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set biases, values and projection; the content weights are zero, with a gradient that is not."""
    assert isinstance(block, Outlook)
    attention, size = block.attention, block.attention.window
    side = 2 * size - 1

    def patterns(parameters: Sequence[Tensor]) -> Tensor:
        weights = bounded(parameters[0]).softmax(-1).view(-1, size, size, size, size)
        shares = centre_patterns(weights, size) / (size**2 if attention.normalise else 1)
        return pooled_patterns(shares, (side, side), spec.stride)

    def regress(patterns: Tensor) -> Regressed:
        return projected(target, patterns, block.out_channels // attention.heads)

    start = _by_centre(_offsets(target, attention.heads, block.out_channels, size, spec.stride), size)
    (logits,), found = learn(target, [[start.log().flatten(3)]], patterns, regress, centred=True)
    assert found.mix is not None
    with torch.no_grad():
        attention.attn.weight.zero_()
        attention.attn.bias.copy_(bounded(logits).flatten() / attention.scale)
        attention.v.weight.copy_(found.values)
        attention.proj.weight.copy_(found.mix)
        attention.proj.bias.copy_(found.bias)
    return target.nmse(found.kernel, found.bias)


def _offsets(target: Target, heads: int, outputs: int, size: int, stride: Pair) -> list[Pair]:
    """The busiest taps, one for each head, as offsets (down, right) within a centre's own window."""
    wide = target.window.size[1]
    first = [size // 2 + stride[axis] // 2 for axis in (0, 1)]
    usable = [(first[0] + row) * wide + first[1] + column for row in range(size) for column in range(size)]
    taps = busiest_taps(target, torch.arange(outputs), usable, heads, outputs // heads)
    return [(tap // wide - first[0] - size // 2, tap % wide - first[1] - size // 2) for tap in taps.tolist()]


def _by_centre(offsets: list[tuple[int, int]], size: int) -> Tensor:
    """Weights (N, K, K, K, K): of head, target in the centre's window, source there."""
    weights = torch.full((len(offsets), size, size, size, size), (1 - LOCALITY) / size**2, dtype=torch.float64)
    for head, (down, right) in enumerate(offsets):
        for row in range(size):
            for column in range(size):
                at = (min(max(0, row + down), size - 1), min(max(0, column + right), size - 1))
                weights[head, row, column, *at] += LOCALITY
    return weights


def centre_patterns(weights: Tensor, size: int) -> Tensor:
    """The weight of each offset source - target, summed over the centres: (N, (2K - 1)^2)."""
    patterns = weights.new_zeros(len(weights), 2 * size - 1, 2 * size - 1)
    for row in range(size):
        for column in range(size):
            top, left = size - 1 - row, size - 1 - column
            patterns[:, top : top + size, left : left + size] += weights[:, row, column]
    return patterns.flatten(1)
