"""The text format: aligned columns for a terminal, 7-bit as far as the model's own names are."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.report import REPORTS, narrow
from convrewrite.report.content import CHANGED, CONVOLUTIONS, report_document
from convrewrite.report.diffcontent import diff_document
from convrewrite.report.document import Document, Section
from convrewrite.report.plantext import plan_text
from convrewrite.report.sitetable import totals_line
from convrewrite.reports import Report
from convrewrite.sites import Site


class TextFormat:
    """Text for a terminal."""

    def report(self, report: Report, *, verbose: bool) -> str:
        document = report_document(report, verbose=verbose)
        return _page(replace(document, sections=tuple(_narrowed(s, report) for s in document.sections)))

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        return plan_text(plan, verbose=verbose)

    def sites(self, sites: Sequence[Site]) -> str:
        table = narrow.text_of(narrow.site_table(sites)) if sites else "none"
        return f"{table}\n\n{totals_line(sites)}\n"

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        return _page(diff_document(diff, verbose=verbose))


REPORTS.register("text")(TextFormat())


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _narrowed(section: Section, report: Report) -> Section:
    """The sections that would be too wide for a terminal, folded."""
    if section.title == CHANGED and report.plan.edits:
        return narrow.changed_section(section, report.plan.edits)
    if section.title == CONVOLUTIONS:
        return replace(section, table=narrow.site_table(report.sites))
    return section


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
    lines = [section.title]
    for line in section.lines:
        lines += textwrap.wrap(line, narrow.WIDTH, initial_indent="  ", subsequent_indent="    ", **_WHOLE) or [""]
    if section.table is not None and section.table.rows:
        lines.append(textwrap.indent(narrow.text_of(section.table, narrow.WIDTH - 2), "  "))
    elif not section.lines:
        lines.append("  none")
    return "\n".join(lines)
