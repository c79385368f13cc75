"""The Triton kernels as a backend: loaded on first use, because a CPU installation may have no Triton."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from convrewrite.kernels.geometry import LocalSpec
from convrewrite.kernels.layouts import empty_output, laid_out

WIDEST = 128
"""Largest head width that the kernels' tiles hold."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interpreted() -> bool:
    """Whether Triton interprets its kernels, which then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def refuse(x: Tensor, width: int) -> str | None:
    """Why these kernels cannot take tensors such as `x`, in heads of `width` channels, or None."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreted()):
        return f"it runs on cuda, the tensors are on {x.device.type}"
    if not _installed():
        return "triton is not installed"
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it has no {x.dtype}"
    return None if width <= WIDEST else f"heads of {width} channels, at most {WIDEST}"


def _kernels() -> Any:
    from convrewrite.kernels import triton_local

    return triton_local


def _numbers(spec: LocalSpec) -> tuple[Any, ...]:
    return spec.window, spec.scale, spec.stride, spec.dilation, spec.start, spec.border


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: LocalSpec, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `convrewrite.kernels.native_local.forward`."""
    out, lse = _kernels().forward(q, k, v, *_numbers(spec), rows, columns, bias)
    return laid_out(out, empty_output(q, v.shape[-1])), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: LocalSpec,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As `convrewrite.kernels.native_local.backward`."""
    dq, dk, dv, *tables = _kernels().backward(grad, q, k, v, out, lse, *_numbers(spec), rows, columns, bias)
    dq, dk, dv = (laid_out(got, torch.empty_like(t)) for got, t in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, *tables
