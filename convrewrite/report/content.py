"""What a report says, as a document: its text, Markdown and HTML differ in form only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from convrewrite.plans import Edit
from convrewrite.report import figures
from convrewrite.report import plancontent as plans
from convrewrite.report.calibrationcontent import calibration_line, calibration_section
from convrewrite.report.document import Document, Section, Table, table
from convrewrite.report.sitetable import site_table, totals_line
from convrewrite.reports import Report

CHANGED, CONVOLUTIONS = "Changed sites", "All convolutions"
FATES = ("carried", "re-estimated", "absorbed", "new", "dropped")
_FATE_NOTES = {
    "carried": "same values, same or new key",
    "re-estimated": "batch-norm statistics, measured again on images",
    "absorbed": "its values live on inside other tensors",
    "new": "initialised by a block",
    "dropped": "not in the rewritten model",
}
COSTS_NOTE = (
    f"FLOPs: {plans.FLOPS_NOTE}. Memory: activations of the place at the planned input, in inference the most "
    "alive at once, in training what the backward pass keeps."
)


def broken(report: Report) -> list[str]:
    """Names of the broken laws."""
    return [figures.plain(law.law) for law in report.laws if law.status == "broken"]


def laws_line(report: Report) -> str:
    """ "6 laws held, 1 skipped", "BROKEN: start (1 of 7 laws)", "laws not checked"."""
    if not report.laws:
        return "laws not checked"
    if not report.ok:
        return (
            f"BROKEN: {', '.join(broken(report))} ({len(broken(report))} of {figures.plural(len(report.laws), 'law')})"
        )
    skipped = sum(law.status == "skipped" for law in report.laws)
    held = figures.plural(len(report.laws) - skipped, "law") + " held"
    return f"{held}, {skipped} skipped" if skipped else held


def alerts(report: Report) -> tuple[str, ...]:
    """What must not be missed: broken laws, forced or not."""
    bad = [law for law in report.laws if law.status == "broken"]
    lines = [f"law '{figures.plain(law.law)}' is BROKEN: {figures.plain(law.detail)}" for law in bad]
    if bad and report.forced:
        lines.insert(0, "FORCED: this model was emitted although it breaks the laws below. Do not trust it unchecked.")
    return tuple(lines)


def worst_drift(report: Report) -> float:
    """The largest relative drift of any mode; NaN is worse than every number, and `max` would hide it."""
    return max((d.max_relative for d in report.drift), key=lambda value: (math.isnan(value), value), default=0.0)


def conclusion(report: Report) -> str:
    """The report in one line."""
    plan = report.plan
    replaced = sum(e.action == "replace" for e in plan.edits)
    inserted = len(plan.edits) - replaced
    drift = f", output drift {figures.small(worst_drift(report))}" if report.drift else ""
    params = figures.percent(plan.totals.params_before, plan.totals.params_after)
    flops = figures.percent(plan.totals.flops_before, plan.totals.flops_after)
    forced = "FORCED, " if report.forced and not report.ok else ""
    edits = f"{replaced} replaced, {inserted} inserted"
    fits = f", {calibration_line(report.calibration)}" if report.calibration is not None else ""
    return f"Result: {forced}{edits}, params {params}, FLOPs {flops}, {laws_line(report)}{drift}{fits}."


def report_document(report: Report, *, verbose: bool) -> Document:
    """The page of a report; `verbose` adds all sites, refusals and timings."""
    plan = report.plan
    sections = [
        Section("Rules", table=_rules(report)),
        Section(CHANGED, table=changed_table(plan.edits)),
    ]
    if plan.edits:
        sections.append(Section("Costs", (COSTS_NOTE,), costs_table(plan.edits)))
    missed = [r for rule in plans.rules_of(plan) for r in plans.near_misses(plan, rule)]
    if missed:
        shown = missed if verbose else missed[: plans.NEAR_MISSES]
        more = (f"{len(missed) - len(shown)} more in the verbose form",) if len(shown) < len(missed) else ()
        sections.append(Section("Near misses", more, plans.refusal_table(shown)))
    sections += [
        Section(
            "Tensors", () if report.tensors else ("not recorded",), fates_table(report) if report.tensors else None
        ),
        Section("Laws", () if report.laws else ("not checked",), laws_table(report) if report.laws else None),
        Section("Output drift at start", *_drift(report)),
    ]
    if report.calibration is not None:
        sections.append(calibration_section(report.calibration))
    if verbose:
        sections.append(Section(CONVOLUTIONS, (totals_line(report.sites),), site_table(report.sites), folded=True))
        sections.append(Section("Timings", table=_timings(report)))
    sections.append(Section("Reproduce", table=plans.provenance(plan)))
    lines = (f"Plan: {plans.counts_line(plan)}", plans.cost_line(plan)) if plan.edits else tuple(plans.nothing(plan))
    notes = tuple(f"note: {figures.plain(n)}" for n in (*plan.notes, *report.notes))
    return Document(
        f"Rewrite of {plans.heading(plan)}", (*lines, *notes), tuple(sections), conclusion(report), alerts(report)
    )


def _rules(report: Report) -> Table:
    rows = [
        (figures.plain(f.rule), plans.funnel(f), str(f.edits), plans.passed_over(report.plan, f.rule) or "-")
        for f in report.plan.funnels
    ]
    return table(("rule", "funnel", "edits", "passed over"), rows, "llrl")


def changed_table(edits: Sequence[Edit]) -> Table:
    """What stands where now, in place of what."""
    rows = [
        (
            plans.name(e),
            e.site.role,
            figures.place(e.site),
            plans.old(e),
            f"{plans.MARKS[e.action]} {plans.new(e)}",
            plans.start(e),
        )
        for e in edits
    ]
    return table(("site", "role", "stage", "old", "new", "start"), rows, "llllll", _edit_tones(edits))


def costs_table(edits: Sequence[Edit]) -> Table:
    """What each change costs, and what its place saw of the input before."""
    headers = ("site", "params", "FLOPs", "inference memory", "training memory", "receptive field before")
    rows = [
        (
            plans.name(e),
            figures.change(e.before.params, e.after.params),
            figures.change(e.before.flops, e.after.flops),
            figures.change(e.before.act_infer, e.after.act_infer, figures.size),
            figures.change(e.before.act_train, e.after.act_train, figures.size),
            figures.shape(e.site.receptive_field),
        )
        for e in edits
    ]
    return table(headers, rows, "lrrrrr", _edit_tones(edits))


def _edit_tones(edits: Sequence[Edit]) -> list[str]:
    return ["replaced" if e.action == "replace" else "inserted" for e in edits]


def fates_table(report: Report) -> Table:
    """What became of the tensors, by fate; the share is of all elements before (new: after) the rewrite."""
    sums = report.carried()
    before = sum(sums[fate]["elements"] for fate in ("carried", "re-estimated", "absorbed", "dropped") if fate in sums)
    rows = []
    for fate in FATES:
        if fate == "re-estimated" and fate not in sums:
            continue
        entry = sums.get(fate, {"tensors": 0, "elements": 0, "norm": 0.0})
        elements = int(entry["elements"])
        of = "-" if fate == "new" else figures.share(elements, before)
        norm = f"{entry['norm']:.4g}"
        rows.append((fate, str(int(entry["tensors"])), figures.total(elements), of, norm, _FATE_NOTES[fate]))
    return table(("fate", "tensors", "elements", "of the original", "L2 norm", "meaning"), rows, "lrrrrl")


def laws_table(report: Report) -> Table:
    """The laws with their verdicts."""
    rows = [
        (
            figures.plain(law.law),
            law.status.upper() if law.status == "broken" else law.status,
            "-" if law.value is None else figures.small(law.value),
            figures.plain(law.detail),
        )
        for law in report.laws
    ]
    tones = ["broken" if law.status == "broken" else "" for law in report.laws]
    return table(("law", "verdict", "value", "detail"), rows, "llrl", tones)


def _drift(report: Report) -> tuple[tuple[str, ...], Table | None]:
    if not report.drift:
        return ("not measured",), None
    rows = [
        (d.mode, figures.small(d.max_relative), f"{d.cosine:.7f}", "-" if d.agreement is None else f"{d.agreement:.1%}")
        for d in report.drift
    ]
    return (), table(("mode", "max |new - old| / max |old|", "cosine", "same top-1"), rows, "lrrr")


def _timings(report: Report) -> Table:
    rows = [(figures.plain(name), figures.seconds(value)) for name, value in report.timings.items()]
    return table(("pass", "time"), [*rows, ("all", figures.seconds(sum(report.timings.values())))], "lr")
