"""Attention of every query over a small window of keys, without ever unfolding the map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import Block
from convrewrite.errors import BackendError
from convrewrite.kernels.aten import is_whole_map, local_attention_aten, tile_counts
from convrewrite.kernels.backends import KERNELS, check_name, choose
from convrewrite.kernels.geometry import EXCLUDED, Axis, Border, LocalSpec, Pair, reflect_index
from convrewrite.kernels.lines import NARROW, line_elements, narrow
from convrewrite.kernels.op import local_attention_op

__all__ = [
    "EXCLUDED",
    "NARROW",
    "Axis",
    "Border",
    "Pair",
    "is_dense",
    "line_elements",
    "local_attention",
    "reads_maps",
    "reflect_index",
    "reflect_pad",
    "set_backend",
    "tile_counts",
]


def reflect_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """``F.pad(x, (left, right, top, bottom), mode="reflect")`` for maps of any size, down to 1 x 1.

    Where torch refuses (padding as wide as the map) the reflection goes on between both mirrors;
    negative amounts crop. x (..., H, W) -> (..., top + H + bottom, left + W + right).
    """
    rows = torch.arange(-top, x.shape[-2] + bottom, device=x.device)
    columns = torch.arange(-left, x.shape[-1] + right, device=x.device)
    x = x.index_select(-2, reflect_index(rows, x.shape[-2]))
    return x.index_select(-1, reflect_index(columns, x.shape[-1]))


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Pair,
    scale: float,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    start: Pair = (0, 0),
    border: Border = "reflect",
    relative: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each query over the window of keys around it.

        y_i = sum_o softmax_o( scale * q_i . (k_{i+o} + r_o) + bias_o ) v_{i+o}

    Args:
        q: (B, Ho, Wo, N, d); query (a, b) is centred on key ``start + (a, b) * stride``. Any strides in memory.
        k: (B, H, W, N, d). v: (B, H, W, N, dv), dv of any width.
        window: taps (kh, kw), `dilation` apart; of an even span the extra tap is at the end.
        border: keys outside the map are the mirrored ones ("reflect"), zeros that take part in the
            softmax ("zero"), or absent ("mask"; a window that lies wholly outside then has no meaning).
        relative: r, (N or 1, d, kh * kw), any learned vector per tap. Only "aten" has it, and materialises all
            logits of a tile.
        rows, columns: r as a sum r_row + r_column, (N or 1, d, kh) and (N or 1, d, kw): the same
            and much cheaper (they ride along as extra channels against one-hot keys, arXiv 2505.12044).
        bias: (N or 1, kh * kw), a logit per tap, not scaled.
        backend: "native" (the C kernel, on CPU), "triton" (on GPU), "aten" (composed of torch's operations, anywhere),
            or "auto": what the environment variable CONVREWRITE_BACKEND says, else the first of these that can.
            "auto" and all others become "aten" while a model is being exported.

    Returns:
        (B, Ho, Wo, N, dv), in the dtype of `q`. Sums and softmax run in float32 or wider.

    Raises:
        BackendError: the backend that was asked for is unknown, or cannot do this.
    """
    spec = LocalSpec(window, stride, dilation, start, border, scale)
    plain = relative is None and rows is None and columns is None and bias is None and border != "zero"
    dense = plain and is_dense(*spec.axes(q.shape[1:3], k.shape[1:3]))
    name = choose(backend, q, q.shape[4], relative=relative is not None, dense=dense)
    if name == "aten":
        return local_attention_aten(q, k, v, spec, relative, rows, columns, bias)
    k, v = k.to(q.dtype), v.to(q.dtype)
    numbers = (list(window), list(stride), list(dilation), list(start), border, scale, name)
    out: Tensor = local_attention_op(q, k, v, rows, columns, bias, *numbers)[0]
    return out


def is_dense(y: Axis, x: Axis) -> bool:
    """Whether "aten" attends to the whole map at once over these axes, without relative terms and zero border."""
    return is_whole_map(y.tiled(), x.tiled())


def reads_maps(backend: str, x: Tensor, width: int, *, dense: bool = False, tables: bool = False) -> bool:
    """Whether `local_attention` of projections of `x` (B, C, H, W) is fastest on views of maps (B, N * d, H, W).

    Kernels read and write those without a copy. "aten" has to copy them: it wants tokens, channels last, but where it
    goes tap by tap. `width` is d; `dense` is what `is_dense` says; `tables`: there are relative terms, at stride 1.
    """
    return choose(backend, x, width, dense=dense) != "aten" or (tables and narrow(x, width))


def set_backend(model: nn.Module, backend: str) -> int:
    """Have `backend` compute the local attention of every block in `model`, from the next forward on.

    Args:
        model: rewritten or not, changed in place. Nothing of this is in its state dict, and a copy keeps it.
        backend: "native", "triton", "aten", or "auto" for the fastest that can, as `local_attention` has them.

    Returns:
        How many blocks were set.

    Raises:
        BackendError: there is no backend of that name, or it cannot run where the model is.
    """
    check_name(backend, "set_backend")
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    weight = next((p for block in blocks for p in block.parameters() if not p.is_meta), None)
    reason = KERNELS.get(backend).refuse(weight, 1) if backend in KERNELS and weight is not None else None
    if reason is not None:
        fix = "move the model first, or use 'auto'"
        raise BackendError(f"backend '{backend}' cannot do this: {reason}", where="set_backend", fix=fix)
    for block in blocks:
        block.backend = backend
    return len(blocks)
