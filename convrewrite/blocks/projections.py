"""Queries, keys and values from one matrix product, and their gradients back into one tensor without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FOLDED = 100
"""Maps of at most so many pixels are multiplied as one matrix: a product for each image would be too small. On CPU."""


def is_small(x: Tensor) -> bool:
    """Whether maps (B, C, H, W) are so small that one product for all images is worth a copy of them."""
    return x.shape[2] * x.shape[3] <= FOLDED


def project_maps(weight: Tensor, x: Tensor) -> Tensor:
    """A 1 x 1 convolution: weight (O, C) on x (B, C, H, W) -> (B, O, H*W).

    ``torch.matmul`` folds the images into one matrix, which copies the map and the result: at 64 channels of 56 x 56
    two and a half times the time of a 3 x 3 convolution, of which the products are a fifth.
    """
    if is_small(x):
        return torch.matmul(weight, x.flatten(2))
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2))


def unbind_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, W, N, d) of a tensor (B, H, W, 3, N, d).

    As ``qkv.unbind(3)``; in eager mode the gradients of the three are taken as one tensor where a kernel has written
    them side by side (`convrewrite.kernels.layouts.side_by_side`), instead of being copied into one.
    """
    if torch.compiler.is_compiling() or not qkv.requires_grad or not torch.is_grad_enabled():
        q, k, v = qkv.unbind(3)
    else:
        q, k, v = _Unbind.apply(qkv)
    return q, k, v


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.strides = qkv.shape, qkv.stride()
        ctx.set_materialize_grads(False)
        return qkv.unbind(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None
        whole = [torch.zeros_like(given[0]) if grad is None else grad for grad in grads]
        strides = (*ctx.strides[:3], *ctx.strides[4:])
        first, step = whole[0], ctx.strides[3]
        together = all(
            grad.stride() == strides
            and grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and grad.storage_offset() == first.storage_offset() + i * step
            for i, grad in enumerate(whole)
        )
        if together:
            return first.as_strided(ctx.shape, ctx.strides, first.storage_offset())
        return torch.stack(whole, 3)
