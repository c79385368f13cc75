"""The picture's content before it has coordinates: bands (stages) of groups (blocks) of slots (convolutions).

A slot holds what stands at one place before and after, so that the two rows of the picture stay aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convrewrite.diffing import Diff, ModelView, merged
from convrewrite.plans import Edit
from convrewrite.report import figures
from convrewrite.report import plancontent as plans
from convrewrite.report.diffcontent import stands
from convrewrite.sites import Site


@dataclass(frozen=True)
class Cell:
    """One convolution or block in one row.

    Attributes:
        role: of the site, for its colour.
        kernel: "3", "1x7"; what an unchanged cell shows.
        mark: what a changed cell shows: "~ acmix", "+ non_local"; "" if nothing changed here.
        tone: "", "replaced", "inserted" or "removed".
        about: everything, for the tooltip.
    """

    role: str
    kernel: str
    about: str
    mark: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Slot:
    """One place in both rows; None where nothing stands."""

    before: Cell | None
    after: Cell | None


@dataclass(frozen=True)
class Group:
    """A block of the network, or the convolutions between blocks (`label` is "")."""

    label: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Band:
    """A stage: its title, a few facts, and its groups in order of execution."""

    title: str
    facts: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class _Entry:
    """A slot with the site that says where it belongs."""

    site: Site
    slot: Slot
    before: int  # FLOPs
    after: int
    apart: bool = False  # stands between blocks, whatever block its site is in


def bands_of_sites(sites: Sequence[Site]) -> tuple[Band, ...]:
    """One model: both rows are the same, and only one is drawn."""
    return _bands([_Entry(s, Slot(_cell(s), _cell(s)), s.flops, s.flops) for s in sites])


def bands_of_edits(sites: Sequence[Site], edits: Sequence[Edit]) -> tuple[Band, ...]:
    """The model as it is, and with the edits."""
    replaced = {call: e for e in edits if e.action == "replace" for call in (e.calls or (e.site.id,))}
    entries: list[_Entry] = []
    for site in sites:
        edit = replaced.get(site.id)
        if edit is None:
            entries.append(_Entry(site, Slot(_cell(site), _cell(site)), site.flops, site.flops))
            continue
        after = Cell(site.role, "", f"{site.id}: {plans.new(edit)}, {_costs(edit)}", f"~ {edit.block}", "replaced")
        now = site.flops + (edit.after.flops - edit.before.flops) // max(len(edit.calls), 1)
        entries.append(_Entry(site, Slot(_cell(site, tone="replaced"), after), site.flops, now))
    for edit in edits:
        if edit.action == "insert":
            entries.insert(_insert_at(entries, edit), _inserted(edit))
    return _bands(entries)


def bands_of_diff(diff: Diff) -> tuple[Band, ...]:
    """Two models, their convolutions matched by id."""
    before, after = {s.id: s for s in diff.before.sites}, {s.id: s for s in diff.after.sites}
    changed = {c.id for c in diff.sites}
    entries = []
    for key in merged(list(before), list(after)):
        old, new = before.get(key), after.get(key)
        site = new or old
        assert site is not None  # `merged` returns names of one list or the other
        was = _diff_cell(diff.before, old, new, changed=key in changed, alone="removed")
        now = _diff_cell(diff.after, new, old, changed=key in changed, alone="inserted")
        entries.append(_Entry(site, Slot(was, now), old.flops if old else 0, new.flops if new else 0))
    return _bands(entries)


def _diff_cell(view: ModelView, site: Site | None, other: Site | None, *, changed: bool, alone: str) -> Cell | None:
    """`alone` is what a site of only this model is called: removed or inserted."""
    if site is None or not changed:
        return _cell(site) if site else None
    about = f"{site.id}: {stands(view, site)}"
    if other is None:
        return Cell(site.role, "", about, f"{'-' if alone == 'removed' else '+'} {_kernel(site)}", alone)
    if alone == "removed":  # the row before: the cell as it was, outlined
        return Cell(site.role, _kernel(site), about, "", "replaced")
    name = view.modules.get(site.path, "block") if site.rewritten else _kernel(site)
    return Cell(site.role, "", about, f"~ {name}", "replaced")


def _cell(site: Site, tone: str = "") -> Cell:
    costs = f"params {figures.count(site.params)}, FLOPs {figures.count(site.flops)}"
    about = f"{site.id}: {site.role}, {figures.conv(site)}, {costs}"
    mark = "~" if site.rewritten else ""
    return Cell(site.role, _kernel(site), about, mark, tone or ("replaced" if mark else ""))


def _kernel(site: Site) -> str:
    return figures.pair(site.kernel)


def _costs(edit: Edit) -> str:
    params = figures.change(edit.before.params, edit.after.params)
    return f"params {params}, FLOPs {figures.change(edit.before.flops, edit.after.flops)}, start {plans.start(edit)}"


def _inserted(edit: Edit) -> _Entry:
    cell = Cell(edit.site.role, "", f"{edit.id}: {plans.new(edit)}, {_costs(edit)}", f"+ {edit.block}", "inserted")
    apart = edit.path in (edit.site.block_path, edit.site.block_entry, edit.site.stage_path)
    return _Entry(edit.site, Slot(None, cell), 0, edit.after.flops, apart)


def _insert_at(entries: Sequence[_Entry], edit: Edit) -> int:
    """Before the first or after the last site of what the edit wraps: a convolution, a block or a stage."""
    inside = [
        i
        for i, entry in enumerate(entries)
        if edit.path in (entry.site.path, entry.site.block_path, entry.site.stage_path)
        or entry.site.path.startswith(f"{edit.path}.")
        or entry.site.id == edit.site.id
    ]
    if not inside:
        return len(entries)
    return inside[0] if edit.at == "before" else inside[-1] + 1


def _bands(entries: Iterable[_Entry]) -> tuple[Band, ...]:
    """Entries by stage: the stem first, then by number; the head and what is off the path to the output last."""
    stages: dict[tuple[int, int], list[_Entry]] = {}
    for entry in entries:
        stages.setdefault(_band_key(entry.site), []).append(entry)
    return tuple(_band(key, members) for key, members in sorted(stages.items()))


def _band_key(site: Site) -> tuple[int, int]:
    if site.stage is None:
        return (2, 0)
    return (1, 0) if site.role == "head" else (0, site.stage)


def _band(key: tuple[int, int], entries: Sequence[_Entry]) -> Band:
    kind, stage = key
    title = ("Stem" if stage == 0 else f"Stage {stage}", "Head", "Off the path")[kind]
    last = entries[-1].site
    shape = last.stage_shape if kind == 0 and len(last.stage_shape) == 4 else last.out_shape
    facts = []
    if len(shape) == 4:
        facts = [f"{shape[2]} × {shape[3]}", figures.plural(shape[1], "channel")]
    flops = figures.change(sum(e.before for e in entries), sum(e.after for e in entries))
    facts.append("FLOPs " + flops.replace("=>", "→"))
    return Band(title, tuple(facts), tuple(_groups(entries)))


def _groups(entries: Sequence[_Entry]) -> list[Group]:
    """Neighbours of one block together; a shortcut convolution that runs late still joins its block."""
    found: dict[tuple[int, int], list[_Entry]] = {}
    loose = 0
    previous: int | None = -1
    for entry in entries:
        block = None if entry.apart else entry.site.block
        loose += block is None and (previous is not None or entry.apart)
        previous = -1 if entry.apart else block
        found.setdefault((0, block) if block is not None else (1, loose), []).append(entry)
    return [
        Group("" if kind else _block_name(members[0].site), tuple(e.slot for e in members))
        for (kind, _), members in found.items()
    ]


def _block_name(site: Site) -> str:
    return site.block_path or f"block {site.block}"
