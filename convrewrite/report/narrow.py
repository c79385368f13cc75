"""Tables that fit a terminal of 100 columns: what all rows share is said once, long text is wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from convrewrite.plans import Edit
from convrewrite.report import figures
from convrewrite.report import plancontent as plans
from convrewrite.report.document import Section, Table, table
from convrewrite.sites import Site

WIDTH = 100
_NARROWEST = 20
_GAP = 2


def site_table(sites: Sequence[Site]) -> Table:
    """One row per call of a convolution; the part of the network only where there are several."""
    parts = len({site.part for site in sites}) > 1
    rewritten = any(site.rewritten for site in sites)
    headers = ["site", "role", *(["part"] if parts else []), "stage", "conv", "channels", "size", "params", "FLOPs"]
    rows = []
    for site in sites:
        kernel = figures.kernel(site) if site.op == "conv2d" else f"{site.op} g{site.groups}"
        place = [figures.plain(site.id), site.role, *([site.part or ""] if parts else []), figures.place(site)]
        costs = [figures.count(site.params), figures.count(site.flops)]
        rows.append([*place, kernel, figures.channels(site), figures.sizes(site), *costs])
    align = "l" * (len(headers) - 2) + "rr"
    if rewritten:
        headers.append("rewritten by")
        rows = [[*row, figures.plain(site.rewritten)] for row, site in zip(rows, sites, strict=True)]
        align += "l"
    return table(headers, rows, align)


def changed_section(section: Section, edits: Sequence[Edit]) -> Section:
    """The changed sites with each kind of change, its options and its start in a line above the table."""
    kinds = list(dict.fromkeys(_kind(edit) for edit in edits))
    marks = {kind: "" if len(kinds) == 1 else f" ({number})" for number, kind in enumerate(kinds, 1)}
    counts = {kind: sum(_kind(edit) == kind for edit in edits) for kind in kinds}
    lines = [f"=>{marks[k]} {k[0]}   {k[1]}   {figures.plural(counts[k], 'site')}" for k in kinds]
    rows = [
        (
            plans.name(edit),
            edit.site.role,
            figures.place(edit.site),
            plans.old(edit),
            f"{plans.MARKS[edit.action]} {figures.plain(edit.block)}{marks[_kind(edit)]}",
        )
        for edit in edits
    ]
    made = table(("site", "role", "stage", "old", "new"), rows, "lllll")
    return replace(section, lines=(*section.lines, *lines), table=made)


def _kind(edit: Edit) -> tuple[str, str]:
    return plans.new(edit), plans.start(edit)


def text_of(made: Table, width: int = WIDTH) -> str:
    """The table in aligned columns, `width` wide where that can be.

    Headers wrap to the width of what stands below them; then changes lose their spaces ("1K>2K"); then columns of text
    wrap, the widest first.
    """
    rows = [list(row) for row in made.rows]
    over = _excess(made.headers, rows, width)
    if over > 0:
        rows = [[cell.replace(" => ", ">") for cell in row] for row in rows]
    limits = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    over = _excess(made.headers, rows, width)
    for i in sorted(range(len(limits)), key=lambda i: -limits[i]):
        least = max(_longest_word([row[i] for row in rows]), _NARROWEST)
        if over > 0 and made.align[i] == "l" and limits[i] > least:
            before, limits[i] = limits[i], max(least, limits[i] - over)
            over -= before - limits[i]
    whole = sum(max(len(name), limit) + _GAP for name, limit in zip(made.headers, limits, strict=True)) - _GAP <= width
    heads = [[name] if whole else _wrapped(name, limit or 1) for name, limit in zip(made.headers, limits, strict=True)]
    widths = [max(limit, *map(len, head)) for limit, head in zip(limits, heads, strict=True)]
    lines = [*_lines(heads, widths, made.align), (" " * _GAP).join("-" * w for w in widths)]
    for row in rows:
        cells = [_wrapped(cell, w) for cell, w in zip(row, widths, strict=True)]
        lines += _lines(cells, widths, made.align)
    return "\n".join(line.rstrip() for line in lines)


def _excess(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """By how much the table is too wide, its headers wrapped."""
    columns = zip(headers, zip(*rows, strict=True), strict=True)
    widths = [max(_longest_word([name]), *map(len, cells)) for name, cells in columns]
    return sum(widths) + _GAP * (len(widths) - 1) - width


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int], align: str) -> list[str]:
    """The lines of one row; a cell that has fewer ends early."""
    found = []
    for number in range(max(map(len, cells))):
        parts = [cell[number] if number < len(cell) else "" for cell in cells]
        justified = (p.rjust(w) if a == "r" else p.ljust(w) for p, w, a in zip(parts, widths, align, strict=True))
        found.append((" " * _GAP).join(justified))
    return found


def _longest_word(column: Sequence[str]) -> int:
    return max((len(word) for cell in column for word in cell.split()), default=0)
