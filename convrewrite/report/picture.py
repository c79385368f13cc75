"""The network as a drawing: SVG with a band per stage, a box per block and a cell per convolution.

Two rows, before and after, aligned place by place. Colours come from the CSS variables of `style`, so
that one drawing serves light, dark and print. A change shows by colour, by its symbol and by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from convrewrite.report import figures
from convrewrite.report.layout import Band, Cell, Group, Slot
from convrewrite.sites import ROLES

_PAD, _GAP, _CELL_GAP = 5, 14, 4
_LABEL_HEIGHT, _ROW_GAP, _LINE_GAP = 14, 7, 12
_ROW_NAMES = 46
_LETTER = 6.1  # width of a letter of the 10.5 px face that cells and labels use
WITH_KERNELS = 420
"""A network of more convolutions than these gets cells too small for the size of the kernel."""
_LONGEST_MARK = {24: 20, 18: 11, 14: 9}  # letters, by height of a cell; the legend names the blocks in full


@dataclass(frozen=True)
class Pen:
    """The measures of one drawing.

    Attributes:
        width: of the whole drawing, in pixels.
        gutter: of the column with the stage's name; 0 puts the name above the blocks.
        cell: height of a cell and least width.
        rows: ("before", "after"), or one name where there is nothing to compare.
    """

    width: int
    gutter: int
    cell: int
    rows: tuple[str, ...]

    @property
    def room(self) -> float:
        """Width for blocks."""
        return self.width - self.gutter - _ROW_NAMES - _PAD

    @property
    def box(self) -> int:
        """Height of a block's box."""
        return self.cell + 2 * _PAD

    @property
    def line(self) -> int:
        """Height of one line of blocks, all rows."""
        return _LABEL_HEIGHT + len(self.rows) * (self.box + _ROW_GAP) - _ROW_GAP


def draw(bands: Sequence[Band], *, width: int, compare: bool, label: str) -> str:
    """The drawing as one ``<svg>`` element.

    Args:
        width: in pixels; below 600 the stage's name stands above its blocks.
        compare: draw the row "after" too.
        label: says in words what the picture shows, for those who do not see it.
    """
    slots = sum(len(group.slots) for band in bands for group in band.groups)
    cell = 24 if slots <= 90 else 18 if slots <= WITH_KERNELS else 14
    pen = Pen(width, 140 if width >= 600 else 0, cell, ("before", "after") if compare else ("now",))
    parts, y = [], 2.0
    for index, band in enumerate(bands):
        body, height = _band(pen, band, y, index)
        parts.append(body)
        y += height
    return (
        f'<svg class="net" role="img" aria-label="{escape(label)}" width="{width}" height="{y:.0f}" '
        f'viewBox="0 0 {width} {y:.0f}">{"".join(parts)}</svg>'
    )


def _band(pen: Pen, band: Band, top: float, index: int) -> tuple[str, float]:
    """One stage from `top` down, and its height."""
    lines = _wrap(pen, band.groups)
    head = 0 if pen.gutter else 24
    body = len(lines) * (pen.line + _LINE_GAP) - _LINE_GAP
    least = 15 * (1 + len(band.facts)) + 4 if pen.gutter else 0
    height = head + max(body, least) + 20
    shade = "band" if index % 2 else "band odd"
    parts = [
        f'<rect class="{shade}" x="0" y="{top:.1f}" width="{pen.width}" height="{height:.1f}"/>',
        _title(pen, band, top),
    ]
    y = top + 10 + head
    for line in lines:
        parts.append(_line(pen, line, y))
        y += pen.line + _LINE_GAP
    return "".join(parts), height


def _title(pen: Pen, band: Band, top: float) -> str:
    if not pen.gutter:
        facts = escape(" · ".join(band.facts))
        title = f'{escape(band.title)}<tspan class="fact" dx="8">{facts}</tspan>'
        return f'<text class="stage" x="8" y="{top + 21:.1f}">{title}</text>'
    rows = [f'<text class="stage" x="10" y="{top + 24:.1f}">{escape(band.title)}</text>']
    rows += [
        f'<text class="fact" x="10" y="{top + 41 + 15 * i:.1f}">{escape(fact)}</text>'
        for i, fact in enumerate(band.facts)
    ]
    return "".join(rows)


def _wrap(pen: Pen, groups: Sequence[Group]) -> list[list[Group]]:
    """Blocks into lines; a block wider than a line goes on in a second box."""
    lines: list[list[Group]] = [[]]
    used = 0.0
    for group in (part for whole in groups for part in _split(pen, whole)):
        width = _group_width(pen, group)
        if lines[-1] and used + width > pen.room:
            lines.append([])
            used = 0.0
        lines[-1].append(group)
        used += width + _GAP
    return lines


def _split(pen: Pen, group: Group) -> list[Group]:
    parts: list[list[Slot]] = [[]]
    used = 2.0 * _PAD
    for slot in group.slots:
        width = _slot_width(pen, slot)
        if parts[-1] and used + width > pen.room:
            parts.append([])
            used = 2.0 * _PAD
        parts[-1].append(slot)
        used += width + _CELL_GAP
    again = f"{group.label} …" if group.label else ""
    return [Group(again if number else group.label, tuple(part)) for number, part in enumerate(parts)]


def _group_width(pen: Pen, group: Group) -> float:
    return sum(_slot_width(pen, s) for s in group.slots) + _CELL_GAP * (len(group.slots) - 1) + 2 * _PAD


def _slot_width(pen: Pen, slot: Slot) -> float:
    """A slot is as wide in both rows: that is what keeps them aligned."""
    cells = [slot.after if len(pen.rows) > 1 else None, slot.before]
    return max(
        [
            float(pen.cell),
            *(_LETTER * len(_text(pen, c)) + 9 for c in cells if c is not None and len(_text(pen, c)) > 2),
        ]
    )


def _text(pen: Pen, cell: Cell) -> str:
    if not cell.mark:
        return "" if pen.cell < 16 else cell.kernel
    mark = figures.plain(cell.mark)
    most = _LONGEST_MARK[pen.cell]
    return mark if len(mark) <= most else mark[: most - 1] + "…"


def _line(pen: Pen, groups: Sequence[Group], top: float) -> str:
    """One line of blocks in every row, with the row's name in front."""
    parts = []
    for row, name in enumerate(pen.rows):
        y = top + _LABEL_HEIGHT + row * (pen.box + _ROW_GAP)
        middle = y + pen.box / 2
        parts.append(f'<text class="row" x="{pen.gutter + 8}" y="{middle + 3.5:.1f}">{name}</text>')
        x = float(pen.gutter + _ROW_NAMES)
        for index, group in enumerate(groups):
            width = _group_width(pen, group)
            if index:
                parts.append(f'<path class="flow" d="M{x - _GAP + 1:.1f} {middle:.1f}h{_GAP - 2}"/>')
            if row == 0:
                parts.append(_label(group, x, y, width))
            parts.append(_group(pen, group, x, y, after=row == 1))
            x += width + _GAP
    return "".join(parts)


def _label(group: Group, x: float, y: float, width: float) -> str:
    """The block's path, or as much of its end as fits."""
    path = figures.plain(group.label)
    ends = [path, *(path[i + 1 :] for i, letter in enumerate(path) if letter == ".")]
    fitting = next((end for end in ends if len(end) * (_LETTER - 0.4) <= width + _GAP - 4), "")
    return f'<text class="block" x="{x + 1:.1f}" y="{y - 4:.1f}">{escape(fitting)}</text>' if fitting else ""


def _group(pen: Pen, group: Group, x: float, y: float, *, after: bool) -> str:
    cells = [slot.after if after else slot.before for slot in group.slots]
    kind = "box" if group.label else "box loose"
    parts = []
    if any(cells):
        size = f'width="{_group_width(pen, group):.1f}" height="{pen.box}"'
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size} rx="4"/>')
    at = x + _PAD
    for slot, cell in zip(group.slots, cells, strict=True):
        width = _slot_width(pen, slot)
        parts.append(_cell(pen, cell, at, y + _PAD, width))
        at += width + _CELL_GAP
    return "".join(parts)


def _cell(pen: Pen, cell: Cell | None, x: float, y: float, width: float) -> str:
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{pen.cell}" rx="3"'
    if cell is None:
        return f'<rect class="empty" {shape}/>'
    marked = bool(cell.mark)
    role = cell.role if cell.role in ROLES else "other"
    classes = f"cell {cell.tone} new" if marked else f"cell r-{role} {cell.tone}".strip()
    text = _text(pen, cell)
    face = "mark" if marked else "kernel"
    middle = f'x="{x + width / 2:.1f}" y="{y + pen.cell / 2 + 3.6:.1f}"'
    inner = f'<text class="{face}" {middle}>{escape(text)}</text>' if text else ""
    return f'<g><title>{escape(figures.plain(cell.about))}</title><rect class="{classes}" {shape}/>{inner}</g>'
