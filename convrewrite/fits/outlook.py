"""Outlook attention: soft patterns on the busiest taps in the biases, no content, values and projection regressed.

A centre sees its own window alone, so a weight that should lie outside it goes to the nearest place inside: patterns
are blurred, which the regression knows. At the map's border fewer centres write; the expected NMSE leaves that out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.outlook import Outlook, OutlookOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.reduced import busiest_taps, reduced_heads, reduced_kernel
from convrewrite.fits.target import Target, Window
from convrewrite.sites import ConvSpec, Place

LOCALITY = 0.9
"""Share of a centre's weights on the wanted source; the rest is even, so that logits stay alive."""


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    assert isinstance(options, OutlookOptions)
    return Window.over(spec, (2 * options.window - 1,) * 2) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, OutlookOptions) and place.conv is not None
    if max(place.conv.stride) > 1:
        return f"stride {max(place.conv.stride)} is made by pooling, which no weights undo (wanted: 1)"
    if options.step > 1:
        return f"step {options.step} shares weights between pixels (wanted: 1)"
    if Window.over(place.conv, (2 * options.window - 1,) * 2) is None:
        return f"the taps of window {options.window} fall between those of the kernel"
    return None


@fit_of("outlook", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set biases, values and projection; the content weights are zero, with a gradient that is not."""
    assert isinstance(block, Outlook)
    attention = block.attention
    heads, size = attention.heads, attention.window
    width, every = block.out_channels // heads, torch.arange(block.out_channels)
    around = range(size // 2, size // 2 + size)  # the taps that a centre's own window can shift by
    side = 2 * size - 1
    usable = [row * side + column for row in around for column in around]
    taps = busiest_taps(target, every, usable, heads, width)
    by_centre = _by_centre([(tap // side - size + 1, tap % side - size + 1) for tap in taps.tolist()], size)
    patterns = centre_patterns(by_centre, size) / (size**2 if attention.normalise else 1)
    values, mix = reduced_heads(target, patterns, every, width, centred=True)
    kernel = reduced_kernel(values, mix, patterns)
    bias = target.best_bias(kernel)
    with torch.no_grad():
        attention.attn.weight.zero_()
        attention.attn.bias.copy_(by_centre.log().flatten() / attention.scale)
        attention.v.weight.copy_(values)
        attention.proj.weight.copy_(mix)
        attention.proj.bias.copy_(bias)
    return target.nmse(kernel, bias)


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
