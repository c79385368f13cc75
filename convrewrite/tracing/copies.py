"""Copies of a model: one that shares its parameters, one without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import CaptureError
from convrewrite.sources.examples import tensors_in
from convrewrite.tracing.regions import first_line

_MODULE_FIELDS = ("_parameters", "_buffers", "_modules")


def light_copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters and owns its buffers and everything else."""
    return _copy(model, parameter=lambda t: t, buffer=lambda t: t.detach().clone())


def hollow_copy(model: nn.Module, *, on_meta: bool = False) -> nn.Module:
    """A deep copy without values: meta tensors, or zeros that take no memory."""
    hollow = meta if on_meta else zeros
    return _copy(model, parameter=partial(_hollow, change=hollow), buffer=hollow)


def meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def zeros(tensor: Tensor) -> Tensor:
    """Zeros of that shape that take the memory of one number."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def filled(tensor: Tensor, *, device: torch.device) -> Tensor:
    """The tensor on the device, a meta tensor as zeros."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)


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
            f"the model cannot be deep-copied: {first_line(error)}", where=type(model).__name__
        ) from error
    for module in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = vars(module).get(name) or {}
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):  # weight_norm's hook computes the weight
                    del hooks[key]
    return twin


def _hollow(tensor: Tensor, *, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A parameter of the same shape and dtype without its values."""
    return nn.Parameter(change(tensor.detach()), requires_grad=tensor.requires_grad)
