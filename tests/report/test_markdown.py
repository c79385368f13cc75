"""The Markdown form: GitHub tables that nothing from a model can break."""

from __future__ import annotations

import re

import pytest

from convrewrite.diffing import diff
from convrewrite.report import render, render_diff, render_plan, render_sites
from convrewrite.report.markdown import escape
from tests.report import sample
from tests.report.sample import Golden

PAGES = {
    "report": render(sample.report(), "markdown", verbose=True),
    "forced": render(sample.broken_report(), "markdown"),
    "hostile": render(sample.hostile_report(), "markdown", verbose=True),
    "plan": render_plan(sample.plan(), "markdown"),
    "nothing": render_plan(sample.empty_plan(), "markdown"),
    "sites": render_sites(sample.resnet50_sites(), "markdown"),
    "diff": render_diff(diff(*sample.views()), "markdown"),
}


def test_the_report_reads_as_reviewed(golden: Golden) -> None:
    golden("report_resnet50.md.txt", render(sample.report(), "markdown"))


def test_the_plan_reads_as_reviewed(golden: Golden) -> None:
    golden("plan_resnet50.md.txt", PAGES["plan"])


@pytest.mark.parametrize("name", PAGES)
def test_every_row_of_a_table_has_as_many_cells_as_its_header(name: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", PAGES[name], flags=re.MULTILINE)
    assert tables
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
        assert re.fullmatch(r"\|( (---|---:) \|)+", table.splitlines()[1])


def test_hostile_names_stay_text() -> None:
    page = PAGES["hostile"]
    assert "<script" not in page
    assert "\x1b" not in page
    assert all(not line.startswith("&lt;script") or line.endswith("&amp;") for line in page.splitlines())


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("bottleneck_spatial", "bottleneck_spatial"),
        ("_x_", "\\_x\\_"),
        ("a|b", "a\\|b"),
        ("~ acmix", "\\~ acmix"),
        ("<b>&", "&lt;b>&amp;"),
        ("*`[x]", "\\*\\`\\[x\\]"),
        ("conv 3x3 64>64", "conv 3x3 64>64"),
    ],
)
def test_only_what_markdown_would_read_is_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


def test_a_forced_report_opens_with_a_caution() -> None:
    head = PAGES["forced"].split("##")[0]
    assert "> [!CAUTION]" in head
    assert "**FORCED:" in head
    assert "law 'start' is BROKEN" in head
    assert "CAUTION" not in PAGES["report"]


def test_every_edit_is_in_the_plan() -> None:
    rows = [line for line in PAGES["plan"].splitlines() if line.startswith(("| replace |", "| insert |"))]
    assert len(rows) == 17
