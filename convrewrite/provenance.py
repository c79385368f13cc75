"""What a rewritten model remembers of its making: the plan, what it was before, and where that came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convrewrite.plans import Plan

_ATTRIBUTE = "_convrewrite"  # a plain attribute: not in the state dict, and copied with the module


@dataclass(frozen=True)
class Provenance:
    """The making of one rewritten model.

    Attributes:
        plan: what was done.
        identity: `convrewrite.identity.identity` of the model before the rewrite.
        source: recipe that builds that model again; None if it was given as an object.
    """

    plan: Plan
    identity: str
    source: Mapping[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self  # it is immutable, and a plan can be large


def attach(model: nn.Module, *, plan: Plan, identity: str, source: Mapping[str, Any] | None = None) -> None:
    """Note on the rewritten `model` how it was made.

    Args:
        identity: of the model before this rewrite.
        source: recipe of that model. If left out and it was itself rewritten (the copy still carries the
            note), the earlier plan becomes part of the recipe.
    """
    if source is None:
        source = recipe_of(model)
    setattr(model, _ATTRIBUTE, Provenance(plan, identity, source))


def of(model: nn.Module) -> Provenance | None:
    """The note on `model`, None if it was never rewritten. A ``torch.compile`` wrapper is looked through."""
    note = getattr(getattr(model, "_orig_mod", model), _ATTRIBUTE, None)
    return note if isinstance(note, Provenance) else None


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """Recipe that replays the making of a rewritten `model`, None if it was never rewritten."""
    note = of(model)
    if note is None:
        return None
    return {
        "kind": "rewritten",
        "name": note.plan.model,
        "base": None if note.source is None else dict(note.source),
        "identity": note.identity,
        "plan": note.plan.to_dict(),
    }
