"""Whether a rule found what it was expected to find: `expect` in a rule file, and the wishes of its own `tests`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convrewrite.errors import RuleError
from convrewrite.plans import Refusal
from convrewrite.ruleschema import Expect, Rule
from convrewrite.rulevalues import Wish
from convrewrite.selectors.wanted import name_test
from convrewrite.sites import Site

NEAREST = 3


@dataclass(frozen=True)
class Judgement:
    """One wish of a test against what was found.

    Attributes:
        wanted: the wish as text. matched: paths found and wanted. missing: wanted and not found; of a
            mere count, "2 more". noisy: found and not wanted; of a mere count the last ones.
    """

    wanted: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing missing, nothing noisy."""
        return not self.missing and not self.noisy

    def __str__(self) -> str:
        text = f"{len(self.matched)} matched, wanted {self.wanted}"
        for word, items in (("missing", self.missing), ("noisy", self.noisy)):
            text += f"; {word}: {', '.join(items)}" if items else ""
        return text


def judge(found: Sequence[str], wish: Wish) -> Judgement:
    """Compare the site ids a rule found, in forward order, with what a test wants."""
    if wish.count is None:
        wanted, seen = set(wish.paths), set(found)
        return Judgement(
            ", ".join(wish.paths) or "none",
            tuple(path for path in found if path in wanted),
            tuple(path for path in dict.fromkeys(wish.paths) if path not in seen),
            tuple(path for path in found if path not in wanted),
        )
    count = wish.count
    most = len(found) if count.most is None else count.most
    lacking = count.least - len(found)
    missing = (f"{lacking} more",) if lacking > 0 else ()
    return Judgement(str(count), tuple(found[:most]), missing, tuple(found[most:]))


def unmet(
    rule: Rule, where: str, found: Sequence[Site], steps: Sequence[tuple[str, int]], refused: Iterable[Refusal]
) -> list[str]:
    """A line for every part of the rule's `expect` that does not hold, with the funnel and the nearest misses."""
    lines = []
    if not rule.expect.sites.fits(len(found)):
        what = f"{_sites(len(found))}, expected {rule.expect.sites}: {funnel_text(steps)}"
        fix = f"nearest: {near}" if len(found) < rule.expect.sites.least and (near := nearest(refused)) else None
        lines.append(str(RuleError(f"rule '{rule.id}': {what}", where=where, fix=fix)))
    return lines + [str(RuleError(f"rule '{rule.id}': {what}", where=where)) for what in _misplaced(rule.expect, found)]


def unmet_in_all(expect: Expect, where: str, found: Sequence[Site]) -> list[str]:
    """The same for the `expect` of a whole file."""
    lines = list(_misplaced(expect, found))
    if not expect.sites.fits(len(found)):
        lines.insert(0, f"all rules together: {_sites(len(found))}, expected {expect.sites}")
    return [str(RuleError(line, where=where)) for line in lines]


def funnel_text(steps: Sequence[tuple[str, int]]) -> str:
    """``53 convs > 16 role bottleneck_spatial > 0 groups 1``, up to the first step that leaves nothing."""
    shown: list[str] = []
    for label, count in steps:
        shown.append(f"{count} {label}")
        if count == 0:
            break
    return " > ".join(shown)


def nearest(refused: Iterable[Refusal]) -> str:
    """The sites that fewest clauses reject, first ones first."""
    own = ("pick", "claimed", "rewritten")
    misses = sorted((r for r in refused if r.clause not in own), key=lambda r: (r.failed, r.site.index))
    misses = [miss for miss in misses if miss.failed == misses[0].failed]
    return ", ".join(f"{r.site.id} ({r.reason})" for r in misses[:NEAREST])


def _sites(count: int) -> str:
    return f"{count} site{'' if count == 1 else 's'}"


def _misplaced(expect: Expect, found: Sequence[Site]) -> Iterable[str]:
    stages = {site.stage for site in found}
    if expect.stages is not None and stages != set(expect.stages):
        seen = ", ".join(sorted(str(stage) for stage in stages)) or "none"
        yield f"sites in stages {seen}, expected {', '.join(map(str, sorted(expect.stages))) or 'none'}"
    for pattern in expect.includes:
        if not any(_fits(pattern, site) for site in found):
            yield f"no site is '{pattern}', which 'includes' asks for"
    for pattern in expect.excludes:
        if hits := [site.id for site in found if _fits(pattern, site)]:
            yield f"{hits[0]} is '{pattern}', which 'excludes' forbids"


def _fits(pattern: str, site: Site) -> bool:
    test = name_test(pattern)
    return test(site.path) or test(site.id)
