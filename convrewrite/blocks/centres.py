"""Where a convolution's windows are centred: the positions at which attention in its place has its queries."""

from __future__ import annotations

from torch import Tensor

from convrewrite.blocks.pooled import pooled_grid
from convrewrite.sites import ConvSpec


def at_centres(x: Tensor, spec: ConvSpec) -> Tensor:
    """x (B, C, H, W) at every window's centre, (B, C, Ho, Wo), the convolution's output size.

    A view of x where every centre is on the map; where padding beyond "same" puts one outside, x is zero there.
    """
    height, width = spec.out_size(x.shape[2], x.shape[3])
    grid = pooled_grid(spec, x.shape[2], x.shape[3], 1)
    x = grid.pad(x)[:, :, grid.y.start :: spec.stride[0], grid.x.start :: spec.stride[1]]
    return x[:, :, :height, :width]
