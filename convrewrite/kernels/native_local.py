"""The native CPU kernel as functions of tensors: local attention and its gradients, by the C library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from convrewrite.kernels.geometry import BORDERS, LocalSpec
from convrewrite.kernels.layouts import empty_output, wide
from convrewrite.kernels.native.library import STRIDES, Arguments, Strides, library

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
WIDEST = 2
"""Highest instruction set that the kernel may use: 0 the compiler's base, 1 AVX2, 2 AVX-512; absent ones it skips."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the library was built and could be loaded."""
    return library() is not None


def refuse(x: Tensor, width: int) -> str | None:
    """Why this kernel cannot take tensors such as `x`, in heads of `width` channels, or None."""
    if x.device.type != "cpu":
        return f"it runs on cpu, the tensors are on {x.device.type}"
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it has no {x.dtype}"
    return None if available() else "its library is absent (it is built at install, where a C compiler is)"


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: LocalSpec, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, Ho, Wo, N, dv) as q in dtype and layout, lse (B, Ho, Wo, N) in float32 or float64."""
    dtype = q.dtype
    q, k, v = (wide(t) for t in (q, k, v))
    out = empty_output(q, v.shape[-1])
    lse = q.new_empty(q.shape[:4])
    tables = _tables(q, rows, columns, bias)
    _run("local_attention_forward", spec, {"q": q, "k": k, "v": v, "out": out, "lse": lse, **tables})
    return out.to(dtype), lse


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
    into: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k, v, rows, columns, bias, from those of `out`; each in the dtype of its tensor.

    With `into` (3, B, H, W, N, d), those of q, k, v are written there, and are views of it.
    """
    given = q, k, v
    grad, q, k, v, out = (wide(t) for t in (grad, q, k, v, out))
    tables = _tables(q, rows, columns, bias)
    to = [torch.empty_like(t) for t in (q, k, v)] if into is None else into.unbind(0)
    grads = {f"grad_{name}": t for name, t in zip("qkv", to, strict=True)}
    sums = {f"grad_{name}": t.new_zeros(q.shape[0], *t.shape) for name, t in tables.items()}
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "grad": grad, **tables, **grads, **sums}
    _run("local_attention_backward", spec, tensors)
    dq, dk, dv = (grads[f"grad_{name}"].to(t.dtype) for name, t in zip("qkv", given, strict=True))
    of_tables = []
    for name, table in (("rows", rows), ("columns", columns), ("bias", bias)):
        of_tables.append(None if table is None else _like_table(sums[f"grad_{name}"].sum(0), table))
    return dq, dk, dv, of_tables[0], of_tables[1], of_tables[2]


def _tables(q: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    """The tables that are there, one copy a head, in the dtype of `q`."""
    found = {"rows": rows, "columns": columns, "bias": bias}
    heads = q.shape[3]
    return {
        name: table.to(q.dtype).expand(heads, *table.shape[1:]).contiguous()
        for name, table in found.items()
        if table is not None
    }


def _like_table(total: Tensor, table: Tensor) -> Tensor:
    """Gradients of all heads, summed where the heads share the table."""
    total = total.sum(0, keepdim=True) if table.shape[0] == 1 else total
    return total.to(table.dtype)


def _run(name: str, spec: LocalSpec, tensors: dict[str, Tensor]) -> None:
    """One call of the library on `tensors`, named as the fields of its arguments."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if min(q.numel(), k.numel(), v.numel()) == 0:
        for key, tensor in tensors.items():
            if key.startswith(("grad_", "out")):
                tensor.zero_()
        return
    found = library()
    assert found is not None  # refuse() said so
    call = Arguments(
        batch=q.shape[0],
        heads=q.shape[3],
        width=q.shape[4],
        value_width=v.shape[4],
        query_rows=q.shape[1],
        query_columns=q.shape[2],
        key_rows=k.shape[1],
        key_columns=k.shape[2],
        window=spec.window,
        stride=spec.stride,
        dilation=spec.dilation,
        first=tuple(axis.first for axis in spec.axes(q.shape[1:3], k.shape[1:3])),
        border=BORDERS.index(spec.border),
        threads=torch.get_num_threads(),
        is_double=int(q.dtype == torch.float64),
        scale=spec.scale,
    )
    for key, tensor in tensors.items():
        setattr(call, key, tensor.data_ptr())
        if f"{key}_at" in STRIDES:
            setattr(call, f"{key}_at", Strides(*tensor.stride()))
    if getattr(found, name)(ctypes.byref(call), WIDEST):
        raise MemoryError(f"{name}: no scratch memory")
