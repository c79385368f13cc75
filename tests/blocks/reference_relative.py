"""Slow, independent forms of the blocks with global relative attention: loops over pairs of pixels, heads and taps."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from convrewrite.sites import ConvSpec

Pair = tuple[int, int]
State = dict[str, Tensor]


def loop_relative(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor | None, columns: Tensor | None, position_scale: float
) -> Tensor:
    """Softmax over all keys of scale q.k + position_scale q.(r_row + r_column); all (B, H, W, N, channels).

    Tables have 2 n - 1 rows for exactly this map's n.
    """
    batch, height, width, heads, _ = q.shape
    out = q.new_zeros(batch, height, width, heads, v.shape[-1])
    cells = list(product(range(height), range(width)))
    for b, (y, x), n in product(range(batch), cells, range(heads)):
        query, logits = q[b, y, x, n], []
        for ky, kx in cells:
            logit = scale * (query * k[b, ky, kx, n]).sum()
            if rows is not None:
                logit = logit + position_scale * (query * rows[ky - y + height - 1]).sum()
            if columns is not None:
                logit = logit + position_scale * (query * columns[kx - x + width - 1]).sum()
            logits.append(logit)
        share = torch.softmax(torch.stack(logits), 0)
        out[b, y, x, n] = sum(share[i] * v[b, ky, kx, n] for i, (ky, kx) in enumerate(cells))
    return out


def loop_conv(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """The convolution with zero padding, one output pixel and one tap at a time."""
    height, width = spec.out_size(*x.shape[2:])
    left, _, top, _ = spec.padding
    out = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    per_out, per_in = weight.shape[0] // spec.groups, x.shape[1] // spec.groups
    for o, i, j in product(range(weight.shape[0]), range(height), range(width)):
        first = o // per_out * per_in
        for a, c in product(range(spec.kernel[0]), range(spec.kernel[1])):
            y = i * spec.stride[0] - top + a * spec.dilation[0]
            z = j * spec.stride[1] - left + c * spec.dilation[1]
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                out[:, o, i, j] += (x[:, first : first + per_in, y, z] * weight[o, :, a, c]).sum(1)
        if bias is not None:
            out[:, o, i, j] += bias[o]
    return out


def centre(index: int, axis: int, spec: ConvSpec) -> int:
    """Input position under the middle tap of output `index`; of an even span the one before the middle."""
    before = spec.padding[2] if axis == 0 else spec.padding[0]
    return index * spec.stride[axis] - before + (spec.dilation[axis] * (spec.kernel[axis] - 1)) // 2


def at(x: Tensor, y: int, z: int) -> Tensor:
    """x at a pixel, (B, C); zero outside the map."""
    if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
        return x[:, :, y, z]
    return x.new_zeros(x.shape[:2])


def loop_centres(x: Tensor, spec: ConvSpec) -> Tensor:
    """x under the middle of every window of the convolution."""
    height, width = spec.out_size(*x.shape[2:])
    out = x.new_zeros(*x.shape[:2], height, width)
    for i, j in product(range(height), range(width)):
        out[:, :, i, j] = at(x, centre(i, 0, spec), centre(j, 1, spec))
    return out


def loop_pool3(x: Tensor) -> Tensor:
    """Mean over the pixels of each 3 x 3 window that are on the map, every second window."""
    height, width = -(-x.shape[2] // 2), -(-x.shape[3] // 2)
    out = x.new_zeros(*x.shape[:2], height, width)
    for i, j in product(range(height), range(width)):
        seen = [
            x[:, :, y, z]
            for y, z in product(range(2 * i - 1, 2 * i + 2), range(2 * j - 1, 2 * j + 2))
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
        ]
        out[:, :, i, j] = torch.stack(seen).mean(0)
    return out


def loop_bilinear(x: Tensor, size: Pair) -> Tensor:
    """Bilinear interpolation with pixel centres at half integers, clamped at the border."""
    out = x.new_zeros(*x.shape[:2], *size)
    for i, j in product(range(size[0]), range(size[1])):
        (y, fy), (z, fz) = (
            _between(p, old, new) for p, old, new in ((i, x.shape[2], size[0]), (j, x.shape[3], size[1]))
        )
        for dy, dz in product((0, 1), (0, 1)):
            share = (fy if dy else 1 - fy) * (fz if dz else 1 - fz)
            out[:, :, i, j] += share * x[:, :, min(y + dy, x.shape[2] - 1), min(z + dz, x.shape[3] - 1)]
    return out


def _between(place: int, old: int, new: int) -> tuple[int, float]:
    exact = max(0.0, (place + 0.5) * old / new - 0.5)
    return math.floor(exact), exact - math.floor(exact)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution, channels last: (B, C, H, W) -> (B, H, W, O)."""
    return (x.permute(0, 2, 3, 1)[..., None, :] * weight.flatten(1)).sum(-1)


def _by_heads(t: Tensor, heads: int) -> Tensor:
    return t.reshape(*t.shape[:3], heads, t.shape[3] // heads)


def loop_aa_conv(state: State, x: Tensor, spec: ConvSpec, *, heads: int, position: str, pool: int) -> Tensor:
    """AA-Conv from Bello et al. 2019; the widths are read off the weights."""
    values = state["attn_out.weight"].shape[0]
    keys = (state["qkv_conv.weight"].shape[0] - values) // 2
    halves = []
    if "conv_out.weight" in state:
        halves.append(loop_conv(x, state["conv_out.weight"], state.get("conv_out.bias"), spec))
    seen = loop_centres(x, spec)
    size = (seen.shape[2], seen.shape[3])
    seen = loop_pool3(seen) if pool == 2 else seen
    if position == "absolute":
        planes = seen.new_zeros(seen.shape[0], 3, *seen.shape[2:])
        for y, z in product(range(seen.shape[2]), range(seen.shape[3])):
            down, right = (-1 + 2 * p / (n - 1) if n > 1 else 0.0 for p, n in ((y, seen.shape[2]), (z, seen.shape[3])))
            planes[:, :, y, z] = seen.new_tensor([right, down, math.hypot(right, down)])
        seen = torch.cat([seen, planes], 1)
    qkv = _project(seen, state["qkv_conv.weight"])
    q, k, v = (_by_heads(t, heads) for t in (qkv[..., :keys], qkv[..., keys : 2 * keys], qkv[..., 2 * keys :]))
    scale = 1 / math.sqrt(keys // heads)
    att = loop_relative(q, k, v, scale, state.get("key_rel_h"), state.get("key_rel_w"), scale)
    att = _project(att.flatten(3).permute(0, 3, 1, 2), state["attn_out.weight"])
    att = (att + state["attn_out.bias"] if "attn_out.bias" in state else att).permute(0, 3, 1, 2)
    halves.append(loop_bilinear(att, size) if pool == 2 else att)
    return torch.cat(halves, 1)


def loop_mhsa(state: State, x: Tensor, spec: ConvSpec, *, heads: int, scale_position: bool = True) -> Tensor:
    """BoTNet's attention at full resolution, then the mean of the stride x stride positions from each centre on.

    For convolutions whose windows are all centred on the map.
    """
    q, k, v = (_by_heads(t, heads) for t in _project(x, state["qkv.weight"]).chunk(3, 3))
    scale = 1 / math.sqrt(q.shape[-1])
    position_scale = scale if scale_position else 1.0
    att = loop_relative(q, k, v, scale, state["height_rel"], state["width_rel"], position_scale).flatten(3)
    height, width = spec.out_size(*x.shape[2:])
    out = x.new_zeros(x.shape[0], att.shape[3], height, width)
    for i, j in product(range(height), range(width)):
        y, z = centre(i, 0, spec), centre(j, 1, spec)
        cells = att[:, y : y + spec.stride[0], z : z + spec.stride[1]]
        out[:, :, i, j] = cells.flatten(1, 2).mean(1) + state.get("bias", torch.zeros(()))
    return out


def loop_gpsa(state: State, x: Tensor, spec: ConvSpec) -> Tensor:
    """GPSA with one head for each tap, from ConViT's equations, zeros as keys all over the convolution's padding.

    And one more where the state has a `background`.
    """
    weight = state["weight"]
    values = weight.flatten(2)  # (C_out, C_in, N)
    if "background" in state:
        values = torch.cat([values, state["background"].unsqueeze(2)], 2)
    heads = values.shape[2]
    to_q, to_k = state["qk.weight"].flatten(1).chunk(2)
    dim = to_q.shape[0] // heads
    batch, _, map_height, map_width = x.shape
    left, right, top, bottom = spec.padding
    height, width = spec.out_size(map_height, map_width)
    inside = list(product(range(map_height), range(map_width)))
    padded = list(product(range(-top, map_height + bottom), range(-left, map_width + right)))
    out = x.new_zeros(batch, weight.shape[0], height, width)
    for b, i, j, n in product(range(batch), range(height), range(width), range(heads)):
        y, z = centre(i, 0, spec), centre(j, 1, spec)
        u = state["position"][n]
        bumps = [u[0] * (kz - z) + u[1] * (ky - y) + u[2] * ((kz - z) ** 2 + (ky - y) ** 2) for ky, kz in padded]
        near = torch.softmax(torch.stack(bumps), 0)
        query = to_q[n * dim : (n + 1) * dim] @ at(x, y, z)[b]
        alike = [query @ (to_k[n * dim : (n + 1) * dim] @ x[b, :, ky, kz]) / math.sqrt(dim) for ky, kz in inside]
        far = torch.softmax(torch.stack(alike), 0)
        gate = state["gate"][n]
        mixed = sum((1 - gate) * share * at(x, ky, kz)[b] for share, (ky, kz) in zip(near, padded, strict=True))
        mixed = mixed + sum(gate * share * x[b, :, ky, kz] for share, (ky, kz) in zip(far, inside, strict=True))
        out[b, :, i, j] += values[:, :, n] @ mixed
    return out + state["bias"].view(-1, 1, 1) if "bias" in state else out
