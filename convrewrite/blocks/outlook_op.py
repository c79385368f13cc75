"""Outlook attention as a torch operation: one node for autograd and ``torch.compile``.

``convrewrite::outlook`` saves its two arguments and nothing else; its backward is an operation too, which makes the
softmax again. A compiler would unroll the sum over 25 offsets into loops that it cannot vectorise (on CPU six times as
slow as eager), so on CPU the form that is composed of torch's operations hides behind this operation as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convrewrite.blocks.overlap import outlook as composed
from convrewrite.blocks.overlap import outlook_gradients
from convrewrite.kernels import native_outlook
from convrewrite.kernels.backends import choose


def kernel_for(backend: str, values: Tensor, step: int) -> str | None:
    """What computes the operation for such values: "native" or "aten"; None where it is not to be used.

    That is where weights are made at some pixels only, on GPU, and while a model is being exported; and "aten" in
    eager mode, where autograd keeps the softmax instead of making it twice.

    Raises:
        BackendError: the backend that was asked for is unknown, or cannot do it.
    """
    name = choose(backend, values, 1)
    if step > 1 or values.device.type != "cpu" or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return None
    if name == "native":
        return name
    return "aten" if torch.compiler.is_compiling() else None


@torch.library.custom_op("convrewrite::outlook", mutates_args=())
def outlook_op(values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int], kernel: str) -> Tensor:
    """`convrewrite.blocks.overlap.outlook` at step 1, not normalised, contiguous, by the kernel of that name."""
    if kernel == "native":
        return native_outlook.forward(values, logits, heads, window, dilation)
    y = composed(values, logits, heads=heads, window=window, dilation=(dilation[0], dilation[1]), normalise=False)
    return y.contiguous()


@outlook_op.register_fake
def _(values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int], kernel: str) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.custom_op("convrewrite::outlook_backward", mutates_args=())
def outlook_backward_op(
    grad: Tensor, values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int], kernel: str
) -> tuple[Tensor, Tensor]:
    """Gradients of values and logits, contiguous."""
    if kernel == "native":
        return native_outlook.backward(grad, values, logits, heads, window, dilation)
    pair = dilation[0], dilation[1]
    return outlook_gradients(grad, values, logits, heads=heads, window=window, dilation=pair)


@outlook_backward_op.register_fake
def _(
    grad: Tensor, values: Tensor, logits: Tensor, heads: int, window: int, dilation: Sequence[int], kernel: str
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, logits, *ctx.rest = inputs
    ctx.save_for_backward(values, logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_values, to_logits = outlook_backward_op(grad, *ctx.saved_tensors, *ctx.rest)
    return to_values, to_logits, *(None for _ in ctx.rest)


outlook_op.register_autograd(_backward, setup_context=_setup)
