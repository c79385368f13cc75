"""What a comparison of two models says, as a document."""

from __future__ import annotations

from collections.abc import Sequence

from convrewrite.diffing import Diff, ModelView, ModuleChange, SiteChange, TensorChange
from convrewrite.report import figures
from convrewrite.report.document import Document, Section, Table, table
from convrewrite.report.plancontent import FLOPS_NOTE
from convrewrite.sites import Shape, Site

_SHOWN = 40
_TONES = {"added": "inserted", "removed": "removed", "changed": "replaced"}
_Columns = tuple[tuple[str, ...], str]
_Change = ModuleChange | SiteChange | TensorChange
_MODULES: _Columns = (("change", "module", "before", "after", "changes inside"), "llllr")
_SITES: _Columns = (("change", "site", "before", "after", "params", "FLOPs", "other facts"), "llllrrl")
_TENSORS: _Columns = (("change", "tensor", "before", "after"), "llll")


def diff_document(diff: Diff, *, verbose: bool) -> Document:
    """The page of a comparison; `verbose` lists all that `_SHOWN` would cut."""
    before, after = figures.plain(diff.before.name), figures.plain(diff.after.name)
    title = f"{before} compared with {after}"
    if diff.same:
        line = "Same: no module, convolution or tensor differs (values are not compared)."
        return Document(title, (), (Section("Totals", table=_diff_totals(diff)), *_measured(diff)), line)
    modules = list(diff.modules if verbose else diff.outermost)
    sections = [
        Section("Totals", table=_diff_totals(diff)),
        *_measured(diff),
        *_section(
            "Modules", [_module_row(diff, m, verbose=verbose) for m in modules], _MODULES, modules, verbose=verbose
        ),
        *_section("Convolutions", [_site_row(diff, s) for s in diff.sites], _SITES, diff.sites, verbose=verbose),
        *_section("Tensors", [_tensor_row(t) for t in diff.tensors], _TENSORS, diff.tensors, verbose=verbose),
    ]
    return Document(title, (), tuple(sections), f"Diff: {diff_counts(diff)}.")


def _section(
    title: str, rows: Sequence[Sequence[str]], columns: _Columns, changes: Sequence[_Change], *, verbose: bool
) -> list[Section]:
    """One section, cut at `_SHOWN` rows unless `verbose`; none where nothing changed."""
    if not rows:
        return []
    shown = rows if verbose else rows[:_SHOWN]
    tones = [_TONES[change.kind] for change in changes[: len(shown)]]
    more = (f"{len(rows) - len(shown)} more in the verbose form",) if len(shown) < len(rows) else ()
    return [Section(title, more, table(columns[0], shown, columns[1], tones))]


def diff_counts(diff: Diff) -> str:
    """ "modules +4 -0 ~16, convolutions ..., tensors ..."."""
    words = []
    for name, kinds in (
        ("modules", [m.kind for m in diff.modules]),
        ("convolutions", [s.kind for s in diff.sites]),
        ("tensors", [t.kind for t in diff.tensors]),
    ):
        words.append(f"{name} +{kinds.count('added')} -{kinds.count('removed')} ~{kinds.count('changed')}")
    return ", ".join(words)


def _diff_totals(diff: Diff) -> Table:
    before, after = diff.totals()["before"], diff.totals()["after"]
    names = {
        "params": "parameters",
        "flops": f"FLOPs of convolutions ({FLOPS_NOTE})",
        "convs": "convolutions",
        "elements": "state-dict elements",
        "tensors": "state-dict tensors",
    }
    rows = []
    for key, label in names.items():
        old, new = before[key], after[key]
        if old is not None and new is not None:
            rows.append((label, figures.total(old), figures.total(new), figures.percent(old, new)))
    return table(("what", "before", "after", "change"), rows, "lrrr")


def _measured(diff: Diff) -> list[Section]:
    """What training measured last, where either model was trained."""
    before, after = diff.before.measured, diff.after.measured
    rows = []
    for key, label in (("val_accuracy", "accuracy"), ("agreement", "agreement with the original")):
        if key in before or key in after:
            old, new = before.get(key), after.get(key)
            change = "-" if old is None or new is None else f"{100 * (new - old):+.2f} points"
            rows.append((label, *("-" if v is None else f"{100 * v:.2f} %" for v in (old, new)), change))
    if "val_loss" in before or "val_loss" in after:
        shown = ("-" if v is None else f"{v:.4g}" for v in (before.get("val_loss"), after.get("val_loss")))
        rows.append(("loss", *shown, "-"))
    if "step" in before or "step" in after:
        shown = ("-" if v is None else f"{v:.0f}" for v in (before.get("step"), after.get("step")))
        rows.append(("at step", *shown, "-"))
    if not rows:
        return []
    return [Section("Measured on held-out images", table=table(("what", "before", "after", "change"), rows, "lrrr"))]


def _module_row(diff: Diff, change: ModuleChange, *, verbose: bool) -> tuple[str, ...]:
    inside = 0 if verbose or not change.path else diff.inside(change.path)
    path = figures.plain(change.path) or "(root)"
    return (change.kind, path, _side(change.before), _side(change.after), str(inside) if inside else "-")


def _side(text: str) -> str:
    return figures.plain(text) or "-"


def _site_row(diff: Diff, change: SiteChange) -> tuple[str, ...]:
    old, new = change.before, change.after
    return (
        change.kind,
        figures.plain(change.id),
        stands(diff.before, old),
        stands(diff.after, new),
        figures.change(old.params if old else 0, new.params if new else 0),
        figures.change(old.flops if old else 0, new.flops if new else 0),
        "; ".join(f"{name} {figures.plain(was)} => {figures.plain(now)}" for name, was, now in _told(change)) or "-",
    )


def stands(view: ModelView, site: Site | None) -> str:
    """The convolution, or the class of what stands in its place."""
    if site is None:
        return "-"
    if not site.rewritten:
        return figures.conv(site)
    return f"{figures.plain(view.modules.get(site.path, 'block'))} {figures.channels(site)} {figures.sizes(site)}"


def _told(change: SiteChange) -> list[tuple[str, str, str]]:
    """The facts that the other columns do not show."""
    shown = ("params", "flops", "kernel", "stride", "groups", "dilation", "op", "act_infer", "act_train")
    return [fact for fact in change.facts if fact[0] not in shown]


def _tensor_row(change: TensorChange) -> tuple[str, ...]:
    return (change.kind, figures.plain(change.key), _signature(change.before), _signature(change.after))


def _signature(signature: tuple[Shape, str] | None) -> str:
    return f"{figures.shape(signature[0])} {figures.plain(signature[1]).removeprefix('torch.')}" if signature else "-"
