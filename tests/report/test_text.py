"""The text form of reports and site tables."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from convrewrite.report import render, render_sites
from convrewrite.report.document import table
from convrewrite.report.narrow import text_of
from tests.report import sample
from tests.report.sample import Golden


def test_the_report_reads_as_reviewed(golden: Golden) -> None:
    golden("report_resnet50.txt", render(sample.report(), "text"))


def test_the_verbose_report_reads_as_reviewed(golden: Golden) -> None:
    golden("report_resnet50_verbose.txt", render(sample.report(), "text", verbose=True))


def test_the_forced_report_reads_as_reviewed(golden: Golden) -> None:
    golden("report_forced.txt", render(sample.broken_report(), "text"))


def test_the_site_table_reads_as_reviewed(golden: Golden) -> None:
    golden("sites_resnet50.txt", render_sites(sample.resnet50_sites(), "text"))


def test_a_forced_report_says_so_first_and_last_with_the_broken_law() -> None:
    lines = render(sample.broken_report(), "text").strip().splitlines()
    for end in (lines[:4], lines[-4:]):
        assert any("FORCED" in line for line in end)
        assert any("law 'start' is BROKEN: largest relative drift 0.12" in line for line in end)
    assert "Result: FORCED, 16 replaced" in "\n".join(lines)


def test_a_broken_law_is_loud_without_force_too() -> None:
    text = render(replace(sample.broken_report(), forced=False), "text")
    assert "law 'start' is BROKEN" in text.splitlines()[1]
    assert "FORCED" not in text


def test_force_without_a_broken_law_raises_no_alarm() -> None:
    text = render(replace(sample.report(), forced=True), "text")
    assert "FORCED" not in text
    assert "!!" not in text


def test_a_drift_that_is_not_a_number_is_the_worst_drift() -> None:
    assert "output drift nan." in render(sample.broken_report(), "text")
    assert "output drift 4.4e-07." in render(sample.report(), "text")


def test_the_fates_add_up() -> None:
    """Carried are the 53 convolutions (23,454,912) and 64 elements of a norm; dropped is a bias of 1000."""
    text = render(sample.report(), "text")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("  carried", "  dropped"))}
    assert rows["carried"][1:3] == ["54", "23.45M"]
    assert rows["dropped"][1:3] == ["1", "1.00K"]


def test_a_report_of_nothing_says_what_was_not_done() -> None:
    empty = replace(sample.report(), plan=sample.empty_plan(), tensors=(), laws=(), drift=())
    text = render(empty, "text")
    assert "Nothing to do for acmix/bottleneck-3x3" in text
    assert "laws not checked" in text
    assert text.count("not measured") == 1
    assert text.count("not recorded") == 1


def test_the_totals_line_counts_the_roles() -> None:
    text = render_sites(sample.resnet50_sites(), "text")
    assert text.splitlines()[-1] == (
        "53 convolutions (1 stem, 16 bottleneck_spatial, 32 pointwise, 4 shortcut), "
        "params 23.45M, FLOPs 8.17G (2 per multiply-add)"
    )


def test_the_parameters_of_a_shared_module_count_once() -> None:
    site = sample.resnet50_sites()[0]  # 9,408 parameters
    calls = [replace(site, call=k, calls=3) for k in range(3)]
    assert "params 9.41K," in render_sites(calls, "text")
    assert "conv1@2" in render_sites(calls, "text")


def test_a_rewritten_site_names_its_edit() -> None:
    sites = [replace(sample.resnet50_sites()[0], rewritten="conv1"), sample.resnet50_sites()[1]]
    assert "rewritten by" in render_sites(sites, "text")
    assert "rewritten by" not in render_sites(sites[1:], "text")


def test_no_sites_is_a_table_of_none() -> None:
    assert render_sites([], "text") == "none\n\n0 convolutions, params 0, FLOPs 0 (2 per multiply-add)\n"


def test_nothing_from_a_model_reaches_the_terminal_unescaped() -> None:
    text = render(sample.hostile_report(), "text", verbose=True)
    assert all(c == "\n" or c.isprintable() for c in text)


def test_reports_import_no_torch() -> None:
    code = (
        "import sys; from convrewrite.report import REPORTS; import convrewrite.report.schema; REPORTS.names(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tables_fit_a_terminal_of_100_columns() -> None:
    """The totals below the table and the conclusion are sentences and may be longer."""
    texts = [render_sites(sample.resnet50_sites(), "text"), render(sample.report(), "text", verbose=True)]
    lines = [line for text in texts for line in text.splitlines()]
    sentences = ("53 convolutions (", "Result: ")
    assert len(lines) > 100
    assert [line for line in lines if len(line) > 100 and not line.startswith(sentences)] == []


def test_a_table_is_wrapped_only_where_it_is_too_wide() -> None:
    made = table(("name", "what it is"), [("a", "one two three four five six"), ("b", "seven")], "ll")
    assert text_of(made, 40).splitlines()[2:] == ["a     one two three four five six", "b     seven"]
    assert text_of(made, 26).splitlines()[2:] == ["a     one two three four", "      five six", "b     seven"]


def test_kinds_of_change_are_numbered_where_there_are_several() -> None:
    """The sample replaces 16 convolutions in one way and inserts one block."""
    text = render(sample.report(), "text")
    assert "  => (1) acmix form=ordered heads=4 window=7   exact (blend)   16 sites" in text
    assert "  => (2) non_local channels=512 pool=1   exact (zero gate)   1 site" in text
    assert sum(line.endswith("~ acmix (1)") for line in text.splitlines()) == 16
