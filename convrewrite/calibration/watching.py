"""Run a model up to one module and look at what goes in and comes out there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.laws.case import quiet, seeded


class _ReachedError(Exception):
    """The last call of the watched module is done; the rest of the forward pass is not needed."""


@dataclass
class Seen:
    """Input and output of each call of a module in one forward pass."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def resting(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients and with fixed random numbers; afterwards as it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), seeded(), quiet():
            yield model.eval()
    finally:
        for module, training in flags:
            module.training = training


def watch(model: nn.Module, path: str, batch: Tensor, *, calls: int) -> Seen:
    """What the module at `path` sees and gives for one batch; the forward pass ends after its last call."""
    module, seen = model.get_submodule(path), Seen()

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        last = len(seen.outputs) == calls - 1  # what follows an earlier call may change the tensors in place
        seen.inputs.append(inputs[0] if last else inputs[0].clone())
        seen.outputs.append(output if last else output.clone())
        if len(seen.outputs) == calls:
            raise _ReachedError

    handle = module.register_forward_hook(hook)
    try:
        model(batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen


def order_of_calls(model: nn.Module, paths: Sequence[str], batch: Tensor) -> dict[str, int]:
    """Path -> calls in one forward pass, in the order of the first call; what is never called is left out."""
    found: dict[str, int] = {}
    handles = []
    for path in paths:

        def hook(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            found[path] = found.get(path, 0) + 1

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def norms_after(model: nn.Module, paths: Sequence[str], batch: Tensor) -> dict[str, nn.BatchNorm2d]:
    """Path -> the batch norm that takes the module's output as it is, where there is one."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, nn.BatchNorm2d] = {}
    handles = []
    for path in paths:

        def give(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            made[id(output)] = (path, output)

        handles.append(model.get_submodule(path).register_forward_hook(give))

    def take(module: nn.Module, inputs: Any) -> None:
        if inputs and id(inputs[0]) in made:
            assert isinstance(module, nn.BatchNorm2d)
            found[made[id(inputs[0])][0]] = module

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles.extend(norm.register_forward_pre_hook(take) for norm in norms)
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
