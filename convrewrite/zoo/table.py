"""The zoo's rows as a Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from convrewrite.zoo.models import Entry
from convrewrite.zoo.rows import Row

HEAD = ("model", "family", "convs", "sites by role", "rules that apply (edits)", "applied", "result")


TITLE = """# The zoo: models that were tried

Written by `convrewrite zoo --rows zoo.jsonl --out docs/zoo.md`. Each model is captured. Every convolution is replaced
by an equal copy, which must change no bit of the output in eval and train mode and no state-dict key. Every built-in
rule file is planned, the one that adds the fewest FLOPs is applied, and the laws are checked. Random weights, a batch
of two, 64 pixels or the model's own size where it takes no other; detectors with images of 96 to 128 pixels and few
boxes. `convrewrite/zoo/models.py` lists the models that are tried smaller or larger.

The number after a rule file is that of the edits in its plan. Where none fits, the column says what the model has
instead. What was not copied, or stays an exception, is named with its cause."""


def markdown(rows: Sequence[Row], untried: Sequence[Entry] = ()) -> str:
    """A page: totals, exceptions, and one table for each group.

    Args:
        untried: models that have no row yet; they are counted, so that the page claims no more than was done.
    """
    groups = dict.fromkeys(row.group for row in rows)
    sections = (_section(group, [row for row in rows if row.group == group]) for group in groups)
    missing = Counter(entry.group for entry in untried)
    counts = ", ".join(f"{number} of {group}" for group, number in missing.items())
    parts = [TITLE, summary(rows), *([f"Not tried yet: {counts}."] if untried else []), *sections]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """Totals, times and exceptions, as lines of text."""
    good = sum(row.good for row in rows)
    applied = sum(row.good and bool(row.applied) for row in rows)
    lines = [
        f"{good} of {len(rows)} models good: {applied} with a rule applied and its laws held, {good - applied} where "
        "no rule fits."
    ]
    lines += _times([row.seconds for row in rows])
    exceptions = [f"- `{row.spec}`: {_cell(row.result)}" for row in rows if not row.good]
    if exceptions:
        lines += ["", f"Exceptions ({len(exceptions)}):", "", *exceptions]
    return "\n".join(lines)


def _times(seconds: Sequence[Mapping[str, float]]) -> list[str]:
    """Medians beyond building the model, of the rows that have them."""
    one = [row["plan"] for row in seconds if "plan" in row]
    every = [row["capture"] + row["plans"] for row in seconds if {"capture", "plans"} <= set(row)]
    parts = []
    if one:
        quick = f"under a second for {sum(value < 1 for value in one)} of {len(one)}"
        parts.append(f"{median(one):.2f} s to capture and plan one rule file ({quick})")
    if every:
        parts.append(f"{median(every):.2f} s to capture and plan all of them in a new process")
    return ["", f"Median time beyond building, on one thread of a shared machine: {'; '.join(parts)}."] if parts else []


def _section(group: str, rows: Sequence[Row]) -> str:
    lines = [f"## {group}", "", f"{sum(row.good for row in rows)} of {len(rows)} good.", "", _line(HEAD)]
    lines += ["|---|---|---:|---|---|---|---|", *(_line(_cells(row)) for row in rows)]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    name = row.spec.partition(":")[2] or row.spec
    others = "".join(f", {number} {kind} out of scope" for kind, number in row.out_of_scope.items())
    roles = ", ".join(f"{number} {role}" for role, number in row.roles.items()) + others
    rules = ", ".join(f"{name} {edits}" for name, edits in row.rules.items()) or row.none
    result = row.result
    if row.good and row.refused:
        site, why = next(iter(row.refused.items()))
        result += f"; {len(row.refused)} not copied ({site}: {why})"
    return f"`{name}`", row.family, str(row.convs), roles.removeprefix(", "), rules, row.applied, result


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
