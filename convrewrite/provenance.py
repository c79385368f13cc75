"""What a rewritten model remembers of its making: the plan, what it was before, and where that came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from convrewrite.plans import Plan

_ATTRIBUTE = "_convrewrite"  # a plain attribute: not in the state dict, and copied with the module


_FUSED = "_convrewrite_fused"


@dataclass(frozen=True)
class Since:
    """What was done to a model after its rewrite, beside changing the values of tensors.

    Attributes:
        finalized: module paths of the blends that became their blocks.
        head: (module path, classes) of a classifier that was exchanged for a new one; None if it was not.
        steps: optimizer steps of training.
    """

    finalized: tuple[str, ...] = ()
    head: tuple[str, int] | None = None
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what `since_from` reads."""
        head = None if self.head is None else list(self.head)
        return {"finalized": list(self.finalized), "head": head, "steps": self.steps}


def since_from(data: Mapping[str, Any] | None) -> Since:
    """A `Since` from its `to_dict`; None and {} are a model that was left as the rewrite made it."""
    if not data:
        return Since()
    head = data["head"]
    return Since(tuple(data["finalized"]), None if head is None else (str(head[0]), int(head[1])), int(data["steps"]))


@dataclass(frozen=True)
class Provenance:
    """The making of one rewritten model.

    Attributes:
        plan: what was done.
        identity: `convrewrite.identity.identity` of the model before the rewrite.
        source: recipe that builds that model again; None if it was given as an object.
        since: what was done to it afterwards.
    """

    plan: Plan
    identity: str
    source: Mapping[str, Any] | None = None
    since: Since = Since()

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        return self  # it is immutable, and a plan can be large


def attach(
    model: nn.Module, *, plan: Plan, identity: str, source: Mapping[str, Any] | None = None, since: Since | None = None
) -> None:
    """Note on the rewritten `model` how it was made.

    Args:
        identity: of the model before this rewrite.
        source: recipe of that model. If left out and it was itself rewritten (the copy still carries the
            note), the earlier plan becomes part of the recipe.
        since: what was done after the rewrite; nothing by default.
    """
    if source is None:
        source = recipe_of(model)
    setattr(model, _ATTRIBUTE, Provenance(plan, identity, source, since or Since()))


def note_plan(model: nn.Module, plan: Plan) -> None:
    """Note on a rewritten `model` the plan as it was carried out, in place of the one that it was made with."""
    note = of(model)
    if note is not None:
        setattr(model, _ATTRIBUTE, replace(note, plan=plan))


def note_since(model: nn.Module, since: Since) -> None:
    """Note on a rewritten `model` what was done to it since; nothing on a model that was never rewritten."""
    note = of(model)
    if note is not None:
        setattr(getattr(model, "_orig_mod", model), _ATTRIBUTE, replace(note, since=since))


def of(model: nn.Module) -> Provenance | None:
    """The note on `model`, None if it was never rewritten. A ``torch.compile`` wrapper is looked through."""
    note = getattr(getattr(model, "_orig_mod", model), _ATTRIBUTE, None)
    return note if isinstance(note, Provenance) else None


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """Recipe that replays the making of a rewritten `model`, None if it was never rewritten."""
    note = of(model)
    if note is None:
        return None
    recipe = {
        "kind": "rewritten",
        "name": note.plan.model,
        "base": None if note.source is None else dict(note.source),
        "identity": note.identity,
        "plan": note.plan.to_dict(),
    }
    return recipe if note.since == Since() else {**recipe, "since": note.since.to_dict()}


def mark_fused(model: nn.Module) -> None:
    """Note on `model` that `convrewrite.fuse` made it: no plan leads to what it is."""
    setattr(model, _FUSED, True)


def is_fused(model: nn.Module) -> bool:
    """Whether `convrewrite.fuse` made `model`."""
    return bool(vars(getattr(model, "_orig_mod", model)).get(_FUSED))
