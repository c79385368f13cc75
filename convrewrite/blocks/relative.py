"""Softmax attention over a whole map with a learned vector per row offset and per column offset, at any map size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.blocks.relative_tiles import tiled_attention

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

    On CPU, large maps with both terms go in tiles of queries (`relative_tiles`). Elsewhere, under a compiler and in
    half precision: q_i . columns[j_x - i_x] depends on j by its column alone, so the W such numbers of a query are W
    more channels, against keys that are one-hot in their column; rows likewise (FlashBias, arXiv 2505.12044). What is
    left is plain attention with d + H + W channels: no tensor of all pairs for large maps, and gradients without
    atomics.

    Args:
        q, k: (B, H, W, N, d). v: (B, H, W, N, dv).
        rows: (2 n - 1, d), shared by the heads; entry m is for the offset m - (n - 1). Resized if n is not H.
        columns: likewise along W.
        scale_position: whether `scale` multiplies the position terms too.

    Returns:
        (B, H, W, N, dv). The softmax runs in float32 or wider.
    """
    batch, height, width, heads, dim = q.shape
    whole = holds_logits(height * width, dim) and q.dtype in (torch.float32, torch.float64)
    if not whole and rows is not None and columns is not None and _takes_tiles(q):
        return _in_tiles(q, k, v, scale, rows, columns, scale if scale_position else 1.0)
    q, k = (t.permute(0, 3, 1, 2, 4) for t in (q, k))  # (B, N, H, W, d); joining them makes the one copy needed
    terms = _position(q, rows, columns, scale if scale_position else 1.0)
    joined = dim + sum(term.shape[4] for term in terms)
    spare = 0 if whole else streamed_width(joined, v.shape[4]) - joined
    q = _joined([q * scale, *terms], spare)
    k = _joined([k, *_one_hots(k, rows, columns)], spare)
    del terms  # as large as they are, inference needs them no more
    out = (_whole if whole else _streamed)(q, k, v.flatten(1, 2).transpose(1, 2))  # (B, N, H*W, dv)
    return out.transpose(1, 2).reshape(batch, height, width, heads, v.shape[-1])


def holds_logits(positions: int, head_dim: int) -> bool:
    """Whether `relative_attention` holds the logits of a float32 or float64 map of so many positions whole."""
    return positions <= max(DENSE_KEYS, DENSE_PER_CHANNEL * head_dim)


def streamed_width(key_width: int, value_width: int) -> int:
    """Channels of a head of q, k and v in SDPA, from those of keys with their position terms, and of values."""
    return -(-max(key_width, value_width) // ALIGNMENT) * ALIGNMENT


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


def _takes_tiles(q: Tensor) -> bool:
    """Whether `tiled_attention` can be used. A compiler is given the plain form."""
    narrow = q.dtype not in (torch.float32, torch.float64)
    return q.device.type == "cpu" and not narrow and not torch.compiler.is_compiling()


def _in_tiles(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, columns: Tensor, position_scale: float
) -> Tensor:
    """`relative_attention` by `tiled_attention`."""
    batch, height, width, heads, dim = q.shape
    tables = [
        (by_pair(resized(table, size)) * position_scale).to(q.dtype)
        for table, size in ((rows, height), (columns, width))
    ]  # (H, H, d), (W, W, d)
    q = q.permute(0, 3, 1, 2, 4).reshape(batch * heads, height, width, dim)
    k, v = (t.permute(0, 3, 4, 1, 2).reshape(batch * heads, t.shape[4], height * width) for t in (k, v))
    out = tiled_attention(q.contiguous(), k.contiguous(), v.contiguous(), tables[0], tables[1], scale)
    return out.view(batch, heads, height, width, out.shape[-1]).permute(0, 2, 3, 1, 4)


def _position(q: Tensor, rows: Tensor | None, columns: Tensor | None, scale: float) -> list[Tensor]:
    """scale q . r of every row, (B, N, H, W, H), and of every column, (B, N, H, W, W)."""
    terms = []
    if rows is not None:
        table = (by_pair(resized(rows, q.shape[2])) * scale).to(q.dtype)  # (H, H, d)
        terms.append(torch.einsum("bnyxd,yed->bnyxe", q, table).to(q.dtype))
    if columns is not None:
        table = (by_pair(resized(columns, q.shape[3])) * scale).to(q.dtype)  # (W, W, d)
        terms.append(torch.einsum("bnyxd,xed->bnyxe", q, table).to(q.dtype))
    return terms


def _one_hots(k: Tensor, rows: Tensor | None, columns: Tensor | None) -> list[Tensor]:
    """Which row a key is in, (B, N, H, W, H), and which column, (B, N, H, W, W)."""
    batch, heads, height, width, _ = k.shape
    row, column = (torch.eye(size, device=k.device, dtype=k.dtype) for size in (height, width))
    hots = [] if rows is None else [row[:, None].expand(batch, heads, height, width, height)]
    return hots if columns is None else [*hots, column.expand(batch, heads, height, width, width)]


def _joined(parts: list[Tensor], spare: int) -> Tensor:
    """Parts (B, N, H, W, c) and `spare` zeros side by side: (B, N, H*W, sum of c + spare)."""
    if spare:
        parts = [*parts, parts[0].new_zeros(spare).expand(*parts[0].shape[:4], spare)]
    return torch.cat(parts, -1).flatten(2, 3)


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.matmul(q, k.transpose(2, 3)).softmax(-1), v)


def _streamed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA at one common width: on CPU and GPU its kernels hold all logits if values and keys differ in width."""
    width = v.shape[-1]
    v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]
