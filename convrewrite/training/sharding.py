"""Parameters, gradients and optimizer state spread over the processes (FSDP), and whole copies of them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from convrewrite.errors import ConvrewriteError

LEAST = 2**20
"""Parameters from which on a child of a sequence is gathered on its own, when its turn comes."""


def spread(model: nn.Module, device: torch.device, *, apart: bool) -> None:
    """Spread the parameters of `model` over all processes, in place, by torch's `fully_shard`.

    Each large child of a sequence (a stage, a residual block) is gathered when it runs and let go after it; the rest
    is gathered for the whole step.

    Args:
        apart: parts of `model` are also called by themselves in its forward: all is gathered for the whole step.

    Raises:
        ConvrewriteError: a parameter has no dimension to split.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            fix = "launch without FSDP (one whole model in each process)"
            raise ConvrewriteError("FSDP cannot split a parameter without dimensions", where=name, fix=fix)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [] if apart else _units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _units(model: nn.Module) -> list[nn.Module]:
    """The large children of the outermost sequences; none if modules or parameters are shared between places."""
    places = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    if any(count > 1 for count in places.values()):
        return []
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and module not in inside:
            inside.update(module.modules())
            found += [child for child in module if sum(p.numel() for p in child.parameters()) >= LEAST]
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module) -> None:
    """Copy a spread `model` into its whole twin; every process has to ask.

    Buffers (batch statistics) are those of the first process, in both.
    """
    values = model.state_dict()
    for name, kept in into.state_dict().items():
        value = values[name]
        if not isinstance(value, DTensor):
            dist.broadcast(value, 0)
        kept.copy_(whole(value))


class WholeState:
    """The state of an optimizer over spread parameters, as that of one over whole ones."""

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._state: Mapping[str, Any] = {}

    def attach(self, optimizer: Any) -> None:
        """Give `optimizer` the state that was loaded, if any; every process has to."""
        self._optimizer = optimizer
        if not self._state:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {name: _like(value, parameters[index]) for name, value in entries.items()}
            for index, entries in self._state["state"].items()
        }
        optimizer.load_state_dict({**self._state, "state": state})

    def gather(self) -> None:
        """Make `state_dict` give what the optimizer has now; every process has to ask."""
        state: dict[str, Any] = self._optimizer.state_dict()
        entries = {
            index: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in one.items()}
            for index, one in state["state"].items()
        }
        self._state = {**state, "state": entries}

    def state_dict(self) -> Mapping[str, Any]:
        """What `gather` found."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold `state` for `attach`."""
        self._state = state


def _like(value: Any, parameter: Tensor) -> Any:
    """`value` spread as `parameter` is, if it is one number for each of its elements."""
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
