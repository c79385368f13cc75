"""Other forms of a rewritten model: one fx graph, compiled, exported program, ONNX."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from convrewrite.blocks.base import Block
from convrewrite.capture import CONVS, light_copy
from convrewrite.errors import EditError
from convrewrite.registry import Registry
from convrewrite.stands import stand_of

KINDS = ("module", "graph", "compiled", "exported", "onnx")


def emit(model: nn.Module, kind: str, example: tuple[Any, ...]) -> Any:
    """`model` as a GraphModule, a compiled module or an ExportedProgram; "module" is the model itself.

    Raises:
        EditError: the model has no such form; the message says why.
    """
    if kind == "module":
        return model
    try:
        return EMITTERS.get(kind)(model, example)
    except EditError:
        raise
    except Exception as error:
        first = (str(error) or repr(error)).strip().splitlines()[0]
        raise EditError(f"cannot be emitted as {kind}: {type(error).__name__}: {first}", where="emit") from error


EMITTERS: Registry[Any] = Registry("form")


@EMITTERS.register("graph")
def graph_of(model: nn.Module, example: tuple[Any, ...] = ()) -> fx.GraphModule:
    """The whole model as one fx.GraphModule; refused where its forward differs between train and eval mode."""
    graphs = []
    for training in (True, False):
        twin = light_copy(model).train(training)
        graphs.append(_Leaves().trace(twin))
    texts = [[(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in g.nodes] for g in graphs]
    if texts[0] != texts[1]:
        differ = next((a for a, b in zip(*texts, strict=False) if a != b), texts[0][-1])
        raise EditError(f"train and eval mode differ at {differ[1]}", where="graph", fix="emit the module instead")
    emitted = fx.GraphModule(model, graphs[1], class_name=type(model).__name__)
    emitted.training = model.training
    return emitted


@EMITTERS.register("compiled")
def compiled(model: nn.Module, example: tuple[Any, ...] = ()) -> Any:
    """``torch.compile`` of the model."""
    return torch.compile(model)


@EMITTERS.register("exported")
def exported(model: nn.Module, example: tuple[Any, ...]) -> Any:
    """``torch.export`` of the model in eval mode, for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(light_copy(model).eval(), example)


@dataclass(frozen=True)
class Breaks:
    """Graph breaks of the original and of the rewritten model."""

    before: int
    after: int
    reasons: tuple[str, ...]


def graph_breaks(original: nn.Module | None, rewritten: nn.Module, example: tuple[Any, ...]) -> Breaks:
    """Count the graph breaks that ``torch.compile`` meets in both, in eval mode; None counts as no breaks.

    Raises:
        EditError: the tracer of ``torch.compile`` fails on one of them.
    """
    before, _ = _breaks_of(original, example) if original is not None else (0, ())
    after, reasons = _breaks_of(rewritten, example)
    return Breaks(before, after, reasons)


def _breaks_of(model: nn.Module, example: tuple[Any, ...]) -> tuple[int, tuple[str, ...]]:
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer touches what warns, such as the .grad of inner tensors
            found = torch._dynamo.explain(light_copy(model).eval())(*example)
    except Exception as error:
        first = (str(error) or repr(error)).strip().splitlines()[0]
        raise EditError(f"cannot be traced: {type(error).__name__}: {first}", where="compile") from error
    finally:
        torch._dynamo.reset()
    return found.graph_break_count, tuple(str(r.reason).splitlines()[0] for r in found.break_reasons)


def write_onnx(model: nn.Module, example: tuple[Any, ...], path: Path) -> None:
    """Write the model in eval mode as ONNX, weights inside the file.

    Raises:
        EditError: the onnx packages are missing, or an operation has no ONNX form.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise EditError("ONNX needs more packages", where="onnx", fix="pip install convrewrite[export]") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                light_copy(model).eval(), example, str(path), dynamo=True, external_data=False, verbose=False
            )
    except Exception as error:
        first = (str(error) or repr(error)).strip().splitlines()[0]
        raise EditError(f"no ONNX form: {first}", where="onnx") from error


class _Leaves(fx.Tracer):
    """Enters what holds convolutions or blocks; everything else stays a module, so that its flags stay live."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*CONVS, Block)) or stand_of(m) is not None:
            return True
        return not any(isinstance(i, (*CONVS, Block)) or stand_of(i) is not None for i in m.modules())
