"""What is timed of a module: a forward pass in inference, or a forward and a backward pass in training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FORWARD, BOTH = "forward", "forward+backward"
VARIABLE = "CONVREWRITE_BACKEND"

Call = Callable[[], object]


def calls_of(module: nn.Module, x: Tensor, backend: str | None = None) -> dict[str, Call]:
    """The two calls by name. Gradients are those of a fixed random cotangent, to x and every parameter.

    Args:
        module: left in training mode. x: (B, C, H, W), not yet requiring a gradient.
        backend: forced for these calls; None leaves the choice to the package.
    """
    leaf = x.clone().requires_grad_()
    cotangent: list[Tensor] = []

    def forward() -> None:
        module.eval()
        with forced(backend), torch.no_grad():
            module(x)

    def both() -> None:
        module.train()
        leaf.grad = None
        module.zero_grad(set_to_none=True)
        with forced(backend):
            y = module(leaf)
            if not cotangent:
                cotangent.append(torch.randn_like(y))
            y.backward(cotangent[0])

    return {FORWARD: forward, BOTH: both}


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Kernels of this backend inside, by the environment variable that users set; None changes nothing."""
    if backend is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def compiled(module: nn.Module) -> nn.Module:
    """Compiled whole for its one shape, with the compiler's memory of earlier modules dropped.

    Dynamo counts recompilations per code object, so without that the ninth block of a run would silently run eagerly.
    """
    torch._dynamo.reset()
    result: nn.Module = torch.compile(module, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return result
