"""Law `start`: a rewrite that claims an exact start gives the original's output, up to rounding, in both modes."""

from __future__ import annotations

from convrewrite.laws import LAWS
from convrewrite.laws.case import Case
from convrewrite.reports import LawResult

AMPLIFIED = {"eval": 1e2, "train": 1e4}
"""Rounding that a network makes larger than so many tolerances is not held to be a start. Batch norms that see a few
pixels make much of it: a ResNet-152 a thousand times, on two images of 64 x 64."""
WORST = 0.1


@LAWS.register("start")
def start(case: Case) -> LawResult:
    """The worst relative drift over both modes against the dtype's tolerance.

    A network can make the rounding of a block that holds a convolution larger than that. Then the tolerance has to
    hold for its parts: for each such block against its convolution, and for the network with all of them exchanged.
    """
    worst = max(case.drift(), key=lambda d: d.max_relative if d.max_relative == d.max_relative else float("inf"))
    claimed = sum(1 for e in case.plan.edits if e.start == "exact")
    if not case.exact:
        detail = f"{len(case.plan.edits) - claimed} of {len(case.plan.edits)} edits do not claim an exact start"
        return LawResult("start", "skipped", f"{detail}; drift {worst.max_relative:.3g}", worst.max_relative)
    held = worst.max_relative <= case.tolerance
    detail = f"relative drift {worst.max_relative:.3g} in {worst.mode} mode, allowed {case.tolerance:.3g}"
    if not held and all(d.max_relative <= min(AMPLIFIED[d.mode] * case.tolerance, WORST) for d in case.drift()):
        held, detail = _by_parts(case, detail)
    return LawResult("start", "held" if held else "broken", detail, worst.max_relative)


def _by_parts(case: Case, detail: str) -> tuple[bool, str]:
    parts = [case.by_parts(d.mode) for d in case.drift() if not d.max_relative <= case.tolerance]
    found = [p for p in parts if p is not None]
    if len(found) < len(parts):
        return False, detail
    block, rest = (max(p[i] for p in found) for i in (0, 1))
    held = block <= case.tolerance and rest <= case.tolerance
    return held, f"{detail}; each block is within {block:.3g} of its convolution, the rest within {rest:.3g}"
