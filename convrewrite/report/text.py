"""The text format: aligned columns for a terminal, 7-bit as far as the model's own names are."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.report import REPORTS
from convrewrite.report.content import report_document
from convrewrite.report.diffcontent import diff_document
from convrewrite.report.document import Document, Section, Table
from convrewrite.report.plantext import plan_text
from convrewrite.report.sitetable import site_table, totals_line
from convrewrite.reports import Report
from convrewrite.sites import Site


class TextFormat:
    """Text for a terminal."""

    def report(self, report: Report, *, verbose: bool) -> str:
        return _page(report_document(report, verbose=verbose))

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        return plan_text(plan, verbose=verbose)

    def sites(self, sites: Sequence[Site]) -> str:
        return f"{_table(site_table(sites))}\n\n{totals_line(sites)}\n"

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        return _page(diff_document(diff, verbose=verbose))


REPORTS.register("text")(TextFormat())


def _page(document: Document) -> str:
    alarm = [_alarm(document.alerts)] if document.alerts else []
    head = "\n".join((document.title, *document.summary))
    parts = [*alarm, head, *(_section(s) for s in document.sections), document.conclusion, *alarm]
    return "\n\n".join(parts) + "\n"


def _alarm(lines: Sequence[str]) -> str:
    """Nobody may scroll past a broken law: it stands at both ends, between bars."""
    bar = "!" * 78
    return "\n".join((bar, *(f"!! {line}" for line in lines), bar))


def _section(section: Section) -> str:
    lines = [section.title] + [f"  {line}" for line in section.lines]
    if section.table is not None and section.table.rows:
        lines.append(textwrap.indent(_table(section.table), "  "))
    elif not section.lines:
        lines.append("  none")
    return "\n".join(lines)


def _table(table: Table) -> str:
    if not table.rows:
        return "none"
    sides = ["right" if letter == "r" else "left" for letter in table.align]
    text = tabulate(table.rows, table.headers, tablefmt="simple", disable_numparse=True, colalign=sides)
    return "\n".join(line.rstrip() for line in text.splitlines())
