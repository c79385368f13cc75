"""Stride by pooling, as a fit sees it: patterns blurred over the pooled positions, in a window that much larger."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.fits.target import Window
from convrewrite.sites import ConvSpec, Pair


def pooled_window(spec: ConvSpec, side: int) -> Window | None:
    """The taps that windows of `side` taps see from all the positions that one output averages.

    None where those fall between the convolution's taps (`refuse_pooling` says why).
    """
    window = Window.over(spec, (side, side))
    if window is None or refuse_pooling(spec) is not None:
        return None
    return Window((side + spec.stride[0] - 1, side + spec.stride[1] - 1), window.first)


def refuse_pooling(spec: ConvSpec) -> str | None:
    """Why pooling in place of this convolution's stride cannot be told in its taps, or None."""
    for stride, dilation in zip(spec.stride, spec.dilation, strict=True):
        if stride > 1 and dilation > 1:
            return f"stride {stride} is made by pooling, which with dilation {dilation} falls between the kernel's taps"
    return None


def pooled_patterns(patterns: Tensor, side: Pair, stride: Pair) -> Tensor:
    """Patterns at each position -> patterns of an output: the mean over stride x stride of them, shifted.

    Args:
        patterns: (N, rows * columns). side: (rows, columns).

    Returns:
        (N, (rows + stride - 1) * (columns + stride - 1)). At the map's last row and column fewer
        positions are averaged; that is left out here.
    """
    if stride == (1, 1):
        return patterns
    box = patterns.new_full((1, 1, *stride), 1 / (stride[0] * stride[1]))
    shifted = F.conv_transpose2d(patterns.view(-1, 1, *side), box)
    return torch.flatten(shifted, 1)
