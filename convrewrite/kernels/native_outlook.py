"""The native CPU kernel of outlook attention as functions of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from convrewrite.kernels.geometry import BORDERS
from convrewrite.kernels.layouts import wide
from convrewrite.kernels.native.library import STRIDES, Arguments, Strides, library

WIDEST = 2
"""Highest instruction set that the kernel may use, as in `convrewrite.kernels.native_local`."""


def forward(values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int]) -> Tensor:
    """Outlook attention at step 1: values (B, C, H, W), logits (B, N K^4, H, W) -> (B, C, H, W) like `values`."""
    maps, dense = _given(values, logits)
    out = maps.new_empty(maps.shape)
    _run("outlook_forward", heads, window, dilation, {"v": maps, "q": dense, "out": out})
    return out.to(values.dtype)


def backward(
    grad: Tensor, values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of values and logits, each in the dtype of its tensor, from those of the output."""
    maps, dense = _given(values, logits)
    to_values, to_logits = maps.new_empty(maps.shape), torch.empty_like(dense)
    tensors = {"v": maps, "q": dense, "grad": grad.to(maps.dtype), "grad_v": to_values, "grad_q": to_logits}
    _run("outlook_backward", heads, window, dilation, tensors)
    return to_values.to(values.dtype), to_logits.to(logits.dtype)


def _given(values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the kernel works in, the logits dense."""
    maps = wide(values)
    return maps, logits.to(maps.dtype).contiguous()


def _run(name: str, heads: int, window: int, dilation: Sequence[int], tensors: dict[str, Tensor]) -> None:
    """One call of the library: maps under "v", "out", "grad" and "grad_v", dense logits under "q" and "grad_q"."""
    batch, channels, rows, columns = tensors["v"].shape
    if tensors["v"].numel() == 0:
        return
    found = library()
    assert found is not None  # native_local.refuse() said so
    side, width = 2 * window - 1, channels // heads
    call = Arguments(
        batch=batch,
        heads=heads,
        value_width=width,
        query_rows=rows,
        query_columns=columns,
        key_rows=rows,
        key_columns=columns,
        window=(side, side),
        stride=(1, 1),
        dilation=tuple(dilation),
        first=tuple(-(window - 1) * apart for apart in dilation),
        border=BORDERS.index("zero"),
        threads=torch.get_num_threads(),
        is_double=int(tensors["v"].dtype == torch.float64),
    )
    for key, tensor in tensors.items():
        setattr(call, key, tensor.data_ptr())
        if f"{key}_at" in STRIDES and key not in ("q", "grad_q"):
            of_batch, of_channel, of_row, of_column = tensor.stride()
            setattr(call, f"{key}_at", Strides(of_batch, of_row, of_column, width * of_channel, of_channel))
    if getattr(found, name)(ctypes.byref(call), WIDEST):
        raise MemoryError(f"{name}: no scratch memory")
