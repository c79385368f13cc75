"""What a page is made of before it has a format: text, Markdown and HTML all print the same `Document`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells of text under headers.

    Attributes:
        align: one letter per column, "l" or "r".
        tones: per row "" or what happened to it: "replaced", "inserted", "removed", "broken". Only for colour:
            the cells must say it too.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    tones: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A title, then lines, then a table. `folded` sections are long: HTML shows them on demand."""

    title: str
    lines: tuple[str, ...] = ()
    table: Table | None = None
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """A page: what must not be missed first (`alerts`), what it is about, sections, and one line that concludes."""

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    conclusion: str
    alerts: tuple[str, ...] = ()


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], align: str, tones: Iterable[str] = ()) -> Table:
    """A `Table`; a row that is longer or shorter than the headers is an error of ours, found here."""
    made = Table(tuple(headers), tuple(tuple(r) for r in rows), align, tuple(tones))
    if any(len(row) != len(made.headers) for row in made.rows) or len(align) != len(made.headers):
        raise ValueError(f"the table under {made.headers} is not rectangular")
    return made
