"""Local attention as a torch operation: one node for autograd, ``torch.compile`` and ``torch.export``.

``convrewrite::local_attention`` saves its inputs, its output and one log-sum-exp per query; its backward is an
operation too, which computes the logits again. Both work in the dtype of q and sum in float32 or wider, so autocast
decides about them by what the projections before them return, and never casts the tables of relative terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convrewrite.kernels.backends import KERNELS
from convrewrite.kernels.geometry import BORDERS, LocalSpec
from convrewrite.kernels.layouts import empty_output, gap_between, side_by_side


def _spec(
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    border: str,
    scale: float,
) -> LocalSpec:
    return LocalSpec(
        window=(window[0], window[1]),
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        start=(start[0], start[1]),
        border=next(known for known in BORDERS if known == border),
        scale=scale,
    )


@torch.library.custom_op("convrewrite::local_attention", mutates_args=())
def local_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    border: str,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the kernel of that name: out (B, Ho, Wo, N, dv), lse (B, Ho, Wo, N) in float32 or float64."""
    spec = _spec(window, stride, dilation, start, border, scale)
    return KERNELS.get(kernel).forward(q, k, v, spec, rows, columns, bias)


@local_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    border: str,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:4], dtype=_wide_dtype(q))
    return empty_output(q, v.shape[-1]), lse


@torch.library.custom_op("convrewrite::local_attention_backward", mutates_args=())
def local_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    border: str,
    scale: float,
    kernel: str,
    gap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rows, columns and bias; of a table that is None an empty tensor.

    With `gap`, those of q, k and v are one tensor, the first, so many elements apart; the other two are empty.
    """
    spec = _spec(window, stride, dilation, start, border, scale)
    into = [side_by_side(q, gap)] if gap else []
    dq, dk, dv, *tables = KERNELS.get(kernel).backward(grad, q, k, v, out, lse, spec, rows, columns, bias, *into)
    if gap:
        dq, dk, dv = into[0], q.new_empty(0), q.new_empty(0)
    drows, dcolumns, dbias = (q.new_empty(0) if table is None else table for table in tables)
    return dq, dk, dv, drows, dcolumns, dbias


@local_attention_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    start: Sequence[int],
    border: str,
    scale: float,
    kernel: str,
    gap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    if gap:
        dq, dk, dv = side_by_side(q, gap), q.new_empty(0), q.new_empty(0)
    drows, dcolumns, dbias = (
        q.new_empty(0) if table is None else torch.empty(table.shape, dtype=table.dtype, device=table.device)
        for table in (rows, columns, bias)
    )
    return dq, dk, dv, drows, dcolumns, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, rows, columns, bias, *rest = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, rows, columns, bias)
    ctx.rest = rest
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = ctx.rest
    if grad is None:
        return (None,) * (6 + len(rest))
    q, k, v, out, lse, rows, columns, bias = ctx.saved_tensors
    gap = gap_between(q, k, v) if KERNELS.get(rest[-1]).side_by_side else 0
    grads = local_attention_backward_op(grad, q, k, v, out, lse, rows, columns, bias, *rest, gap)
    tables = (None if table is None else g for table, g in zip((rows, columns, bias), grads[3:], strict=True))
    of_qkv = grads[0].unbind(0) if gap else grads[:3]
    return (*of_qkv, *tables, *(None for _ in rest))


local_attention_op.register_autograd(_backward, setup_context=_setup)


def _wide_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
