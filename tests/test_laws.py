"""Each law fails on the fault planted for it, and only it; on a sound rewrite all seven hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.editing import edit_model
from convrewrite.errors import LawError
from convrewrite.laws import ORDER, check
from convrewrite.laws.case import Case, _drift
from convrewrite.laws.start import start
from convrewrite.pipeline import PROBED, _replan, _work, example_of, real_example
from convrewrite.plans import Plan
from convrewrite.transfer import fates

from .nets import SHAPE, Residual

RULES: dict[str, Any] = {
    "version": 1,
    "name": "t",
    "rules": [
        {
            "id": "r",
            "match": {"role": "bottleneck_spatial"},
            "replace": {"block": "acmix", "window": 3},
            "start": "exact",
        }
    ],
}


def make_case(start: str = "exact") -> Case:
    torch.manual_seed(0)
    model = Residual()
    plan = cr.plan(model, RULES, example=SHAPE, start=start)
    edited = edit_model(model, plan)
    work = _work(model, RULES, start, SHAPE, 0, None, "net", None)
    work.plan = plan
    return Case(
        original=model,
        rewritten=edited.model,
        plan=plan,
        sites=cr.inspect(model, example=SHAPE),
        example=real_example(model, work.example, pixels=PROBED),
        tensors=fates(model, edited),
        moved=edited.moved,
        replan=lambda m: _replan(work, m),
        again=lambda: edit_model(model, plan).model,
    )


class _Wrapped(nn.Module):
    """The rewritten model with something done to its output."""

    def __init__(self, model: nn.Module, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.__dict__.update(model.__dict__)
        self.inner_forward = type(model).forward
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner_forward(self, x))


def wrong_shape(case: Case) -> Case:
    case.rewritten = _Wrapped(case.rewritten, lambda y: y[:, :3])
    return case


def another_structure(case: Case) -> Case:
    case.rewritten = _Wrapped(case.rewritten, lambda y: (y,))
    return case


def open_gate(case: Case) -> Case:
    """The blend does not start at the convolution."""
    new = copy.deepcopy(case.rewritten)
    new.layer1[0].conv2.gate.data.fill_(0.5)
    case.rewritten = new
    return case


def lost_tensor(case: Case) -> Case:
    """One tensor of the original is nowhere in the new model, and no edit says so."""
    case.moved = {**case.moved, "head.bias": ()}
    return case


def changed_weight(case: Case) -> Case:
    """One value far below what the start law's tolerance can see."""
    new = copy.deepcopy(case.rewritten)
    new.stem.weight.data[0, 0, 0, 0] += 1e-7
    case.rewritten = new
    return case


class _Silent(nn.Module):
    """A block whose parameters the output does not depend on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.in_channels, self.out_channels = block.in_channels, block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.block(x)


def unreachable_block(case: Case) -> Case:
    new = copy.deepcopy(case.rewritten)
    blend = new.layer2[1].conv2
    forward = blend.block.forward

    def silent(x: Tensor) -> Tensor:
        with torch.no_grad():
            return forward(x)

    blend.block.forward = silent
    case.rewritten = new
    return case


def not_finite(case: Case) -> Case:
    new = copy.deepcopy(case.rewritten)
    new.layer1[0].conv2.block.conv1.weight.data.fill_(float("nan"))
    case.rewritten = new
    return case


class _AlwaysOn(nn.Dropout):
    """Dropout that ignores eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, True)


def frozen_dropout(case: Case) -> Case:
    new = copy.deepcopy(case.rewritten)
    new.drop = _AlwaysOn(0.5)
    case.rewritten = new
    return case


def frozen_statistics(case: Case) -> Case:
    """A batch norm that stays in eval mode."""
    new = copy.deepcopy(case.rewritten)
    new.layer1[0].bn1.train = lambda mode=True: new.layer1[0].bn1  # type: ignore[method-assign]
    new.layer1[0].bn1.training = False
    case.rewritten = new
    return case


def unmarked(case: Case) -> Case:
    """A new convolution that the rule would take stands where nothing is marked."""
    new = copy.deepcopy(case.rewritten)
    new.layer1[0].conv2 = copy.deepcopy(case.original.layer1[0].conv2)
    case.rewritten = new
    return case


def another_layout(case: Case) -> Case:
    """The second application has a key more."""
    again = case.again

    def other() -> nn.Module:
        model = again()
        model.register_buffer("extra", torch.zeros(1))
        return model

    case.again = other
    return case


FAULTS: list[tuple[str, Callable[[Case], Case], set[str]]] = [
    ("shape", wrong_shape, {"shape"}),
    ("shape", another_structure, {"shape"}),
    ("start", open_gate, {"start"}),
    ("kept", lost_tensor, {"kept"}),
    ("kept", changed_weight, {"kept"}),
    ("alive", unreachable_block, {"alive"}),
    ("modes", frozen_dropout, {"modes", "start"}),
    ("modes", frozen_statistics, {"modes", "start"}),
    ("stable", unmarked, {"stable"}),
    ("portable", another_layout, {"portable"}),
]


def broken(case: Case) -> set[str]:
    return {law.law for law in check(case) if law.status == "broken"}


@pytest.mark.parametrize("start", ["exact", "fresh"])
def test_all_laws_hold_on_a_sound_rewrite(start: str) -> None:
    results = check(make_case(start))
    assert [r.law for r in results] == list(ORDER)
    expected = {"start": "skipped"} if start == "fresh" else {}
    assert {r.law: r.status for r in results} == {law: expected.get(law, "held") for law in ORDER}


@pytest.mark.parametrize(("law", "plant", "allowed"), FAULTS, ids=[f.__name__ for _, f, _ in FAULTS])
def test_a_planted_fault_breaks_its_law(law: str, plant: Callable[[Case], Case], allowed: set[str]) -> None:
    found = broken(plant(make_case()))
    assert law in found
    if plant in (wrong_shape, another_structure, frozen_dropout, frozen_statistics, unmarked):
        return  # a fault of the model's surface shows in other laws too
    assert found <= allowed


def test_a_block_that_gives_no_finite_output_breaks_alive() -> None:
    assert "alive" in broken(not_finite(make_case()))


def test_a_broken_law_is_an_error_unless_forced_and_then_reported_loudly() -> None:
    def sabotage(work: Any) -> None:
        work.edited.model.layer1[0].conv2.gate.data.fill_(0.5)

    fault = cr.Pass("sabotage", sabotage, after="edit")
    with pytest.raises(LawError, match="start: relative drift"):
        cr.rewrite(Residual(), RULES, example=SHAPE, passes=[fault])
    _, report = cr.rewrite(Residual(), RULES, example=SHAPE, passes=[fault], force=True)
    assert report.forced
    assert not report.ok
    from convrewrite.report import render

    assert "BROKEN" in render(report, "text")


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_the_cosine_of_the_outputs_does_not_depend_on_their_size(scale: float) -> None:
    old, new = torch.tensor([[3.0, 4.0]]) * scale, torch.tensor([[4.0, 3.0]]) * scale
    assert _drift("eval", old, new).cosine == pytest.approx(24 / 25, rel=1e-6)
    assert _drift("eval", old, torch.zeros(1, 2)).cosine == 0


def test_verifying_changes_neither_model() -> None:
    case = make_case()
    before = [copy.deepcopy(m.state_dict()) for m in (case.original, case.rewritten)]
    check(case)
    for state, model in zip(before, (case.original, case.rewritten), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in case.rewritten.parameters())


def test_a_plan_without_rules_skips_the_stable_law() -> None:
    case = make_case()
    plan: Plan = replace(case.plan, rules=())
    case.plan = plan
    case.replan = lambda m: None
    assert {r.law: r.status for r in check(case)}["stable"] == "skipped"


class Centred(nn.Module):
    """Takes away each map's mean: of values near 1000, only a little is left and the rounding that they had."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


def held_case(level: float = 0.0) -> Case:
    """A small network whose 3x3 convolutions are held by blocks; a higher input leaves more rounding."""
    torch.manual_seed(0)
    norm, last = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), Centred(), norm, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), last)
    rule = {"id": "all", "match": {"kernel": 3}, "replace": {"block": "sasa_wide"}, "start": "exact"}
    held = {"version": 1, "name": "held", "rules": [rule]}
    new, report = cr.rewrite(model, held, example=(2, 4, 8, 8))
    assert report.ok
    x = torch.randn(2, 4, 8, 8) + level
    return Case(model, new, cr.plan(model, held, example=(2, 4, 8, 8)), (), (x,), (), {}, None, None)


def test_a_network_may_make_rounding_larger_where_each_block_is_its_convolution() -> None:
    near = start(held_case())
    assert near.status == "held"
    assert near.value <= 1e-5
    assert "each block" not in near.detail

    far = held_case(level=1000.0)
    result = start(far)
    assert result.status == "held"
    assert 1e-5 < result.value < 1e-3
    assert "each block is within" in result.detail
    block, rest = far.by_parts("eval")
    assert 0 < block < 1e-6
    assert rest == 0.0


@pytest.mark.parametrize("at", ["0.mix", "4.mix", "5.weight"])
def test_a_fault_of_a_ten_thousandth_is_found_in_a_block_and_beside_it(at: str) -> None:
    case = held_case()
    with torch.no_grad():
        case.rewritten.get_parameter(at).mul_(1.0001)
    assert start(case).status == "broken"


def test_an_amplified_drift_of_a_hundred_tolerances_is_broken() -> None:
    case = held_case(level=1e4)
    noise = torch.randn(2, 8, 6, 6) * 0.02  # a few millionths of the block's output, and much of what is left of it
    case.rewritten[0].register_forward_hook(lambda module, args, y: y + noise)
    assert case.by_parts("eval")[0] < 1e-5
    assert start(case).status == "broken"


class Idle(nn.Module):
    """An auxiliary convolution runs in training, and its output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.auxiliary = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        self.auxiliary(x)
        return self.last(x)


@pytest.mark.parametrize("start", ["exact", "fresh"])
def test_no_gradient_is_asked_for_where_the_convolution_had_none(start: str) -> None:
    rule = {"id": "all", "match": {"kernel": 3}, "replace": {"block": "sasa", "heads": 1}, "start": start}
    rules = {"version": 1, "name": "idle", "rules": [rule]}
    report = cr.rewrite(Idle(), rules, example=(2, 3, 8, 8)).report
    assert report.ok
    assert len(report.plan.edits) == 3

    blocked = cr.Pass("sabotage", lambda work: _without_gradient(work.edited.model.last), after="edit")
    with pytest.raises(LawError, match="alive: no gradient reaches"):
        cr.rewrite(Idle(), rules, example=(2, 3, 8, 8), passes=[blocked])


def _without_gradient(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: tuple(a.detach() for a in args))
    inner = getattr(module, "block", module)
    inner.forward = torch.no_grad()(inner.forward)


@pytest.mark.parametrize(
    ("shape", "count"), [((1, 3, 64, 64), 2), ((1, 3, 32, 32), 8), ((1, 3, 8, 8), 16), ((3, 3, 8, 8), 3)]
)
def test_small_images_are_looked_at_in_larger_batches(shape: tuple[int, ...], count: int) -> None:
    """ResNet-50 on images of 32 x 32 has last maps of one pixel: of two images batch norm makes signs."""
    model = nn.Conv2d(3, 4, 3)
    assert real_example(model, example_of(model, shape), pixels=PROBED)[0].shape == (count, *shape[1:])
    assert real_example(model, example_of(model, shape))[0].shape[0] == max(2, shape[0])
