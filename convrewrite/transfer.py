"""What became of every tensor: carried, absorbed, new or dropped."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from convrewrite.editing import Edited
from convrewrite.reports import TensorFate


def fates(original: nn.Module, edited: Edited, *, measured: Collection[str] = ()) -> tuple[TensorFate, ...]:
    """The fate of every entry of both state dicts, in the order of the new one, the dropped ones last.

    Args:
        measured: keys of the new state dict whose values were measured again (batch-norm statistics).
    """
    old, new = original.state_dict(), edited.model.state_dict()
    source = {key: name for name, keys in edited.moved.items() for key in keys}
    parameters = {n for n, _ in original.named_parameters(remove_duplicate=False)}
    parameters |= {n for n, _ in edited.model.named_parameters(remove_duplicate=False)}
    found = []
    for name, tensor in new.items():
        came = source.get(name, "")
        fate = ("re-estimated" if name in measured else "carried") if came else "new"
        found.append(_fate(name, came, fate, tensor, parameters, _owner(name, edited.touched)))
    for name, tensor in old.items():
        if not edited.moved.get(name):
            edit = _owner(name, edited.touched)
            fate = "absorbed" if edit in edited.absorbing else "dropped"
            found.append(_fate(name, name, fate, tensor, parameters, edit))
    return tuple(found)


def _fate(name: str, source: str, fate: str, tensor: Tensor, parameters: set[str], edit: str) -> TensorFate:
    norm = 0.0
    if not tensor.is_meta and tensor.numel():
        norm = float(tensor.detach().double().norm() if tensor.numel() < 4096 else tensor.detach().float().norm())
    return TensorFate(name, source, fate, tensor.numel(), norm, name in parameters, edit)  # type: ignore[arg-type]


def _owner(name: str, touched: dict[str, str]) -> str:
    """The edit whose module path is the longest prefix of the key."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        found = touched.get(".".join(parts[:length]))
        if found:
            return found
    return ""
