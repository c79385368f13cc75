"""Slow, independent forms of the blocks, written from the papers' equations with loops over pixels and taps."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def mirror(position: int, size: int) -> int:
    """Reflects step by step until the position is on the map."""
    while not 0 <= position < size:
        if size == 1:
            return 0
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def taps(kernel: int, dilation: int) -> list[int]:
    """Offsets of a window from its centre; the extra position of an even span lies at the end."""
    before = (dilation * (kernel - 1)) // 2
    return [t * dilation - before for t in range(kernel)]


def loop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Pair,
    scale: float,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    start: Pair = (0, 0),
    border: str = "reflect",
    relative: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Local attention in the layout (B, H, W, N, d), one query and one tap at a time."""
    batch, height, width, heads, _ = q.shape
    map_height, map_width = k.shape[1:3]
    out = q.new_zeros(batch, height, width, heads, v.shape[-1])
    for b, i, j, n in product(range(batch), range(height), range(width), range(heads)):
        logits, values = [], []
        offsets = list(product(taps(window[0], dilation[0]), taps(window[1], dilation[1])))
        for tap, (dy, dx) in enumerate(offsets):
            y, x = start[0] + i * stride[0] + dy, start[1] + j * stride[1] + dx
            inside = 0 <= y < map_height and 0 <= x < map_width
            if border == "mask" and not inside:
                continue
            y, x = mirror(y, map_height), mirror(x, map_width)
            gone = border == "zero" and not inside
            key = torch.zeros_like(k[b, y, x, n]) if gone else k[b, y, x, n]
            if relative is not None:
                key = key + relative[n % relative.shape[0], :, tap]
            logit = scale * (q[b, i, j, n] * key).sum()
            logits.append(logit if bias is None else logit + bias[n % bias.shape[0], tap])
            values.append(torch.zeros_like(v[b, y, x, n]) if gone else v[b, y, x, n])
        weight = torch.softmax(torch.stack(logits), 0)
        out[b, i, j, n] = (weight[:, None] * torch.stack(values)).sum(0)
    return out


def _dot(row: Tensor, columns: Tensor, bias: Tensor) -> Tensor:
    return (row[None] * columns).sum(1) + bias


def loop_acmix(
    state: dict[str, Tensor],
    x: Tensor,
    *,
    heads: int,
    window: int = 7,
    kernel_conv: int = 3,
    layout: str = "authors",
    start: Pair = (0, 0),
    count: Pair | None = None,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
) -> Tensor:
    """ACmix at the queries ``start + i * stride``, i < count, from Pan et al. 2022, nothing shared or fused."""
    batch, _, height, width = x.shape
    rows, columns = count or (height, width)
    c_out = state["conv1.weight"].shape[0]
    dim = c_out // heads
    project = [(state[f"conv{s}.weight"].flatten(1), state[f"conv{s}.bias"]) for s in (1, 2, 3)]

    def projected(s: int, b: int, y: int, z: int) -> Tensor:
        return _dot(x[b, :, y, z], *project[s]).view(heads, dim)

    def position(y: int, z: int) -> Tensor:
        place = [(-1.0 if size == 1 else -1 + 2 * at / (size - 1)) for at, size in ((z, width), (y, height))]
        return _dot(x.new_tensor(place), state["conv_p.weight"].flatten(1), state["conv_p.bias"])

    qkv = {key: torch.stack([projected(s, *key) for s in range(3)]) for key in _keys(batch, height, width)}
    fc = state["fc.weight"].flatten(1)
    mixed = {key: fc @ value.reshape(3 * heads, dim) for key, value in qkv.items()}  # (kc^2, d)
    out = x.new_zeros(batch, c_out, rows, columns)
    for b, i, j in _keys(batch, rows, columns):
        y, z = start[0] + i * stride[0], start[1] + j * stride[1]
        att = x.new_zeros(heads, dim)
        for n in range(heads):
            logits, values = [], []
            for dy, dz in product(taps(window, dilation[0]), taps(window, dilation[1])):
                at = mirror(y + dy, height), mirror(z + dz, width)
                key = qkv[b, *at][1, n] + position(y, z) - position(*at)
                logits.append((qkv[b, y, z][0, n] * key).sum() / math.sqrt(dim))
                values.append(qkv[b, *at][2, n])
            att[n] = (torch.softmax(torch.stack(logits), 0)[:, None] * torch.stack(values)).sum(0)
        conv = x.new_zeros(dim, heads)
        kernel = state["dep_conv.weight"].view(dim, heads, -1, kernel_conv, kernel_conv)
        for (a, dy), (c, dz) in product(
            enumerate(taps(kernel_conv, dilation[0])), enumerate(taps(kernel_conv, dilation[1]))
        ):
            if 0 <= y + dy < height and 0 <= z + dz < width:
                here = mixed[b, y + dy, z + dz]  # (kc^2, d)
                conv = conv + (kernel[:, :, :, a, c] * here.t()[:, None]).sum(2)
        flat = conv.t().reshape(-1) if layout == "ordered" else conv.reshape(-1)
        out[b, :, i, j] = state["rate1"] * att.reshape(-1) + state["rate2"] * flat
    return out


def _keys(*sizes: int) -> list[tuple[int, ...]]:
    return list(product(*map(range, sizes)))


def unfold_acmix(state: dict[str, Tensor], x: Tensor, *, heads: int, stride: int = 1) -> Tensor:
    """ACmix with window 7 and kernel_conv 3 plainly: unfolded keys, values and positions, fc, grouped conv."""
    batch, _, height, width = x.shape
    q, k, v = (F.conv2d(x, state[f"conv{s}.weight"], state[f"conv{s}.bias"]) for s in (1, 2, 3))
    dim = q.shape[1] // heads
    column = torch.linspace(-1, 1, width, dtype=x.dtype).expand(height, width)
    row = torch.linspace(-1, 1, height, dtype=x.dtype)[:, None].expand(height, width)
    pe = F.conv2d(torch.stack([column, row])[None], state["conv_p.weight"], state["conv_p.bias"])

    def windows(t: Tensor) -> Tensor:
        flat = F.unfold(F.pad(t, (3, 3, 3, 3), mode="reflect"), 7, stride=stride)
        return flat.view(t.shape[0], -1, dim, 49, flat.shape[-1])

    def centres(t: Tensor) -> Tensor:
        return t[:, :, ::stride, ::stride].reshape(t.shape[0], -1, dim, 1, windows(t).shape[-1])

    logits = torch.einsum("bndtl,bndul->bnul", centres(q), windows(k) + centres(pe) - windows(pe)) / math.sqrt(dim)
    att = torch.einsum("bntl,bndtl->bndl", logits.softmax(2), windows(v))
    stacked = torch.cat([q, k, v], 1).view(batch, 3 * heads, dim, height, width)
    mixed = torch.einsum("ts,bsdyx->bdtyx", state["fc.weight"].flatten(1), stacked).flatten(1, 2)
    conv = F.conv2d(mixed, state["dep_conv.weight"], padding=1, stride=stride, groups=dim)
    return state["rate1"] * att.reshape(conv.shape) + state["rate2"] * conv
