"""The HTML format: one self-contained file with a picture of the network, cost bars and tables."""

from __future__ import annotations

from collections.abc import Sequence

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.report import REPORTS, content, figures
from convrewrite.report import htmlparts as parts
from convrewrite.report import plancontent as plans
from convrewrite.report.diffcontent import diff_document
from convrewrite.report.document import Section
from convrewrite.report.layout import bands_of_diff, bands_of_edits, bands_of_sites
from convrewrite.report.sitetable import site_table, totals, totals_line
from convrewrite.reports import Report
from convrewrite.sites import Site

_COMPARED = "Each row of blocks is drawn before and after; rest the pointer on a cell for its facts."


class HtmlFormat:
    """A page to open in a browser, to print, or to keep beside a model."""

    def report(self, report: Report, *, verbose: bool) -> str:
        plan = report.plan
        document = content.report_document(report, verbose=verbose)
        body = [
            parts.heading("Rewrite report", figures.plain(plan.model), _lead(plan)),
            parts.badge(content.laws_line(report), "unsure" if not report.laws else "good" if report.ok else "bad"),
            parts.alert(document.alerts),
            parts.tiles([*_plan_tiles(plan), _drift_tile(report)]),
            *_notes([*plan.notes, *report.notes]),
            *_drawing(report.sites, plan),
        ]
        for section in document.sections:
            if section.title == "Tensors":
                body.append("<h2>Tensors</h2>" + parts.fates_bar(report) + parts.table(content.fates_table(report)))
            elif section.title != "All convolutions":
                body.append(parts.section(section))
        body.append(parts.section(_all_sites(report.sites, plan)))
        return parts.page(document.title, "\n".join(body), document.conclusion)

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        document = plans.plan_document(plan, verbose=verbose)
        sites = sites_of(plan)
        body = [
            parts.heading("Rewrite plan", figures.plain(plan.model), _lead(plan)),
            parts.tiles(_plan_tiles(plan)),
            *(f'<p class="lead">{parts.text(line)}</p>' for line in plans.nothing(plan)),
            *_notes(plan.notes),
            *_drawing(sites, plan),
            *(parts.section(s) for s in document.sections),
            parts.section(_all_sites(sites, plan)),
        ]
        return parts.page(document.title, "\n".join(body), document.conclusion)

    def sites(self, sites: Sequence[Site]) -> str:
        sums = totals(sites)
        figures_of = [
            parts.tile("convolutions", str(sums["sites"])),
            parts.tile("params", figures.total(sums["params"])),
            parts.tile("FLOPs", figures.total(sums["flops"]), plans.FLOPS_NOTE),
        ]
        body = [
            parts.heading("Convolutions", "The convolutions of a model", totals_line(sites)),
            parts.tiles(figures_of),
            "<h2>The network</h2>",
            parts.picture(bands_of_sites(sites), compare=False, label=totals_line(sites)),
            parts.section(Section("All convolutions", table=site_table(sites))),
        ]
        return parts.page("Convolutions", "\n".join(body), totals_line(sites))

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        document = diff_document(diff, verbose=verbose)
        sums = diff.totals()
        cards = [
            parts.cost_tile(label, before, after)
            for key, label in (("params", "params"), ("flops", "FLOPs of convolutions"), ("convs", "convolutions"))
            if (before := sums["before"][key]) is not None and (after := sums["after"][key]) is not None
        ]
        body = [
            parts.heading("Comparison", document.title, document.conclusion),
            parts.badge("same structure" if diff.same else "they differ", "good" if diff.same else "unsure"),
            parts.tiles(cards),
            "<h2>The networks</h2>",
            f'<p class="note">{_COMPARED}</p>',
            parts.picture(bands_of_diff(diff), compare=True, label=document.conclusion),
            *(parts.section(s) for s in document.sections),
        ]
        return parts.page(document.title, "\n".join(body), document.conclusion)


REPORTS.register("html")(HtmlFormat())


def sites_of(plan: Plan) -> tuple[Site, ...]:
    """All sites that a plan speaks of, in order of execution."""
    found = {s.id: s for s in (*(e.site for e in plan.edits), *(r.site for r in plan.refused))}
    return tuple(sorted(found.values(), key=lambda s: (s.index, s.call)))


def _lead(plan: Plan) -> str:
    rules = plans.files_of(plan)
    return f"rules {rules} · input {figures.shape(plan.input_shape)} · plan {plan.hash[:12]}"


def _notes(notes: Sequence[str]) -> list[str]:
    return [parts.section(Section("Notes", tuple(figures.plain(n) for n in notes)))] if notes else []


def _plan_tiles(plan: Plan) -> list[str]:
    replaced = sum(e.action == "replace" for e in plan.edits)
    t = plan.totals
    return [
        parts.tile(
            "changes", str(len(plan.edits)), f"{replaced} of {t.convs} replaced, {len(plan.edits) - replaced} inserted"
        ),
        parts.cost_tile("params", t.params_before, t.params_after),
        parts.cost_tile(f"FLOPs ({plans.FLOPS_NOTE})", t.flops_before, t.flops_after),
    ]


def _drift_tile(report: Report) -> str:
    if not report.drift:
        return parts.tile("output drift at start", "not measured")
    modes = ", ".join(d.mode for d in report.drift)
    return parts.tile("output drift at start", figures.small(content.worst_drift(report)), f"largest relative, {modes}")


def _drawing(sites: Sequence[Site], plan: Plan) -> list[str]:
    """The picture, the profile and the bars; without edits there is one row and nothing to weigh."""
    bands = bands_of_edits(sites, plan.edits)
    drawn = parts.picture(bands, compare=bool(plan.edits), label=f"Plan: {plans.counts_line(plan)}")
    if not plan.edits:
        return ["<h2>The network</h2>", drawn]
    return [
        "<h2>The network, before and after</h2>",
        f'<p class="note">{_COMPARED}</p>',
        drawn,
        "<h2>FLOPs along the network</h2>",
        '<p class="note">One column per convolution in order of execution; grey was, the colour on top is added.</p>',
        parts.profile(sites, plan.edits),
        "<h2>Cost of every change</h2>",
        '<p class="note">Grey is before, colour is after; one scale per column.</p>',
        parts.bars(plan.edits),
    ]


def _all_sites(sites: Sequence[Site], plan: Plan) -> Section:
    changed = {call for e in plan.edits for call in (e.site.id, *e.calls)}
    made = site_table(sites)
    tones = tuple("replaced" if s.id in changed else "" for s in sites)
    rows = type(made)(made.headers, made.rows, made.align, tones)
    return Section(f"All {len(sites)} convolutions", (totals_line(sites),), rows, folded=True)
