"""Second derivatives of what has a backward pass of its own, which writes in place and leaves no graph.

`torch.autograd.function.once_differentiable` does not do: it refuses where its own node is reached, but
``torch.autograd.grad`` with respect to a tensor before it goes around that node, and returns a second derivative
with this part left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_wanted(grad: Tensor, inputs: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass runs under ``create_graph=True`` and its result depends on what has a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, *inputs))


def refuse_if_wanted(what: str, grad: Tensor, inputs: Sequence[Tensor | None]) -> None:
    """Raise:
    RuntimeError: a second derivative is asked for.
    """
    if is_wanted(grad, inputs):
        raise RuntimeError(f"{what} has no second derivative (a backward pass with create_graph=True)")


def by_autograd(plain: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `plain(*inputs)`, None where none is needed, which can be differentiated again."""
    with torch.enable_grad():
        needed = [t for t in inputs if t.requires_grad]
        gradients = iter(torch.autograd.grad(plain(*inputs), needed, grad, create_graph=True))
    return tuple(next(gradients) if t.requires_grad else None for t in inputs)
