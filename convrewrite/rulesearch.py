"""One rule against all sites: clauses, shared modules, pick, claims, and what was rewritten before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from convrewrite.clauses import Clause, Clauses, Compiler, first_reason
from convrewrite.errors import RuleError
from convrewrite.expectations import unmet
from convrewrite.picking import pick
from convrewrite.plans import Refusal
from convrewrite.ruleschema import Rule, RuleFile
from convrewrite.selectors.base import Context
from convrewrite.sites import Site
from convrewrite.yamlfile import Problems

T = TypeVar("T")
Units = list[tuple[Site, ...]]


@dataclass(frozen=True)
class Candidate:
    """A site that a rule takes.

    Attributes:
        site: of a shared module its first matching call.
        calls: ids of all the sites that the one edit will change.
    """

    site: Site
    rule: Rule
    calls: tuple[str, ...]


class RuleSearch:
    """One rule against all sites, step by step; every step drops sites, with a reason, and is counted.

    A *unit* is what one edit would change: one call, or all calls of a module under ``shared: together``.

    Args:
        owners: site id -> "file/rule" that replaces it already; what this rule takes is added.

    Attributes:
        candidates, refused, steps: what it finds (see `Candidate`, `Refusal`, `Funnel`).
        effective: the sites it takes or has taken before, which is what `expect` counts.
        failures: error lines that end the search. unmet: error lines of `expect`. notes: oddities.
    """

    def __init__(self, rule: Rule, file: RuleFile, context: Context, owners: dict[str, str]) -> None:
        self.rule = rule
        self.name = f"{file.name}/{rule.id}"
        self.where = file.where(rule.id) or file.name
        self.context = context
        self.refused: list[Refusal] = []
        self.steps: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.failures: list[str] = []
        units: Units = [(site,) for site in self._matching(file)]
        if rule.shared == "together":
            units = self._grouped(units)
        units = self._picked(units)
        units = self._one_per_point(units) if rule.insert else self._unclaimed(units, owners)
        self.effective = [unit[0] for unit in units]
        units = self._untouched(units)
        self._check_shared(units)
        self.candidates = [Candidate(unit[0], rule, tuple(site.id for site in unit)) for unit in units]
        self.unmet = unmet(rule, self.where, self.effective, self.steps, self.refused)

    def _matching(self, file: RuleFile) -> list[Site]:
        clauses = (
            *compile_match(self.rule.match, self.where, file.selectors, file.vars),
            *(_exclusion(entry, self.where, file) for entry in self.rule.exclude),
        )
        convs = [site for site in self.context.sites if site.op == "conv2d"]
        for site in self.context.sites:
            if site.op != "conv2d":
                self._refuse(site, "op", f"op {site.op}, only conv2d can be rewritten")
        try:
            failed = {site.id: failed_clauses(clauses, site, self.context) for site in convs}
        except RuleError as error:  # an expression that cannot be computed at a site
            raise RuleError(f"rule '{self.rule.id}': {error}", where=self.where) from None
        left = self._count("convs", convs)
        for clause in clauses:
            left = [site for site in left if not any(found is clause for found, _ in failed[site.id])]
            if clause.key == "exclude" and not any(f is clause for found in failed.values() for f, _ in found):
                self.notes.append(f"{self.where}: rule '{self.rule.id}': '{clause.label}' excludes nothing")
            self._count(clause.label, left)
        for site in convs:
            if failed[site.id]:
                clause, reason = failed[site.id][0]
                self._refuse(site, clause.key, reason, len(failed[site.id]))
        return left

    def _count(self, label: str, left: list[T]) -> list[T]:
        self.steps.append((label, len(left)))
        return left

    def _refuse(self, site: Site, clause: str, reason: str, failed: int = 1) -> None:
        self.refused.append(Refusal(site, self.name, clause, reason, failed))

    def _drop(self, units: Units, dropped: Mapping[int, tuple[str, str]], label: str) -> Units:
        """Refuse the units at the indices of `dropped` (index -> clause, reason) and count the others."""
        for index, (clause, reason) in dropped.items():
            for site in units[index]:
                self._refuse(site, clause, reason)
        return self._count(label, [unit for index, unit in enumerate(units) if index not in dropped])

    def _grouped(self, sites: Units) -> Units:
        """All calls of a module as one unit, if all of them match."""
        by_path: dict[str, tuple[Site, ...]] = {}
        for (site,) in sites:
            by_path[site.path] = (*by_path.get(site.path, ()), site)
        units = list(by_path.values())
        dropped = {}
        for index, unit in enumerate(units):
            ids = {site.id for site in unit}
            missing = [s.id for s in self.context.sites if s.path == unit[0].path and s.id not in ids]
            if missing:
                dropped[index] = ("shared", f"shared with {', '.join(missing)}, which the rule does not match")
        return self._drop(units, dropped, "whole modules") if dropped or len(units) < len(sites) else units

    def _picked(self, units: Units) -> Units:
        for label, kept in pick(self.rule.pick, [unit[0] for unit in units]):
            ids = {site.id for site in kept}
            dropped = {i: ("pick", f"not picked: {label}") for i, unit in enumerate(units) if unit[0].id not in ids}
            units = self._drop(units, dropped, label)
        return units

    def _one_per_point(self, units: Units) -> Units:
        """Sites that mean the same place of insertion collapse into the first."""
        anchor = self.rule.insert.anchor if self.rule.insert else ""
        first: dict[str, str] = {}
        dropped = {}
        for index, (site, *_) in enumerate(units):
            point = insertion_point(self.rule, site)
            if point is None:
                dropped[index] = ("block", f"no module stands for the {anchor} of this site")
            elif point in first:
                dropped[index] = ("pick", f"same place of insertion as {first[point]}")
            else:
                first[point] = site.id
        return self._drop(units, dropped, f"one per {anchor}") if dropped else units

    def _unclaimed(self, units: Units, owners: dict[str, str]) -> Units:
        dropped = {}
        for index, unit in enumerate(units):
            owner = next((owners[site.id] for site in unit if site.id in owners), None)
            if owner:
                dropped[index] = ("claimed", f"claimed by rule {owner}")
        left = self._drop(units, dropped, "unclaimed") if dropped else units
        owners.update({site.id: self.name for unit in left for site in unit})
        return left

    def _untouched(self, units: Units) -> Units:
        dropped = {}
        for index, unit in enumerate(units):
            edit = next((site.rewritten for site in unit if site.rewritten), None)
            if edit:
                dropped[index] = ("rewritten", f"already rewritten by {edit}")
        return self._drop(units, dropped, "not rewritten yet") if dropped else units

    def _check_shared(self, units: Units) -> None:
        if self.rule.shared == "together":
            return
        for path, calls in {unit[0].path: unit[0].calls for unit in units if unit[0].calls > 1}.items():
            what = f"rule '{self.rule.id}': module {path} is called {calls} times"
            fix = "write 'shared: together' to change all calls, or exclude it"
            self.failures.append(str(RuleError(what, where=self.where, fix=fix)))


def compile_match(data: Any, name: str, selectors: Mapping[str, Any], variables: Mapping[str, Any]) -> Clauses:
    """The clauses of one match; a RuleError with a line per problem."""
    problems = Problems(name)
    clauses = Compiler(problems, selectors, variables).match(data, ())
    problems.check()
    return clauses


def failed_clauses(clauses: Clauses, site: Site, context: Context) -> list[tuple[Clause, str]]:
    """The clauses that reject a site, in their order, with the reasons."""
    return [(clause, reason) for clause in clauses if (reason := clause.test(site, context)) is not None]


def insertion_point(rule: Rule, site: Site) -> str | None:
    """Path of the module before or after which the rule inserts at this site; None if there is none."""
    insert = rule.insert
    if insert is None or insert.anchor == "here":
        return site.path
    if insert.anchor == "stage":
        return site.stage_path
    return site.block_path if insert.at == "after" else site.block_entry


def _exclusion(entry: Any, where: str, file: RuleFile) -> Clause:
    clauses = compile_match(entry, where, file.selectors, file.vars)
    label = ", ".join(clause.label for clause in clauses)

    def test(site: Site, context: Context) -> str | None:
        return f"excluded: {label}" if first_reason(clauses, site, context) is None else None

    return Clause("exclude", f"not {label}", test)
