"""Pieces of an HTML page: tables, tiles, legend, bars and the picture. Every text that comes in is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from convrewrite.plans import Edit
from convrewrite.report import figures
from convrewrite.report import plancontent as plans
from convrewrite.report.document import Section, Table
from convrewrite.report.layout import Band, Cell
from convrewrite.report.picture import WITH_KERNELS, draw
from convrewrite.report.style import style_sheet
from convrewrite.reports import Report
from convrewrite.sites import ROLES, Site

_TONES = {
    "replaced": ("~", "replaced", "cell new replaced"),
    "inserted": ("+", "inserted", "cell new inserted"),
    "removed": ("-", "removed", "cell new removed"),
}


def text(line: str) -> str:
    """Any text, safe inside HTML."""
    return escape(line)


def page(title: str, body: str, footer: str) -> str:
    """A whole file: no script, nothing loaded from anywhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def heading(kind: str, title: str, lead: str) -> str:
    """What kind of page it is, about what, and one line more."""
    return f'<p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'


def tile(label: str, value: str, note: str = "", tone: str = "") -> str:
    """One large figure. `tone` is "", "up" or "down"."""
    extra = f' <span class="{tone}">{escape(note)}</span>' if note else ""
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b>{extra}</div>'


def cost_tile(label: str, before: int, after: int) -> str:
    """A sum before and after, with its change."""
    value = figures.change(before, after, figures.total).replace("=>", "→")
    return tile(
        label,
        value,
        figures.percent(before, after).replace("-", "−"),
        "up" if after > before else "down" if after < before else "",
    )


def tiles(parts: Iterable[str]) -> str:
    return f'<div class="tiles">{"".join(parts)}</div>'


def badge(text: str, tone: str) -> str:
    """A verdict: `tone` is "good", "bad" or "unsure"; the text must say it as well."""
    sign = {"good": "✓ ", "bad": "✗ ", "unsure": ""}[tone]
    return f'<p><span class="badge {tone}">{sign}{escape(text)}</span></p>'


def alert(lines: Sequence[str]) -> str:
    """What must not be missed."""
    return (
        f'<div class="alert" role="alert">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""
    )


def section(item: Section) -> str:
    """A section of a document; long ones are folded."""
    lines = "".join(f'<p class="note">{escape(line)}</p>' for line in item.lines)
    body = lines + (
        table(item.table) if item.table and item.table.rows else "" if item.lines else '<p class="note">none</p>'
    )
    if item.folded:
        return f"<details><summary>{escape(item.title)}</summary>{body}</details>"
    return f"<h2>{escape(item.title)}</h2>{body}"


def table(data: Table) -> str:
    """A table that scrolls on its own where the page is too narrow."""
    kinds = ["n" if letter == "r" else "s" if number == 0 else "" for number, letter in enumerate(data.align)]

    def row(cells: Sequence[str], tag: str, tone: str = "") -> str:
        inner = "".join(
            f"<{tag}{f' class={kind}' if kind else ''}>{_arrows(c)}</{tag}>"
            for c, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr{f' class={tone}' if tone else ''}>{inner}</tr>"

    tones = data.tones or ("",) * len(data.rows)
    body = "".join(row(cells, "td", tone) for cells, tone in zip(data.rows, tones, strict=True))
    return f'<div class="scroll"><table><thead>{row(data.headers, "th")}</thead><tbody>{body}</tbody></table></div>'


def _arrows(text: str) -> str:
    return escape(text.replace("=>", "→"))


def picture(bands: Sequence[Band], *, compare: bool, label: str) -> str:
    """The network twice, for wide and for narrow screens, under its legend."""
    cells = [c for b in bands for g in b.groups for s in g.slots for c in (s.before, s.after) if c is not None]
    drawings = "".join(
        f'<div class="{name}">{draw(bands, width=width, compare=compare, label=label)}</div>'
        for name, width in (("wide", 1120), ("narrow", 366))
    )
    return f"<figure>{_legend(cells, compare=compare)}{drawings}</figure>"


def _legend(cells: Sequence[Cell], *, compare: bool) -> str:
    roles = {c.role if c.role in ROLES else "other" for c in cells if c.tone != "inserted"}
    items = [_swatch(f"cell r-{role}", "", role.replace("_", " ")) for role in ROLES if role in roles]
    if len(cells) <= 2 * WITH_KERNELS:
        items.append(_swatch("cell r-other", "3", "kernel size", "kernel"))
    tones = {c.tone for c in cells}
    if compare and "replaced" in tones:
        items.append(_swatch(f"cell r-{next((r for r in ROLES if r in roles), 'other')} replaced", "", "changes"))
    for tone, (sign, name, css) in _TONES.items():
        marks = list(dict.fromkeys(c.mark[2:] for c in cells if c.tone == tone and len(c.mark) > 2))
        if tone in tones:
            items.append(_swatch(css, sign, f"{name}: {figures.plain(', '.join(marks[:6]))}" if marks else name))
    return f'<div class="legend">{"".join(items)}</div>'


def _swatch(css: str, sign: str, name: str, face: str = "mark") -> str:
    text = f'<text class="{face}" x="9" y="12.5">{sign}</text>' if sign else ""
    rect = f'<rect class="{css}" x="1" y="1" width="16" height="16" rx="3"/>'
    return f'<span><svg width="18" height="18" aria-hidden="true">{rect}{text}</svg>{escape(name)}</span>'


def bars(edits: Sequence[Edit]) -> str:
    """Parameters and FLOPs of every changed site, before above after, on one scale per column."""
    most_params = max((max(e.before.params, e.after.params) for e in edits), default=0)
    most_flops = max((max(e.before.flops, e.after.flops) for e in edits), default=0)
    rows = [
        '<div class="head">site</div><div class="head">params</div><div class="head">FLOPs (2 per multiply-add)</div>'
    ]
    for e in edits:
        tone = " plus" if e.action == "insert" else ""
        rows.append(
            f'<div class="site">{plans.MARKS[e.action]} {escape(plans.name(e))}</div>'
            f'<div class="value{tone}" data-name="params">{_bar(e.before.params, e.after.params, most_params)}</div>'
            f'<div class="value{tone}" data-name="FLOPs">{_bar(e.before.flops, e.after.flops, most_flops)}</div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar(before: int, after: int, most: int) -> str:
    widths = [f"{100 * value / most:.1f}%" if most else "0" for value in (before, after)]
    both = "".join(f'<i style="width:{width}"></i>' for width in widths)
    return f'<div class="bar"><div>{both}</div><span>{figures.change(before, after).replace("=>", "→")}</span></div>'


def profile(sites: Sequence[Site], edits: Sequence[Edit]) -> str:
    """FLOPs of every convolution in order of execution, with what each change adds or saves."""
    columns = _columns(sites, edits)
    most = max([1.0, *(max(was, now) for _, was, now in columns)])
    step = min(1000 / max(len(columns), 1), 40)
    drawn = []
    for number, (name, was, now) in enumerate(columns):
        x, width = step * (number + 0.12), step * 0.76
        old, new = 100 * was / most, 100 * now / most
        kind = "add" if was == 0 else "more" if new > old else "less"
        tip = escape(figures.plain(f"{name}: FLOPs {figures.change(int(was), int(now))}"))
        change = _column(kind, x, width, min(old, new), abs(new - old)) if new != old else ""
        drawn.append(f"<g><title>{tip}</title>{_column('was', x, width, 0, min(old, new))}{change}</g>")
    axis = "".join(f'<line class="axis" x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in (0, 50, 100))
    scale = "".join(f"<span>{figures.count(int(most * part))}</span>" for part in (1.0, 0.5, 0.0))
    label = "FLOPs of every convolution before and after"
    return (
        f'<div class="profile"><div class="scale">{scale}</div>'
        f'<svg class="chart" role="img" aria-label="{label}" preserveAspectRatio="none" viewBox="0 0 1000 100">'
        f"{axis}{''.join(drawn)}</svg></div>"
    )


def _columns(sites: Sequence[Site], edits: Sequence[Edit]) -> list[tuple[str, float, float]]:
    """(name, FLOPs before, after) per convolution, an insertion behind its site."""
    replaced = {call: e for e in edits if e.action == "replace" for call in (e.calls or (e.site.id,))}
    found: list[tuple[str, float, float]] = []
    for site in sites:
        edit = replaced.get(site.id)
        # An edit of a shared module has one cost for all of its calls.
        now = edit.after.flops / max(len(edit.calls), 1) if edit else site.flops
        found.append((site.id, site.flops, now))
        found += [(e.id, 0, e.after.flops) for e in edits if e.action == "insert" and e.site.id == site.id]
    return found


def _column(kind: str, x: float, width: float, base: float, size: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{100 - base - size:.2f}" width="{width:.2f}" height="{size:.2f}"/>'


def fates_bar(report: Report) -> str:
    """Elements by fate, as parts of one bar; the table under it gives the figures."""
    sums = report.carried()
    whole = sum(entry["elements"] for entry in sums.values())
    parts = [
        f'<i class="f-{fate}" style="flex:{sums[fate]["elements"] / whole:.4f} 1 0" title="{fate}"></i>'
        for fate in ("carried", "absorbed", "new", "dropped")
        if whole and fate in sums
    ]
    return f'<div class="share" aria-hidden="true">{"".join(parts)}</div>' if parts else ""
