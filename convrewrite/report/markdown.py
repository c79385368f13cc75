"""The Markdown format: GitHub tables, every name escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.report import REPORTS
from convrewrite.report.content import report_document
from convrewrite.report.diffcontent import diff_document
from convrewrite.report.document import Document, Section, Table
from convrewrite.report.plancontent import plan_document
from convrewrite.report.sitetable import sites_document
from convrewrite.reports import Report
from convrewrite.sites import Site

_SPECIAL = re.compile(r"([\\`*~|\[\]#!]|\b_|_\b)")


class MarkdownFormat:
    """GitHub-flavoured Markdown."""

    def report(self, report: Report, *, verbose: bool) -> str:
        return _page(report_document(report, verbose=verbose))

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        return _page(plan_document(plan, verbose=verbose))

    def sites(self, sites: Sequence[Site]) -> str:
        return _page(sites_document(sites))

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        return _page(diff_document(diff, verbose=verbose))


REPORTS.register("markdown")(MarkdownFormat())


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is, in a table cell too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\1", text)


def _page(document: Document) -> str:
    parts = [f"# {escape(document.title)}"]
    if document.alerts:
        parts.append("\n".join(("> [!CAUTION]", *(f"> **{escape(line)}**  " for line in document.alerts))))
    parts.append(f"**{escape(document.conclusion)}**")
    if document.summary:
        parts.append("\n".join(f"- {escape(line)}" for line in document.summary))
    parts += [_section(s) for s in document.sections]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [f"## {escape(section.title)}"] if section.title else []
    parts += [escape(line) for line in section.lines]
    if section.table is not None and section.table.rows:
        parts.append(_table(section.table))
    elif not section.lines:
        parts.append("none")
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    rows = [table.headers, *table.rows]
    cells = [[escape(cell) or " " for cell in row] for row in rows]
    rule = ["---:" if letter == "r" else "---" for letter in table.align]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
