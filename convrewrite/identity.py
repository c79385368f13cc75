"""What a model is, apart from its weights: one hash that two builds of the same architecture share."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import ConvrewriteError
from convrewrite.plans import digest

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def identity(model: nn.Module) -> str:
    """SHA-256 over the architecture of `model`.

    Counted in: every module's path, class name, ``extra_repr()`` and public plain attributes (numbers,
    strings, tuples of them), which module is the same object as which, and the shape and dtype of every
    tensor of the state dict. Left out: values of tensors, train or eval mode, devices, hooks.
    """
    first: dict[int, str] = {}
    modules = []
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), path)
        modules.append([path, known] if known != path else [path, *_describe(module)])
    return digest({"modules": modules, "state": state_signature(model)})


def check_module(model: Any) -> None:
    """Refuse what is given in place of a module, such as all that `rewrite` returned.

    Raises:
        ConvrewriteError: `model` is no nn.Module.
    """
    if isinstance(model, nn.Module):
        return
    fix = "build it first"
    if isinstance(model, torch.export.ExportedProgram):
        fix = "give convrewrite.sources.exported.from_program(program)"
    elif isinstance(getattr(model, "model", None), nn.Module):
        fix = "give its .model"
    raise ConvrewriteError(f"model is {type(model).__name__}, not an nn.Module", fix=fix)


def state_signature(model: nn.Module) -> dict[str, list[Any]]:
    """``{key: [shape, dtype]}`` of the state dict; ``[[], "object"]`` for what is not a tensor."""
    return {
        key: [list(value.shape), str(value.dtype)] if isinstance(value, Tensor) else [[], "object"]
        for key, value in model.state_dict().items()
    }


def _describe(module: nn.Module) -> list[Any]:
    attributes = {
        name: _plain(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    return [type(module).__qualname__, _ADDRESS.sub("", module.extra_repr()), attributes]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    """JSON for one attribute; a float is written apart from an int, a tuple is a list."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return repr(float(value)) + "f" if isinstance(value, float) else value
