"""A plan as text that reads like ``terraform plan``, and the answer to "why this site?"."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from convrewrite.errors import PlanError, closest
from convrewrite.plans import Edit, Plan, Refusal
from convrewrite.report import figures
from convrewrite.report import plancontent as content
from convrewrite.sites import Site

_WIDTH = 100


def plan_text(plan: Plan, *, verbose: bool) -> str:
    """The whole plan: a paragraph per rule, then totals and the list of touched sites."""
    paragraphs = [f"Plan for {content.heading(plan)}"]
    paragraphs += [_rule_text(plan, rule, verbose=verbose) for rule in content.rules_of(plan)]
    paragraphs.append("\n".join(closing_lines(plan)))
    if verbose:
        paragraphs.append(f"plan {plan.hash}\nmodel {plan.fingerprint}\nseed {plan.seed}\n{_versions(plan)}")
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def closing_lines(plan: Plan) -> list[str]:
    """Totals, notes and what is touched; or why there is nothing to do."""
    notes = [f"Note: {figures.plain(n)}" for n in plan.notes]
    if not plan.edits:
        return content.nothing(plan) + notes
    touched = "Touched: " + " ".join(dict.fromkeys(figures.plain(e.path) for e in plan.edits))
    wrapped = textwrap.wrap(touched, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [f"Plan: {content.counts_line(plan)}", content.cost_line(plan), content.start_line(plan), *notes, *wrapped]


def _versions(plan: Plan) -> str:
    return ", ".join(f"{figures.plain(k)} {figures.plain(v)}" for k, v in sorted(plan.versions.items()))


def _rule_text(plan: Plan, rule: str, *, verbose: bool) -> str:
    funnels = [content.funnel(f) for f in plan.funnels if f.rule == rule]
    lines = ["   ".join([figures.plain(rule), *funnels])]
    edits = [e for e in plan.edits if e.rule == rule]
    if edits:
        lines += [*_common(edits), textwrap.indent(grid([_edit_row(e, edits) for e in edits]), "  ")]
    missed = content.near_misses(plan, rule)
    shown = missed if verbose else missed[: content.NEAR_MISSES]
    if shown:
        lines.append(textwrap.indent(grid([_refusal_row("near miss", r) for r in shown]), "  "))
    if len(shown) < len(missed):
        lines.append(f"  and {len(missed) - len(shown)} more near misses (-v shows all)")
    passed = content.passed_over(plan, rule)
    if passed:
        lines.append(f"  passed over  {passed}")
    others = [r for r in content.refused_by(plan, rule) if r not in missed] if verbose else []
    if others:
        lines.append(textwrap.indent(grid([_refusal_row("refused", r) for r in others]), "  "))
    return "\n".join(lines)


def _common(edits: Sequence[Edit]) -> list[str]:
    """One line for the block and the start where all edits of a rule have the same, so that rows stay short."""
    kinds = {(content.new(e), content.start(e)) for e in edits}
    return [f"  => {new}   {start}" for new, start in kinds] if len(edits) > 1 == len(kinds) else []


def _edit_row(edit: Edit, edits: Sequence[Edit]) -> tuple[str, ...]:
    own = [] if _common(edits) else [f"=> {content.new(edit)}", content.start(edit)]
    return (
        content.MARKS[edit.action],
        content.name(edit),
        content.old(edit),
        *own[:1],
        f"params {figures.change(edit.before.params, edit.after.params)}",
        f"FLOPs {figures.change(edit.before.flops, edit.after.flops)}",
        *own[1:],
    )


def _refusal_row(word: str, refusal: Refusal) -> tuple[str, ...]:
    return (word, figures.plain(refusal.site.id), figures.plain(refusal.reason))


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns without headers or trailing blanks."""
    text = tabulate(rows, tablefmt="plain", disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def explain(plan: Plan, sites: Sequence[Site], path: str) -> str:
    """All about the site with that id, or about every call of the module at that path.

    Raises:
        PlanError: no such site; names those inside a module that contains some, else the closest.
    """
    found = [s for s in sites if path in (s.id, s.path)]
    if not found:
        raise PlanError(
            f"no convolution at '{figures.plain(path)}'", where=figures.plain(plan.model), fix=_hint(sites, path)
        )
    return "\n\n".join(_explain_site(plan, site) for site in found) + "\n"


def _hint(sites: Sequence[Site], path: str) -> str:
    inside = [s.id for s in sites if s.id.startswith(f"{path}.")]
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        return f"inside it: {', '.join(inside[:5])}{more}"
    return closest(path, [s.id for s in sites]) or "'convrewrite inspect' lists all"


def _explain_site(plan: Plan, site: Site) -> str:
    lines = [figures.plain(site.id), textwrap.indent(grid(_facts(site)), "  "), ""]
    rules = content.rules_of(plan)
    for rule in rules:
        lines += [figures.plain(rule), *(f"  {line}" for line in _verdict(plan, rule, site))]
    return "\n".join(lines if rules else [*lines, "no rules"])


def _facts(site: Site) -> list[tuple[str, str]]:
    rows = [
        ("operation", f"{figures.conv(site)} ({figures.plain(site.module_class)}, {site.kind})"),
        ("role", site.role),
        ("stage", f"{_or_none(site.stage)} ({_or_none(site.stage_from_end)} from the end)"),
        ("block", f"{_or_none(site.block)} ({_or_none(site.block_from_end)} from the end)"),
        ("position", f"{_or_none(site.position)} on its branch"),
        ("calls", f"{site.call + 1} of {site.calls}" if site.calls > 1 else "1"),
        ("padding", f"{','.join(map(str, site.padding))} {figures.plain(site.conv.padding_mode)}"),
        ("inside", " > ".join(f"{figures.plain(p or '(root)')} {figures.plain(c)}" for p, c in site.inside)),
        ("follows", " < ".join(map(figures.plain, site.follows))),
        ("precedes", " > ".join(map(figures.plain, site.precedes))),
        ("pooled by", ", ".join(map(figures.plain, site.pool_tail))),
        ("sees", f"{figures.shape(site.receptive_field)} input pixels per output pixel"),
        ("costs", f"params {figures.count(site.params)}, FLOPs {figures.count(site.flops)}"),
        ("rewritten by", figures.plain(site.rewritten)),
    ]
    return [(key, value) for key, value in rows if value]


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)


def _verdict(plan: Plan, rule: str, site: Site) -> list[str]:
    """What one rule does with the site, in sentences."""
    lines = [_matched(e) for e in plan.edits if e.rule == rule and site.id in (e.site.id, *e.calls)]
    lines += [_refused(r) for r in content.refused_by(plan, rule) if r.site.id == site.id]
    return lines or ["does not look at it"]


def _matched(edit: Edit) -> str:
    verb = "is replaced by" if edit.action == "replace" else f"gets, {edit.at or 'at'} {figures.plain(edit.path)},"
    params = figures.change(edit.before.params, edit.after.params)
    flops = figures.change(edit.before.flops, edit.after.flops)
    return f"matches: {verb} {content.new(edit)}; params {params}, FLOPs {flops}, start {content.start(edit)}"


def _refused(refusal: Refusal) -> str:
    words = {
        "pick": "matches, not picked",
        "claimed": "matches, claimed by another rule",
        "block": "matches, but the block cannot stand here",
        "budget": "matches, left out by the budget",
        "rewritten": "matches, rewritten already",
    }
    others = refusal.failed - 1
    more = f" (and {figures.plural(others, 'more clause')})" if others > 0 and refusal.clause not in words else ""
    return f"{words.get(refusal.clause, 'does not match')}: {figures.plain(refusal.reason)}{more}"
