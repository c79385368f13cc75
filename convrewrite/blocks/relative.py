"""Softmax attention over a whole map with a learned vector per row offset and per column offset, at any map size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_KEYS = 64
DENSE_PER_CHANNEL = 2
"""Logits are held whole where the map has at most so many positions, or so many for each channel of a head.
There the two matrix products beat SDPA on CPU (7 x 7, 14 x 14 with 128 channels a head), and the logits are of the
size of the tensors that came in."""

ALIGNMENT = 8
"""Widths that the memory-saving kernels of SDPA take as they are; other widths fall back to whole logits on GPU."""


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    scale_position: bool = True,
) -> Tensor:
    """Attention of every position to every position, with a vector for each vertical and horizontal offset.

        y_i = sum_j softmax_j( scale q_i . (k_j + rows[j_y - i_y] + columns[j_x - i_x]) ) v_j

    q_i . columns[j_x - i_x] depends on j by its column alone, so the W such numbers of a query are W more channels,
    against keys that are one-hot in their column; rows likewise (FlashBias, arXiv 2505.12044). What is left is plain
    attention with d + H + W channels: no tensor of all pairs for large maps, and gradients without atomics.

    Args:
        q, k: (B, H, W, N, d). v: (B, H, W, N, dv).
        rows: (2 n - 1, d), shared by the heads; entry m is for the offset m - (n - 1). Resized if n is not H.
        columns: likewise along W.
        scale_position: whether `scale` multiplies the position terms too.

    Returns:
        (B, H, W, N, dv). The softmax runs in float32 or wider.
    """
    batch, height, width, heads, dim = q.shape
    queries, keys = [q * scale], [k]
    position = queries[0] if scale_position else q
    if rows is not None:
        table = by_pair(resized(rows, height)).to(q.dtype)  # (H, H, d)
        queries.append(torch.einsum("byxnd,yed->byxne", position, table).to(q.dtype))
        hot = torch.eye(height, device=k.device, dtype=k.dtype)
        keys.append(hot[:, None, None].expand(batch, height, width, heads, height))
    if columns is not None:
        table = by_pair(resized(columns, width)).to(q.dtype)  # (W, W, d)
        queries.append(torch.einsum("byxnd,xed->byxne", position, table).to(q.dtype))
        hot = torch.eye(width, device=k.device, dtype=k.dtype)
        keys.append(hot[:, None].expand(batch, height, width, heads, width))
    dense = holds_logits(height * width, dim) and q.dtype in (torch.float32, torch.float64)
    attend = _dense if dense else _streamed
    out = attend(_heads_first(queries), _heads_first(keys), _heads_first([v]))  # (B, N, H*W, dv)
    return out.transpose(1, 2).reshape(batch, height, width, heads, v.shape[-1])


def holds_logits(positions: int, head_dim: int) -> bool:
    """Whether `relative_attention` holds the logits of a float32 or float64 map of so many positions whole."""
    return positions <= max(DENSE_KEYS, DENSE_PER_CHANNEL * head_dim)


def streamed_width(height: int, width: int, head_dim: int, value_dim: int) -> int:
    """Channels of a head of q, k and v in SDPA, position terms and padding included."""
    return -(-max(head_dim + height + width, value_dim) // ALIGNMENT) * ALIGNMENT


def by_pair(table: Tensor) -> Tensor:
    """A table over offsets (2 n - 1, d) laid out over (query, key): (n, n, d)."""
    size = (table.shape[0] + 1) // 2
    at = torch.arange(size, device=table.device)
    offset = at[None, :] - at[:, None] + size - 1
    return table.index_select(0, offset.flatten()).view(size, size, table.shape[1])


def resized(table: Tensor, size: int) -> Tensor:
    """A table over the offsets of n positions made one of `size` positions: (2 n - 1, d) -> (2 size - 1, d).

    Linear interpolation that keeps the middle (offset 0) in the middle and both ends at the ends, so offsets count
    in shares of the map. A map of one position has offset 0 alone.
    """
    known, wanted = table.shape[0], 2 * size - 1
    if known == wanted:
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    middle, step = (known - 1) / 2, (known - 1) / max(wanted - 1, 1)
    offset = torch.arange(wanted, device=table.device, dtype=dtype) - (wanted - 1) / 2
    at = (middle + step * offset)[:, None]
    weight = (1 - (at - torch.arange(known, device=table.device, dtype=dtype)).abs()).clamp(min=0)
    return (weight @ table.to(dtype)).to(table.dtype)


def _heads_first(parts: list[Tensor]) -> Tensor:
    """Parts (B, H, W, N, c) side by side as (B, N, H*W, sum of c)."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return whole.flatten(1, 2).transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.matmul(q, k.transpose(2, 3)).softmax(-1), v)


def _streamed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA at one common width: on CPU and GPU its kernels hold all logits if values and keys differ in width."""
    width, value_width = q.shape[-1], v.shape[-1]
    common = -(-max(width, value_width) // ALIGNMENT) * ALIGNMENT
    q, k = (F.pad(t, (0, common - width)) if common > width else t for t in (q, k))
    v = F.pad(v, (0, common - value_width)) if common > value_width else v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :value_width]
