"""Parameter groups of a rewritten model: what is new, fitted and carried; plain PyTorch, for any loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from convrewrite import provenance
from convrewrite.blocks.blend import Blend
from convrewrite.identity import check_module
from convrewrite.inserting import NAMES
from convrewrite.stands import Stand, stand_of
from convrewrite.training.solving import is_solved

HOLDS = "holds the conv"
KINDS = ("new", "fitted", "carried")
_NEVER_DECAYED = re.compile(r"(^|_)(bias|gate|gamma|rate\d*|rel|embedding|position)(_|$)")
"""Names of gates and of tables of relative positions: a pull to zero would fight what they are for."""


@dataclass(frozen=True)
class TrainableSummary:
    """How many parameters of each kind a model has. `str()` is a table.

    Attributes:
        trained: kind -> elements that take gradients. frozen: kind -> elements that do not.
    """

    trained: dict[str, int]
    frozen: dict[str, int]

    def __str__(self) -> str:
        rows = [f"{kind:<8}{self.trained[kind]:>14,} trained{self.frozen[kind]:>14,} frozen" for kind in KINDS]
        return "\n".join([*rows, f"{'total':<8}{sum(self.trained.values()):>14,} trained"])


def param_groups(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    new_multiplier: float = 10.0,
    fitted_multiplier: float = 1.0,
    weight_decay: float = 0.05,
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer: every trainable parameter of `model` in exactly one of them.

    Args:
        lr: learning rate of what was carried over from the original.
        new_multiplier: times `lr` for blocks that start fresh or behind a gate, and for the gates.
        fitted_multiplier: times `lr` for blocks that hold the convolution's weights.
        weight_decay: of all but gates, biases, norms and tables of relative positions, which get 0.

    Returns:
        Up to six dicts with ``params``, ``lr``, ``weight_decay``, ``name`` ("new", "new, no decay", ...) and
        ``names`` (of the parameters). A model that was never rewritten is carried as a whole.
    """
    rates = {"new": lr * new_multiplier, "fitted": lr * fitted_multiplier, "carried": lr}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for kind in KINDS:
        for decays in (True, False):
            groups[kind, decays] = {
                "params": [],
                "lr": rates[kind],
                "weight_decay": weight_decay if decays else 0.0,
                "name": kind if decays else f"{kind}, no decay",
                "names": [],
            }
    kinds = kinds_of(model)
    for name, parameter, decays in _decaying(model):
        if parameter.requires_grad:
            group = groups[kinds[name], decays]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Elements of the parameters of `model` by kind, trained and frozen."""
    trained, frozen = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    kinds = kinds_of(model)
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[kinds[name]] += parameter.numel()
    return TrainableSummary(trained, frozen)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Parameter name -> "new", "fitted" or "carried". The innermost edit above a parameter decides."""
    check_module(model)
    plain = getattr(model, "_orig_mod", model)
    edits = _edits(plain)
    found = dict.fromkeys((name for name, _ in plain.named_parameters(remove_duplicate=False)), "carried")
    for path, module in plain.named_modules(remove_duplicate=False):  # parents come before their children
        inner = _kind_below(path, module, edits)
        for below, kind in inner.items():
            for name in found:
                if name == below or name.startswith(f"{below}.") or not below:
                    found[name] = kind
    head = (note.since.head if (note := provenance.of(plain)) else None) or ("",)
    for name in found:
        if head[0] and name.startswith(f"{head[0]}."):
            found[name] = "new"
    prefix = "_orig_mod." if plain is not model else ""
    return {prefix + name: kind for name, kind in found.items()}


def _kind_below(path: str, module: nn.Module, edits: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Path below which parameters are of a kind, as far as `module` itself says so."""
    stem = f"{path}." if path else ""
    if isinstance(module, Blend):
        stand = stand_of(module)
        kind = "fitted" if is_solved(module) else _kind(stand, edits)
        return {f"{stem}conv": "carried", f"{stem}block": kind, f"{stem}gate": "new"}
    if (stand := stand_of(module)) is not None:
        whole = _whole_convolution(module, stand) if edits.get(stand.edit, ("", ""))[1] == HOLDS else None
        if whole is not None:
            return {path: "new", f"{stem}{whole}": "carried"}  # what is added to it gives nothing yet
        return {path: _kind(stand, edits)}
    return {f"{stem}{name}": "new" for name in NAMES.values() if name in module._modules}


def _whole_convolution(block: nn.Module, stand: Stand) -> str | None:
    """Name of the child of `block` that is the replaced convolution, unchanged, if it has one."""
    old = stand.conv
    wanted = (old.in_channels, old.out_channels, old.kernel, old.groups)
    convolutions = ((name, child) for name, child in block.named_children() if isinstance(child, nn.Conv2d))
    for name, child in convolutions:
        if (child.in_channels, child.out_channels, child.kernel_size, child.groups) == wanted:
            return name
    return None


def _kind(stand: Stand | None, edits: dict[str, tuple[str, str]]) -> str:
    start, how = edits.get(stand.edit, ("", "")) if stand is not None else ("", "")
    return "fitted" if start == "fitted" or how == HOLDS else "new"


def _edits(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Edit id -> (start, how), of all rewrites of the model, the last one winning."""
    note = provenance.of(model)
    if note is None:
        return {}
    found: dict[str, tuple[str, str]] = {}
    recipe: Any = note.source
    while recipe and recipe.get("kind") == "rewritten":
        for edit in recipe["plan"]["edits"]:
            found.setdefault(edit["id"], (edit["start"], edit["how"]))
        recipe = recipe["base"]
    return found | {edit.id: (edit.start, edit.how) for edit in note.plan.edits}


def _decaying(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, whether weight decay is good for it); a shared parameter once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim > 1 and not _NEVER_DECAYED.search(name)
            yield (f"{path}.{name}" if path else name), parameter, decays
