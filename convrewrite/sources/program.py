"""An exported program as an ordinary module: its convolutions are `nn.Conv2d`, its modules nest as they did.

The forward goes through the program's steps one by one. So the module can be copied, traced, edited, compiled and
exported like any other. What the program fixed when it was exported stays fixed: batch norms and dropouts do as in the
mode of that time, whatever `train()` and `eval()` say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from convrewrite.sites import Shape
from convrewrite.sources.examples import EXAMPLES
from convrewrite.sources.exportedgraph import Document


@dataclass(frozen=True)
class Of:
    """The value of that name."""

    name: str


@dataclass(frozen=True)
class Own:
    """The tensor at that path below the module."""

    path: str


@dataclass(frozen=True)
class Device:
    """The device of the first input: the one of the export need not exist here."""


@dataclass(frozen=True)
class Step:
    """One operation: an operator, or the path of a module to call; afterwards the names `done` are needed no more."""

    does: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    gives: tuple[str, ...]
    several: bool
    done: tuple[str, ...] = ()


class Program(nn.Module):
    """One scope of an exported program: the whole, or a module of it that holds convolutions.

    Attributes:
        signature: hash of the document that the whole was built from; "" of an inner one.
        document: the document itself; of an inner one None.
        fixed_batch: True if the whole was exported for one size of batch and names that size in its steps.
    """

    def __init__(self, takes: Sequence[str], steps: Sequence[Step], result: Any) -> None:
        super().__init__()
        self._takes, self._steps, self._result = tuple(takes), tuple(steps), result
        self.signature, self.fixed_batch = "", False
        self.document: Document | None = None

    def forward(self, *inputs: Any) -> Any:
        return self._run(inputs)

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        values = dict(zip(self._takes, inputs, strict=True))
        for step in self._steps:
            args = [_resolved(each, self, values, inputs) for each in step.args]
            kwargs = {key: _resolved(each, self, values, inputs) for key, each in step.kwargs}
            does = _fetch(self, step.does) if isinstance(step.does, str) else step.does
            given = does(*args, **kwargs)
            for i, name in enumerate(step.gives):
                if name:
                    values[name] = given[i] if step.several else given
            for name in step.done:
                values.pop(name, None)
        return _resolved(self._result, self, values, inputs)


def _fetch(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _resolved(value: Any, module: nn.Module, values: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    if isinstance(value, Of):
        return values[value.name]
    if isinstance(value, Own):
        return _fetch(module, value.path)
    if isinstance(value, Device):
        return inputs[0].device
    if isinstance(value, (list, tuple)):
        return type(value)([_resolved(each, module, values, inputs) for each in value])
    if isinstance(value, dict):
        return type(value)((key, _resolved(each, module, values, inputs)) for key, each in value.items())
    return value


# fx takes the number of inputs from the signature, and cannot count those of *inputs.
_FORWARDS: dict[int, Callable[..., Any]] = {
    1: lambda self, first: self._run((first,)),
    2: lambda self, first, second: self._run((first, second)),
    3: lambda self, first, second, third: self._run((first, second, third)),
    4: lambda self, first, second, third, fourth: self._run((first, second, third, fourth)),
}


@lru_cache(maxsize=512)
def class_of(name: str, inputs: int) -> type[Program]:
    """A class of that name, so that rules can say `inside: Bottleneck`."""
    forward = _FORWARDS.get(inputs, Program.forward)
    return type(name if name.isidentifier() else "Module", (Program,), {"__module__": __name__, "forward": forward})


@EXAMPLES.register("exported")
def exported(model: nn.Module, shape: Shape, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Exported programs of several inputs: those after the first as they were exported."""
    document = getattr(model, "document", None)
    if not isinstance(model, Program) or document is None or len(document["inputs"]) < 2:
        return None
    shapes = [shape, *(tuple(other) for other in list(document["inputs"].values())[1:])]
    return tuple(torch.empty(each, dtype=dtype, device="meta") for each in shapes)
