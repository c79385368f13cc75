"""What a plan says, in pieces that every format uses: edits, near misses, totals, why there is nothing to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from convrewrite.plans import Edit, Funnel, Plan, Refusal
from convrewrite.report import figures
from convrewrite.report.document import Document, Section, Table, table

NEAR_MISSES = 5
MARKS = {"replace": "~", "insert": "+"}
FLOPS_NOTE = "2 per multiply-add"


def rules_of(plan: Plan) -> list[str]:
    """Ids of all rules of the plan, in the order of the files."""
    return list(dict.fromkeys([f.rule for f in plan.funnels] + [e.rule for e in plan.edits]))


def files_of(plan: Plan) -> str:
    """Names of the rule files: "acmix, tail"."""
    names = [str(r.get("name", "")) for r in plan.rules if r.get("name")] or [r.split("/")[0] for r in rules_of(plan)]
    return figures.plain(", ".join(dict.fromkeys(names))) or "none"


def heading(plan: Plan) -> str:
    """ "torchvision:resnet50 at 1x3x224x224, rules acmix"; of a detector also the size that it makes of its images."""
    inside = _size_inside(plan)
    resized = f" (resized to {figures.shape(inside)} inside)" if inside else ""
    return f"{figures.plain(plan.model)} at {figures.shape(plan.input_shape)}{resized}, rules {files_of(plan)}"


def _size_inside(plan: Plan) -> tuple[int, ...]:
    """Height and width that the first convolution sees, if that is no part of the input's; () otherwise."""
    sites = (*(edit.site for edit in plan.edits), *(refusal.site for refusal in plan.refused))
    first = min(sites, key=lambda site: site.index, default=None)
    given, seen = plan.input_shape[2:], first.in_shape[2:] if first is not None else ()
    if len(given) != 2 or len(seen) != 2 or seen == given:
        return ()
    part = all(a > b and a % b == 0 for a, b in zip(given, seen, strict=True))  # cut into patches or pooled first
    return () if part else tuple(seen)


def funnel(steps: Funnel) -> str:
    """ "53 convs > 16 role bottleneck_spatial > 16 kernel 3"."""
    return " > ".join(f"{left} {figures.plain(label)}" for label, left in steps.steps)


def old(edit: Edit) -> str:
    """What stands at the place now: the convolution and what goes with it; for an insertion the tensor there."""
    if edit.whole_block:
        convs = figures.plural(len(edit.calls), "convolution")
        return f"block of {convs} {edit.in_shape[1]}>{edit.out_shape[1]} {figures.shape(edit.in_shape[2:])}"
    if edit.action == "replace":
        absorbed = f" and {', '.join(map(figures.plain, edit.absorbs))}" if edit.absorbs else ""
        return figures.conv(edit.site) + absorbed
    return f"{edit.in_shape[1]} channels {figures.shape(edit.in_shape[2:])}"


def new(edit: Edit) -> str:
    """The block with all its options: "acmix heads=4 window=7"."""
    return " ".join(filter(None, (figures.plain(edit.block), figures.options(edit.options))))


def start(edit: Edit) -> str:
    """ "exact (blend)"."""
    return f"{edit.start} ({figures.plain(edit.how)})" if edit.how else edit.start


def name(edit: Edit) -> str:
    """The edit's id; with the number of calls where one module is called at several sites."""
    several = len(edit.calls) > 1 and not edit.whole_block
    return figures.plain(edit.id) + (f" ({len(edit.calls)} calls)" if several else "")


def refused_by(plan: Plan, rule: str) -> list[Refusal]:
    """All refusals of one rule."""
    return [r for r in plan.refused if r.rule == rule]


def near_misses(plan: Plan, rule: str) -> list[Refusal]:
    """The near misses of one rule, those that nothing but the budget or the block stopped first."""
    found = [r for r in plan.near_misses if r.rule == rule]
    return sorted(found, key=lambda r: r.clause not in ("budget", "block"))


def passed_over(plan: Plan, rule: str) -> str:
    """Sites that match and are left all the same: "12 by pick, 3 claimed by an earlier rule"; "" if none."""
    words = {"pick": "by pick", "claimed": "claimed by an earlier rule", "rewritten": "rewritten already"}
    counts = Counter(r.clause for r in refused_by(plan, rule))
    return ", ".join(f"{counts[clause]} {text}" for clause, text in words.items() if counts[clause])


def untouched(plan: Plan) -> int:
    """Number of convolutions that no edit replaces."""
    replaced = {call for e in plan.edits if e.action == "replace" for call in (e.calls or (e.site.id,))}
    return max(plan.totals.convs - len(replaced), 0)


def counts_line(plan: Plan) -> str:
    """ "16 to replace, 1 to insert. 37 convolutions untouched."."""
    actions = Counter(e.action for e in plan.edits)
    left = figures.plural(untouched(plan), "convolution")
    return f"{actions['replace']} to replace, {actions['insert']} to insert. {left} untouched."


def cost_line(plan: Plan) -> str:
    """Parameters and FLOPs of the whole model before and after."""
    t = plan.totals
    params = figures.change(t.params_before, t.params_after, figures.total)
    flops = figures.change(t.flops_before, t.flops_after, figures.total)
    return (
        f"Params {params} ({figures.percent(t.params_before, t.params_after)})   "
        f"FLOPs {flops} ({figures.percent(t.flops_before, t.flops_after)}; {FLOPS_NOTE})"
    )


def start_line(plan: Plan) -> str:
    """How the edits start, and whether the output stays what it was."""
    counts = Counter(e.start for e in plan.edits)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("exact", "fitted", "fresh") if counts[kind])
    same = counts["exact"] == len(plan.edits)
    return f"Start {kinds}: " + ("the output stays as it is" if same else "the output changes at start")


def nothing(plan: Plan) -> list[str]:
    """Why a plan has no edits, a line per rule; [] if it has some."""
    if plan.edits:
        return []
    if not plan.funnels:
        return ["Nothing to do: there are no rules."]
    return [f"Nothing to do for {figures.plain(f.rule)}: {_nothing_reason(plan, f)}." for f in plan.funnels]


def _nothing_reason(plan: Plan, steps: Funnel) -> str:
    refused = refused_by(plan, steps.rule)
    if not refused:
        return "the model has no convolution" if not plan.totals.convs else "no site was tried"
    passed = passed_over(plan, steps.rule)
    empty = next((label for label, left in steps.steps if left == 0), None)
    if passed and empty is None:
        return f"{passed}"
    nearest = min(r.failed for r in refused)
    (reason, times), *_ = Counter(r.reason for r in refused if r.failed == nearest).most_common(1)
    where = f"no site is left after '{figures.plain(empty)}'; " if empty else ""
    return f"{where}what stops the nearest sites most often: {figures.plain(reason)} ({figures.plural(times, 'site')})"


def edit_table(edits: Sequence[Edit]) -> Table:
    """Edits of one rule as a table for Markdown and HTML."""
    rows = [
        (
            e.action,
            name(e),
            old(e),
            new(e),
            start(e),
            figures.change(e.before.params, e.after.params),
            figures.change(e.before.flops, e.after.flops),
        )
        for e in edits
    ]
    tones = ["replaced" if e.action == "replace" else "inserted" for e in edits]
    return table(("action", "site", "old", "new", "start", "params", "FLOPs"), rows, "lllllrr", tones)


def refusal_table(refusals: Sequence[Refusal]) -> Table:
    """Refusals with their reasons."""
    rows = [(figures.plain(r.site.id), r.site.role, figures.plain(r.clause), figures.plain(r.reason)) for r in refusals]
    return table(("site", "role", "clause", "reason"), rows, "llll")


def provenance(plan: Plan) -> Table:
    """What is needed to make the same plan again."""
    rows = [("plan", plan.hash), ("model", plan.fingerprint), ("seed", str(plan.seed))]
    rows += [(figures.plain(k), figures.plain(v)) for k, v in sorted(plan.versions.items())]
    return table(("what", "value"), rows, "ll")


def plan_document(plan: Plan, *, verbose: bool) -> Document:
    """The page of a plan for Markdown and HTML; the text format has a form of its own."""
    sections = [section for rule in rules_of(plan) for section in _rule_sections(plan, rule, verbose=verbose)]
    sections.append(Section("Reproduce", table=provenance(plan)))
    lines = (cost_line(plan), start_line(plan)) if plan.edits else ()
    notes = tuple(f"note: {figures.plain(n)}" for n in plan.notes)
    conclusion = f"Plan: {counts_line(plan)}" if plan.edits else " ".join(nothing(plan))
    return Document(f"Plan for {heading(plan)}", (*lines, *notes), tuple(sections), conclusion)


def _rule_sections(plan: Plan, rule: str, *, verbose: bool) -> list[Section]:
    lines = [funnel(f) for f in plan.funnels if f.rule == rule]
    passed = passed_over(plan, rule)
    if passed:
        lines.append(f"Passed over: {passed}.")
    edits = [e for e in plan.edits if e.rule == rule]
    sections = [Section(f"Rule {figures.plain(rule)}", tuple(lines), edit_table(edits) if edits else None)]
    missed = near_misses(plan, rule)
    if missed:
        shown = missed if verbose else missed[:NEAR_MISSES]
        more = (f"{len(missed) - len(shown)} more in the verbose form.",) if len(shown) < len(missed) else ()
        sections.append(Section(f"Near misses of {figures.plain(rule)}", more, refusal_table(shown)))
    return sections
