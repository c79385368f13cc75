"""Every rule against every site: which sites each rule takes, and for every other one the clause that rejects it.

All rules look at the original sites, so their order matters only for who owns a site. Pure data in and
out; nothing here knows blocks, costs or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convrewrite.clauses import first_reason
from convrewrite.errors import RuleError
from convrewrite.expectations import unmet_in_all
from convrewrite.plans import Funnel, Refusal
from convrewrite.rulefile import load_rules
from convrewrite.ruleschema import RuleFile
from convrewrite.rulesearch import Candidate, RuleSearch, compile_match, failed_clauses, insertion_point
from convrewrite.selectors.base import Context
from convrewrite.sites import Site

__all__ = ["Candidate", "MatchResult", "correct_roles", "insertion_point", "match", "search", "select", "sites_by_rule"]


@dataclass(frozen=True)
class MatchResult:
    """What the rules of one file find.

    Attributes:
        candidates: in rule order, then forward order.
        refused: every other site of every rule, with the reason.
        funnels: one per rule; `edits` counts the candidates so far.
        unmet: an error line for every `expect` that does not hold.
        notes: what is odd but no error, such as an `exclude` that excludes nothing.
    """

    candidates: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]
    funnels: tuple[Funnel, ...]
    unmet: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def match(sites: Sequence[Site], file: RuleFile, claimed: Mapping[str, str] | None = None) -> MatchResult:
    """What the rules find; an `expect` that does not hold is a RuleError, a line for each.

    Args:
        sites: of the whole network, in forward order, roles already corrected.
        claimed: site id -> "file/rule" for sites that earlier files replace.

    Raises:
        RuleError: an unmet `expect`; a shared module under ``shared: error``.
    """
    result = search(sites, file, claimed)
    if result.unmet:
        raise RuleError("\n".join(result.unmet))
    return result


def search(sites: Sequence[Site], file: RuleFile, claimed: Mapping[str, str] | None = None) -> MatchResult:
    """The same, with what is unmet told in the result and not raised."""
    file = load_rules(file)
    context = Context(sites, file.vars)
    owners = dict(claimed or {})
    searches = [RuleSearch(rule, file, context, owners) for rule in file.rules]
    failures = [line for one in searches for line in one.failures]
    if failures:
        raise RuleError("\n".join(failures))
    all_unmet = [line for one in searches for line in one.unmet]
    if file.expect:
        all_unmet += unmet_in_all(file.expect, file.name, [site for one in searches for site in one.effective])
    return MatchResult(
        candidates=tuple(c for one in searches for c in one.candidates),
        refused=tuple(r for one in searches for r in one.refused),
        funnels=tuple(Funnel(one.name, tuple(one.steps), len(one.candidates)) for one in searches),
        unmet=tuple(all_unmet),
        notes=(*file.notes, *(note for one in searches for note in one.notes)),
    )


def sites_by_rule(sites: Sequence[Site], file: RuleFile) -> dict[str, tuple[str, ...]]:
    """Rule id -> ids of the sites it takes, whatever `expect` says: what a file's own `tests` look at."""
    result = search(correct_roles(sites, file), file)
    return {rule.id: tuple(c.site.id for c in result.candidates if c.rule.id == rule.id) for rule in file.rules}


def select(sites: Sequence[Site], data: Mapping[str, Any], where: str = "--select") -> tuple[list[Site], list[Refusal]]:
    """The sites that one match fits, and why the others do not; for tables, so any kind of convolution may fit.

    Raises:
        RuleError: the match is wrong; a line per problem.
    """
    clauses = compile_match(dict(data), where, {}, {})
    context = Context(sites)
    fitting, refused = [], []
    for site in sites:
        failed = failed_clauses(clauses, site, context)
        if failed:
            refused.append(Refusal(site, where, failed[0][0].key, failed[0][1], len(failed)))
        else:
            fitting.append(site)
    return fitting, refused


def correct_roles(sites: Sequence[Site], file: RuleFile) -> tuple[Site, ...]:
    """The sites with the file's `roles` corrections made; all corrections look at the roles as found.

    Raises:
        RuleError: a correction that fits no site.
    """
    context = Context(sites, file.vars)
    corrected = list(sites)
    idle = []
    for index, correction in enumerate(file.roles):
        clauses = compile_match(correction.match, file.name, file.selectors, file.vars)
        fitting = [i for i, site in enumerate(sites) if first_reason(clauses, site, context) is None]
        for i in fitting:
            corrected[i] = replace(corrected[i], role=correction.role)
        if not fitting:
            labels = ", ".join(clause.label for clause in clauses)
            idle.append(f"{file.name}: roles[{index}]: no site is {labels}; nothing to call {correction.role}")
    if idle:
        raise RuleError("\n".join(idle))
    return tuple(corrected)
