"""The tensors of a model in one safetensors file: shared ones once, with a note of who shares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.errors import StoreError


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """``{key: earlier key}`` for every state-dict key whose tensor is, element for element, an earlier one's."""
    first: dict[object, str] = {}
    aliases = {}
    for key, value in _state(model).items():
        owner = first.setdefault(_place_in_memory(value), key)
        if owner != key:
            aliases[key] = owner
    return aliases


def write_tensors(model: nn.Module, path: Path) -> None:
    """Write the state dict of `model`, whatever its devices, strides and dtypes.

    Raises:
        StoreError: a tensor has no values (meta device) or cannot be written without pickling.
    """
    from safetensors.torch import save_file

    aliases = shared_tensors(model)  # the only metadata: the order of several would differ from run to run
    tensors = {key: _writable(key, value) for key, value in _state(model).items() if key not in aliases}
    path.touch()
    mode = path.stat().st_mode  # safetensors makes its files private; this one is as readable as its neighbours
    try:
        save_file(tensors, path, metadata={"aliases": json.dumps(aliases, sort_keys=True)})
    except (KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"a tensor cannot be written: {error}".splitlines()[0], where=str(path)) from error
    path.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(all keys with their tensors on the CPU, the aliases) of a file of `write_tensors`.

    Raises:
        StoreError: the file is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        aliases = json.loads(notes["aliases"])
        return tensors | {key: tensors[owner] for key, owner in aliases.items()}, aliases
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise StoreError("the tensors cannot be read", where=str(path), fix="save the model again") from error


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into `model` bit for bit; a tensor of another dtype changes the model's, in place.

    In place, so that tensors that are shared, or known to an optimiser, stay so.

    Raises:
        StoreError: a key is missing or unexpected, or a shape differs.
    """
    from convrewrite.weights import load_exactly

    state = _state(model)
    for key in [*state, *tensors]:
        if key not in tensors or key not in state:
            raise StoreError(f"tensor '{key}' is only in the {'model' if key in state else 'file'}")
        if state[key].shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(state[key].shape)} in the model"
            raise StoreError(f"tensor '{key}' is {shapes}")
    for key, value in state.items():
        if 0 in value.stride() and value.numel() > 1:  # expanded: several elements in one place cannot be written
            value.data = value.data.contiguous()
        if value.dtype != tensors[key].dtype:
            value.data = value.data.to(tensors[key].dtype)
    with torch.no_grad():
        load_exactly(model, tensors)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)  # the tensors themselves, not new views of them
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise StoreError(f"the extra state '{key}' is no tensor, and objects are not saved")
    return dict(state)


def _place_in_memory(tensor: Tensor) -> object:
    if tensor.numel() == 0 or tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    start = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()
    return (start, str(tensor.device), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _writable(key: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise StoreError(f"tensor '{key}' has no values (it is on the meta device)", fix="build the model with weights")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise StoreError(f"tensor '{key}' is {kind} and cannot be saved")
    value = tensor.detach().cpu().contiguous()
    # A view on a larger storage would be taken for a shared tensor.
    return value.clone() if value.untyped_storage().nbytes() != value.numel() * value.element_size() else value
