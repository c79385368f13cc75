"""Outlook attention with full-width heads: the patterns of its own start, and the best mix of them."""

from __future__ import annotations

import torch
from torch import nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.outlook_wide import OutlookWide
from convrewrite.fits.base import fit_of
from convrewrite.fits.outlook import centre_patterns
from convrewrite.fits.target import Target, Window
from convrewrite.fits.wide import best_mix, spread_groups
from convrewrite.sites import ConvSpec, Place


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    return Window.over(spec, (2 * spec.kernel[0] - 1, 2 * spec.kernel[1] - 1)) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert place.conv is not None
    height, width = place.conv.kernel
    if height != width or height % 2 == 0:
        return f"kernel {height}x{width} has no middle tap on both axes (wanted: square and odd)"
    return None


@fit_of("outlook_wide", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set the mix by least squares; the content weights are zero, with a gradient that is not."""
    assert isinstance(block, OutlookWide)
    size, centred = spec.kernel[0], block.bias is not None
    logits = block.attn.bias.detach().double().cpu().view(block.heads, size, size, size * size)
    by_centre = (
        logits.softmax(-1).view(block.heads, size, size, size, size).flip(1, 2)
    )  # here by where the centre lies, not the target
    patterns = centre_patterns(by_centre, size)
    mix = best_mix(target, patterns, spec.groups, centred=centred)
    kernel = spread_groups(mix, spec.groups) @ patterns
    bias = target.best_bias(kernel) if centred else torch.zeros_like(target.bias)
    with torch.no_grad():
        block.mix.copy_(mix)
        block.attn.weight.zero_()
        if block.bias is not None:
            block.bias.copy_(bias)
    return target.nmse(kernel, bias)
