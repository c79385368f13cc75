"""Law `kept`: every tensor of the original is carried bit for bit, absorbed, or dropped by an edit that says so.

Batch-norm statistics that were measured again on calibration images are listed as re-estimated."""

from __future__ import annotations

import torch

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case
from convrewrite.reports import LawResult


@LAWS.register("kept")
def kept(case: Case) -> LawResult:
    """Look at every key of the original's state dict and compare values."""
    old, new = case.original.state_dict(), case.rewritten.state_dict()
    dropped = {t.name: t.edit for t in case.tensors if t.fate in ("dropped", "absorbed")}
    measured = {t.name for t in case.tensors if t.fate == "re-estimated"}
    may_drop = {e.id for e in case.plan.edits if e.action == "replace" and e.how != "blend"}
    for key, tensor in old.items():
        targets = [k for k in case.moved.get(key, ()) if k in new]
        if not targets:
            if dropped.get(key) in may_drop:
                continue
            return LawResult("kept", "broken", f"{key} is gone and no edit drops it")
        for target in targets:
            if target in measured and new[target].shape == tensor.shape:
                continue
            if new[target].shape != tensor.shape or not (tensor.is_meta or torch.equal(new[target], tensor)):
                return LawResult("kept", "broken", f"{key} is not the same at {target}")
    listed = {t.name for t in case.tensors if t.fate in ("carried", "re-estimated", "new")}
    unlisted = next((k for k in new if k not in listed), None)
    if unlisted:
        return LawResult("kept", "broken", f"{unlisted} is in the new state dict and in no list")
    carried = len(old) - len(dropped) - len(measured)
    again = f", {len(measured)} re-estimated" if measured else ""
    return LawResult("kept", "held", f"{carried} of {len(old)} tensors carried{again}, {len(dropped)} not")
