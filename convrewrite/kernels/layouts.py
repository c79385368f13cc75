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


def gap_between(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Elements from q to k and from k to v where the three, of one shape, fill one piece of memory; else 0.

    k itself may lie elsewhere (a sum with it often does): then it is where k was. 0 while anything is being traced, and
    for half precision, whose gradients kernels make in float32.
    """
    if type(q) is not Tensor or q.shape != k.shape or q.shape != v.shape or q.numel() == 0:
        return 0
    if wide(q) is not q or not q.dtype == k.dtype == v.dtype:
        return 0
    together = q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and q.stride() == v.stride()
    gap, odd = divmod(int(v.storage_offset()) - int(q.storage_offset()), 2)
    if not together or odd or gap <= 0:
        return 0
    used = 1
    for stride, size in sorted(zip((gap, *q.stride()), (3, *q.shape), strict=True)):
        if size != 1 and stride != used:
            return 0
        used *= size
    return gap


def side_by_side(like: Tensor, gap: int) -> Tensor:
    """Uninitialised memory for three tensors, each with the strides of `like` and `gap` elements apart: (3, ...)."""
    return like.new_empty_strided((3, *like.shape), (gap, *like.stride()))
