"""Which backend computes a local attention: the fastest that can, or the one that was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convrewrite.errors import BackendError, closest
from convrewrite.kernels import gpu_local, native_local
from convrewrite.registry import Registry

VARIABLE = "CONVREWRITE_BACKEND"
WIDE = 32
"""Width of a head from which one dense matrix product over a small map beats windows on CPU."""


@dataclass(frozen=True)
class Kernel:
    """One implementation behind the operation ``convrewrite::local_attention``.

    Attributes:
        refuse: (x, width of a head) -> why it cannot take tensors such as x, or None.
        forward: (q, k, v, spec, rows, columns, bias) -> (out, lse).
        backward: (grad, q, k, v, out, lse, spec, rows, columns, bias) -> gradients of q, k, v, rows, columns, bias.
        side_by_side: `backward` takes one more argument, a tensor (3, ...) to write the gradients of q, k, v to.
    """

    refuse: Callable[[Tensor, int], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Any]
    side_by_side: bool = False


KERNELS: Registry[Kernel] = Registry("backend")
KERNELS.register("native")(Kernel(native_local.refuse, native_local.forward, native_local.backward, side_by_side=True))
KERNELS.register("triton")(Kernel(gpu_local.refuse, gpu_local.forward, gpu_local.backward))


def names() -> list[str]:
    """What ``backend=`` and the environment variable take."""
    return ["auto", "aten", *KERNELS.names()]


def check_name(name: str, where: str) -> str:
    """`name`, if it is a backend's.

    Raises:
        BackendError: it is not.
    """
    if name not in names():
        fix = closest(name, names()) or f"one of {', '.join(names())}"
        raise BackendError(f"no backend '{name}'", where=where, fix=fix)
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def of_environment() -> str:
    """The backend that the environment asks for, "auto" where it asks for none."""
    return check_name(os.environ.get(VARIABLE) or "auto", VARIABLE)


def choose(backend: str, x: Tensor, width: int, *, relative: bool = False, dense: bool = False) -> str:
    """The backend for queries in the dtype and on the device of `x`, in heads of `width` channels.

    It is `backend`, else the environment's, else the first kernel that can, else "aten". `relative`: there is a vector
    per tap. `dense`: "aten" would be one `scaled_dot_product_attention` over the whole map, which on CPU wins for wide
    heads (forward and backward of ACmix, batch 8, heads of 64 at 14 x 14: 0.75 of the native kernel's time).

    An exporter that is tracing always gets "aten": the programs it writes must run without this package.

    Raises:
        BackendError: the backend that was asked for is unknown, or cannot do it.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "aten"
    asked = of_environment() if backend == "auto" else check_name(backend, "backend")
    if asked == "auto" and dense and x.device.type == "cpu" and width >= WIDE:
        return "aten"
    if asked == "auto":
        return next((name for name in KERNELS.names() if _refusal(name, x, width, relative=relative) is None), "aten")
    reason = None if asked == "aten" else _refusal(asked, x, width, relative=relative)
    if reason is not None:
        raise BackendError(f"backend '{asked}' cannot do this: {reason}", where="local_attention", fix="use 'auto'")
    return asked


def _refusal(name: str, x: Tensor, width: int, *, relative: bool) -> str | None:
    if relative:
        return "a vector per tap (relative) has no kernel, only rows and columns have"
    return KERNELS.get(name).refuse(x, width)
