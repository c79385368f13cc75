"""What the blocks that attend over the whole map share: tokens, attention that keeps no logits, gates, refusals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import float32
from convrewrite.sites import Place

FLOAT_BYTES = 4

SMALL = 2
"""Logits are held whole where there are at most this many keys for each channel of the values: no more memory
than a few of the tensors that came in, and faster than padding narrow keys to the values' width. Measured on CPU."""


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), contiguous; a view of a channels_last map."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) as a view, H x W that of `like`."""
    return tokens.transpose(1, 2).view(like.shape[0], tokens.shape[2], like.shape[2], like.shape[3])


def pointwise(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    """A 1 x 1 convolution on tokens: (B, L, C_in) -> (B, L, C_out)."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def holds_logits(keys: int, value_width: int) -> bool:
    """Whether `attend` holds the logits of a float32 or float64 map of so many keys whole."""
    return keys <= SMALL * value_width


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax attention over all keys: y_i = sum_j softmax_j(scale q_i . k_j) v_j.

    Few keys: two matrix products. Many, or half precision (whose logits must not be rounded): SDPA, with the
    narrower of keys and values padded with zeros, since its memory-saving kernels want equal widths.

    Args:
        q: (B, L, d). k: (B, M, d). v: (B, M, dv), dv of any width.

    Returns:
        (B, L, dv). Softmax runs in float32 or wider.
    """
    width = v.shape[-1]
    if q.dtype in (torch.float32, torch.float64) and holds_logits(k.shape[1], width):
        return torch.bmm(torch.bmm(q * scale if scale != 1 else q, k.transpose(1, 2)).softmax(-1), v)
    gap = q.shape[-1] - width
    if gap > 0:
        v = F.pad(v, (0, gap))
    elif gap < 0:
        q, k = F.pad(q, (0, -gap)), F.pad(k, (0, -gap))
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)
    return out[:, 0, :, :width]


def attend_elements(queries: int, keys: int, width: int, value_width: int) -> tuple[int, int]:
    """What `attend` costs one image in float32: (elements alive besides q, k, v; elements kept, with them and y)."""
    if holds_logits(keys, value_width):
        logits = queries * keys
        alive = logits + max(logits, queries * value_width)
        return alive, (queries + keys) * width + keys * value_width + logits + queries * value_width
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
