"""A second opinion on a model's convolutions: what `torch.export` sees, against the sites that we found.

An exported program is only looked at: its train and eval mode cannot be switched, so it is nothing to fine-tune.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from convrewrite.capture import hollow_copy
from convrewrite.inserting import NAMES
from convrewrite.sites import Shape, Site
from convrewrite.sources.examples import mapped
from convrewrite.stands import stand_of

_SHOWN = 5


@dataclass(frozen=True)
class CrossCheck:
    """Both views of one model, in eval mode.

    Attributes:
        ours: number of calls of convolutions that we found, without those of rewritten sites. theirs: that
            `torch.export` found outside the blocks that were put in; None if it refuses.
        missing: calls that only we see. extra: calls that only `torch.export` sees.
        shapes: sites whose output shape differs, with both.
        rewritten: number of rewritten sites, which are not compared: what convolves there is a block's own affair.
        refusal: why `torch.export` cannot take the model, "" if it can.
    """

    ours: int
    theirs: int | None = None
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    shapes: tuple[tuple[str, Shape, Shape], ...] = ()
    rewritten: int = 0
    refusal: str = ""

    @property
    def agrees(self) -> bool:
        """True if both see the same calls with the same shapes."""
        return self.theirs is not None and not (self.missing or self.extra or self.shapes)

    def lines(self) -> list[str]:
        """What to tell the user, a line each."""
        if self.theirs is None:
            return [f"cross-check: torch.export refuses the model: {self.refusal}"]
        word = "site" if self.rewritten == 1 else "sites"
        beside = f", beside {self.rewritten} rewritten {word}" if self.rewritten else ""
        if self.agrees:
            return [f"cross-check: torch.export sees the same {self.ours} convolutions with the same shapes{beside}"]
        found = [f"cross-check: torch.export sees {self.theirs} calls of convolutions, we see {self.ours}{beside}"]
        if self.missing:
            found.append(f"  only here (in train mode only, or after a branch on data): {_some(self.missing)}")
        if self.extra:
            found.append(f"  only in torch.export: {_some(self.extra)}")
        found.extend(f"  {path}: {_by(mine)} here, {_by(other)} there" for path, mine, other in self.shapes[:_SHOWN])
        return found


def cross_check(model: nn.Module, example: tuple[Any, ...], sites: Sequence[Site]) -> CrossCheck:
    """Export a copy of `model` without its weights, and compare its convolutions with `sites`."""
    calls = [s for s in sites if s.calls and not s.rewritten]
    rewritten = len({s.path for s in sites if s.rewritten})
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            inputs = mapped(example, partial(torch.zeros_like, device="cpu"))
            program = torch.export.export(hollow_copy(model).eval(), inputs)
    except Exception as error:
        return CrossCheck(len(calls), refusal=_cause(error))
    paths = {s.path.partition(":")[0] for s in calls}
    names, blocks = _first_names(model), _blocks(model)
    theirs: dict[str, list[Shape]] = {}
    for path, shape in _convolutions(program.graph):
        path = names.get(path, path)
        if not any(f"{path}.".startswith(f"{block}.") for block in blocks):
            theirs.setdefault(_site_path(path, paths), []).append(shape)
    ours: dict[str, list[Shape]] = {}
    for site in calls:
        ours.setdefault(site.path.partition(":")[0], []).append(site.out_shape)
    return replace(_compared(ours, theirs), rewritten=rewritten)


def _first_names(model: nn.Module) -> dict[str, str]:
    """path -> the first path of the same module; torch.export speaks of an alias by the name that was called."""
    first: dict[nn.Module, str] = {}
    return {path: first.setdefault(module, path) for path, module in model.named_modules(remove_duplicate=False)}


def _blocks(model: nn.Module) -> list[str]:
    """Paths of the modules that were put into the model, in place of others or beside them."""
    return [
        path
        for path, module in model.named_modules()
        if stand_of(module) is not None or path.rpartition(".")[2] in NAMES.values()
    ]


def _compared(ours: dict[str, list[Shape]], theirs: dict[str, list[Shape]]) -> CrossCheck:
    missing: list[str] = []
    extra: list[str] = []
    shapes: list[tuple[str, Shape, Shape]] = []
    for path in dict.fromkeys((*ours, *theirs)):
        mine, other = ours.get(path, []), theirs.get(path, [])
        more = len(mine) - len(other)
        missing.extend([path] * more)
        extra.extend([path] * -more)
        if not more and Counter(mine) != Counter(other):
            shapes.extend((path, a, b) for a, b in zip(mine, other, strict=True) if a != b)
    counts = [sum(map(len, side.values())) for side in (ours, theirs)]
    return CrossCheck(counts[0], counts[1], tuple(missing), tuple(extra), tuple(shapes))


def _convolutions(graph: torch.fx.Graph) -> Iterator[tuple[str, Shape]]:
    """(path of the module, output shape) of every convolution of an exported graph, in order."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith("conv"):
            stack = node.meta.get("nn_module_stack") or {}
            path = str(list(stack.values())[-1][0]) if stack else ""
            shape = tuple(int(n) for n in node.meta["val"].shape)
            yield path.removeprefix("L['self']").lstrip(".").partition("@")[0], shape


def _site_path(path: str, known: set[str]) -> str:
    """The site that the path is, or lies in (a convolution beside its block)."""
    parts = path.split(".")
    inside = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((p for p in inside if p in known), path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Failing exports write their graph to the terminal and their stack to the log."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _some(names: Sequence[str]) -> str:
    counted = Counter(names)
    shown = [name if n == 1 else f"{name} ({n} calls)" for name, n in counted.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))
