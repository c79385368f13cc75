"""Law `stable`: planning the same rules on the rewritten model finds nothing to do."""

from __future__ import annotations

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case
from convrewrite.reports import LawResult


@LAWS.register("stable")
def stable(case: Case) -> LawResult:
    """Plan again."""
    again = case.replan(case.rewritten)
    if again is None:
        return LawResult("stable", "skipped", "the plan came without its rules")
    if again.edits:
        return LawResult("stable", "broken", f"planning again would edit {again.edits[0].id}", len(again.edits))
    return LawResult("stable", "held", "planning again finds nothing to do", 0)
