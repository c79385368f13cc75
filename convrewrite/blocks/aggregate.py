"""Weighted sums over windows, one for each full-width head, and their projection, a few rows at a time.

Full-width heads each sum whole pixels, so M heads make M maps, nine for a 3 x 3 kernel. They are never held: the
sums of a few rows are made, projected and forgotten, and made once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.sites import ConvSpec, Pair

CHUNK_ELEMENTS = 2**19
"""Elements of windows and sums made at once for one image: few enough to stay in a processor's cache."""


def windows(x: Tensor, window: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """The windows of a map that lie wholly on it, as a view: (B, H, W, C) -> (B, Ho, Wo, kh, kw, C)."""
    for axis in (0, 1):
        span = dilation[axis] * (window[axis] - 1) + 1
        x = x.unfold(axis + 1, span, stride[axis])[..., :: dilation[axis]]
    return x.permute(0, 1, 2, 4, 5, 3)


def aggregate(
    pixels: Tensor, attention: Tensor, mix: Tensor, *, window: Pair, stride: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Each head's weighted sum over the window, then all heads' sums mixed: a convolution whose taps are weighed.

        y_i = sum_h P_h sum_u a_ihu x_{i stride + u dilation}

    Args:
        pixels: x, (B, H, W, C), with every pixel that a window reaches.
        attention: a, (B, Ho, Wo, M, kh * kw).
        mix: P, (O, C / groups, M); output o reads the channels of its group alone, as in a convolution.

    Returns:
        (B, Ho, Wo, O), in the dtype of `pixels`.
    """
    attention, mix = attention.to(pixels.dtype), mix.to(pixels.dtype)
    result: Tensor = _Aggregate.apply(pixels.contiguous(), attention, mix, window, stride, dilation, groups)
    return result


def chunk_rows(out_width: int, channels: int, heads: int, taps: int) -> int:
    """Output rows that `aggregate` works on at once."""
    return max(1, CHUNK_ELEMENTS // (out_width * channels * (heads + taps)))


def chunk_elements(conv: ConvSpec, out_size: Pair, heads: int, taps: int) -> int:
    """Elements that `aggregate` holds besides arguments and result, for one image."""
    rows = min(out_size[0], chunk_rows(out_size[1], conv.in_channels, heads, taps))
    return rows * out_size[1] * (conv.in_channels * (taps + heads) + conv.out_channels)


class _Aggregate(torch.autograd.Function):
    """`aggregate`, which keeps nothing but its arguments for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        attention: Tensor,
        mix: Tensor,
        window: Pair,
        stride: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(pixels, attention, mix)
        ctx.geometry, ctx.groups = (window, stride, dilation), groups
        y = pixels.new_empty(*attention.shape[:3], mix.shape[0])
        for rows, read in _chunks(pixels, attention, window, stride, dilation):
            seen = _seen(pixels[:, read], window, stride, dilation)
            y[:, rows] = _projected(_sums(seen, attention[:, rows]), mix, groups)
            del seen  # before the next one is made
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pixels, attention, mix = ctx.saved_tensors
        window, stride, dilation = ctx.geometry
        weight = _by_group(mix, ctx.groups)
        to_pixels, to_mix = torch.zeros_like(pixels), torch.zeros_like(weight)
        to_attention = torch.empty_like(attention)
        for rows, read in _chunks(pixels, attention, window, stride, dilation):
            seen, weights = _seen(pixels[:, read], window, stride, dilation), attention[:, rows]
            sums = _grouped(_sums(seen, weights), ctx.groups)
            part = grad[:, rows].reshape(*sums.shape[:4], weight.shape[1])  # (B, r, Wo, G, O/G)
            to_mix += torch.einsum("bhwgo,bhwgi->goi", part, sums)
            to_sums = torch.einsum("bhwgo,goi->bhwgi", part, weight)
            to_sums = to_sums.reshape(*seen.shape[:3], seen.shape[4], mix.shape[2])
            to_attention[:, rows] = torch.matmul(seen, to_sums).transpose(3, 4)  # (B, r, Wo, M, n)
            to_seen = torch.matmul(weights.transpose(3, 4), to_sums.transpose(3, 4))  # (B, r, Wo, n, C)
            _add_windows(to_pixels[:, read], to_seen, window, stride, dilation)
        return to_pixels, to_attention, to_mix.view(mix.shape), None, None, None, None


def _chunks(
    pixels: Tensor, attention: Tensor, window: Pair, stride: Pair, dilation: Pair
) -> Iterator[tuple[slice, slice]]:
    """(output rows, rows of pixels that they read), a few at a time."""
    count, span = attention.shape[1], dilation[0] * (window[0] - 1) + 1
    step = chunk_rows(attention.shape[2], pixels.shape[3], *attention.shape[3:])
    for first in range(0, count, step):
        last = min(first + step, count)
        yield slice(first, last), slice(first * stride[0], (last - 1) * stride[0] + span)


def _seen(pixels: Tensor, window: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Copies of the windows, (B, r, Wo, n, C)."""
    return windows(pixels, window, stride, dilation).flatten(3, 4)


def _sums(seen: Tensor, weights: Tensor) -> Tensor:
    """Every head's sum, (B, r, Wo, C, M): channels first, so that those of a group lie together."""
    return torch.matmul(seen.transpose(3, 4), weights.transpose(3, 4))


def _projected(sums: Tensor, mix: Tensor, groups: int) -> Tensor:
    """(B, r, Wo, C, M) -> (B, r, Wo, O)."""
    if groups == 1:
        return F.linear(sums.flatten(3), mix.flatten(1))
    return torch.einsum("bhwgi,goi->bhwgo", _grouped(sums, groups), _by_group(mix, groups)).flatten(3)


def _grouped(sums: Tensor, groups: int) -> Tensor:
    """(B, r, Wo, C, M) -> (B, r, Wo, G, C/G * M)."""
    return sums.reshape(*sums.shape[:3], groups, sums.shape[3] // groups * sums.shape[4])


def _by_group(mix: Tensor, groups: int) -> Tensor:
    """(O, C/G, M) -> (G, O/G, C/G * M)."""
    return mix.reshape(groups, mix.shape[0] // groups, mix.shape[1] * mix.shape[2])


def _add_windows(into: Tensor, parts: Tensor, window: Pair, stride: Pair, dilation: Pair) -> None:
    """Add windows' parts (B, r, Wo, n, C) back to the pixels that they came from."""
    rows, columns = parts.shape[1:3]
    for tap in range(window[0] * window[1]):
        top, left = tap // window[1] * dilation[0], tap % window[1] * dilation[1]
        bottom, right = top + (rows - 1) * stride[0] + 1, left + (columns - 1) * stride[1] + 1
        into[:, top : bottom : stride[0], left : right : stride[1]] += parts[:, :, :, tap]


def padded_pixels(x: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
    """x (B, C, H, W) padded as a convolution pads it, channels last: (B, top + H + bottom, left + W + right, C)."""
    if any(padding):
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    return x.permute(0, 2, 3, 1).contiguous()
