"""Stand-alone attention with full-width heads: patterns in the offset biases, no content, the best mix."""

from __future__ import annotations

import torch
from torch import nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.sasa_wide import SASAWide, SASAWideOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.target import Target, Window
from convrewrite.fits.wide import best_mix, best_patterns, fewest_heads, spread_groups
from convrewrite.sites import ConvSpec, Place


def _size(spec: ConvSpec, options: BlockOptions) -> tuple[int, int]:
    assert isinstance(options, SASAWideOptions)
    return (options.window, options.window) if options.window else spec.kernel


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    return Window.over(spec, _size(spec, options)) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert place.conv is not None
    if Window.over(place.conv, _size(place.conv, options)) is None:
        size, kernel = ("x".join(map(str, s)) for s in (_size(place.conv, options), place.conv.kernel))
        return f"the taps of a window of {size} fall between those of a {kernel} kernel"
    return None


def _settle(block: nn.Module, spec: ConvSpec, target: Target) -> BlockOptions:
    """With the option `nmse`: the fewest heads that lose no more than that of what a convolution could still give."""
    assert isinstance(block, SASAWide)
    centred = block.bias is not None

    def error(heads: int) -> float:
        patterns = best_patterns(target, heads, spec.groups, centred=centred)
        kernel = spread_groups(best_mix(target, patterns, spec.groups, centred=centred), spec.groups) @ patterns
        bias = target.best_bias(kernel) if centred else torch.zeros_like(target.bias)
        return target.nmse(kernel, bias) - target.unexplained

    if block.options.nmse is None:
        return block.options
    return block.options.model_copy(update={"heads": fewest_heads(error, block.heads, block.options.nmse)})


@fit_of("sasa_wide", refuse=_refuse, window=_window, settle=_settle)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set offset biases and mix; queries start at zero, with a gradient that is not."""
    assert isinstance(block, SASAWide)
    centred = block.bias is not None
    patterns = block.offset_bias.detach().double().cpu().softmax(1)
    if block.heads < target.taps and int(torch.linalg.matrix_rank(patterns, rtol=1e-6)) < target.taps:
        patterns = best_patterns(target, block.heads, spec.groups, centred=centred)
    logits = patterns.log().to(block.offset_bias.dtype)
    patterns = logits.double().softmax(1)  # as they will be, rounded
    mix = best_mix(target, patterns, spec.groups, centred=centred)
    kernel = spread_groups(mix, spec.groups) @ patterns
    bias = target.best_bias(kernel) if centred else torch.zeros_like(target.bias)
    with torch.no_grad():
        block.offset_bias.copy_(logits)
        block.mix.copy_(mix)
        block.query.weight.zero_()
        if block.bias is not None:
            block.bias.copy_(bias)
    return target.nmse(kernel, bias)
