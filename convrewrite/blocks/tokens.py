"""What the blocks that attend over the whole map share: tokens, attention that keeps no logits, gates, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import float32
from convrewrite.kernels import again
from convrewrite.sites import Place

FLOAT_BYTES = 4

SMALL = 2
"""Logits are held whole where there are at most this many keys for each channel of the values: no more memory
than a few of the tensors that came in, and faster than padding narrow keys to the values' width. Measured on CPU."""

TILED = (512, 8, 4)
"""On CPU, narrow keys go through tiles of whole logits where there are more keys than the first number, at most the
second for each channel of the values, and keys are at least the third times as narrow: SDPA wants them padded."""

TILE_ELEMENTS = 2**18
"""Logits of one tile: 1 MiB in float32, about a processor's second-level cache."""


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), contiguous; a view of a channels_last map."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) as a view, H x W that of `like`."""
    return tokens.transpose(1, 2).view(like.shape[0], tokens.shape[2], like.shape[2], like.shape[3])


def pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1 x 1 convolution on tokens: (B, L, C_in) -> (B, L, C_out)."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def whole_precision(x: Tensor) -> bool:
    """Whether products of `x` are computed in float32 or float64: not under autocast, which rounds them.

    What is not may not be squared into logits in the open, only within SDPA, which sums them in float32.
    """
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


def holds_logits(keys: int, value_width: int) -> bool:
    """Whether `attend` holds the logits of a float32 or float64 map of so many keys whole."""
    return keys <= SMALL * value_width


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax attention over all keys: y_i = sum_j softmax_j(scale q_i . k_j) v_j.

    Few keys: two matrix products. Many and narrow ones on CPU: the same for tiles of queries, whose logits are
    forgotten and made once more in the backward pass. Else, or half precision (whose logits must not be rounded):
    SDPA, with the narrower of keys and values padded with zeros, since its memory-saving kernels want equal widths.

    Args:
        q: (B, L, d). k: (B, M, d). v: (B, M, dv), dv of any width.

    Returns:
        (B, L, dv). Softmax runs in float32 or wider.
    """
    width = v.shape[-1]
    whole = whole_precision(q)
    if whole and holds_logits(k.shape[1], width):
        return _whole(q * scale if scale != 1 else q, k, v)
    if whole and q.device.type == "cpu" and in_tiles(k.shape[1], k.shape[2], width):
        result: Tensor = _Tiles.apply(q * scale if scale != 1 else q, k, v)
        return result
    gap = q.shape[-1] - width
    if gap > 0:
        v = F.pad(v, (0, gap))
    elif gap < 0:
        q, k = F.pad(q, (0, -gap)), F.pad(k, (0, -gap))
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)
    return out[:, 0, :, :width]


def attend_maps(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """`attend` of maps, where the logits are held whole: no map is copied to tokens, nor the result back.

    Args:
        q: (B, d, H, W). k: (B, d, h, w). v: (B, dv, h, w).

    Returns:
        (B, L, dv), a view of a map.
    """
    q, k, v = (t.flatten(2) for t in (q, k, v))
    weights = torch.bmm((q * scale if scale != 1 else q).transpose(1, 2), k).softmax(-1)
    return torch.bmm(v, weights.transpose(1, 2)).transpose(1, 2)


def in_tiles(keys: int, width: int, value_width: int) -> bool:
    """Whether `attend` works in tiles on CPU, of a float32 or float64 map. A compiler is given the plain form."""
    least, most, narrow = TILED
    if torch.compiler.is_compiling():
        return False
    return least < keys <= most * value_width and narrow * width <= value_width


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


class _Tiles(torch.autograd.Function):
    """softmax(q k^T) v a few queries at a time, keeping nothing but its arguments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        y = q.new_empty(*q.shape[:2], v.shape[2])
        for image, queries in _tiles(q, k):
            y[image, queries] = torch.mm(torch.mm(q[image, queries], k[image].T).softmax(1), v[image])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        if again.is_wanted(grad, (q, k, v)):
            return again.by_autograd(_whole, (q, k, v), grad)
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for image, queries in _tiles(q, k):
            weights = torch.mm(q[image, queries], k[image].T).softmax(1)
            part = grad[image, queries]
            to_v[image].addmm_(weights.T, part)
            to_weights = torch.mm(part, v[image].T)
            weighted = to_weights.mul_(weights)
            to_logits = weighted.addcmul_(weights, weighted.sum(1, keepdim=True), value=-1)
            torch.mm(to_logits, k[image], out=to_q[image, queries])
            to_k[image].addmm_(to_logits.T, q[image, queries])
        return to_q, to_k, to_v


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, queries) of each tile."""
    step = max(1, TILE_ELEMENTS // k.shape[1])
    for image in range(q.shape[0]):
        for begin in range(0, q.shape[1], step):
            yield image, slice(begin, begin + step)


def attend_elements(queries: int, keys: int, width: int, value_width: int) -> tuple[int, int]:
    """What `attend` costs one image in float32: (elements alive besides q, k, v; elements kept, with them and y)."""
    if holds_logits(keys, value_width):
        logits = queries * keys
        alive = logits + max(logits, queries * value_width)
        return alive, (queries + keys) * width + keys * value_width + logits + queries * value_width
    if in_tiles(keys, width, value_width):
        tile = 2 * min(queries * keys, TILE_ELEMENTS)  # of one image at a time: less than this for more than one
        return tile + queries * value_width, (queries + keys) * (width + value_width)
    wide = max(width, value_width)
    padded = (queries + keys) * wide if width < value_width else keys * wide if width > value_width else 0
    return padded + queries * (wide + 1), 2 * (queries + keys) * wide + queries


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y in the dtype of `x`; exactly `x` while the gate is zero."""
    return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def softmax32(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 or wider."""
    return float32(logits)[0].softmax(-1)


def refuse_change(name: str, place: Place) -> str | None:
    """Why a block that keeps channels and size, and mixes all channels, cannot stand at `place`; None if it can."""
    conv = place.conv
    if conv is not None and conv.groups > 1:
        return f"convolution has {conv.groups} groups, {name} mixes all channels (groups must be 1)"
    if conv is not None and conv.stride != (1, 1):
        return f"stride {conv.stride[0]}x{conv.stride[1]}, {name} keeps the size (stride must be 1)"
    if place.in_shape[1] != place.out_shape[1]:
        return f"{place.in_shape[1]} -> {place.out_shape[1]} channels, {name} keeps them (they must be equal)"
    (height, width), (new_height, new_width) = place.in_shape[2:], place.out_shape[2:]
    if (height, width) != (new_height, new_width):
        return f"the convolution makes {height}x{width} into {new_height}x{new_width}, {name} keeps the size"
    return None
