"""Trace a model into graphs with shapes, without its weights and without running it on data.

The trap: plain ``symbolic_trace`` enters norm layers (and freezes their ``training`` flag), stops at the
first data-dependent branch, and knows no shapes. Here a module is entered only if convolutions live in
it; one that cannot be traced becomes opaque and its parts are captured on their own, call by call.

Shapes come from meta tensors. A model whose forward needs values (a detector filters boxes) runs on zeros, with
weights of zeros that take no memory, and its convolutions are not computed: the shapes are right, and depend neither on
the weights nor on the input's values.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import CaptureError
from convrewrite.sources.examples import mapped
from convrewrite.stands import stand_of
from convrewrite.tracing.copies import filled, hollow_copy, light_copy, meta
from convrewrite.tracing.inside import within
from convrewrite.tracing.regions import CONVS, FUNCTIONAL_CONVS, Captured, ModuleCall, Region, first_line, join
from convrewrite.tracing.running import Part, Recorder, ShapeRun
from convrewrite.tracing.tracer import Given, MustEnterError, Tracer

__all__ = ["CONVS", "FUNCTIONAL_CONVS", "METHODS", "Captured", "Region", "capture", "hollow_copy", "light_copy"]

METHODS = ("meta", "zeros", "filled", "real")
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "torchao.nn")
_FAKE_QUANTIZED = ("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")
_COMPILED = "OptimizedModule"  # what torch.compile wraps a module in
_STILL_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # what quantizable models write their sums with
_RETRIES = 64


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
            errors.append(f"{type(error).__name__}: {first_line(error)}")
    raise CaptureError(
        f"the model does not run on an input of shape {_shapes(example)}: {errors[-1]}",
        where=type(model).__name__,
        fix="give a fitting input (--input NxCxHxW or example=...)",
    )


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that the model's parameters are on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def _capture_by(method: str, model: nn.Module, example: tuple[Any, ...]) -> Captured:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "real":
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            return _Capture(light_copy(model), method).run(mapped(example, partial(filled, device=device)))
        skeleton = hollow_copy(model, on_meta=method == "meta")
        return _Capture(skeleton, method).run(
            mapped(example, meta if method == "meta" else partial(filled, device=torch.device("cpu")))
        )


def _is_exported_conv(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.__name__.startswith("conv")


def _refuse_unsupported(model: nn.Module) -> None:
    kind = type(model)
    if kind.__name__ == _COMPILED:
        raise CaptureError("the model is compiled", where="model", fix="rewrite model._orig_mod, compile afterwards")
    if kind.__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise CaptureError(f"the model is wrapped by {kind.__name__}", where="model", fix="rewrite model.module")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError("the model is TorchScript", where="model", fix="rewrite the eager nn.Module")
    if isinstance(model, torch.fx.GraphModule) and any(_is_exported_conv(node) for node in model.graph.nodes):
        fix = "rewrite convrewrite.sources.exported.from_program(program)"
        raise CaptureError("the model is the module of an exported program", where="model", fix=fix)
    if isinstance(model, CONVS):
        raise CaptureError("the model is itself a convolution", where="model", fix="wrap it: nn.Sequential(model)")
    for path, module in model.named_modules():
        home = type(module).__module__
        if type(module).__name__ == _COMPILED:
            fix = "put its _orig_mod there, compile afterwards"
            raise CaptureError("this part of the model is compiled", where=path, fix=fix)
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
        self.other_flops = 0
        self.names = {module: path for path, module in skeleton.named_modules()}

    def run(self, inputs: tuple[Any, ...]) -> Captured:
        self._region("", self.skeleton, inputs, {}, 1)
        self.skeleton.eval()
        return Captured(self.skeleton, self.regions, self.opaque, self.other_flops, self.method)

    def _region(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int
    ) -> None:
        """Trace `module`, find its shapes, then do the same for the opaque modules in it."""
        flops = self.other_flops
        region, parts = self._traced(prefix, module, args, kwargs)
        self.other_flops += (self.other_flops - flops) * (repeats - 1)
        if region is not None:
            region.repeats = repeats
            self.regions.append(region)
        for call in parts:
            self._region(call.path, call.module, call.args, call.kwargs, call.count * repeats)

    def _traced(
        self, prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Region | None, list[Part]]:
        """The region and the calls of parts inside modules that stayed opaque."""
        stay: dict[nn.Module, str] = {}
        missing = Given(args, kwargs).missing(module)
        if missing is not None:
            raise CaptureError(f"forward takes '{missing}', which the example input lacks", where=type(module).__name__)
        for _ in range(_RETRIES):
            region = self._trace(prefix, module, stay, Given(args, kwargs))
            if region is None:  # the module's own forward cannot be traced
                self.opaque[prefix or type(module).__name__] = stay[module]
                with self._recorder({module}) as recorder, torch.no_grad():
                    module(*args, **kwargs)
                if recorder.own:
                    self.opaque[prefix or type(module).__name__] += f"; its own {recorder.own} is not seen"
                self.other_flops += recorder.other_flops
                return None, list(recorder.parts.values())
            with self._recorder(set(stay)) as recorder, torch.no_grad():
                ShapeRun(region).run(*region.inputs)
            hidden = recorder.functional - self.functional
            if not hidden:
                self.other_flops += recorder.other_flops
                for opaque, why in stay.items():
                    self.opaque[self.names.get(opaque, "?")] = why
                return region, list(recorder.parts.values())
            self.functional |= hidden  # convolutions called as functions: enter these modules and trace again
        raise CaptureError("tracing does not settle", where=prefix or type(module).__name__)

    def _recorder(self, opaque: set[nn.Module]) -> Recorder:
        return Recorder(self.method, self.names, self.functional, opaque)

    def _trace(self, prefix: str, module: nn.Module, stay: dict[nn.Module, str], given: Given) -> Region | None:
        """Trace in train mode (a superset of eval's convolutions in every known model), else in eval mode."""
        if isinstance(module, CONVS) or stand_of(module) is not None:
            holder = nn.Sequential()
            holder.add_module("it", module)
            tracer = Tracer({}, set(), Given(given.values()[:1], {}))
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

    def _trace_in_mode(self, prefix: str, module: nn.Module, stay: dict[nn.Module, str], given: Given) -> Region | None:
        for _ in range(_RETRIES):
            tracer = Tracer(stay, self.functional, given, self.unpacked)
            try:
                graph = tracer.trace(module)
            except MustEnterError:
                continue
            except Exception as error:
                culprit = tracer.open[-1] if tracer.open else module
                stay[culprit] = f"{type(error).__name__}: {first_line(error).split('. ')[0]}"
                if culprit is module:
                    return None
                continue
            calls = [ModuleCall(join(prefix, path), inputs, out) for path, inputs, out in tracer.calls]
            return Region(prefix, module, graph, {}, calls, tracer.inputs)
        raise CaptureError("too many modules cannot be traced", where=prefix or type(module).__name__)

    def _unreached(self, module: nn.Module, region: Region) -> bool:
        reached = {region.root.get_submodule(str(n.target)) for n in region.graph.nodes if n.op == "call_module"}
        return any(isinstance(m, CONVS) and m not in reached and not within(m, reached) for m in module.modules())


def _set_mode(model: nn.Module, *, training: bool) -> None:
    for module in model.modules():
        module.training = training


def _shapes(example: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in example)
