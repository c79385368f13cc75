"""Law `portable`: the state dict loads strictly into a second application of the same plan, with the same output."""

from __future__ import annotations

import torch

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case, tensors_of
from convrewrite.reports import LawResult


@LAWS.register("portable")
def portable(case: Case) -> LawResult:
    """Apply again, load, compare keys and eval outputs bit for bit."""
    twin = case.again()
    state = case.rewritten.state_dict()
    fresh = twin.state_dict()
    if list(fresh) != list(state):
        odd = next(k for k in (*state, *fresh) if (k in state) != (k in fresh)) if set(state) != set(fresh) else "order"
        return LawResult("portable", "broken", f"the state dicts' keys differ: {odd}")
    twin.load_state_dict(state, strict=True)
    pairs = zip(tensors_of(case.outputs["eval"][1]), tensors_of(case.run(twin, training=False)), strict=True)
    if not all(torch.equal(a, b) or bool((a != a).all()) for a, b in pairs):
        return LawResult("portable", "broken", "the reloaded model gives another output")
    return LawResult("portable", "held", f"{len(state)} tensors load into a second application")
