"""Law `start`: a rewrite that claims an exact start gives the original's output, up to rounding, in both modes."""

from __future__ import annotations

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case
from convrewrite.reports import LawResult

AMPLIFIED = 4
"""Where blocks hold convolutions, a drift may be this many times what the original makes of one rounding itself."""


@LAWS.register("start")
def start(case: Case) -> LawResult:
    """The worst relative drift over both modes against the dtype's tolerance."""
    worst = max(case.drift(), key=lambda d: d.max_relative if d.max_relative == d.max_relative else float("inf"))
    claimed = sum(1 for e in case.plan.edits if e.start == "exact")
    if not case.exact:
        detail = f"{len(case.plan.edits) - claimed} of {len(case.plan.edits)} edits do not claim an exact start"
        return LawResult("start", "skipped", f"{detail}; drift {worst.max_relative:.3g}", worst.max_relative)
    allowed = case.tolerance
    if worst.max_relative > allowed and case.holding:
        allowed = max(allowed, AMPLIFIED * case.amplified(worst.mode))
    held = worst.max_relative <= allowed
    detail = f"relative drift {worst.max_relative:.3g} in {worst.mode} mode, allowed {allowed:.3g}"
    return LawResult("start", "held" if held else "broken", detail, worst.max_relative)
