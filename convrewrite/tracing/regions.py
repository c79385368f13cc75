"""What tracing finds: a model as graphs, one for each piece that could be traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FUNCTIONAL_CONVS: dict[Any, str] = {
    nn.functional.conv1d: "conv1d",
    nn.functional.conv2d: "conv2d",
    nn.functional.conv3d: "conv3d",
    nn.functional.conv_transpose1d: "conv_transpose1d",
    nn.functional.conv_transpose2d: "conv_transpose2d",
    nn.functional.conv_transpose3d: "conv_transpose3d",
}


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
        other_flops: FLOPs (2 per multiply-add) of what is no site: ``nn.Linear`` calls, and blocks that were inserted.
        method: how shapes were found: "meta", "zeros", "filled" (zeros that are written to in place) or "real" (on the
            model's own weights).
    """

    skeleton: nn.Module
    regions: list[Region]
    opaque: dict[str, str]
    other_flops: int
    method: str


def join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
