"""The whole way of a model through convrewrite, as passes. Read this file first.

    capture -> annotate -> match and plan -> edit -> calibrate -> transfer -> verify -> report

Each pass reads and fills fields of one `Work`. `rewrite`, `plan` and `inspect` are the public functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convrewrite import provenance
from convrewrite.annotate import Graph, annotate
from convrewrite.calibration import DEFAULT_IMAGES, check_fits_well, fitted_edits, images_for
from convrewrite.calibration.images import Images
from convrewrite.capture import capture
from convrewrite.diffing import Diff, ModelView, view_of
from convrewrite.diffing import diff as compare
from convrewrite.editing import Edited, edit_model, settled_options
from convrewrite.errors import ConvrewriteError, LawError, RuleError
from convrewrite.identity import check_module, identity
from convrewrite.laws import check
from convrewrite.laws.case import Case
from convrewrite.planning import check_fits, make_plan, settle
from convrewrite.plans import Plan
from convrewrite.reports import Calibration, Drift, LawResult, Report, TensorFate
from convrewrite.rulefile import Rule, RuleFile, load_rules
from convrewrite.sites import Site
from convrewrite.sources.examples import inputs_of, mapped, shape_of
from convrewrite.transfer import fates

DEFAULT_SHAPE = (1, 3, 224, 224)
Example = Any


class Rewritten(NamedTuple):
    """What `rewrite` returns."""

    model: nn.Module
    report: Report


@dataclass
class Work:
    """One model on its way: the inputs of a run, and what the passes have filled in so far."""

    model: nn.Module
    example: tuple[Any, ...]
    name: str = "model"
    rules: tuple[RuleFile, ...] = ()
    start: str | None = None
    overrides: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    seed: int = 0
    source: Mapping[str, Any] | None = None
    graph: Graph | None = None
    plan: Plan | None = None
    given: Plan | None = None
    images: Images | None = None
    max_nmse: float | None = None
    calibration: Calibration | None = None
    measured: tuple[str, ...] = ()
    edited: Edited | None = None
    tensors: tuple[TensorFate, ...] = ()
    laws: tuple[LawResult, ...] = ()
    drift: tuple[Drift, ...] = ()
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """One step.

    Attributes:
        run: changes the Work. requires, ensures: fields of Work that must be set before and after.
        after: for a pass of the user's own, the name of the pass it follows (the last one by default).
    """

    name: str
    run: Callable[[Work], None]
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ()
    after: str = ""


def _capture(work: Work) -> None:
    work.graph = annotate(capture(work.model, work.example))


def _plan(work: Work) -> None:
    assert work.graph is not None
    if work.given is not None:
        check_fits(work.given, work.model, work.graph)
        work.plan = work.given
        return
    work.plan = make_plan(
        work.model,
        work.graph,
        work.rules,
        name=work.name,
        input_shape=_shape(work.example),
        start=work.start,
        overrides=work.overrides,
        seed=work.seed,
    )


def _edit(work: Work) -> None:
    assert work.plan is not None
    work.edited = edit_model(work.model, work.plan)
    provenance.attach(work.edited.model, plan=work.plan, identity=identity(work.model), source=work.source)


def _calibrate(work: Work) -> None:
    assert work.plan is not None and work.edited is not None
    if work.images is not None and not any(edit.start == "fitted" for edit in work.plan.edits):
        work.notes.append("no edit starts fitted: the calibration images were not used")
    work.calibration, work.measured = fitted_edits(work.model, work.edited, work.plan, work.images)
    settled = settled_options(work.edited.model, work.plan)
    if settled:
        assert work.graph is not None
        work.plan = settle(work.plan, settled, work.model, work.graph)
        provenance.note_plan(work.edited.model, work.plan)
    check_fits_well(work.calibration, work.max_nmse)


def _transfer(work: Work) -> None:
    assert work.edited is not None
    work.tensors = fates(work.model, work.edited, measured=work.measured)


def _verify(work: Work) -> None:
    assert work.plan is not None and work.edited is not None and work.graph is not None
    if any(p.is_meta for p in work.model.parameters()):
        work.notes.append("the model is on the meta device: the laws were not checked")
        return
    case = Case(
        original=work.model,
        rewritten=work.edited.model,
        plan=work.plan,
        sites=work.graph.sites,
        example=real_example(work.model, work.example, pixels=PROBED),
        tensors=work.tensors,
        moved=work.edited.moved,
        replan=lambda model: _replan(work, model),
        again=lambda: edit_model(work.model, _plan_of(work), fit=False).model,
    )
    work.laws = check(case)
    try:
        work.drift = case.drift()
    except Exception as error:
        work.notes.append(f"drift not measured: {error}")


PLANNING = (
    Pass("capture", _capture, ensures=("graph",)),
    Pass("plan", _plan, requires=("graph",), ensures=("plan",)),
)
REWRITING = (
    *PLANNING,
    Pass("edit", _edit, requires=("plan",), ensures=("edited",)),
    Pass("calibrate", _calibrate, requires=("edited",)),
    Pass("transfer", _transfer, requires=("edited",), ensures=("tensors",)),
    Pass("verify", _verify, requires=("edited",)),
)


class PassManager:
    """Runs passes in order, checks what each requires and ensures, and times it.

    Args:
        watch: called with the name of each pass before it runs (progress).
    """

    def __init__(self, passes: Sequence[Pass], *, watch: Callable[[str], None] | None = None) -> None:
        self.passes = list(passes)
        self._watch = watch or (lambda name: None)

    def insert(self, extra: Sequence[Pass]) -> PassManager:
        """Add passes of the user's own, each after the pass it names."""
        for one in extra:
            names = [p.name for p in self.passes]
            if one.after and one.after not in names:
                known = f"passes: {', '.join(names)}"
                raise ConvrewriteError(f"pass '{one.name}' wants to follow '{one.after}'", fix=known)
            self.passes.insert(names.index(one.after) + 1 if one.after else len(names), one)
        return self

    def run(self, work: Work) -> Work:
        """Run all passes on `work`."""
        for one in self.passes:
            self._check(one, "requires", one.requires, work)
            self._watch(one.name)
            begun = time.perf_counter()
            one.run(work)
            work.timings[one.name] = time.perf_counter() - begun
            self._check(one, "ensures", one.ensures, work)
        return work

    @staticmethod
    def _check(one: Pass, word: str, fields: Sequence[str], work: Work) -> None:
        for name in fields:
            if getattr(work, name) in (None, ()) and not (name == "tensors" and not work.model.state_dict()):
                raise ConvrewriteError(f"pass '{one.name}' {word} '{name}', which is not set")


def inspect(model: nn.Module, *, example: Example = None) -> tuple[Site, ...]:
    """Every convolution of `model` as a `Site`, in forward order.

    Args:
        example: input shape such as (1, 3, 224, 224), a tensor, or a tuple of inputs.
    """
    check_module(model)
    return annotate(capture(model, example_of(model, example))).sites


def plan(
    model: nn.Module,
    rules: Any,
    *,
    start: str | None = None,
    example: Example = None,
    seed: int = 0,
    overrides: Mapping[tuple[str, str], Any] | None = None,
    name: str | None = None,
) -> Plan:
    """What `rules` would change on `model`; nothing is changed. Arguments as for `rewrite`."""
    work = _work(model, rules, start, example, seed, overrides, name, None)
    found = PassManager(PLANNING).run(work).plan
    assert found is not None
    return found


def rewrite(
    model: nn.Module,
    rules: Any,
    *,
    start: str | None = None,
    example: Example = None,
    seed: int = 0,
    overrides: Mapping[tuple[str, str], Any] | None = None,
    passes: Sequence[Pass] = (),
    force: bool = False,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    watch: Callable[[str], None] | None = None,
    calibrate: Any = None,
    calibrate_images: int = DEFAULT_IMAGES,
    max_nmse: float | None = None,
) -> Rewritten:
    """A rewritten copy of `model` and the report; `model` is untouched.

    Args:
        model: any nn.Module that holds 2-D convolutions.
        rules: a built-in name ("acmix"), a path, a dict, Rule or RuleFile objects, a list of these, or a `Plan`.
        start: "exact", "fitted" or "fresh"; overrides the rules' own.
        example: input shape such as (1, 3, 224, 224), a tensor, or a tuple of inputs.
        seed: fixes the new blocks' initialisation.
        overrides: (rule id or "*", option) -> value.
        passes: passes of your own, each placed by its `after`.
        force: return the model even if a law is broken; the report says so.
        calibrate: images without labels, on which the fitted edits are fitted: a folder, a data set, a tensor or an
            iterable, see `calibration.images.read_images`. Without it they are fitted to the weights alone.
        calibrate_images: at most so many are used; a fifth of them is held out to measure on.
        max_nmse: refuse the rewrite if a fitted edit's NMSE is larger (measured, or without images as expected).

    Raises:
        PlanError: a fitted edit is above `max_nmse` (unless `force`).
        RuleError: a rule is wrong or matched nothing. PlanError: a given plan does not fit.
        LawError: the rewritten model broke a law (unless `force`).
    """
    work = _work(model, rules, start, example, seed, overrides, name, source)
    work.max_nmse = None if force else max_nmse
    if calibrate is not None:
        work.images = images_for(model, work.example, calibrate, limit=calibrate_images, seed=seed)
    PassManager(REWRITING, watch=watch).insert(passes).run(work)
    assert work.edited is not None
    report = report_of(work, forced=force)
    broken = [law for law in report.laws if law.status == "broken"]
    if broken and not force:
        lines = "; ".join(f"{law.law}: {law.detail}" for law in broken)
        fix = "--force emits it all the same"
        raise LawError(f"the rewritten model breaks a law: {lines}", where=work.name, fix=fix)
    return Rewritten(work.edited.model, report)


def diff(before: nn.Module | ModelView, after: nn.Module | ModelView, *, example: Example = None) -> Diff:
    """What differs between two models: modules, sites, tensors and costs.

    Args:
        example: input shape for both, as for `rewrite`.
    """
    views = [
        m if isinstance(m, ModelView) else view_of(m, inspect(m, example=example), type(m).__name__)
        for m in (before, after)
    ]
    return compare(*views)


def report_of(work: Work, *, forced: bool = False) -> Report:
    """The report of a finished run."""
    assert work.plan is not None and work.graph is not None
    broken = any(law.status == "broken" for law in work.laws)
    return Report(
        plan=work.plan,
        sites=work.graph.sites,
        tensors=work.tensors,
        laws=work.laws,
        drift=work.drift,
        timings=dict(work.timings),
        forced=forced and broken,
        notes=tuple(work.notes),
        calibration=work.calibration,
    )


def rule_files(rules: Any) -> tuple[RuleFile, ...]:
    """Rule files from whatever `rewrite` takes."""
    if isinstance(rules, Rule):
        return (load_rules(RuleFile(version=1, rules=[rules])),)
    if isinstance(rules, (list, tuple)):
        if not rules:
            raise RuleError("the list of rules is empty", fix="give a name, a path, a dict or Rule objects")
        if all(isinstance(r, Rule) for r in rules):
            return (load_rules(RuleFile(version=1, rules=list(rules))),)
        return tuple(f for r in rules for f in rule_files(r))
    return (load_rules(rules),)


def example_of(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Example inputs as a tuple; shapes become meta tensors in the model's dtype."""
    if example is None:
        example = _own_shape(model)
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, (tuple, list)) and example and all(isinstance(s, int) for s in example):
        if any(s < 0 for s in example):
            raise ConvrewriteError(f"input shape {tuple(example)} has a negative size", fix="write (1, 3, 224, 224)")
        return inputs_of(model, tuple(example))
    if isinstance(example, tuple) and example:
        return example
    raise ConvrewriteError(
        f"example is {type(example).__name__}", fix="give a shape (1, 3, 224, 224), a tensor or a tuple of inputs"
    )


PROBED = 8192
"""The laws look at so many pixels, as two images of 64 x 64 or eight of 32 x 32: batch norms that see a few values, as
on the last maps of small images, make any rounding large."""


def real_example(model: nn.Module, example: tuple[Any, ...], *, pixels: int = 0) -> tuple[Any, ...]:
    """The example with values: meta tensors become noise on the model's device, a batch of one becomes two.

    Args:
        pixels: make it more than two where that is needed to have so many of them, but no more than 16.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    one = 0 if getattr(model, "fixed_batch", False) else 1  # an exported program may run on one size of batch only

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return mapped(value, noise)
        if value.is_meta and value.dim() and value.shape[0] == one:
            count = -(-pixels // max(value.shape[2:].numel(), 1)) if value.dim() == 4 else 0
            value = value.expand(
                min(max(2, count), 16), *value.shape[1:]
            )  # statistics of a single 1x1 map are undefined
        return noise(value)

    def noise(value: Tensor) -> Tensor:
        if not value.is_meta:
            return value.to(device)
        return torch.randn(value.shape, generator=generator).to(device=device, dtype=value.dtype)

    return tuple(real(v) for v in example)


def _own_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape the model says it wants (timm's config), its first convolution's channels, or 1x3x224x224."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size:
        return (1, *size)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (1, first.in_channels, *DEFAULT_SHAPE[2:]) if first is not None else DEFAULT_SHAPE


def _work(
    model: Any,
    rules: Any,
    start: str | None,
    example: Example,
    seed: int,
    overrides: Mapping[tuple[str, str], Any] | None,
    name: str | None,
    source: Mapping[str, Any] | None,
) -> Work:
    check_module(model)
    if start not in (None, "exact", "fitted", "fresh"):
        raise ConvrewriteError(f"unknown start '{start}'", fix="exact, fitted or fresh")
    if not isinstance(seed, int):
        raise ConvrewriteError(f"seed {seed!r} is no whole number", fix="give one, such as 0")
    given = rules if isinstance(rules, Plan) else None
    files = () if given is not None else rule_files(rules)
    if given is not None and example is None:
        example = given.input_shape
    label = name or type(model).__name__
    return Work(model, example_of(model, example), label, files, start, overrides or {}, seed, source, given=given)


def _replan(work: Work, model: nn.Module) -> Plan | None:
    """Plan the same rules on the rewritten model; a rule that now finds nothing left is what is wanted."""
    plan_ = _plan_of(work)
    files = work.rules or tuple(load_rules(dict(data)) for data in plan_.rules)
    if not files:
        return None
    graph = annotate(capture(model, work.example))
    shape = _shape(work.example)
    return make_plan(
        model, graph, files, name=work.name, input_shape=shape, start=work.start, overrides={}, seed=work.seed
    )


def _plan_of(work: Work) -> Plan:
    assert work.plan is not None
    return work.plan


def _shape(example: tuple[Any, ...]) -> tuple[int, ...]:
    return shape_of(example)
