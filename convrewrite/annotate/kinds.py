"""What an fx node does, in the lower-case words that rules use: conv2d, batch_norm, relu, add, cat, max_pool, ..."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx, nn

from convrewrite.capture import CONVS, FUNCTIONAL_CONVS, Region
from convrewrite.sites import Site
from convrewrite.stands import stand_of

_RENAMED = {
    "iadd": "add",
    "add_": "add",
    "imul": "mul",
    "mul_": "mul",
    "multiply": "mul",
    "concat": "cat",
    "concatenate": "cat",
    "relu_": "relu",
    "adaptive_avg_pool": "adaptive_avg_pool",
    "frozen_batch_norm": "batch_norm",
    "batch_norm_act": "batch_norm_act",
}
_DROP_DIGITS = re.compile(r"(?<=[a-z_])_?[123]d$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def node_module(region: Region, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls."""
    return region.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def stood_for(region: Region, node: fx.Node) -> tuple[Site, ...]:
    """The convolutions of the residual block that the node's module stands for as a whole; () of any other node."""
    module = node_module(region, node)
    stand = stand_of(module) if module is not None else None
    return stand.sites if stand is not None else ()


def kind(region: Region, node: fx.Node) -> str:
    """The node's kind."""
    module = node_module(region, node)
    if module is not None:
        if isinstance(module, CONVS):
            base = next(c for c in CONVS if isinstance(module, c))
            return _snake(base.__name__).replace("convtranspose", "conv_transpose")
        if stand_of(module) is not None:
            return "conv2d"
        return _plain(_snake(type(module).__name__))
    if node.target in FUNCTIONAL_CONVS:
        return FUNCTIONAL_CONVS[node.target]
    if node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
        if isinstance(node.target, torch._ops.OpOverload):  # exported: add_.Tensor, upsample_nearest2d.vec
            name = name.partition(".")[0].rstrip("_")
            name = "interpolate" if name.startswith("upsample_") else name
        return _plain(name.strip("_") if name.startswith("_") else name)
    return node.op


def is_add(region: Region, node: fx.Node) -> bool:
    """True for the sum of two or more feature maps, written as operator, function, method or a small module."""
    if kind(region, node) == "add" or node.target in (operator.add, operator.iadd, torch.add):
        return True
    module = node_module(region, node)
    shapes = [region.shapes.get(n) for n in node.all_input_nodes]
    return (
        module is not None
        and len(shapes) > 1
        and not any(True for _ in module.children())
        and all(s == region.shapes.get(node) for s in shapes)
    )


def is_mul(region: Region, node: fx.Node) -> bool:
    """True for an elementwise product."""
    return kind(region, node) == "mul" or node.target in (operator.mul, operator.imul, torch.mul)


def is_pool(region: Region, node: fx.Node) -> bool:
    """True for any pooling, and for a mean over pixels."""
    name = kind(region, node)
    return "pool" in name or name in ("mean", "blur_pool")


def is_feature(shape: Any) -> bool:
    """True for the shape of a batch of feature maps, (N, C, H, W)."""
    return isinstance(shape, tuple) and len(shape) == 4 and all(isinstance(s, int) for s in shape)


def window_of(region: Region, node: fx.Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(effective kernel, stride) of a convolution or pooling node, None for anything else."""
    module = node_module(region, node)
    stand = stand_of(module) if module is not None else None
    if stand is not None:
        conv = stand.conv
        span = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilation, strict=True)]
        return (span[0], span[1]), conv.stride
    if module is not None:
        if not hasattr(module, "kernel_size") or not hasattr(module, "stride"):
            return None
        kernel: Any = module.kernel_size
        stride: Any = module.stride
        dilation: Any = getattr(module, "dilation", 1)
    else:
        if "pool" not in kind(region, node) or "adaptive" in kind(region, node):
            return None
        values = {**dict(zip(("input", "kernel_size", "stride"), node.args, strict=False)), **node.kwargs}
        kernel, dilation = values.get("kernel_size"), values.get("dilation", 1)
        stride = values.get("stride") or kernel
    k, s, d = _pair(kernel), _pair(stride if stride is not None else kernel), _pair(dilation)
    if k is None or s is None or d is None:
        return None
    return (d[0] * (k[0] - 1) + 1, d[1] * (k[1] - 1) + 1), s


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], int):
        return value[0], value[0]
    return None


def _snake(name: str) -> str:
    return _CAMEL.sub("_", name).lower()


def _plain(name: str) -> str:
    name = name.lower()
    name = name if name.startswith("conv") else _DROP_DIGITS.sub("", name)
    name = {"re_lu": "relu", "re_lu6": "relu6", "si_lu": "silu"}.get(name, name)
    return _RENAMED.get(name, name)
