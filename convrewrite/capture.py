"""Trace a model into graphs with shapes, without its weights and without running it on data.

The trap: plain ``symbolic_trace`` enters norm layers (and freezes their ``training`` flag), stops at the
first data-dependent branch, and knows no shapes. Here a module is entered only if convolutions live in
it; one that cannot be traced becomes opaque and its parts are captured on their own, call by call.

Shapes come from meta tensors. A model whose forward needs values (a detector filters boxes) runs on zeros, with
weights of zeros that take no memory, and its convolutions are not computed: the shapes are right, and depend neither on
the weights nor on the input's values.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode

from convrewrite.blocks.base import Block
from convrewrite.errors import CaptureError
from convrewrite.sources.examples import mapped, tensors_in
from convrewrite.stands import stand_of

METHODS = ("meta", "zeros", "filled", "real")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FUNCTIONAL_CONVS: dict[Any, str] = {
    nn.functional.conv1d: "conv1d",
    nn.functional.conv2d: "conv2d",
    nn.functional.conv3d: "conv3d",
    nn.functional.conv_transpose1d: "conv_transpose1d",
    nn.functional.conv_transpose2d: "conv_transpose2d",
    nn.functional.conv_transpose3d: "conv_transpose3d",
}
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
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "torchao.nn")
_FAKE_QUANTIZED = ("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")
_STILL_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # what quantizable models write their sums with
_RETRIES = 64


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module that was entered while tracing: what went in and what came out."""

    path: str
    inputs: tuple[fx.Node, ...]
    output: fx.Node


@dataclass
class Region:
    """One traced piece of the model.

    Attributes:
        prefix: path of the traced module, "" for the whole model.
        graph: its fx graph; targets are relative to `prefix`.
        shapes: of every node that yields a tensor, its shape; of one that yields several, a tuple of shapes.
        calls: the entered modules' calls, in order of their return.
        inputs: a value for each of the graph's placeholders.
        single: True if the traced module is one convolution, held under the name "it".
        repeats: how often the module is called with inputs of these shapes.
    """

    prefix: str
    root: nn.Module
    graph: fx.Graph
    shapes: dict[fx.Node, Any] = field(default_factory=dict)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    single: bool = False
    repeats: int = 1

    def path(self, target: str) -> str:
        """Path from the model's root of a target of this region's graph."""
        if self.single:
            return self.prefix
        return f"{self.prefix}.{target}" if self.prefix and target else self.prefix or target


@dataclass
class Captured:
    """The model as graphs: regions, the outermost first.

    Attributes:
        skeleton: a copy of the model without values, in which the graphs' modules live.
        opaque: path -> why the module could not be traced.
        linear_flops: FLOPs (2 per multiply-add) of all ``nn.Linear`` calls.
        method: how shapes were found: "meta", "zeros", "filled" (zeros that are written to in place) or "real" (on the
            model's own weights).
    """

    skeleton: nn.Module
    regions: list[Region]
    opaque: dict[str, str]
    linear_flops: int
    method: str


def capture(model: nn.Module, example: tuple[Any, ...]) -> Captured:
    """Trace `model` for inputs like `example` (tensors on any device; only their shapes are used).

    Raises:
        CaptureError: the model cannot be analysed; the message names the module and the cause.
    """
    _refuse_unsupported(model)
    errors: list[str] = []
    for method in METHODS:
        try:
            with torch.random.fork_rng(devices=_cuda_devices(model)):  # dropout draws, the caller's numbers stay
                return _capture_by(method, model, example)
        except CaptureError:
            raise
        except Exception as error:
            errors.append(f"{type(error).__name__}: {_first_line(error)}")
    raise CaptureError(
        f"the model does not run on an input of shape {_shapes(example)}: {errors[-1]}",
        where=type(model).__name__,
        fix="give a fitting input (--input NxCxHxW or example=...)",
    )


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that the model's parameters are on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def light_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters and owns its buffers and everything else."""
    return _copy(model, parameter=lambda t: t, buffer=lambda t: t.detach().clone())


def hollow_copy(model: nn.Module, *, meta: bool = False) -> nn.Module:
    """A deep copy without values: meta tensors, or zeros that take no memory."""
    hollow = _meta if meta else _zeros
    return _copy(model, parameter=partial(_hollow, change=hollow), buffer=hollow)


def _capture_by(method: str, model: nn.Module, example: tuple[Any, ...]) -> Captured:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "real":
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            return _Capture(light_copy(model), method).run(mapped(example, partial(_filled, device=device)))
        skeleton = hollow_copy(model, meta=method == "meta")
        return _Capture(skeleton, method).run(
            mapped(example, _meta if method == "meta" else partial(_filled, device=torch.device("cpu")))
        )


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros of that shape that take the memory of one number."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _filled(tensor: Tensor, *, device: torch.device) -> Tensor:
    """The tensor on the device, a meta tensor as zeros."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)


def _refuse_unsupported(model: nn.Module) -> None:
    kind = type(model)
    if kind.__name__ == "OptimizedModule":
        raise CaptureError("the model is compiled", where="model", fix="rewrite model._orig_mod, compile afterwards")
    if kind.__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise CaptureError(f"the model is wrapped by {kind.__name__}", where="model", fix="rewrite model.module")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError("the model is TorchScript", where="model", fix="rewrite the eager nn.Module")
    if isinstance(model, CONVS):
        raise CaptureError("the model is itself a convolution", where="model", fix="wrap it: nn.Sequential(model)")
    for path, module in model.named_modules():
        home = type(module).__module__
        if home.startswith(_QUANTIZED) and type(module).__name__ not in _STILL_FLOAT:
            what = "the model is quantized: its weights are integers, which no block can be trained from"
            raise CaptureError(what, where=path, fix="rewrite the float model first, quantize afterwards")
        if home.startswith(_FAKE_QUANTIZED):
            what = "the model is prepared for quantization-aware training"
            raise CaptureError(what, where=path, fix="rewrite the float model first, prepare it afterwards")
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise CaptureError("the module is lazy and has no weights yet", where=path, fix="run one forward first")


class _Capture:
    """One attempt at the whole model with one kind of tensors."""

    def __init__(self, skeleton: nn.Module, method: str) -> None:
        self.skeleton = skeleton
        self.method = method
        self.regions: list[Region] = []
        self.opaque: dict[str, str] = {}
        self.functional: set[nn.Module] = set()
        self.unpacked: set[nn.Module] = set()
        self.linear_flops = 0
        self.names = {module: path for path, module in skeleton.named_modules()}

    def run(self, inputs: tuple[Any, ...]) -> Captured:
        self._region("", self.skeleton, inputs, {}, 1)
        self.skeleton.eval()
        return Captured(self.skeleton, self.regions, self.opaque, self.linear_flops, self.method)

    def _region(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int
    ) -> None:
        """Trace `module`, find its shapes, then do the same for the opaque modules in it."""
        flops = self.linear_flops
        region, parts = self._traced(prefix, module, args, kwargs)
        self.linear_flops += (self.linear_flops - flops) * (repeats - 1)
        if region is not None:
            region.repeats = repeats
            self.regions.append(region)
        for call in parts:
            self._region(call.path, call.module, call.args, call.kwargs, call.count * repeats)

    def _traced(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Region | None, list[_Part]]:
        """The region and the calls of parts inside modules that stayed opaque."""
        stay: dict[nn.Module, str] = {}
        missing = _Given(args, kwargs).missing(module)
        if missing is not None:
            raise CaptureError(f"forward takes '{missing}', which the example input lacks", where=type(module).__name__)
        for _ in range(_RETRIES):
            region = self._trace(prefix, module, stay, _Given(args, kwargs))
            if region is None:  # the module's own forward cannot be traced
                self.opaque[prefix or type(module).__name__] = stay[module]
                with _Recorder(self, {module}) as recorder, torch.no_grad():
                    module(*args, **kwargs)
                if recorder.own:
                    self.opaque[prefix or type(module).__name__] += f"; its own {recorder.own} is not seen"
                self.linear_flops += recorder.linear_flops
                return None, list(recorder.parts.values())
            with _Recorder(self, set(stay)) as recorder, torch.no_grad():
                _ShapeRun(region).run(*region.inputs)
            hidden = recorder.functional - self.functional
            if not hidden:
                self.linear_flops += recorder.linear_flops
                for opaque, why in stay.items():
                    self.opaque[self.names.get(opaque, "?")] = why
                return region, list(recorder.parts.values())
            self.functional |= hidden  # convolutions called as functions: enter these modules and trace again
        raise CaptureError("tracing does not settle", where=prefix or type(module).__name__)

    def _trace(self, prefix: str, module: nn.Module, stay: dict[nn.Module, str], given: _Given) -> Region | None:
        """Trace in train mode (a superset of eval's convolutions in every known model), else in eval mode."""
        if isinstance(module, CONVS) or stand_of(module) is not None:
            holder = nn.Sequential()
            holder.add_module("it", module)
            tracer = _Tracer({}, set(), _Given(given.values()[:1], {}))
            return Region(prefix, holder, tracer.trace(holder), inputs=tracer.inputs, single=True)
        found: list[Region] = []
        for training in (True, False):
            _set_mode(self.skeleton, training=training)
            traced = self._trace_in_mode(prefix, module, stay, given)
            self.skeleton.eval()
            if traced is None:
                return None
            found.append(traced)
            if not self._unreached(module, traced):
                return traced
        return max(found, key=lambda r: len(r.graph.find_nodes(op="call_module")))

    def _trace_in_mode(
        self, prefix: str, module: nn.Module, stay: dict[nn.Module, str], given: _Given
    ) -> Region | None:
        for _ in range(_RETRIES):
            tracer = _Tracer(stay, self.functional, given, self.unpacked)
            try:
                graph = tracer.trace(module)
            except _MustEnterError:
                continue
            except Exception as error:
                culprit = tracer.open[-1] if tracer.open else module
                stay[culprit] = f"{type(error).__name__}: {_first_line(error).split('. ')[0]}"
                if culprit is module:
                    return None
                continue
            calls = [ModuleCall(_join(prefix, path), inputs, out) for path, inputs, out in tracer.calls]
            return Region(prefix, module, graph, {}, calls, tracer.inputs)
        raise CaptureError("too many modules cannot be traced", where=prefix or type(module).__name__)

    def _unreached(self, module: nn.Module, region: Region) -> bool:
        reached = {region.root.get_submodule(str(n.target)) for n in region.graph.nodes if n.op == "call_module"}
        return any(isinstance(m, CONVS) and m not in reached and not _within(m, reached) for m in module.modules())


class _MustEnterError(Exception):
    """Tracing has to begin again and enter a module that was thought to be of no interest."""


@dataclass(frozen=True)
class _Given:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def values(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def named(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The positional arguments with the names of their parameters; those of ``*args`` are numbered."""
        parameters = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(names) < len(self.args):
            rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
            if rest is None:
                what = f"forward takes {len(names)} inputs, the example has {len(self.args)}"
                raise CaptureError(what, where=type(module).__name__)
            names += [f"{rest}_{i}" for i in range(len(self.args) - len(names))]
        return list(zip(names, self.args, strict=False))

    def missing(self, module: nn.Module) -> str | None:
        """The first parameter without a default that is not given."""
        named = {name for name, _ in self.named(module)} | set(self.kwargs)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        return next(
            (p.name for p in parameters if p.default is p.empty and p.kind not in kinds and p.name not in named), None
        )


class _Sized(fx.Proxy):
    """A proxy whose length is known where its node can be computed, for ``list(x.chunk(2, 1))``."""

    def __len__(self) -> int:
        value = self.tracer.value_of(self.node)  # type: ignore[attr-defined]
        return len(value) if isinstance(value, (tuple, list, Tensor)) else super().__len__()


class _Tracer(fx.Tracer):
    """Enters a module only if a convolution lives in it; remembers which module was open when tracing failed."""

    def __init__(
        self,
        stay: dict[nn.Module, str],
        functional: set[nn.Module],
        given: _Given,
        unpacked: set[nn.Module] | None = None,
    ) -> None:
        super().__init__(param_shapes_constant=False)
        self.stay, self.functional, self.given = stay, functional, given
        self.inputs: list[Any] = []
        self._values: dict[fx.Node, Any] = {}
        self.open: list[nn.Module] = []
        self.calls: list[tuple[str, tuple[fx.Node, ...], fx.Node]] = []
        self._entered: dict[nn.Module, bool] = {}
        self.unpacked = set() if unpacked is None else unpacked

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - the signature is that of fx
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the tensors that are given; all other arguments are what they are in this very call.

        fx would make a proxy of an argument that is left out, which is not None and takes the wrong branch, and of
        ``*args`` and ``**kwargs``, which cannot be passed on.
        """
        args = tuple(self._input(name, value) for name, value in self.given.named(self.root))
        kwargs = {name: self._input(name, value) for name, value in self.given.kwargs.items()}
        return (lambda root: root_fn(root, *args, **kwargs)), [self.root]

    def _input(self, name: str, value: Any) -> Any:
        if next(tensors_in(value), None) is None:
            return value
        self.inputs.append(value)
        proxy = self.create_proxy("placeholder", name, (), {})
        self._values[proxy.node] = value
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on shapes is decided by the shapes at hand; one on values cannot be."""
        value = self.value_of(obj.node)
        return bool(value) if isinstance(value, (bool, int, float)) else super().to_bool(obj)

    def value_of(self, node: fx.Node) -> Any:
        """What the node gives on the inputs at hand (meta tensors or zeros), None where that cannot be said."""
        try:
            with _untraced(), torch.no_grad():
                return self._computed(node)
        except Exception:  # a condition on values, a module that does not run on its own
            return None

    def _computed(self, node: fx.Node) -> Any:
        needed = _needed(node)
        for earlier in self.graph.nodes:  # in order, so that nothing is computed twice and recursion stays flat
            if earlier in needed and earlier not in self._values:
                self._values[earlier] = self._run(earlier)
        return self._values[node]

    def _run(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: self._values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self._values[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        found: Any = self.root
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found(*args, **kwargs) if node.op == "call_module" else found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._entered:
            self._entered[m] = m not in self.stay and (m in self.unpacked or _holds_convs(m, self.functional))
        return not self._entered[m]

    def iter(self, obj: fx.Proxy) -> Any:
        """A module that returns several tensors must be entered, for how many they are is not known otherwise."""
        node = obj.node
        while node.target is operator.getitem:
            node = node.all_input_nodes[0]
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if not isinstance(module, (*CONVS, Block)) and module not in self.stay and module not in self.unpacked:
                self.unpacked.add(module)
                raise _MustEnterError
        value = self.value_of(obj.node)
        if isinstance(value, (tuple, list)):
            items: Any = obj
            return iter([items[i] for i in range(len(value))])
        return super().iter(obj)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.open.append(m)
        out = super().call_module(m, forward, args, kwargs)
        self.open.pop()  # not in a finally: after an error the innermost open module must be known
        if isinstance(out, fx.Proxy) and not self.is_leaf_module(m, ""):
            inputs = tuple(a.node for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy))
            self.calls.append((self.path_of_module(m), inputs, out.node))
        return out


def _needed(node: fx.Node) -> set[fx.Node]:
    """The node and all that it depends on."""
    found, open_ = {node}, [node]
    while open_:
        for earlier in open_.pop().all_input_nodes:
            if earlier not in found:
                found.add(earlier)
                open_.append(earlier)
    return found


@contextmanager
def _untraced() -> Iterator[None]:
    """Modules run as ever while a trace is open: fx patches the class ``nn.Module`` for that time."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__ = _symbolic_trace._orig_module_call  # type: ignore[method-assign]
    nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]


class _ShapeRun(fx.Interpreter):
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
class _Part:
    """Calls of one part of an opaque module, all with inputs of the same shapes."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int = 1


class _Recorder(TorchFunctionMode):
    """Notes, while a graph runs: functional convolutions hidden in leaves, parts of opaque modules, linear FLOPs."""

    def __init__(self, owner: _Capture, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.owner, self.roots = owner, opaque
        self.functional: set[nn.Module] = set()
        self.parts: dict[tuple[str, str], _Part] = {}
        self.own = ""
        self.linear_flops = 0
        self._open: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Recorder:
        self._handles.append(nn.modules.module.register_module_forward_pre_hook(self._enter))
        self._handles.append(nn.modules.module.register_module_forward_hook(self._leave, always_call=True))
        inside = {c for m in self.roots for c in m.children()}
        self._parts = set(_parts(inside, self.owner.functional))
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
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            self.linear_flops += 2 * output.numel() * module.in_features

    def _part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(m in self._parts for m in self._open[:-1]):
            return  # inside another part, which will be captured whole
        path = self.owner.names.get(module)
        if path is None:
            return
        args, kwargs = mapped(args, _at_least_one), mapped(kwargs, _at_least_one)
        key = path, str([(t.shape, t.dtype) for t in tensors_in((args, kwargs))])
        if key in self.parts:
            self.parts[key].count += 1
        else:
            self.parts[key] = _Part(path, module, args, kwargs)

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
        if func in _NORMS and self.owner.method == "meta" and not kwargs and _normalises(*args[:5]):
            return torch.empty_like(args[0])  # torch's own shape function takes half the time of a whole capture
        if self.owner.method in ("zeros", "filled") and _gives_zeros(func, args, kwargs or {}):
            known = func is nn.functional.batch_norm or func in _KEEP_SHAPE
            shape = args[0] if known else func(*mapped(args, _meta), **mapped(kwargs or {}, _meta))
            return _zeros(shape) if self.owner.method == "zeros" else torch.zeros(shape.shape, dtype=shape.dtype)
        if func is nn.functional.grid_sample and args[0].is_meta:  # as a meta function it takes a quarter of a second
            return args[0].new_empty((*args[0].shape[:2], *args[1].shape[1:-1]))
        return func(*args, **(kwargs or {}))


def _gives_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if the result is known to be zeros: of a weight of zeros, or of nothing but zeros."""
    if func in _WEIGHTED:
        return all(_is_blank(t) for t in tensors_in((args[1:], kwargs)))
    return func in _ZERO_TO_ZERO and all(_is_blank(t) for t in tensors_in((args, kwargs)))


def _is_blank(tensor: Tensor) -> bool:
    """True for what `_zeros` makes: one number that stands for all."""
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


def _parts(modules: set[nn.Module], functional: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost callable modules that are or hold convolutions or what replaced one (lists are looked through)."""
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(set(module.children()), functional)
        elif isinstance(module, CONVS) or stand_of(module) is not None or _holds_convs(module, functional):
            yield module


def _holds_convs(module: nn.Module, functional: set[nn.Module]) -> bool:
    """True if tracing has to go inside `module` to see its convolutions."""
    if isinstance(module, (*CONVS, Block)) or stand_of(module) is not None:
        return False
    for inner in module.modules():
        if inner in functional or stand_of(inner) is not None or isinstance(inner, (*CONVS, Block)):
            return True
    return False


def _within(module: nn.Module, holders: set[nn.Module]) -> bool:
    return any(module in holder.modules() for holder in holders if not isinstance(holder, CONVS))


def _copy(model: nn.Module, *, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]) -> nn.Module:
    """Deep copy in which every tensor of the model is converted, and no hook fires."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for own in module._parameters.values():
            if own is not None and id(own) not in memo:
                memo[id(own)] = parameter(own)
        own_values = (v for k, v in vars(module).items() if k not in _MODULE_FIELDS)
        for tensor in (*module._buffers.values(), *tensors_in(list(own_values))):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = buffer(tensor)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be deep-copied: {_first_line(error)}", where=type(model).__name__
        ) from error
    for module in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = vars(module).get(name) or {}
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):  # weight_norm's hook computes the weight
                    del hooks[key]
    return twin


_MODULE_FIELDS = ("_parameters", "_buffers", "_modules")


def _hollow(tensor: Tensor, *, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A parameter of the same shape and dtype without its values."""
    return nn.Parameter(change(tensor.detach()), requires_grad=tensor.requires_grad)


def _set_mode(model: nn.Module, *, training: bool) -> None:
    for module in model.modules():
        module.training = training


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(s) for s in value.shape)
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        return tuple(_shape_of(v) for v in value)
    return None


def _shapes(example: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in example)


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
