"""Trace a model into graphs with shapes, without its weights and without running it on data.

The trap: plain ``symbolic_trace`` enters norm layers (and freezes their ``training`` flag), stops at the
first data-dependent branch, and knows no shapes. Here a module is entered only if convolutions live in
it; one that cannot be traced becomes opaque and its parts are captured on their own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from convrewrite.blocks.base import Block
from convrewrite.errors import CaptureError
from convrewrite.stands import stand_of

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FUNCTIONAL_CONVS: dict[Any, str] = {
    nn.functional.conv1d: "conv1d",
    nn.functional.conv2d: "conv2d",
    nn.functional.conv3d: "conv3d",
    nn.functional.conv_transpose1d: "conv_transpose1d",
    nn.functional.conv_transpose2d: "conv_transpose2d",
    nn.functional.conv_transpose3d: "conv_transpose3d",
}
_KEEPS_SHAPE = {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Dropout, nn.Identity}
_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torchao.nn")
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
        single: True if the traced module is one convolution, held under the name "it".
    """

    prefix: str
    root: nn.Module
    graph: fx.Graph
    shapes: dict[fx.Node, Any] = field(default_factory=dict)
    calls: list[ModuleCall] = field(default_factory=list)
    single: bool = False

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
        method: how shapes were found: "meta", "fake" or "real".
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
    for method in ("meta", "fake", "real"):
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


def _capture_by(method: str, model: nn.Module, example: tuple[Any, ...]) -> Captured:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "meta":
            skeleton = _copy(
                model, parameter=partial(_hollow, device="meta"), buffer=partial(torch.empty_like, device="meta")
            )
            inputs = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in example)
            return _Capture(skeleton, method).run(inputs)
        if method == "fake":
            from torch._subclasses import FakeTensorMode

            with FakeTensorMode(allow_non_fake_inputs=True):
                skeleton = _copy(
                    model, parameter=partial(_hollow, device="cpu"), buffer=partial(torch.empty_like, device="cpu")
                )
                fakes = tuple(torch.empty(a.shape, dtype=a.dtype) if isinstance(a, Tensor) else a for a in example)
                return _Capture(skeleton, method).run(fakes)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        inputs = tuple(
            (torch.zeros(a.shape, dtype=a.dtype, device=device) if a.is_meta else a.to(device))
            if isinstance(a, Tensor)
            else a
            for a in example
        )
        return _Capture(light_copy(model), method).run(inputs)


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
        if type(module).__module__.startswith(_QUANTIZED):
            raise CaptureError("the module is quantized", where=path, fix="rewrite first, quantize afterwards")
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
        self.linear_flops = 0
        self.names = {module: path for path, module in skeleton.named_modules()}

    def run(self, inputs: tuple[Any, ...]) -> Captured:
        self._region("", self.skeleton, inputs, {})
        self.skeleton.eval()
        return Captured(self.skeleton, self.regions, self.opaque, self.linear_flops, self.method)

    def _region(self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace `module`, find its shapes, then do the same for the opaque modules in it."""
        region, opaque_calls = self._traced(prefix, module, args, kwargs)
        if region is not None:
            self.regions.append(region)
        seen: set[str] = set()
        for path, (part, part_args, part_kwargs) in opaque_calls.items():
            if path not in seen:
                seen.add(path)
                self._region(path, part, part_args, part_kwargs)

    def _traced(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Region | None, dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]:
        """The region and the calls of parts inside modules that stayed opaque."""
        stay: dict[nn.Module, str] = {}
        for _ in range(_RETRIES):
            region = self._trace(prefix, module, stay)
            if region is None:  # the module's own forward cannot be traced
                self.opaque[prefix or type(module).__name__] = stay[module]
                with _Recorder(self, {module}) as recorder, torch.no_grad():
                    module(*args, **kwargs)
                return None, recorder.parts
            with _Recorder(self, set(stay)) as recorder, torch.no_grad():
                _ShapeRun(region).run(*_bind(region.graph, module, args, kwargs))
            hidden = recorder.functional - self.functional
            if not hidden:
                self.linear_flops += recorder.linear_flops
                for opaque, why in stay.items():
                    self.opaque[self.names.get(opaque, "?")] = why
                return region, recorder.parts
            self.functional |= hidden  # convolutions called as functions: enter these modules and trace again
        raise CaptureError("tracing does not settle", where=prefix or type(module).__name__)

    def _trace(self, prefix: str, module: nn.Module, stay: dict[nn.Module, str]) -> Region | None:
        """Trace in train mode (a superset of eval's convolutions in every known model), else in eval mode."""
        if isinstance(module, CONVS) or stand_of(module) is not None:
            holder = nn.Sequential()
            holder.add_module("it", module)
            return Region(prefix, holder, _Tracer({}, set()).trace(holder), single=True)
        found: list[Region] = []
        for training in (True, False):
            _set_mode(self.skeleton, training=training)
            traced = self._trace_in_mode(prefix, module, stay)
            self.skeleton.eval()
            if traced is None:
                return None
            found.append(traced)
            if not self._unreached(module, traced):
                return traced
        return max(found, key=lambda r: len(r.graph.find_nodes(op="call_module")))

    def _trace_in_mode(self, prefix: str, module: nn.Module, stay: dict[nn.Module, str]) -> Region | None:
        for _ in range(_RETRIES):
            tracer = _Tracer(stay, self.functional)
            try:
                graph = tracer.trace(module)
            except Exception as error:
                culprit = tracer.open[-1] if tracer.open else module
                stay[culprit] = f"{type(error).__name__}: {_first_line(error)}"
                if culprit is module:
                    return None
                continue
            calls = [ModuleCall(_join(prefix, path), inputs, out) for path, inputs, out in tracer.calls]
            return Region(prefix, module, graph, {}, calls)
        raise CaptureError("too many modules cannot be traced", where=prefix or type(module).__name__)

    def _unreached(self, module: nn.Module, region: Region) -> bool:
        reached = {region.root.get_submodule(str(n.target)) for n in region.graph.nodes if n.op == "call_module"}
        return any(isinstance(m, CONVS) and m not in reached and not _within(m, reached) for m in module.modules())


class _Tracer(fx.Tracer):
    """Enters a module only if a convolution lives in it; remembers which module was open when tracing failed."""

    def __init__(self, stay: dict[nn.Module, str], functional: set[nn.Module]) -> None:
        super().__init__(param_shapes_constant=False)
        self.stay, self.functional = stay, functional
        self.open: list[nn.Module] = []
        self.calls: list[tuple[str, tuple[fx.Node, ...], fx.Node]] = []
        self._entered: dict[nn.Module, bool] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._entered:
            self._entered[m] = m not in self.stay and _holds_convs(m, self.functional)
        return not self._entered[m]

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


class _Recorder(TorchFunctionMode):
    """Notes, while a graph runs: functional convolutions hidden in leaves, parts of opaque modules, linear FLOPs."""

    def __init__(self, owner: _Capture, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.owner, self.roots = owner, opaque
        self.functional: set[nn.Module] = set()
        self.parts: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
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
        path = self.owner.names.get(module)
        if path is not None and path not in self.parts:
            self.parts[path] = (module, args, kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FUNCTIONAL_CONVS and self._open:
            module = self._open[-1]
            known = isinstance(module, (*CONVS, Block)) or stand_of(module) is not None
            if not known and not any(isinstance(m, Block) or m in self.roots for m in self._open):
                self.functional.add(module)
        if func is torch.batch_norm and not kwargs and _normalises(*args[:4]):
            return torch.empty_like(args[0])  # torch's own shape function takes half the time of a whole capture
        return func(*args, **(kwargs or {}))


def _normalises(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None) -> bool:
    """True if batch norm runs on this shape without values: every vector it is given has one entry per channel."""
    return x.is_meta and x.dim() > 1 and all(v is None or v.shape == x.shape[1:2] for v in (weight, bias, mean))


def _parts(modules: set[nn.Module], functional: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost callable modules with convolutions among `modules` (lists and dicts are looked through)."""
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(set(module.children()), functional)
        elif isinstance(module, CONVS) or _holds_convs(module, functional):
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


def _bind(graph: fx.Graph, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders; the rest take their defaults."""
    import inspect

    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    values: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            if name not in bound.arguments:
                kind = type(module).__name__
                raise CaptureError(f"forward takes '{name}', which the example input lacks", where=kind)
            values.append(bound.arguments[name])
    return values


def _copy(model: nn.Module, *, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]) -> nn.Module:
    """Deep copy in which every tensor of the model is converted, and no hook fires."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for own in module._parameters.values():
            if own is not None and id(own) not in memo:
                memo[id(own)] = parameter(own)
        tensors = [*module._buffers.values(), *(v for v in vars(module).values() if isinstance(v, Tensor))]
        for tensor in tensors:
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


def _hollow(tensor: Tensor, *, device: str) -> Tensor:
    """A parameter of the same shape and dtype without its values."""
    return nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=tensor.requires_grad)


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
