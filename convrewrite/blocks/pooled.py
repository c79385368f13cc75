"""Stride by pooling: where attention at full resolution stands, and how it is averaged to the convolution's size."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from convrewrite.blocks.base import query_grid
from convrewrite.blocks.local import Axis, Pair
from convrewrite.sites import ConvSpec


@dataclass(frozen=True)
class PooledGrid:
    """Geometry of a block that computes at every position and then averages stride x stride of them.

    Output i of the convolution is centred on position ``start + i * stride``; it becomes the mean of the positions
    from there to the next centre, as many of them as lie on the map.

    Attributes:
        pads: zeros (left, right, top, bottom) that x needs so that every window of the convolution is centred on
            the map; all 0 unless the convolution pads beyond "same".
        y, x: the positions along both axes of the map so padded, before pooling (their stride is 1).
        stride: the convolution's, (vertical, horizontal).
    """

    pads: tuple[int, int, int, int]
    y: Axis
    x: Axis
    stride: Pair

    def pad(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) with `pads` around it."""
        return F.pad(x, self.pads) if any(self.pads) else x

    def pool(self, x: Tensor) -> Tensor:
        """(B, C, y.count, x.count) -> (B, C, Ho, Wo), the convolution's output size."""
        if self.stride == (1, 1):
            return x
        return F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True)


def pooled_grid(spec: ConvSpec, height: int, width: int, window: int) -> PooledGrid:
    """The grid of a block with windows of `window` taps a side in the place of the convolution `spec`."""
    left, right, top, bottom = spec.padding
    above, below, y = _axis(spec, 0, height, (top, bottom), window)
    before, after, x = _axis(spec, 1, width, (left, right), window)
    return PooledGrid((before, after, above, below), y, x, spec.stride)


def _axis(spec: ConvSpec, i: int, size: int, padding: Pair, window: int) -> tuple[int, int, Axis]:
    """(zeros before, zeros after, axis) along axis `i`."""
    stride, dilation = spec.stride[i], spec.dilation[i]
    start, outputs = query_grid(size, spec.kernel[i], stride, dilation, *padding)
    before, after = max(0, -start), max(0, start + (outputs - 1) * stride - size + 1)
    size, start = size + before + after, start + before
    return before, after, Axis(size, min(outputs * stride, size - start), window, 1, dilation, start)
