"""One model of the zoo through the whole pipeline: captured, copied, planned with every rule file, rewritten by one."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from convrewrite.annotate import Graph, annotate
from convrewrite.capture import CONVS, capture
from convrewrite.errors import ConvrewriteError, RuleError
from convrewrite.pipeline import example_of, plan, rewrite
from convrewrite.planning import make_plan
from convrewrite.plans import Plan
from convrewrite.rulefile import builtin_names, load_rules
from convrewrite.sites import Site
from convrewrite.sources import resolve
from convrewrite.zoo.copies import NAME
from convrewrite.zoo.models import Entry, smaller
from convrewrite.zoo.rows import Row

COPIES = {
    "version": 1,
    "name": "copies",
    "rules": [{"id": "all", "match": {"op": "conv2d"}, "replace": {"block": NAME}, "shared": "together"}],
}


def try_model(entry: Entry) -> Row:
    """Everything the zoo asks of one model; an error ends in the row, not in an exception."""
    row = Row(entry.spec, entry.group, entry.family)
    seconds: dict[str, float] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return replace(_tried(row, seconds), seconds=_rounded(seconds))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = "" if isinstance(error, ConvrewriteError) else f"{type(error).__name__}: "
        return replace(row, error=f"{kind}{lines[0]}"[:300], seconds=_rounded(seconds))


def _tried(row: Row, seconds: dict[str, float]) -> Row:
    with _timed(seconds, "build"):
        spec, pixels = smaller(row.spec)
        source = resolve(spec)
        model = source.model
    with _timed(seconds, "capture"):
        graph, example = _captured(model, source.example, pixels)
    row = replace(row, **_facts(model, graph), input=tuple(example))
    with _timed(seconds, "copies"):
        row = _copied(row, model, example)
    with _timed(seconds, "plans"):
        plans, refusals = _plans(model, graph, example)
    row = replace(row, rules={name: len(one.edits) for name, one in plans.items()})
    if not plans:
        return replace(row, none=_why_none(graph.sites, refusals))
    chosen = min(plans, key=lambda name: (plans[name].totals.flops_after, len(plans[name].edits)))
    with _timed(seconds, "plan"):  # what a user waits for before anything is changed
        plan(model, chosen, example=example, name=row.spec)
    with _timed(seconds, "rewrite"):
        _, report = rewrite(model, chosen, example=_batch(example), name=row.spec, force=True)
    broken = next((law.detail for law in report.laws if law.status == "broken"), "")
    return replace(row, applied=chosen, laws={law.law: law.status for law in report.laws}, broken=broken)


def _captured(model: nn.Module, own: tuple[int, ...], pixels: int) -> tuple[Graph, tuple[int, ...]]:
    """The graph on a small input, or on the model's own size where it insists on that."""
    shapes = [own] if len(own) != 4 else [(1, own[1], min(pixels, own[2]), min(pixels, own[3])), own]
    for shape in dict.fromkeys(shapes):
        try:
            return annotate(capture(model, example_of(model, shape))), shape
        except ConvrewriteError:
            if shape == shapes[-1]:
                raise
    raise AssertionError


def _facts(model: nn.Module, graph: Graph) -> dict[str, Any]:
    convs = {name: m for name, m in model.named_modules() if isinstance(m, CONVS)}
    seen = {site.path for site in graph.sites}
    plain = {name for name, m in convs.items() if isinstance(m, nn.Conv2d)}
    functional = {site.path for site in graph.sites if site.op == "conv2d" and site.path not in convs}
    others = Counter(type(m).__name__ for name, m in convs.items() if name not in plain)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "convs": len(plain) + len(functional),
        "unseen": tuple(sorted(plain - seen)),
        "out_of_scope": dict(sorted(others.items())),
        "roles": dict(Counter(site.role for site in graph.sites if site.op == "conv2d").most_common()),
    }


def _copied(row: Row, model: nn.Module, example: tuple[int, ...]) -> Row:
    """Every convolution replaced by an equal copy."""
    if not row.roles:
        return replace(row, identical=True)  # nothing to replace: a video model, all its convolutions 3-D
    made = plan(model, COPIES, example=_batch(example), name=row.spec)
    refused = {refusal.site.path: refusal.reason for refusal in made.refused if refusal.site.op == "conv2d"}
    beside = [edit for edit in made.edits if edit.how != "holds the conv"]
    refused |= {edit.site.path: f"a block stands beside a {edit.site.module_class}, not for it" for edit in beside}
    made = replace(made, edits=tuple(edit for edit in made.edits if edit not in beside), rules=())
    if not made.edits:
        return replace(row, refused=refused, identical=True)
    new, report = rewrite(model, made, example=_batch(example), name=row.spec, force=True)
    broken = [law for law in report.laws if law.status == "broken"]
    same = list(new.state_dict()) == list(model.state_dict()) and len(report.drift) == 2
    same = same and not broken and all(drift.max_relative == 0 for drift in report.drift)
    if broken:
        row = replace(row, error=f"equal copies: {broken[0].law}: {broken[0].detail}"[:300])
    return replace(row, copied=len(made.edits), refused=refused, identical=same)


def _plans(model: nn.Module, graph: Graph, example: tuple[int, ...]) -> tuple[dict[str, Plan], list[str]]:
    """The plans that have something to do, and why blocks refused the sites that other files found."""
    plans, refusals = {}, []
    for name in builtin_names():
        try:
            made = make_plan(model, graph, (load_rules(name),), name="zoo", input_shape=tuple(example))
        except RuleError:
            continue
        if made.edits:
            plans[name] = made
        refusals += [refusal.reason for refusal in made.refused if refusal.clause == "block"]
    return plans, refusals


def _why_none(sites: tuple[Site, ...], refusals: list[str]) -> str:
    """What the model has instead of what the rules look for."""
    if refusals:
        return f"the blocks refuse its sites: {refusals[0]}"
    spatial = [site for site in sites if site.op == "conv2d" and max(site.kernel) > 1]
    if not any(site.op == "conv2d" for site in sites):
        return "it has no 2-D convolution"
    if not spatial:
        return "no convolution is larger than 1x1"
    kinds = Counter(f"{site.role}{_grouped(site)}" for site in spatial)
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return f"no rule looks for its convolutions larger than 1x1: {listed}"


def _grouped(site: Site) -> str:
    return f" in {site.groups} groups" if site.groups > 1 and site.role != "depthwise" else ""


def _batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Two of them, for batch statistics."""
    return (2, *shape[1:])


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = time.perf_counter() - begun


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {step: round(value, 2) for step, value in seconds.items()}
