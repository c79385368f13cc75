"""Every rule against every site: which sites each rule takes, and for every other one the clause that rejects it.

All rules look at the original sites, so their order matters only for who owns a site. Pure data in and
out; nothing here knows blocks, costs or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convrewrite.clauses import Clause, Clauses, Compiler, first_reason
from convrewrite.errors import RuleError
from convrewrite.expectations import unmet, unmet_in_all
from convrewrite.picking import pick
from convrewrite.plans import Funnel, Refusal
from convrewrite.rulefile import load_rules
from convrewrite.ruleschema import Rule, RuleFile
from convrewrite.selectors.base import Context
from convrewrite.sites import Site
from convrewrite.yamlfile import Problems


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
    searches = [_RuleSearch(rule, file, context, owners) for rule in file.rules]
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


def select(sites: Sequence[Site], data: Mapping[str, Any], where: str = "--select") -> tuple[list[Site], list[Refusal]]:
    """The sites that one match fits, and why the others do not; for tables, so any kind of convolution may fit.

    Raises:
        RuleError: the match is wrong; a line per problem.
    """
    clauses = _compile(dict(data), where, {}, {})
    context = Context(sites)
    fitting, refused = [], []
    for site in sites:
        failed = _failed(clauses, site, context)
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
        clauses = _compile(correction.match, file.name, file.selectors, file.vars)
        fitting = [i for i, site in enumerate(sites) if first_reason(clauses, site, context) is None]
        for i in fitting:
            corrected[i] = replace(corrected[i], role=correction.role)
        if not fitting:
            labels = ", ".join(clause.label for clause in clauses)
            idle.append(f"{file.name}: roles[{index}]: no site is {labels}; nothing to call {correction.role}")
    if idle:
        raise RuleError("\n".join(idle))
    return tuple(corrected)


def _compile(data: Any, name: str, selectors: Mapping[str, Any], variables: Mapping[str, Any]) -> Clauses:
    problems = Problems(name)
    clauses = Compiler(problems, selectors, variables).match(data, ())
    problems.check()
    return clauses


def _failed(clauses: Clauses, site: Site, context: Context) -> list[tuple[Clause, str]]:
    return [(clause, reason) for clause in clauses if (reason := clause.test(site, context)) is not None]


class _RuleSearch:
    """One rule against all sites, step by step; every step drops sites, with a reason, and is counted.

    A *unit* is what one edit would change: one call, or all calls of a module under ``shared: together``.
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
        units = [(site,) for site in self._matching(file)]
        if rule.shared == "together":
            units = self._grouped(units)
        units = self._picked(units)
        if rule.action == "insert":
            units = self._one_per_point(units)
        else:
            units = self._unclaimed(units, owners)
        self.effective = [unit[0] for unit in units]
        units = self._untouched(units)
        self._check_shared(units)
        self.candidates = [Candidate(unit[0], rule, tuple(site.id for site in unit)) for unit in units]
        self.unmet = unmet(rule, self.where, self.effective, self.steps, self.refused)

    def _matching(self, file: RuleFile) -> list[Site]:
        clauses = (
            *_compile(rule_match(self.rule), self.where, file.selectors, file.vars),
            *(_exclusion(entry, self.where, file) for entry in self.rule.exclude),
        )
        convs = [site for site in self.context.sites if site.op == "conv2d"]
        for site in self.context.sites:
            if site.op != "conv2d":
                self._refuse(site, "op", f"op {site.op}, only conv2d can be rewritten")
        failed = {site.id: _failed(clauses, site, self.context) for site in convs}
        left = self._count("convs", convs)
        for clause in clauses:
            left = [site for site in left if clause not in [found for found, _ in failed[site.id]]]
            if clause.key == "exclude" and not any(f is clause for found in failed.values() for f, _ in found):
                self.notes.append(f"{self.where}: rule '{self.rule.id}': '{clause.label}' excludes nothing")
            self._count(clause.label, left)
        for site in convs:
            if failed[site.id]:
                clause, reason = failed[site.id][0]
                self._refuse(site, clause.key, reason, len(failed[site.id]))
        return left

    def _count(self, label: str, left: list[Any]) -> list[Any]:
        self.steps.append((label, len(left)))
        return left

    def _refuse(self, site: Site, clause: str, reason: str, failed: int = 1) -> None:
        self.refused.append(Refusal(site, self.name, clause, reason, failed))

    def _keep(self, units: list[tuple[Site, ...]], label: str, dropped: Mapping[int, tuple[str, str]]) -> Any:
        """The units but those at the indices of `dropped` (index -> clause, reason); a step only if any are."""
        for index, (clause, reason) in dropped.items():
            for site in units[index]:
                self._refuse(site, clause, reason)
        left = [unit for index, unit in enumerate(units) if index not in dropped]
        return self._count(label, left) if dropped else left

    def _grouped(self, units: list[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
        """All calls of a module as one unit, if all of them match."""
        by_path: dict[str, list[Site]] = {}
        for (site,) in units:
            by_path.setdefault(site.path, []).append(site)
        groups = [tuple(group) for group in by_path.values()]
        dropped = {}
        for index, group in enumerate(groups):
            ids = {site.id for site in group}
            missing = [s.id for s in self.context.sites if s.path == group[0].path and s.id not in ids]
            if missing:
                reason = f"shared with {', '.join(missing)}, which the rule does not match"
                dropped[index] = ("shared", reason)
        if len(groups) == len(units) and not dropped:
            return groups
        left = [unit for index, unit in enumerate(groups) if index not in dropped]
        for index, why in dropped.items():
            for site in groups[index]:
                self._refuse(site, *why)
        return self._count("whole modules", left)

    def _picked(self, units: list[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
        for label, kept in pick(self.rule.pick, [unit[0] for unit in units]):
            ids = {site.id for site in kept}
            dropped = {i: ("pick", f"not picked: {label}") for i, unit in enumerate(units) if unit[0].id not in ids}
            self._keep(units, "", {}) if not dropped else None
            for index, why in dropped.items():
                for site in units[index]:
                    self._refuse(site, *why)
            units = self._count(label, [unit for i, unit in enumerate(units) if i not in dropped])
        return units

    def _one_per_point(self, units: list[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
        """Sites that mean the same place of insertion collapse into the first."""
        first: dict[str, str] = {}
        dropped = {}
        for index, (site, *_) in enumerate(units):
            point = insertion_point(self.rule, site)
            if point is None:
                insert = self.rule.insert
                anchor = insert.anchor if insert else ""
                dropped[index] = ("block", f"no module stands for the {anchor} of this site")
            elif point in first:
                dropped[index] = ("pick", f"same place of insertion as {first[point]}")
            else:
                first[point] = site.id
        anchor = self.rule.insert.anchor if self.rule.insert else "here"
        return self._keep(units, f"one per {anchor}", dropped)  # type: ignore[no-any-return]

    def _unclaimed(self, units: list[tuple[Site, ...]], owners: dict[str, str]) -> list[tuple[Site, ...]]:
        dropped = {}
        for index, unit in enumerate(units):
            owner = next((owners[site.id] for site in unit if site.id in owners), None)
            if owner:
                dropped[index] = ("claimed", f"claimed by rule {owner}")
        left: list[tuple[Site, ...]] = self._keep(units, "unclaimed", dropped)
        owners.update({site.id: self.name for unit in left for site in unit})
        return left

    def _untouched(self, units: list[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
        dropped = {}
        for index, unit in enumerate(units):
            edit = next((site.rewritten for site in unit if site.rewritten), None)
            if edit:
                dropped[index] = ("rewritten", f"already rewritten by {edit}")
        return self._keep(units, "not rewritten yet", dropped)  # type: ignore[no-any-return]

    def _check_shared(self, units: Iterable[tuple[Site, ...]]) -> None:
        if self.rule.shared == "together":
            return
        for path, calls in {unit[0].path: unit[0].calls for unit in units if unit[0].calls > 1}.items():
            what = f"rule '{self.rule.id}': module {path} is called {calls} times"
            fix = "write 'shared: together' to change all calls, or exclude it"
            self.failures.append(str(RuleError(what, where=self.where, fix=fix)))


def rule_match(rule: Rule) -> dict[str, Any]:
    """The rule's match as plain data."""
    return dict(rule.match)


def insertion_point(rule: Rule, site: Site) -> str | None:
    """Path of the module before or after which the rule inserts at this site; None if there is none."""
    insert = rule.insert
    if insert is None or insert.anchor == "here":
        return site.path
    if insert.anchor == "stage":
        return site.stage_path
    return site.block_path if insert.at == "after" else site.block_entry


def _exclusion(entry: Any, where: str, file: RuleFile) -> Clause:
    clauses = _compile(entry, where, file.selectors, file.vars)
    label = ", ".join(clause.label for clause in clauses)

    def test(site: Site, context: Context) -> str | None:
        return f"excluded: {label}" if first_reason(clauses, site, context) is None else None

    return Clause("exclude", f"not {label}", test)
