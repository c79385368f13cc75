"""Local attention on GPUs: softmax attention of each query over the window of keys around it, by Triton.

What `convrewrite.blocks.local.local_attention` defines, without any tensor of windows: the forward pass keeps one
number for each query and head besides the output, and the backward pass computes the weights again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from convrewrite.kernels import triton_kernels as kernels

Pair = tuple[int, int]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

BORDERS = {"reflect": kernels.REFLECT.value, "zero": kernels.ZERO.value, "mask": kernels.MASK.value}
TILE = 1024
"""Elements of one of a program's tensors: more spills registers in the backward kernels (compiled for sm_90)."""

LEAST_ROWS = 8
MOST_ROWS = 128
WARPS = 4


@dataclass(frozen=True)
class _Problem:
    """The numbers of one call; `start` is moved to the first tap of the first window."""

    window: Pair
    scale: float
    stride: Pair
    dilation: Pair
    first: Pair
    border: str

    @classmethod
    def of(cls, window: Pair, scale: float, stride: Pair, dilation: Pair, start: Pair, border: str) -> _Problem:
        first = [start[i] - dilation[i] * (window[i] - 1) // 2 for i in range(2)]
        return cls(window, scale, stride, dilation, (first[0], first[1]), border)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Pair,
    scale: float,
    stride: Pair,
    dilation: Pair,
    start: Pair,
    border: str,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logarithms of the softmax's denominators.

    Args:
        q: (B, Ho, Wo, N, d); query (a, b) is centred on key ``start + (a, b) * stride``. Any strides in memory.
        k: (B, H, W, N, d). v: (B, H, W, N, dv).
        border: "reflect", "zero" or "mask", as in `local_attention`. A window without any key gives zeros.
        rows, columns: (N or 1, d, kh), (N or 1, d, kw), added to the keys. bias: (N or 1, kh * kw), to the logits.

    Returns:
        (B, Ho, Wo, N, dv) in the dtype of q, (B, Ho, Wo, N) in float32 (float64 for float64). Sums run in the latter.
    """
    problem = _Problem.of(window, scale, stride, dilation, start, border)
    out = _like(q, v.shape[4])
    lse = q.new_empty(q.shape[:4], dtype=_wide(q))
    if out.numel() == 0:
        return out, lse
    tables = _tables(rows, columns, bias, q)
    tile = _tile(q, v.shape[4], q.shape[1:3])
    kernels.forward_kernel[_grid(q, q.shape[1:3], tile)](
        q, k, v, *tables.tensors, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(), *tables.strides, *_sizes(q, k), *problem.first, scale,
        **_constants(problem, q, v, tile, tables),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Pair,
    scale: float,
    stride: Pair,
    dilation: Pair,
    start: Pair,
    border: str,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> Gradients:
    """Gradients of q, k, v, rows, columns and bias (None for those not given), in the dtypes of these.

    Args:
        grad: of out. out, lse: what `forward` returned for the other arguments.
    """
    problem = _Problem.of(window, scale, stride, dilation, start, border)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if out.numel() == 0:
        zeros = tuple(None if t is None else torch.zeros_like(t) for t in (rows, columns, bias))
        return dq.zero_(), dk.zero_(), dv.zero_(), *zeros  # type: ignore[return-value]
    tables = _tables(rows, columns, bias, q)
    delta = torch.empty_like(lse)
    tile = _tile(q, v.shape[4], q.shape[1:3])
    grid = _grid(q, q.shape[1:3], tile)
    share = (window[0] + window[1]) * q.shape[4] + window[0] * window[1]
    partial = lse.new_zeros((grid[0], q.shape[3], share) if tables.any else (1,))
    kernels.query_kernel[grid](
        grad, q, k, v, *tables.tensors, out, lse, delta, dq, partial,
        *grad.stride(), *q.stride(), *k.stride(), *v.stride(), *out.stride(), *dq.stride(), *tables.strides,
        *_sizes(q, k), *problem.first, scale,
        WP=triton.next_power_of_2(window[1]), **_constants(problem, q, v, tile, tables),
    )  # fmt: skip
    tile = _tile(q, v.shape[4], k.shape[1:3])
    kernels.key_kernel[_grid(q, k.shape[1:3], tile)](
        grad, q, k, v, *tables.tensors, lse, delta, dk, dv,
        *grad.stride(), *q.stride(), *k.stride(), *v.stride(), *dk.stride(), *dv.stride(), *tables.strides,
        *_sizes(q, k), *problem.first, scale, *_images(problem, q, k, 0), *_images(problem, q, k, 1),
        **_constants(problem, q, v, tile, tables),
    )  # fmt: skip
    return dq, dk, dv, *_shared(partial, window, q.shape[4], rows, columns, bias)


@dataclass(frozen=True)
class _Tables:
    """rows, columns and bias, contiguous, a stand-in where there is none; and how far apart two heads are in each."""

    tensors: tuple[Tensor, Tensor, Tensor]
    strides: tuple[int, int, int]
    given: tuple[bool, bool, bool]

    @property
    def any(self) -> bool:
        return any(self.given)


def _tables(rows: Tensor | None, columns: Tensor | None, bias: Tensor | None, like: Tensor) -> _Tables:
    tables = [None if t is None else t.contiguous() for t in (rows, columns, bias)]
    tensors = [like if t is None else t for t in tables]
    strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in tables]
    given = [t is not None for t in tables]
    return _Tables(
        (tensors[0], tensors[1], tensors[2]), (strides[0], strides[1], strides[2]), (given[0], given[1], given[2])
    )


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _like(q: Tensor, width: int) -> Tensor:
    """An empty (B, Ho, Wo, N, width) that lies in memory as q does, heads and channels together."""
    if q.shape[4] == width:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:4], width))


def _tile(q: Tensor, value_width: int, size: torch.Size) -> tuple[int, int, int]:
    """(rows, columns, heads) of a program's tile.

    Where channels are contiguous, several heads of a pixel are read together; where pixels are (maps), wide tiles are.
    """
    width = max(triton.next_power_of_2(q.shape[4]), triton.next_power_of_2(value_width), 4)
    rows = min(MOST_ROWS, max(LEAST_ROWS, TILE // width))
    heads = min(triton.next_power_of_2(q.shape[3]), max(1, 32 // width)) if q.stride(4) == 1 else 1
    pixels = rows // heads
    across = min(16 if q.stride(4) == 1 else 32, triton.next_power_of_2(size[1]), pixels)
    if q.stride(4) == 1:
        across = min(across, 1 << (pixels.bit_length() // 2))
    return pixels // across, across, heads


def _grid(q: Tensor, size: torch.Size, tile: tuple[int, int, int]) -> tuple[int, int]:
    tiles = math.prod(-(-n // t) for n, t in zip(size, tile[:2], strict=True))
    return tiles * q.shape[0], -(-q.shape[3] // tile[2])


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """heads, count_y, count_x, height, width."""
    return q.shape[3], q.shape[1], q.shape[2], k.shape[1], k.shape[2]


def _constants(problem: _Problem, q: Tensor, v: Tensor, tile: tuple[int, int, int], tables: _Tables) -> dict[str, Any]:
    return {
        "stride_y": problem.stride[0],
        "stride_x": problem.stride[1],
        "dilation_y": problem.dilation[0],
        "dilation_x": problem.dilation[1],
        "KH": problem.window[0],
        "KW": problem.window[1],
        "D": q.shape[4],
        "DV": v.shape[4],
        "DP": triton.next_power_of_2(q.shape[4]),
        "VP": triton.next_power_of_2(v.shape[4]),
        "BY": tile[0],
        "BX": tile[1],
        "BH": tile[2],
        "BORDER": BORDERS[problem.border],
        "ROWS": tables.given[0],
        "COLUMNS": tables.given[1],
        "BIAS": tables.given[2],
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
        "enable_fp_fusion": True,  # said aloud, since Triton 3.10 changes the default
    }


def _images(problem: _Problem, q: Tensor, k: Tensor, axis: int) -> tuple[int, int]:
    """(first period, number of images) of a key's mirror images that windows can meet along an axis."""
    if problem.border != "reflect":
        return 0, 1
    size, first = k.shape[axis + 1], problem.first[axis]
    last = first + (q.shape[axis + 1] - 1) * problem.stride[axis] + (problem.window[axis] - 1) * problem.dilation[axis]
    period = max(2 * (size - 1), 1)
    low = first // period
    return low, 2 * (last // period + 2 - low)


def _shared(
    partial: Tensor, window: Pair, width: int, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the tables from the shares of all tiles, summed over the heads that share a table."""
    if rows is None and columns is None and bias is None:
        return None, None, None
    total = partial.sum(0)  # (N, (kh + kw) d + kh kw)
    ends = window[0] * width, (window[0] + window[1]) * width
    parts = total[:, : ends[0]], total[:, ends[0] : ends[1]], total[:, ends[1] :]
    found: list[Tensor | None] = []
    for table, part in zip((rows, columns, bias), parts, strict=True):
        if table is None:
            found.append(None)
            continue
        whole = part if table.ndim == 2 else part.view(part.shape[0], -1, width).transpose(1, 2)
        found.append((whole.sum(0, keepdim=True) if table.shape[0] == 1 else whole).to(table.dtype))
    return found[0], found[1], found[2]
