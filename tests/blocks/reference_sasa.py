"""SASA, its stem and outlook attention with loops over pixels and taps, written from the papers' equations."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from tests.blocks.reference import taps

Pair = tuple[int, int]


def sinusoid(position: int, channels: int) -> list[float]:
    """Vaswani et al. 2017, section 3.5, one position."""
    waves = []
    for channel in range(channels):
        angle = position / 10000 ** (2 * (channel // 2) / channels)
        waves.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return waves


def loop_sasa(
    state: dict[str, Tensor],
    x: Tensor,
    *,
    heads: int,
    window: int,
    position: str = "relative",
    border: str = "zero",
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    start: Pair = (0, 0),
    count: Pair | None = None,
) -> Tensor:
    """Output (a, b) is the mean of the attention at the pixels of start + (a, b) * stride + [0, stride) on the map."""
    batch, _, height, width = x.shape
    rows, columns = count or (height, width)
    weights = state["qkv.weight"].flatten(1).chunk(3)
    out = x.new_zeros(batch, weights[0].shape[0], rows, columns)
    for b, i, j in product(range(batch), range(rows), range(columns)):
        pixels = [
            (y, z)
            for y in range(start[0] + i * stride[0], start[0] + (i + 1) * stride[0])
            for z in range(start[1] + j * stride[1], start[1] + (j + 1) * stride[1])
            if y < height and z < width
        ]
        for y, z in pixels:
            out[b, :, i, j] += _sasa_pixel(state, x[b], weights, y, z, heads, window, position, border, dilation)
        out[b, :, i, j] /= len(pixels)
    return out


def _sasa_pixel(
    state: dict[str, Tensor],
    x: Tensor,
    weights: tuple[Tensor, ...],
    y: int,
    z: int,
    heads: int,
    window: int,
    position: str,
    border: str,
    dilation: Pair,
) -> Tensor:
    dim = weights[0].shape[0] // heads
    q = (weights[0] @ x[:, y, z]).view(heads, dim)
    result = x.new_zeros(heads, dim)
    for n in range(heads):
        logits, values = [], []
        for (row, dy), (column, dz) in product(
            enumerate(taps(window, dilation[0])), enumerate(taps(window, dilation[1]))
        ):
            at = y + dy, z + dz
            inside = 0 <= at[0] < x.shape[1] and 0 <= at[1] < x.shape[2]
            if not inside and border == "masked":
                continue
            key, value = x.new_zeros(dim), x.new_zeros(dim)
            if inside:
                key, value = ((w @ x[:, at[0], at[1]]).view(heads, dim)[n] for w in weights[1:])
            if inside and position == "absolute":
                half = dim // 2
                key = key + x.new_tensor(sinusoid(at[0], half) + sinusoid(at[1], dim - half))
            if position == "relative":
                row_table, column_table = state["row_embedding"], state["column_embedding"]
                own = n % len(row_table)
                key = key + torch.cat([row_table[own, :, row], column_table[own, :, column]])
            logits.append(sum(q[n, c] * key[c] for c in range(dim)))
            values.append(value)
        share = torch.softmax(torch.stack([torch.as_tensor(t) for t in logits]), 0)
        result[n] = sum(share[t] * values[t] for t in range(len(values)))
    return result.flatten()


def loop_stem(state: dict[str, Tensor], x: Tensor, *, heads: int) -> Tensor:
    """The attention stem in eval mode, block by block."""
    batch, _, height, width = x.shape
    c_out = state["query.weight"].shape[0]
    dim = c_out // heads
    values = state["values.weight"].flatten(1).view(-1, c_out, x.shape[1])
    out = x.new_full((batch, c_out, math.ceil(height / 4), math.ceil(width / 4)), -math.inf)
    for b, i, j in product(range(batch), range(out.shape[2]), range(out.shape[3])):
        places = [(r, c) for r in range(4) for c in range(4) if 4 * i + r < height and 4 * j + c < width]
        q, k, v = {}, {}, {}
        for r, c in places:
            pixel = x[b, :, 4 * i + r, 4 * j + c]
            embedding = state["row_embedding"][r] + state["column_embedding"][c]
            share = torch.softmax(torch.stack([(embedding * nu).sum() for nu in state["mixture_embedding"]]), 0)
            q[r, c] = state["query.weight"].flatten(1) @ pixel
            k[r, c] = state["key.weight"].flatten(1) @ pixel
            v[r, c] = sum((share[m] * values[m] for m in range(len(values))), torch.zeros_like(values[0])) @ pixel
        for at in places:
            y = x.new_zeros(c_out)
            for n in range(heads):
                own = slice(n * dim, (n + 1) * dim)
                weight = torch.softmax(torch.stack([(q[at][own] * k[other][own]).sum() for other in places]), 0)
                y[own] = (weight[:, None] * torch.stack([v[other][own] for other in places])).sum(0)
            deviation = torch.sqrt(state["norm.running_var"] + 1e-5)
            y = (y - state["norm.running_mean"]) / deviation * state["norm.weight"] + state["norm.bias"]
            out[b, :, i, j] = torch.maximum(out[b, :, i, j], y)
    return out


def loop_outlook(
    state: dict[str, Tensor],
    x: Tensor,
    *,
    heads: int,
    window: int,
    step: int = 1,
    dilation: Pair = (1, 1),
    normalise: bool = False,
) -> Tensor:
    """z of outlook attention, before the last projection: every centre writes to every pixel of its window."""
    batch, c_in, height, width = x.shape
    c_out = state["v.weight"].shape[0]
    dim, area = c_out // heads, window**2
    out, writers = x.new_zeros(batch, c_out, height, width), x.new_zeros(height, width)
    offsets = list(product(taps(window, dilation[0]), taps(window, dilation[1])))
    for b, y, z in product(range(batch), range(0, height, step), range(0, width, step)):
        mean = x[b, :, y : y + step, z : z + step].reshape(c_in, -1).mean(1)
        logits = (state["attn.weight"] @ mean + state["attn.bias"]) / math.sqrt(dim)
        weights = logits.view(heads, area, area).softmax(2)
        for target, (dy, dz) in enumerate(offsets):
            if not (0 <= y + dy < height and 0 <= z + dz < width):
                continue
            writers[y + dy, z + dz] += b == 0
            for source, (sy, sz) in enumerate(offsets):
                if 0 <= y + sy < height and 0 <= z + sz < width:
                    value = (state["v.weight"] @ x[b, :, y + sy, z + sz]).view(heads, dim)
                    out[b, :, y + dy, z + dz] += (weights[:, target, source, None] * value).flatten()
    return out / writers if normalise else out
