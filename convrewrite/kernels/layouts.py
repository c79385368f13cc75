"""Tensor layouts that kernels read and write: any strides in, and the same order of dimensions out."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_output(q: Tensor, width: int) -> Tensor:
    """An uninitialised, dense (B, Ho, Wo, N, width) tensor for queries (B, Ho, Wo, N, d).

    Where neighbouring columns of `q` are neighbours in memory, as in maps, it is a view of a map (B, N * width, Ho, Wo)
    with head-major channels; else it is contiguous.
    """
    batch, height, columns, heads, _ = q.shape
    if q.stride(2) == 1 and q.stride(4) != 1:
        return q.new_empty(batch, heads, width, height, columns).permute(0, 3, 4, 1, 2)
    return q.new_empty(batch, height, columns, heads, width)


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` itself if it lies in memory as the dense `like` does, or a copy that does."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, unless it is wider already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
