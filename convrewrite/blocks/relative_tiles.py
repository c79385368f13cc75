"""Relative attention in tiles of queries on CPU: a tile's logits are forgotten, and made once more for gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.kernels import again

TILE_ELEMENTS = 2**20
"""Logits of one tile: 4 MiB in float32, in a processor's last-level cache. A tile has at least one row of queries."""

Part = tuple[slice, slice]
"""(heads of images, rows of queries)."""


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attention of every position to every position, with a vector for each pair of rows and each pair of columns.

        y_i = sum_j softmax_j( scale q_i . k_j + q_i . rows[i_y, j_y] + q_i . columns[i_x, j_x] ) v_j

    Kept for gradients: the arguments, the result, and one number a query. Second derivatives are an error.

    Args:
        q: (M, H, W, d), M heads of images. k: (M, d, H*W). v: (M, dv, H*W). All contiguous, float32 or float64.
        rows: (H, H, d). columns: (W, W, d).

    Returns:
        (M, H, W, dv).
    """
    result: Tensor = _Tiled.apply(q, k, v, rows, columns, scale)
    return result


def tile_elements(heads: int, size: tuple[int, int]) -> int:
    """Numbers that `tiled_attention` holds at once in inference besides arguments and result: logits and terms.

    For gradients the logits count twice.
    """
    count, rows = _steps(heads, *size)
    height, width = size
    return count * rows * width * (height * width + 2 * (height + width))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
        y = q.new_empty(*q.shape[:3], v.shape[1])
        norms = q.new_empty(*q.shape[:3], 1)
        room = _room(q)
        for heads, lines in _tiles(q):
            logits = _logits(q[heads, lines], k[heads], rows[lines], columns, scale, room)
            top = logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            part = y[heads, lines]
            part.copy_(torch.bmm(logits, v[heads].transpose(1, 2)).div_(total).view_as(part))
            norms[heads, lines] = total.log_().add_(top).view(*part.shape[:3], 1)
        ctx.save_for_backward(q, k, v, rows, columns, y, norms)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rows, columns, y, norms = ctx.saved_tensors
        inputs = q, k, v, rows, columns
        if again.is_wanted(grad, inputs):
            return *again.by_autograd(partial(_whole, scale=ctx.scale), inputs, grad), None
        to_q, to_k, to_v, to_rows, to_columns = (torch.zeros_like(t) for t in (q, k, v, rows, columns))
        # The gradient of a logit is weight (grad . v_j - grad . y): one product, with a 1 below every v.
        ends = torch.cat([grad, (grad * y).sum(-1, keepdim=True).neg_()], -1)
        below = F.pad(v, (0, 0, 0, 1), value=1.0)
        rooms = _room(q), _room(q)
        for heads, lines in _tiles(q):
            part = q[heads, lines]
            weights = _logits(part, k[heads], rows[lines], columns, ctx.scale, rooms[0], norms[heads, lines]).exp_()
            end = ends[heads, lines].reshape(*weights.shape[:2], -1)  # (g, r*W, dv + 1)
            to_v[heads].baddbmm_(end[..., :-1].transpose(1, 2), weights)
            to_logits = torch.bmm(end, below[heads], out=rooms[1][: weights.numel()].view_as(weights)).mul_(weights)
            queries = part.reshape(*weights.shape[:2], -1)  # (g, r*W, d)
            to_k[heads].baddbmm_(queries.transpose(1, 2), to_logits, alpha=ctx.scale)
            pairs = to_logits.view(*part.shape[:3], *q.shape[1:3])  # (g, r, W, H, W)
            by_row, by_column = pairs.sum(4), pairs.sum(3)  # (g, r, W, H), (g, r, W, W)
            to_rows[lines] += torch.einsum("gyxe,gyxd->yed", by_row, part)
            to_columns += torch.einsum("gyxe,gyxd->xed", by_column, part)
            to_part = by_row @ rows[lines] + (by_column.transpose(1, 2) @ columns).transpose(1, 2)
            to_part = to_part.reshape_as(queries).baddbmm_(to_logits, k[heads].transpose(1, 2), alpha=ctx.scale)
            to_q[heads, lines] = to_part.view_as(part)
        return to_q, to_k, to_v, to_rows, to_columns, None


def _whole(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """What the tiles compute, from all logits at once: memory does not matter where a second derivative is wanted."""
    by_row = q @ rows.transpose(1, 2)  # (B, H, W, H)
    by_column = (q.transpose(1, 2) @ columns.transpose(1, 2)).transpose(1, 2)  # (B, H, W, W)
    logits = scale * (q.flatten(1, 2) @ k) + (by_row[..., None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
    return (logits.softmax(-1) @ v.transpose(1, 2)).view(*q.shape[:3], v.shape[1])


def _logits(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, scale: float, room: Tensor, less: Tensor | None = None
) -> Tensor:
    """Of one tile, in `room`, each query's less a number of its own: (g, r*W, H*W); q (g, r, W, d), rows (r, H, d)."""
    g, r, w, d = q.shape
    by_row = q @ rows.transpose(1, 2)  # (g, r, W, H)
    by_column = (q.transpose(1, 2) @ columns.transpose(1, 2)).transpose(1, 2)  # (g, r, W, W)
    if less is not None:
        by_row -= less
    logits = room[: by_row.numel() * w].view(*by_row.shape, w)
    torch.add(by_row[..., None], by_column[..., None, :], out=logits)
    return logits.view(g, r * w, -1).baddbmm_(q.reshape(g, r * w, d), k, alpha=scale)


def _room(q: Tensor) -> Tensor:
    """Memory for a tile's logits, used again for every tile: fresh pages cost more than what is computed in them."""
    heads, rows = _steps(*q.shape[:3])
    return q.new_empty(heads * rows * q.shape[2] * q.shape[1] * q.shape[2])


def _steps(heads: int, height: int, width: int) -> tuple[int, int]:
    """(heads, rows of queries) of a tile: some rows of one head, or all rows of some."""
    row = width * height * width
    rows = max(1, min(height, TILE_ELEMENTS // row))
    return (max(1, min(heads, TILE_ELEMENTS // (rows * row))) if rows == height else 1), rows


def _tiles(q: Tensor) -> Iterator[Part]:
    heads, rows = _steps(*q.shape[:3])
    for head in range(0, q.shape[0], heads):
        for row in range(0, q.shape[1], rows):
            yield slice(head, head + heads), slice(row, row + rows)
