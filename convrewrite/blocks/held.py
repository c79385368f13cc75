"""How softmax heads hold a convolution exactly: sharp enough to be told apart, soft enough to learn.

A head h that does not look at its input sees sum_u s_hu x_{i+u}, with a pattern s_h of positive weights. M heads
of full width, mixed by P_h, are then the convolution with the kernel K_u = sum_h P_h s_hu: linear in the patterns.
Where the patterns span the kernel's taps, P solves that for any given K, whatever the temperature.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import Block, conv_spec
from convrewrite.blocks.folding import Affine
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec

Pair = tuple[int, int]
Held = TypeVar("Held", bound=Block)

RESIDUAL = 1e-9
"""Largest part of a kernel, relative to it, that patterns may miss and still be said to hold it."""

ROUNDINGS = 16
"""Roundings of the weights that may be left where the patterns of a held kernel cancel each other."""


def solve_mix(kernel: Tensor, patterns: Tensor) -> Tensor:
    """P with sum_h P_h s_h = K, in float64.

    Args:
        kernel: K, (O, C / groups, taps).
        patterns: s, (M, taps).

    Returns:
        (O, C / groups, M), the smallest where there are several.

    Raises:
        ConvrewriteError: the patterns do not span the kernel.
    """
    wanted, patterns = kernel.double(), patterns.double().cpu()
    mix: Tensor = wanted @ torch.linalg.pinv(patterns).to(wanted.device)
    if not wanted.is_meta:
        missed = float((mix @ patterns.to(wanted.device) - wanted).abs().amax()) if wanted.numel() else 0.0
        if missed > RESIDUAL * float(wanted.abs().amax()):
            raise ConvrewriteError(f"{patterns.shape[0]} heads do not span the kernel of {kernel.shape[2]} taps")
    return mix


def within_kernel(kernel: Tensor, before: Pair, size: Pair, dtype: torch.dtype) -> Tensor | None:
    """The part of `kernel` (O, C / groups, h, w) that a convolution of `size` taps has, if the rest is nothing.

    Args:
        before: taps above and left of that part; negative where the convolution's kernel is the larger one.
        dtype: of the weights that it comes from, whose rounding is left beyond that part.

    Returns:
        (O, C / groups, *size), or None where there is more beyond it than rounding explains.
    """
    (top, left), (height, width) = before, size
    bottom, right = kernel.shape[2] - height - top, kernel.shape[3] - width - left
    inside = F.pad(kernel, (-left, -right, -top, -bottom))
    whole = F.pad(inside, (left, right, top, bottom)) if min(top, left, bottom, right) >= 0 else kernel
    missed = float((kernel - whole).abs().max()) if kernel.numel() else 0.0
    return inside if missed <= max(RESIDUAL, ROUNDINGS * torch.finfo(dtype).eps) * float(kernel.abs().max()) else None


def mixed(block: Held, after: Affine | None) -> Held | None:
    """A copy of a block that ends in `mix` (O, C / groups, M) and `bias`, with `after` in both; None without one."""
    if after is None:
        return None
    twin = copy.deepcopy(block)
    twin.bias = after.bias(block.bias, block.mix)
    twin.mix = after.weight(block.mix)
    return twin


def check_conv(block: Block, conv: nn.Conv2d, spec: ConvSpec) -> None:
    """Raises ConvrewriteError unless `conv` is the convolution that the block was built for."""
    if conv_spec(conv) != spec:
        raise ConvrewriteError(f"{block.name} was built for {spec} and cannot hold {conv_spec(conv)}")


def refuse_heads(
    name: str, conv: ConvSpec | None, heads: int | None, taps: int, most: int, in_size: Pair
) -> str | None:
    """Why full-width heads cannot stand in a convolution's place, or None."""
    if conv is None:
        return f"{name} can only replace a convolution, not be inserted"
    if taps == 1:
        return "a window of 1 tap leaves nothing to attend to"
    if heads is not None and heads > most:
        return f"{heads} heads, a window of {taps} taps tells at most {most} apart"
    height, width = conv.out_size(*in_size)
    if height < 1 or width < 1:
        return f"the convolution's output is empty ({height} x {width})"
    return None


def nearest_first(shape: Pair) -> list[Pair]:
    """The taps of a kernel (row, column), those nearest to its centre first."""
    taps = [(row, column) for row in range(shape[0]) for column in range(shape[1])]
    return sorted(taps, key=lambda tap: sum((2 * at - (size - 1)) ** 2 for at, size in zip(tap, shape, strict=True)))
