"""Weights into a model: from a zoo by name, or from a local file that is never unpickled beyond tensors."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convrewrite.errors import ConvrewriteError, SourceError
from convrewrite.exportedfile import SUFFIX, ExportedFile

if TYPE_CHECKING:
    from convrewrite.sources import Source

ONNX = ".onnx"
_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", ".th", SUFFIX, ONNX)
_INSIDE = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3
_LIGHTNING = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
# torchvision's DenseNet files are older than its module names; their builder renames the keys in the same way.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def is_file(weights: str) -> bool:
    """True if `weights` is the path of a file rather than a name of weights in a zoo."""
    path = Path(weights)
    return path.suffix.lower() in _SUFFIXES or "/" in weights or os.sep in weights or path.is_file()


def refuse_onnx(where: str) -> SourceError:
    """Why a file of ONNX is neither a model nor weights."""
    fix = "name the model that it was exported from"
    return SourceError("ONNX files are not read: no converter knows what torch exports today", where=where, fix=fix)


def load_weights(model: nn.Module, spec: str, source: Source) -> tuple[str, ...]:
    """Load `spec` into `model`, all of it or nothing.

    Args:
        model: on the meta device it is only checked that a file fits.
        spec: ``DEFAULT`` or the name of weights of the model's zoo, or a file: a ``.safetensors``, or a
            ``torch.save`` of a state dict, alone or under ``state_dict``, ``model``, ``model_state_dict`` or
            ``state_dict_ema``, with or without the ``module.`` of DataParallel; or a checkpoint of Lightning, whose
            module may hold the model as an attribute (``model.``, ``net.``) beside others; or a ``.pt2``.
        source: where `model` came from.

    Returns:
        What was chosen among the contents of the file, a line each; nothing where there was no choice.

    Raises:
        SourceError: there are no such weights, they cannot be read, or they do not fit.
    """
    wanted = model.state_dict()
    notes: list[str] = []
    state = _of_attribute(read_state(Path(spec), notes), wanted, notes) if is_file(spec) else _of_zoo(spec, source)
    load_state(model, state, spec, source)
    return tuple(f"{spec}: {note}" for note in notes)


def load_state(model: nn.Module, state: Mapping[str, Tensor], spec: str, source: Source) -> None:
    """Load a state dict at hand, which came from `spec`, as `load_weights` does."""
    wanted = model.state_dict()
    state = _adapted(dict(state), wanted, model)
    _check_fit(state, wanted, spec, source)
    if not any(value.is_meta for value in wanted.values() if isinstance(value, Tensor)):
        load_exactly(model, state)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state`, which has precisely the keys of `model`, into it.

    The keys' version notes are the model's own: MNASNet refuses a state dict without them.
    """
    noted: Any = model.state_dict()
    for key, value in state.items():
        noted[key] = value
    model.load_state_dict(noted, strict=True)


def read_state(path: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The state dict in a file, freed of wrappings; tensors on the CPU.

    Args:
        notes: where it is said which of several state dicts was taken.

    Raises:
        SourceError: there is no such file, or it holds anything but tensors.
    """
    if not path.is_file():
        raise SourceError("there is no such file", where=str(path))
    suffix = path.suffix.lower()
    if suffix == SUFFIX:
        return ExportedFile(path).state_dict()
    if suffix == ONNX:
        raise refuse_onnx(str(path))
    found = _unwrapped(_read_safetensors(path) if suffix == ".safetensors" else _read_torch(path), notes)
    if not isinstance(found, Mapping) or not found:
        kind = "an empty dictionary" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise SourceError(f"this is {kind}, not a state dict", where=str(path))
    strange = [str(key) for key, value in found.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if strange:
        raise SourceError(f"these entries are not tensors: {_some(strange)}", where=str(path), fix="save a state dict")
    return dict(found)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"not a readable safetensors file ({_first_line(error)})", where=str(path)) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return _read_script(path, error) if "argparse.Namespace" in str(error) else _read_lightning(path, error)
    except Exception as error:  # truncated and foreign files end in any of a dozen exceptions
        if "TorchScript" in str(error):
            raise SourceError(
                "this is a TorchScript program, not a state dict",
                where=str(path),
                fix="save torch.jit.load(file).state_dict() instead",
            ) from error
        raise SourceError(f"not a readable checkpoint ({_first_line(error)})", where=str(path)) from error


def _read_script(path: Path, first: pickle.UnpicklingError) -> Any:
    """A checkpoint of timm's or torchvision's training scripts: its ``args`` are a Namespace, which is plain data.

    Of any other file the `first` error stands.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_tensors(path, str(error)) from error
    weights = _unwrapped(found)
    held = isinstance(weights, Mapping) and any(isinstance(value, Tensor) for value in weights.values())
    if not held or not isinstance(found.get("args"), argparse.Namespace):
        raise _not_only_tensors(path, str(first)) from first
    return found


def _read_lightning(path: Path, first: pickle.UnpicklingError) -> Any:
    """A checkpoint that holds, besides tensors and plain data, Lightning's dictionaries of settings: read as dicts.

    None of Lightning's code runs, nor need it be installed. Of any other file the `first` error stands.
    """
    stand_ins: list[Any] = [(dict, name) for name in _LIGHTNING]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_tensors(path, str(error)) from error
    if not isinstance(found, Mapping) or "pytorch-lightning_version" not in found:
        raise _not_only_tensors(path, str(first)) from first
    return found


def _of_attribute(state: dict[str, Tensor], wanted: Mapping[str, Any], notes: list[str]) -> dict[str, Tensor]:
    """The entries below one attribute, without its name, where exactly that gives the keys of the model.

    A Lightning module has the network as an attribute of any name, and metrics or losses as others.
    """
    keys = {key for key in wanted if not key.endswith("num_batches_tracked")}
    if not keys or keys <= state.keys():
        return state
    last = min(keys)
    fitting = {}
    for head in sorted(key.removesuffix(last) for key in state if key.endswith(f".{last}")):
        below = {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
        if keys <= below.keys() <= set(wanted):
            fitting[head] = below
    if not fitting:
        return state
    head, below = next(iter(fitting.items()))
    others, left = [f"'{other}'" for other in fitting if other != head], len(state) - len(below)
    if others:
        notes.append(f"the entries below '{head}' were taken; those below {_some(others)} would fit too")
    elif left or head not in (*_PREFIXES, *(a + b for a in _PREFIXES for b in _PREFIXES)):
        rest = f", {left} other{'s' * (left > 1)} left out" if left else ""
        notes.append(f"the entries below '{head}' were taken{rest}")
    return below


def _not_only_tensors(path: Path, message: str) -> SourceError:
    name = re.search(r"GLOBAL ([\w.]+)", message)
    if name is None:
        return SourceError("not a readable checkpoint", where=str(path), fix="save a state dict with torch.save")
    return SourceError(
        f"the file holds a pickled {name.group(1)}, and pickles are not loaded",
        where=str(path),
        fix="save only the tensors: torch.save(model.state_dict(), file)",
    )


def _unwrapped(found: Any, notes: list[str] | None = None) -> Any:
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inside = [key for key in _INSIDE if isinstance(found.get(key), Mapping)]
        if not inside:
            break
        if notes is not None and len(inside) > 1:
            others = _some([f"'{key}'" for key in inside[1:]])
            notes.append(f"the weights under '{inside[0]}' were taken; {others} is there too")
        found = found[inside[0]]
    return found


def _of_zoo(spec: str, source: Source) -> dict[str, Tensor]:
    from convrewrite.sources.base import SOURCES, one_line

    if source.recipe is None:
        raise SourceError(f"a module has no weights called '{spec}'", where=source.name, fix="give a file")
    try:
        return dict(SOURCES.get(source.recipe["kind"]).pretrained(source.recipe, spec))
    except ConvrewriteError:
        raise
    except Exception as error:  # the network, the hub, a full disk, a broken download
        raise SourceError(
            f"the weights '{spec}' could not be fetched ({one_line(error)})",
            where=source.name,
            fix="check the network, or give a local file with --weights",
        ) from error


def _adapted(state: dict[str, Tensor], wanted: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """`state` with its keys as the model spells them, as far as that is certain."""
    for prefix in _PREFIXES * 2:  # module._orig_mod. and _orig_mod.module. both occur
        if all(key.startswith(prefix) for key in state) and not all(key.startswith(prefix) for key in wanted):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    renamed = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    if len(renamed.keys() & wanted.keys()) > len(state.keys() & wanted.keys()):
        state = renamed
    absent = _absent_heads(model)
    state = {key: value for key, value in state.items() if not key.startswith(absent)}
    for key, value in wanted.items():  # batch norms had no such counter before torch 0.4.1
        if key.endswith("num_batches_tracked") and key not in state and isinstance(value, Tensor):
            state[key] = value
    return state


def _absent_heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of torchvision's training-only heads that the files have and `model` was built without."""
    heads: tuple[str, ...] = ()
    if getattr(model, "aux_logits", None) is False:
        heads += ("aux1.", "aux2.", "AuxLogits.")
    if getattr(model, "aux_classifier", model) is None:
        heads += ("aux_classifier.",)
    return heads


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Any], spec: str, source: Source) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and state[key].shape != getattr(wanted[key], "shape", None)]
    if not (missing or unexpected or reshaped):
        return
    asked = ((source.recipe or {}).get("options") or {}).get("num_classes")
    shapes = [f"{key} {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}" for key in reshaped]
    parts = [
        f"{len(found)} {label} ({_some(found)})"
        for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    raise SourceError(
        f"the weights do not fit {source.name}: {'; '.join(parts)}",
        where=spec,
        fix=_advice(missing + unexpected, {key: (state[key], wanted[key]) for key in reshaped}, asked),
    )


def _advice(keys: list[str], reshaped: Mapping[str, tuple[Tensor, Tensor]], asked: int | None) -> str:
    classes = {(theirs.shape[:1], ours.shape[:1]) for theirs, ours in reshaped.values()}
    rest = all(theirs.shape[1:] == ours.shape[1:] for theirs, ours in reshaped.values())
    if not keys and rest and len(classes) == 1 and len(reshaped) <= 2 and next(iter(classes))[0]:
        number = next(iter(classes))[0][0]
        if asked is not None:
            return f"--num-classes {asked} built the head: give {number}, or weights of {asked} classes"
        return f"build the head for these weights with --num-classes {number}"
    return "they are of another architecture, or of another build of this one"


def _some(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
