"""From matches to a plan: options resolved, blocks asked, starts chosen, budgets kept. Edits nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from pydantic import ValidationError
from torch import nn

from convrewrite.annotate import Graph
from convrewrite.blocks.base import BLOCKS, Block, BlockOptions
from convrewrite.blocks.blend import blend_cost
from convrewrite.errors import ConvrewriteError, PlanError, RuleError, closest
from convrewrite.facts import site_facts
from convrewrite.fits.base import can_fit, refuse_fit
from convrewrite.graphs import obstacle
from convrewrite.match import Candidate, correct_roles, match, search
from convrewrite.plans import FITTED, Edit, Funnel, Plan, Refusal, Totals, digest
from convrewrite.rulefile import Rule, RuleFile, resolve_options
from convrewrite.sites import Cost, Place, Site
from convrewrite.spans import WholeBlock, clash, whole_block
from convrewrite.stands import computed_weight, inserted_at

_PACKAGES = ("convrewrite", "torch", "torchvision", "timm")


@dataclass
class _Draft:
    """A plan in the making."""

    graph: Graph
    model: nn.Module
    start: str | None
    overrides: Mapping[tuple[str, str], Any]
    used: set[tuple[str, str]] = field(default_factory=set)
    edits: list[Edit] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    graph: Graph,
    files: Sequence[RuleFile],
    *,
    name: str,
    input_shape: tuple[int, ...],
    start: str | None = None,
    overrides: Mapping[tuple[str, str], Any] | None = None,
    seed: int = 0,
) -> Plan:
    """The plan of `files` on `model`.

    Args:
        graph: the annotated capture of `model`.
        start: overrides every rule's own start.
        overrides: (rule id or "*", option) -> value, from ``--set``.

    Raises:
        RuleError: an option is wrong, or a rule's expectation is not met.
    """
    draft = _Draft(graph, model, start, overrides or {})
    funnels: list[Funnel] = []
    notes: list[str] = []
    for file in files:
        for rule in file.rules:
            _block_class(file, rule, rule.change.options)  # wrong also where it finds no site
        sites = correct_roles(graph.sites, file)
        claimed = {call: e.rule for e in draft.edits if e.action == "replace" for call in e.calls}
        result = match(sites, file, claimed)
        draft.refused.extend(result.refused)
        before = len(draft.edits)
        for candidate in result.candidates:
            _consider(draft, file, candidate)
        _check_expected(draft, file, result.candidates)
        kept, dropped = _within_budget(draft, file, draft.edits[before:])
        draft.edits[before:] = kept
        draft.refused.extend(dropped)
        funnels.extend(_funnel(f, draft.edits) for f in result.funnels)
        notes.extend(result.notes)
    _check_overrides(draft)
    notes.extend(_left_to_the_fit(e) for e in draft.edits if e.how == FITTED and e.options.get("nmse") is not None)
    if model._compiled_call_impl is not None:
        notes.append("the model is compiled in place; the rewritten one is not: call its .compile() again")
    notes.extend(f"{path}: not traced ({why})" for path, why in sorted(graph.captured.opaque.items()))
    return Plan(
        model=name,
        fingerprint=fingerprint(model, graph),
        rules=tuple(f.to_data() for f in files),
        input_shape=input_shape,
        seed=seed,
        edits=tuple(draft.edits),
        refused=tuple(draft.refused),
        funnels=tuple(funnels),
        totals=totals(model, graph, draft.edits),
        notes=tuple(dict.fromkeys(notes)),
        versions=versions(),
    )


def _left_to_the_fit(edit: Edit) -> str:
    most = edit.options.get("heads") or "as many as hold the convolution"
    limit = f"{edit.options['nmse']:g} of the output's variance"
    return (
        f"rule {edit.rule}: the fit chooses the fewest {edit.block} heads that lose at most {limit} "
        f"(costs are for the most, {most})"
    )


def settle(plan: Plan, options: Mapping[str, Mapping[str, Any]], model: nn.Module, graph: Graph) -> Plan:
    """The plan with the options that fits chose, and the costs that go with them.

    Args:
        options: edit's id -> all options of its block. model: the original.
    """
    sites, edits = {s.id: s for s in graph.sites}, []
    for edit in plan.edits:
        if edit.id in options:
            cls, place = BLOCKS.get(edit.block), Place(edit.in_shape, edit.out_shape, edit.site.conv)
            given = cls.Options(**options[edit.id])
            _, after = _costs(cls, given, [sites[i] for i in edit.calls], place, edit.how, replaced=True)
            edit = replace(edit, options=given.model_dump(mode="json"), after=after)
        edits.append(edit)
    left = {_left_to_the_fit(e) for e in plan.edits if e.id in options}
    notes = tuple(n for n in plan.notes if n not in left)
    chosen = Counter((e.rule, e.block, e.options["nmse"], e.options["heads"]) for e in edits if e.id in options)
    notes += tuple(
        f"rule {rule}: {heads} {block} heads chosen at {count} sites (NMSE {nmse:g})"
        for (rule, block, nmse, heads), count in sorted(chosen.items())
    )
    return replace(plan, edits=tuple(edits), notes=notes, totals=totals(model, graph, edits))


def trial(model: nn.Module, graph: Graph, file: RuleFile, *, start: str | None = None) -> dict[str, list[str]]:
    """Rule id -> ids of the sites that it would change; no expectation is checked."""
    draft = _Draft(graph, model, start, {})
    sites = correct_roles(graph.sites, file) if file.roles else graph.sites
    for candidate in search(sites, file).candidates:
        _consider(draft, file, candidate)
    labels = {f"{file.name}/{rule.id}" if file.name else rule.id: rule.id for rule in file.rules}
    found: dict[str, list[str]] = {rule.id: [] for rule in file.rules}
    for edit in draft.edits:
        found[labels[edit.rule]].append(edit.site.id)
    return found


def fingerprint(model: nn.Module, graph: Graph) -> str:
    """Hash of what a plan depends on: the sites' structure and the state dict's keys and shapes."""
    sites = [[s.id, s.op, asdict(s.conv), list(s.in_shape), list(s.out_shape), s.rewritten] for s in graph.sites]
    state = [[k, list(v.shape)] for k, v in model.state_dict().items()]
    return digest([sites, state])


def check_fits(plan: Plan, model: nn.Module, graph: Graph) -> None:
    """Refuse a plan that was made for another model, naming the first site that differs."""
    if fingerprint(model, graph) == plan.fingerprint:
        return
    now = {s.id: s for s in graph.sites}
    for edit in plan.edits:
        site = now.get(edit.site.id)
        if site is None:
            raise PlanError(
                "the plan does not fit the model: no such site",
                where=edit.site.id,
                fix=closest(edit.site.id, now) or "make a new plan",
            )
        if (site.conv, site.in_shape, site.rewritten) != (edit.site.conv, edit.site.in_shape, edit.site.rewritten):
            raise PlanError(
                f"the plan does not fit the model: {_differs(edit.site, site)}", where=site.id, fix="make a new plan"
            )
    what = f"the plan, made for {plan.model}, does not fit the model: other sites or state-dict shapes"
    raise PlanError(what, fix="make a new plan")


def _differs(old: Site, new: Site) -> str:
    """The first fact that changed, with both values."""
    for name, was in asdict(old.conv).items():
        now = getattr(new.conv, name)
        if now != was:
            return f"{name} was {was}, is {now}"
    for name in ("in_shape", "rewritten"):
        if getattr(old, name) != getattr(new, name):
            return f"{name} was {getattr(old, name) or 'none'}, is {getattr(new, name) or 'none'}"
    return "it differs"


def totals(model: nn.Module, graph: Graph, edits: Iterable[Edit]) -> Totals:
    """Parameters and FLOPs of the whole model before and after."""
    params = sum(p.numel() for p in model.parameters())
    flops = graph.captured.other_flops + sum(s.flops for s in graph.sites)
    edits = list(edits)
    return Totals(
        params,
        params + sum(e.after.params - e.before.params for e in edits),
        flops,
        flops + sum(e.after.flops - e.before.flops for e in edits),
        sum(1 for s in graph.sites if s.op == "conv2d"),
    )


def versions() -> dict[str, str]:
    """Versions of what a plan's result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _consider(draft: _Draft, file: RuleFile, candidate: Candidate) -> None:
    """Turn one candidate into an edit, or into a refusal with the reason."""
    site, rule = candidate.site, candidate.rule
    label = f"{file.name}/{rule.id}" if file.name else rule.id
    found = _edit(draft, file, candidate, label)
    if isinstance(found, Edit):
        owner = draft.owners.setdefault(found.id, label)
        in_the_way = f"claimed by rule {owner}" if owner != label else clash(found, draft.edits)
        if in_the_way:
            found = ("claimed", in_the_way)
        else:
            draft.edits.append(found)
            return
    clause, reason = found
    draft.refused.append(Refusal(site, label, clause, reason))


_CANNOT = ("block", "start", "functional", "insert", "op")


def _check_expected(draft: _Draft, file: RuleFile, candidates: Sequence[Candidate]) -> None:
    """A rule whose sites match but cannot be changed has found less than it expects: an error with the reasons."""
    lines = []
    for rule in file.rules:
        label = f"{file.name}/{rule.id}" if file.name else rule.id
        mine = {c.site.id for c in candidates if c.rule is rule}
        refused = [r for r in draft.refused if r.rule == label and r.clause in _CANNOT and r.site.id in mine]
        standing = sum(1 for r in draft.refused if r.rule == label and r.clause == "rewritten")
        left = len(mine) - len(refused) + standing
        if refused and left < rule.expect.sites.least:
            reasons = Counter(r.reason for r in refused)
            first = "; ".join(f"{reason} ({n} of {len(mine)})" for reason, n in reasons.most_common(3))
            where = file.where(rule.id) or file.name
            what = f"rule '{rule.id}': {left} sites can be changed, expected {rule.expect.sites}: {first}"
            lines.append(f"{where}: {what}")
    if lines:
        raise RuleError("\n".join(lines))


def _edit(draft: _Draft, file: RuleFile, candidate: Candidate, label: str) -> Edit | tuple[str, str]:
    site, rule = candidate.site, candidate.rule
    if site.op != "conv2d":
        return "op", f"{site.op} is out of scope, only conv2d is rewritten"
    if len(site.in_shape) != 4 or len(site.out_shape) != 4:
        return "op", "no call of it was seen, so its shapes are unknown" if not site.calls else "its input is not 4-D"
    calls = [s for s in draft.graph.sites if s.id in candidate.calls]
    span = BLOCKS.get(rule.change.block).span if rule.change.block in BLOCKS else "conv"
    whole = whole_block(draft.model, draft.graph, site) if rule.action == "replace" and span == "block" else None
    target = _target(draft, site, rule, span) if whole is None else _whole_target(whole)
    if isinstance(target[0], tuple):
        return target[0]
    path, at, place = target
    assert isinstance(path, str) and isinstance(place, Place)
    cls, options = _block(draft, file, candidate, place)
    if rule.action not in cls.actions:
        return "block", f"{cls.name} cannot {rule.action}, it can {' or '.join(cls.actions)}"
    reason = cls.refuse(place, options)
    if reason:
        return "block", f"{cls.name}: {reason}"
    start = draft.start or rule.start
    if start != "fitted" and getattr(options, "nmse", None) is not None:
        return "start", f"{cls.name}.nmse chooses the heads of a fitted start, this one is {start}; use start: fitted"
    how = _how(cls, place, options, rule.action, start)
    if how in ("holds the conv", FITTED) and (own := computed_weight(draft.model, site.path)):
        how = "blend" if how != FITTED and cls.span == "conv" else None
        if how is None:
            return "start", f"{cls.name} cannot take over the weight of {own}, which is computed from others"
    absorbs = site.pool_tail if cls.span == "pool" and rule.action == "replace" else ()
    if how is None:
        why = refuse_fit(cls.name, place, options) if start == "fitted" and rule.action == "replace" else None
        others = _other_starts(cls, place, options, rule.action)
        return "start", f"{cls.name} has no {start} start for {rule.action}{f', {why}' if why else ''}; use {others}"
    if site.kind == "functional" and rule.action == "replace":
        found = obstacle(draft.model, site.path)
        if found or site.calls > 1:
            return "functional", found or f"it is called {site.calls} times"
    costed = calls if at == "" and whole is None else [site]
    before, after = _costs(cls, options, costed, place, how, replaced=at == "")
    if absorbs:
        gone = sum(p.numel() for path_ in absorbs for p in draft.model.get_submodule(path_).parameters())
        before = replace(before, params=before.params + gone)
    if isinstance(whole, WholeBlock):
        calls, before = list(whole.sites), whole.before
    return Edit(
        id=path if at == "" else f"{path} {at}",
        site=site,
        rule=label,
        action=rule.action,
        at=at,
        path=path,
        block=cls.name,
        options=options.model_dump(mode="json"),
        start=start,  # type: ignore[arg-type]
        how=how,
        calls=tuple(s.id for s in calls),
        in_shape=place.in_shape,
        out_shape=place.out_shape,
        before=before,
        after=after,
        absorbs=absorbs,
    )


def _target(draft: _Draft, site: Site, rule: Any, span: str) -> tuple[Any, str, Place | None]:
    """(path, at, place) of the edit; a pair (clause, reason) in place of the path where there is none."""
    if rule.action == "replace" and span == "pool":
        if not site.pool_tail:
            return ("block", "no straight line of modules leads from it to a pooling"), "", None
        return site.path, "", Place(site.in_shape, site.pool_shape, site.conv)
    if rule.action == "replace":
        height, width = site.conv.out_size(site.in_shape[2], site.in_shape[3])
        if (height, width) != site.out_shape[2:]:
            seen = "x".join(map(str, site.out_shape[2:]))
            return ("op", f"{site.module_class} gives {seen} where its padding says {height}x{width}"), "", None
        return site.path, "", site.place()
    insert = rule.insert
    at, anchor = insert.at, insert.anchor
    if anchor == "here":
        path: str | None = site.path if site.kind == "module" else None
        shape = site.out_shape if at == "after" else site.in_shape
    elif anchor == "block":
        path, shape = (site.block_path, site.block_shape) if at == "after" else (site.block_entry, site.block_in_shape)
    else:
        path, shape = site.stage_path, site.stage_shape
    if path is None or len(shape) != 4:
        return ("insert", f"no module's {'output' if at == 'after' else 'input'} is that of its {anchor}"), "", None
    standing = inserted_at(draft.model.get_submodule(path), at)
    if standing:
        return ("rewritten", f"{standing} already inserted a block {at} {path}"), "", None
    return path, at, Place(shape, shape)


def _whole_target(whole: WholeBlock | tuple[str, str]) -> tuple[Any, str, Place | None]:
    """`_target` of a block that stands for a whole residual block."""
    return (whole.path, "", whole.place) if isinstance(whole, WholeBlock) else (whole, "", None)


def _block(draft: _Draft, file: RuleFile, candidate: Candidate, place: Place) -> tuple[type[Block], BlockOptions]:
    """The block's class and its options, expressions evaluated over the site's facts."""
    rule = candidate.rule
    where = _place_of(file, rule)
    raw = dict(rule.change.options)
    for (rule_id, option), value in draft.overrides.items():
        if rule_id in (rule.id, "*", f"{file.name}/{rule.id}"):
            raw[option] = value
            draft.used.add((rule_id, option))
    cls = _block_class(file, rule, raw)
    fields = {name: _kind_of(info.annotation) for name, info in cls.Options.model_fields.items()}
    try:
        stages = max((s.stage or 0 for s in draft.graph.sites), default=0)
        values = resolve_options(raw, fields, site_facts(candidate.site, stages, file.vars))
        return cls, cls.Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"])) or "options"
        message = f"{cls.name}.{option}: {first['msg'].lower()}, got {first['input']!r}"
        raise RuleError(message, where=where, fix=f"see 'convrewrite blocks {cls.name}'") from None
    except ConvrewriteError as error:
        raise RuleError(f"{candidate.site.id}: {error.what}", where=where, fix=error.fix) from None


def _place_of(file: RuleFile, rule: Rule) -> str:
    return file.where(rule.id) or f"{file.name}/{rule.id}"


def _block_class(file: RuleFile, rule: Rule, options: Iterable[str]) -> type[Block]:
    """The block that `rule` names, which has `options`."""
    where = _place_of(file, rule)
    try:
        cls = BLOCKS.get(rule.change.block)
    except ConvrewriteError as error:
        raise RuleError(error.what, where=where, fix=error.fix) from None
    fields = cls.Options.model_fields
    unknown = next((key for key in options if key not in fields), None)
    if unknown is not None:
        hint = closest(unknown, fields) or f"options of {cls.name}: {', '.join(fields)}"
        raise RuleError(f"{cls.name} has no option '{unknown}'", where=where, fix=hint)
    return cls


def _kind_of(annotation: Any) -> str:
    """int, float, bool or text: what an expression for this option must give."""
    for kind in (bool, int, float):
        if annotation is kind or kind in get_args(annotation):
            return kind.__name__
    return "text"


def _how(cls: type[Block], place: Place, options: BlockOptions, action: str, start: str) -> str | None:
    """What makes the start what it is, or None where the block has no such start."""
    if start == "fresh":
        return "paper's init"
    if start == "exact" and action == "insert":
        return "zero gate" if cls.exact else None
    if start == "fitted":
        fits = action == "replace" and cls.span == "conv" and can_fit(cls.name, place, options)
        return FITTED if fits else None
    if start == "exact":
        return "holds the conv" if cls.holds(place, options) else ("blend" if cls.span == "conv" else None)
    return None


def _other_starts(cls: type[Block], place: Place, options: BlockOptions, action: str) -> str:
    starts = (start for start in ("exact", "fitted", "fresh") if _how(cls, place, options, action, start))
    return " or ".join(f"start: {start}" for start in starts)


def _costs(
    cls: type[Block], options: BlockOptions, calls: Sequence[Site], place: Place, how: str, *, replaced: bool
) -> tuple[Cost, Cost]:
    """Cost of what stood there and of what will; parameters once, work once per call."""
    before, after = Cost(), Cost()
    for i, site in enumerate(calls):
        here = site.place() if replaced and len(calls) > 1 else place
        old = site.cost if replaced else Cost()
        new = cls.cost(here, options)
        if how == "blend" and here.conv is not None:
            new = blend_cost(here.conv, here, new)
            extra = old.params - here.conv.params  # of a convolution whose weight is computed from other parameters
            new = replace(new, params=new.params + extra)
        if i:
            old, new = replace(old, params=0), replace(new, params=0)
        before, after = before + old, after + new
    return before, after


def _within_budget(draft: _Draft, file: RuleFile, edits: list[Edit]) -> tuple[list[Edit], list[Refusal]]:
    """The edits that fit the file's budget, taken greedily in order of `prefer`."""
    budget = file.budget
    if budget is None:
        return edits, []
    earlier = totals(draft.model, draft.graph, [e for e in draft.edits if e not in edits])
    params, flops = earlier.params_after, earlier.flops_after
    most_params = budget.params.most(earlier.params_before) if budget.params else float("inf")
    most_flops = budget.flops.most(earlier.flops_before) if budget.flops else float("inf")
    kept: list[Edit] = []
    dropped: list[Refusal] = []
    for edit in sorted(edits, key=lambda e: _preference(e.site, budget.prefer)):
        more_params, more_flops = edit.after.params - edit.before.params, edit.after.flops - edit.before.flops
        over = None
        if more_params > 0 and params + more_params > most_params:
            over = f"params would be {params + more_params:,}, budget {int(most_params):,}"
        elif more_flops > 0 and flops + more_flops > most_flops:
            over = f"FLOPs would be {flops + more_flops:,}, budget {int(most_flops):,}"
        if over:
            dropped.append(Refusal(edit.site, edit.rule, "budget", over))
        else:
            kept.append(edit)
            params, flops = params + more_params, flops + more_flops
    order = {e.id: i for i, e in enumerate(edits)}
    return sorted(kept, key=lambda e: order[e.id]), dropped


def _preference(site: Site, prefer: str) -> tuple[float, int]:
    key = prefer.lstrip("-")
    value = site.in_shape[2] * site.in_shape[3] if key == "area" else getattr(site, key) or 0
    return (-value if prefer.startswith("-") else value), site.index


def _funnel(funnel: Funnel, edits: Sequence[Edit]) -> Funnel:
    return replace(funnel, edits=sum(1 for e in edits if e.rule == funnel.rule))


def _check_overrides(draft: _Draft) -> None:
    for key in draft.overrides:
        if key not in draft.used:
            raise RuleError(
                f"--set {key[0]}.{key[1]}: no edit takes it", fix="write RULE.option=value with a rule that matches"
            )
