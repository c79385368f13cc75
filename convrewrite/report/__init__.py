"""Everything people read: sites, plans, reports and comparisons as text, Markdown, JSON or HTML. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.registry import Registry
from convrewrite.reports import Report
from convrewrite.sites import Site


class ReportFormat(Protocol):
    """One format: four methods, each from data to the whole text of a file (with a final newline)."""

    def report(self, report: Report, *, verbose: bool) -> str:
        """The report of one rewrite."""

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        """A plan before it is applied."""

    def sites(self, sites: Sequence[Site]) -> str:
        """The convolutions of a model."""

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        """The comparison of two models."""


REPORTS: Registry[ReportFormat] = Registry("report format", package="convrewrite.report")


def render(report: Report, format: str, *, verbose: bool = False) -> str:
    """`report` in the format of that name ("text", "markdown", "json", "html").

    Args:
        verbose: also the untouched sites, all near misses and the seconds of each pass.

    Raises:
        ConvrewriteError: there is no such format.
    """
    return REPORTS.get(format).report(report, verbose=verbose)


def render_plan(plan: Plan, format: str, *, verbose: bool = False) -> str:
    """`plan` in the format of that name; `verbose` adds every near miss, every refusal, versions and hashes."""
    return REPORTS.get(format).plan(plan, verbose=verbose)


def render_sites(sites: Sequence[Site], format: str) -> str:
    """The table of `sites` with totals, in the format of that name."""
    return REPORTS.get(format).sites(sites)


def render_diff(diff: Diff, format: str, *, verbose: bool = False) -> str:
    """`diff` in the format of that name; `verbose` lists every module and tensor, nothing cut short."""
    return REPORTS.get(format).diff(diff, verbose=verbose)


def why(plan: Plan, sites: Sequence[Site], path: str) -> str:
    """All about one site: its facts, then what each rule of `plan` does with it and why.

    Raises:
        PlanError: no site has that path or id; names the closest.
    """
    from convrewrite.report.plantext import explain

    return explain(plan, sites, path)
