"""Running what was traced, on tensors without values: shapes, hidden convolutions, calls of parts of opaque modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from convrewrite.blocks.base import Block
from convrewrite.sites import Place
from convrewrite.sources.examples import mapped, tensors_in
from convrewrite.stands import stand_of
from convrewrite.tracing.copies import meta, zeros
from convrewrite.tracing.inside import parts_of
from convrewrite.tracing.regions import CONVS, FUNCTIONAL_CONVS, Region

_WEIGHTED = {*FUNCTIONAL_CONVS, nn.functional.linear, nn.functional.batch_norm}
_NORMS = {torch.batch_norm, nn.functional.batch_norm}
_KEEP_SHAPE = {
    torch.relu,
    torch.relu_,
    nn.functional.relu,
    nn.functional.relu6,
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.hardswish,
    nn.functional.hardtanh,
}
_ZERO_TO_ZERO = _KEEP_SHAPE | {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__iadd__,
    nn.functional.interpolate,
    nn.functional.max_pool2d,
    nn.functional.avg_pool2d,
    nn.functional.adaptive_avg_pool2d,
    torch.max_pool2d,
}
_KEEPS_SHAPE = {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Dropout, nn.Identity}


class ShapeRun(fx.Interpreter):
    """Runs a region's graph and notes the shape of everything that comes out of a node."""

    def __init__(self, region: Region) -> None:
        super().__init__(region.root, graph=region.graph)
        self.shapes = region.shapes

    def run_node(self, n: fx.Node) -> Any:
        result = self._same_shape(n)
        if result is None:
            result = super().run_node(n)
        self.shapes[n] = _shape_of(result)
        return result

    def _same_shape(self, n: fx.Node) -> Tensor | None:
        """The input itself for modules that keep its shape: half of the time goes into batch norms otherwise."""
        if n.op != "call_module" or len(n.args) != 1 or n.kwargs or not isinstance(n.args[0], fx.Node):
            return None
        module, value = self.fetch_attr(str(n.target)), self.env[n.args[0]]
        if type(module) is nn.BatchNorm2d and isinstance(value, Tensor):
            return value if value.dim() == 4 and value.shape[1] == module.num_features else None
        return value if type(module) in _KEEPS_SHAPE and isinstance(value, Tensor) else None


@dataclass
class Part:
    """Calls of one part of an opaque module, all with inputs of the same shapes."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int = 1


class Recorder(TorchFunctionMode):
    """Notes, while a graph runs: functional convolutions hidden in leaves, parts of opaque modules, linear FLOPs.

    Args:
        method: the kind of tensors, see `capture.METHODS`.
        names: path of every module.
        entered: modules with functional convolutions that are known already.
        opaque: modules that run as they are; calls of their parts are noted.
    """

    def __init__(
        self, method: str, names: dict[nn.Module, str], entered: set[nn.Module], opaque: set[nn.Module]
    ) -> None:
        super().__init__()
        self.method, self.names, self.entered, self.roots = method, names, entered, opaque
        self.functional: set[nn.Module] = set()
        self.parts: dict[tuple[str, str], Part] = {}
        self.own = ""
        self.other_flops = 0
        self._open: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._handles.append(nn.modules.module.register_module_forward_pre_hook(self._enter))
        self._handles.append(nn.modules.module.register_module_forward_hook(self._leave, always_call=True))
        inside = {c for m in self.roots for c in m.children()}
        self._parts = set(parts_of(inside, self.entered))
        for part in self._parts:
            self._handles.append(part.register_forward_pre_hook(self._part, with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop()
        if not isinstance(output, Tensor) or any(isinstance(m, Block) for m in self._open):
            return  # what is inside a block counts with the block
        if isinstance(module, nn.Linear):
            self.other_flops += 2 * output.numel() * module.in_features
        elif isinstance(module, Block) and stand_of(module) is None and not self._replacing():
            place = Place(tuple(args[0].shape), tuple(output.shape))
            self.other_flops += module.cost(place, module.options).flops

    def _replacing(self) -> bool:
        """True inside of what stands for a convolution, whose cost is that of its site."""
        return any(stand_of(m) is not None for m in self._open)

    def _part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(m in self._parts for m in self._open[:-1]):
            return  # inside another part, which will be captured whole
        path = self.names.get(module)
        if path is None:
            return
        args, kwargs = mapped(args, _at_least_one), mapped(kwargs, _at_least_one)
        key = path, str([(t.shape, t.dtype) for t in tensors_in((args, kwargs))])
        if key in self.parts:
            self.parts[key].count += 1
        else:
            self.parts[key] = Part(path, module, args, kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FUNCTIONAL_CONVS and self._open:
            module = self._open[-1]
            known = isinstance(module, (*CONVS, Block)) or stand_of(module) is not None
            if not known and module in self.roots:
                self.own = FUNCTIONAL_CONVS[func]
            elif not known and not any(isinstance(m, Block) or m in self.roots for m in self._open):
                self.functional.add(module)
        if func in _NORMS and self.method == "meta" and not kwargs and _normalises(*args[:5]):
            return torch.empty_like(args[0])  # torch's own shape function takes half the time of a whole capture
        if self.method in ("zeros", "filled") and _gives_zeros(func, args, kwargs or {}):
            known = func is nn.functional.batch_norm or func in _KEEP_SHAPE
            shape = args[0] if known else func(*mapped(args, meta), **mapped(kwargs or {}, meta))
            return zeros(shape) if self.method == "zeros" else torch.zeros(shape.shape, dtype=shape.dtype)
        if func is nn.functional.grid_sample and args[0].is_meta:  # as a meta function it takes a quarter of a second
            return args[0].new_empty((*args[0].shape[:2], *args[1].shape[1:-1]))
        return func(*args, **(kwargs or {}))


def _gives_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if the result is known to be zeros: of a weight of zeros, or of nothing but zeros."""
    if func in _WEIGHTED:
        return all(_is_blank(t) for t in tensors_in((args[1:], kwargs)))
    return func in _ZERO_TO_ZERO and all(_is_blank(t) for t in tensors_in((args, kwargs)))


def _is_blank(tensor: Tensor) -> bool:
    """True for what `zeros` makes: one number that stands for all."""
    return (
        tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() == tensor.element_size()
        and (tensor.numel() > 1 or isinstance(tensor, nn.Parameter))
    )


def _at_least_one(tensor: Tensor) -> Tensor:
    """A batch of none (no box was found) becomes one of zeros, so that shapes and costs are those for one."""
    if tensor.dim() < 2 or tensor.shape[0] != 0:
        return tensor
    return torch.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)


def _normalises(x: Tensor, *vectors: Tensor | None) -> bool:
    """True if batch norm runs on this shape without values: every vector it is given has one entry per channel."""
    return x.is_meta and x.dim() > 1 and all(v is None or v.shape == x.shape[1:2] for v in vectors)


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(s) for s in value.shape)
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        return tuple(_shape_of(v) for v in value)
    return None
