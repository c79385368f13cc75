"""Local attention in plain ATen: tiles of queries, patches of keys, and ``scaled_dot_product_attention``.

Unfolding k x k windows writes k^2 copies of keys and values to fresh memory, and that, not arithmetic, is
what published code spends its time on. Here queries are cut into b x b tiles; a tile sees one patch of
((b - 1) stride + span)^2 keys, which a single ``index_select`` gathers (border rule, tiling and overlap all
sit in its index, and its backward is a plain sum), and a constant additive mask hides the keys outside each
query's window from ``scaled_dot_product_attention``. Small maps skip the tiles: every query sees every
key, and the mask holds the logarithm of how often its window meets that key.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from convrewrite.kernels.geometry import EXCLUDED, Axis, Border, LocalSpec, reflect_index
from convrewrite.kernels.lines import local_attention_lines, takes_lines

DENSE = 1.5
"""Attend to the whole map when it holds at most this many times the keys of one tile."""

CUDA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, whose gradients with a mask are NaN at 64 queries since torch 2.11 (pytorch#196678)."""


def local_attention_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: LocalSpec,
    relative: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`convrewrite.blocks.local.local_attention` by differentiable ATen operations, on every device and dtype."""
    tables = rows is not None or columns is not None or bias is not None
    if tables and relative is None and takes_lines(q, k, spec):
        return local_attention_lines(q, k, v, spec, rows, columns, bias)
    q, k, v = (t if t.stride(4) == 1 else t.contiguous() for t in (q, k, v))  # else SDPA takes its slow path
    if spec.border == "zero":
        k, v, spec = _zero_border(k, v, q, spec)
    y, x = (axis.tiled() for axis in spec.axes(q.shape[1:3], k.shape[1:3]))
    if relative is None and not tables and is_whole_map(y, x):
        return _dense(q, k, v, y, x, spec.scale, spec.border)
    return _tiled(q, k, v, y, x, spec.scale, spec.border, relative, rows, columns, bias)


def is_whole_map(y: Axis, x: Axis) -> bool:
    """Whether attention without relative terms over these axes, tiled, is done as one dense product over the map."""
    return y.size * x.size <= DENSE * y.extent * x.extent


def tile_counts(y: Axis, x: Axis) -> tuple[int, int, int]:
    """(tiles, queries a tile, keys a tile) that `local_attention` works on for one image, without relative terms."""
    y, x = y.tiled(), x.tiled()
    if is_whole_map(y, x):
        return 1, y.count * x.count, y.size * x.size
    return y.tiles * x.tiles, y.tile * x.tile, y.extent * x.extent


def _zero_border(k: Tensor, v: Tensor, q: Tensor, spec: LocalSpec) -> tuple[Tensor, Tensor, LocalSpec]:
    """Keys and values with as many zeros around them as any window reaches, and `start` moved with them."""
    y, x = spec.axes(q.shape[1:3], k.shape[1:3])
    (top, bottom), (left, right) = (tuple(max(0, amount) for amount in axis.padding) for axis in (y, x))
    pads = [0, 0, 0, 0, left, right, top, bottom]
    return F.pad(k, pads), F.pad(v, pads), replace(spec, start=(spec.start[0] + top, spec.start[1] + left))


def _dense(q: Tensor, k: Tensor, v: Tensor, y: Axis, x: Axis, scale: float, border: Border) -> Tensor:
    """Every query over all keys; the logarithm of a key's multiplicity makes it equal to the windowed softmax."""
    batch, height, width, heads, _ = q.shape
    log_y, log_x = (axis.multiplicity(border, q.device).to(q.dtype).log() for axis in (y, x))
    mask = (log_y[:, None, :, None] + log_x[None, :, None, :]).clamp(min=EXCLUDED)  # (Ho, Wo, H, W)
    mask = mask.view(1, 1, height * width, y.size * x.size)
    if holds_logits(q, y.size * x.size):
        q, k, v = (t.flatten(1, 2).transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B * N, L, d)
        weights = torch.baddbmm(mask[0], q, k.transpose(1, 2), alpha=scale).softmax(-1)
        out = torch.bmm(weights, v).view(batch, heads, height, width, v.shape[-1])
        return out.permute(0, 2, 3, 1, 4)
    out = _attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask, scale)
    return out.reshape(batch, height, width, heads, v.shape[-1])


def holds_logits(q: Tensor, keys: int) -> bool:
    """Whether the logits of a whole map are held: small ones, for which SDPA on CPU takes three times as long."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and keys <= q.shape[4]


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Axis,
    x: Axis,
    scale: float,
    border: Border,
    relative: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    batch, height, width, heads, _ = q.shape
    key_y, key_x = y.keys(q.device), x.keys(q.device)
    source_y, source_x = (
        reflect_index(at, axis.size) if border == "reflect" else at.clamp(0, axis.size - 1)
        for at, axis in ((key_y, y), (key_x, x))
    )
    pick_keys = _grid(source_y, source_x, x.size)  # (tiles, keys)
    query_y, query_x = y.queries(q.device), x.queries(q.device)
    q_tile = _gather(q, _grid(query_y, query_x, width))  # (B * tiles, queries, N, d)
    k_tile, v_tile = _gather(k, pick_keys), _gather(v, pick_keys)  # (B * tiles, keys, N, d or dv)

    mask = _window_mask(y, x, q)  # (1, 1, queries, keys)
    if border == "mask":
        inside = _grid_all((key_y >= 0) & (key_y < y.size), (key_x >= 0) & (key_x < x.size))  # (tiles, keys)
        outside = torch.where(inside, 0.0, EXCLUDED).to(q.dtype).repeat(batch, 1)
        mask = mask + outside[:, None, None, :]
    if bias is not None:
        mask = mask + _placed(bias, _taps(y, x, q.device)).to(q.dtype)  # (1, N, queries, keys)
    if relative is not None:
        table = _placed(relative, _taps(y, x, q.device)).to(q.dtype)  # (N or 1, d, queries, keys)
        mask = mask + torch.einsum("tqnd,ndqk->tnqk", q_tile * scale, table.expand(heads, -1, -1, -1))
    if rows is not None or columns is not None:
        q_tile, k_tile = _with_axis_terms(q_tile, k_tile, y, x, rows, columns)

    out = _attend(q_tile, k_tile, v_tile, mask, scale)  # (B * tiles, queries, N, dv)
    del q_tile, k_tile, v_tile  # the largest tensors here; inference needs them no more
    out = out.reshape(batch, y.tiles * x.tiles * y.tile * x.tile, heads, v.shape[-1])
    place_y, place_x = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    tile = (place_y // y.tile)[:, None] * x.tiles + place_x // x.tile
    back = tile * (y.tile * x.tile) + (place_y % y.tile)[:, None] * x.tile + place_x % x.tile
    return out.index_select(1, back.flatten()).view(batch, height, width, heads, v.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """SDPA on (B, L, N, d). The fast CPU path wants values as wide as keys, so the narrower one is padded."""
    value_width = v.shape[-1]
    gap = q.shape[-1] - value_width
    if gap > 0:
        v = F.pad(v, (0, gap))
    elif gap < 0:
        q, k = F.pad(q, (0, -gap)), F.pad(k, (0, -gap))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.is_cuda:
        with sdpa_kernel(CUDA_KERNELS):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = out.transpose(1, 2)[..., :value_width]
    # ONNX's SDPA leaves its result in another order than torch's, for which views that follow were recorded.
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tiles (B * tiles, positions, N, d) of x (B, H, W, N, d) by flat positions (tiles, positions)."""
    batch, _, _, heads, width = x.shape
    return x.flatten(1, 2).index_select(1, index.flatten()).view(batch * index.shape[0], index.shape[1], heads, width)


def _grid(y: Tensor, x: Tensor, width: int) -> Tensor:
    """Flat positions y * width + x of all pairs of tiles: (Ty, m), (Tx, n) -> (Ty * Tx, m * n)."""
    flat = y[:, None, :, None] * width + x[None, :, None, :]
    return flat.reshape(y.shape[0] * x.shape[0], y.shape[1] * x.shape[1])


def _grid_all(y: Tensor, x: Tensor) -> Tensor:
    """As `_grid`, of truth values: true where both are."""
    both = y[:, None, :, None] & x[None, :, None, :]
    return both.reshape(y.shape[0] * x.shape[0], y.shape[1] * x.shape[1])


def _taps(y: Axis, x: Axis, device: torch.device) -> Tensor:
    """Flat tap of each key for each query of a tile, kh * kw where it is outside the window: (queries, keys)."""
    tap_y, tap_x = y.taps(device)[:, None, :, None], x.taps(device)[None, :, None, :]
    both = (tap_y < y.kernel) & (tap_x < x.kernel)
    flat = torch.where(both, tap_y * x.kernel + tap_x, y.kernel * x.kernel)
    return flat.reshape(y.tile * x.tile, y.extent * x.extent)


def _window_mask(y: Axis, x: Axis, like: Tensor) -> Tensor:
    """0 where a key is in the query's window, else EXCLUDED: (1, 1, queries, keys)."""
    hit = _taps(y, x, like.device) < y.kernel * x.kernel
    return torch.where(hit, 0.0, EXCLUDED).to(like.dtype)[None, None]


def _placed(table: Tensor, taps: Tensor) -> Tensor:
    """A table (..., taps) laid out over (queries, keys): zero where the key is no tap of the query."""
    flat = F.pad(table, (0, 1)).index_select(-1, taps.flatten())
    return flat.view(*table.shape[:-1], *taps.shape)


def _with_axis_terms(
    q: Tensor, k: Tensor, y: Axis, x: Axis, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q . r_row and q . r_column as extra channels of q, against keys that are one-hot in row and column."""
    heads, device = q.shape[2], q.device
    grid = q.view(q.shape[0], y.tile, x.tile, heads, q.shape[-1])  # (T, by, bx, N, d)
    queries, keys = [q], [k]
    if rows is not None:
        table = _placed(rows, y.taps(device)).to(q.dtype).expand(heads, -1, -1, -1)  # (N, d, by, ey)
        queries.append(torch.einsum("tyxnd,ndye->tyxne", grid, table).flatten(1, 2).to(q.dtype))
        hot = torch.eye(y.extent, device=device, dtype=k.dtype).repeat_interleave(x.extent, 0)  # (keys, ey)
        keys.append(hot[None, :, None].expand(k.shape[0], -1, heads, -1))
    if columns is not None:
        table = _placed(columns, x.taps(device)).to(q.dtype).expand(heads, -1, -1, -1)  # (N, d, bx, ex)
        queries.append(torch.einsum("tyxnd,ndxe->tyxne", grid, table).flatten(1, 2).to(q.dtype))
        hot = torch.eye(x.extent, device=device, dtype=k.dtype).repeat(y.extent, 1)  # (keys, ex)
        keys.append(hot[None, :, None].expand(k.shape[0], -1, heads, -1))
    return torch.cat(queries, -1), torch.cat(keys, -1)
