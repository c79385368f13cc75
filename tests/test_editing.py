"""Edits on a copy: the user's model and everything untouched stay as they were."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import convrewrite as cr
from convrewrite.blocks.blend import Blend
from convrewrite.errors import ConvrewriteError, RuleError

from . import copyblock  # noqa: F401 - registers the blocks
from .nets import NETS, SHAPE, Aliased, DenseNet, Residual, Shared, WithFunctional


def rules(match: dict[str, Any], change: dict[str, Any], **rule: Any) -> dict[str, Any]:
    key = "insert" if "after" in change or "before" in change else "replace"
    return {"version": 1, "name": "t", "rules": [{"id": "r", "match": match, key: change, **rule}]}


COPY = rules({"op": "conv2d"}, {"block": "test_copy"}, shared="together")
ACMIX = rules(
    {"kernel": 3, "groups": 1, "not": {"role": "stem"}}, {"block": "acmix", "heads": 4, "window": 3}, shared="together"
)


@pytest.mark.parametrize("name", NETS)
def test_equal_copies_of_all_convolutions_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    before = copy.deepcopy(model.state_dict())
    new, report = cr.rewrite(model, COPY, example=SHAPE)
    assert len(report.plan.edits) == len({s.path for s in report.sites})
    if name != "functional":
        assert list(new.state_dict()) == list(before)
    assert {d.mode: d.max_relative for d in report.drift} == {"eval": 0.0, "train": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(type(m).__name__ == "ConvCopy" for m in model.modules())


@pytest.mark.parametrize("name", NETS)
def test_an_exact_start_keeps_the_output_of_every_small_network(name: str) -> None:
    torch.manual_seed(0)
    _, report = cr.rewrite(NETS[name](), ACMIX, example=SHAPE)
    assert report.ok
    assert all(d.max_relative <= 1e-5 for d in report.drift)
    assert [law.status for law in report.laws] == ["held"] * 7


def test_class_methods_attributes_hooks_and_mode_stay() -> None:
    model = Residual().eval()
    fired: list[str] = []
    model.layer1[0].conv2.register_forward_hook(lambda *a: fired.append("site"))
    model.layer1.register_forward_hook(lambda *a: fired.append("layer"))
    new, _ = cr.rewrite(model, ACMIX, example=SHAPE)
    assert type(new) is Residual
    assert new.num_classes == 5
    assert not new.training
    assert isinstance(new.layer1[0].conv2, Blend)
    fired.clear()
    new.forward_features(torch.randn(SHAPE))
    assert sorted(fired) == ["layer", "site"]


def test_an_alias_is_replaced_under_both_names() -> None:
    new, _ = cr.rewrite(Aliased(), ACMIX, example=SHAPE)
    assert new.first is new.second
    assert isinstance(new.first, Blend)


def test_a_shared_module_is_an_error_unless_taken_together() -> None:
    alone = rules({"name": "conv"}, {"block": "test_copy"})
    with pytest.raises(RuleError, match="shared: together"):
        cr.rewrite(Shared(), alone, example=SHAPE)
    new, report = cr.rewrite(Shared(), {**alone, "rules": [{**alone["rules"][0], "shared": "together"}]}, example=SHAPE)
    assert [e.calls for e in report.plan.edits] == [("conv@0", "conv@1")]
    assert type(new.conv).__name__ == "ConvCopy"


def test_a_functional_convolution_becomes_a_module_in_a_graph_and_loses_nothing() -> None:
    model = WithFunctional()
    new, report = cr.rewrite(model, rules({"name": "middle:weight"}, {"block": "acmix", "window": 3}), example=SHAPE)
    assert isinstance(new.middle, torch.fx.GraphModule)
    assert type(new) is WithFunctional
    moved = {t.source: t.name for t in report.tensors if t.fate == "carried"}
    assert moved["middle.weight"] == "middle.convrewrite_weight.conv.weight"
    assert moved["middle.unused"] == "middle.unused"
    assert report.ok
    assert not any("convrewrite" in k for k in model.state_dict())


def test_a_functional_convolution_in_a_mode_dependent_forward_is_refused_with_the_reason() -> None:
    plan = cr.plan(
        WithFunctional(mode_dependent=True),
        rules({"name": "middle:weight"}, {"block": "acmix", "window": 3}, expect={"sites": ">=0"}),
        example=SHAPE,
    )
    assert plan.edits == ()
    assert "depends on train or eval mode" in plan.refused[-1].reason or any(
        "depends on train or eval mode" in r.reason for r in plan.refused
    )


ANCHORS = [("after", "here"), ("before", "here"), ("after", "block"), ("before", "block"), ("after", "stage")]


@pytest.mark.parametrize("anchor", [dict([a]) for a in ANCHORS])
def test_an_inserted_block_changes_no_bit_and_no_key(anchor: dict[str, str]) -> None:
    model = Residual()
    change = {"block": "test_tail", **anchor}
    new, report = cr.rewrite(model, rules({"role": "bottleneck_spatial"}, change), example=SHAPE)
    assert report.ok
    assert all(d.max_relative == 0 for d in report.drift)
    assert set(model.state_dict()) <= set(new.state_dict())
    expected = {"here": 4, "block": 4, "stage": 2}[next(iter(anchor.values()))]
    assert len(report.plan.edits) == expected
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
    x = torch.randn(SHAPE)
    assert not torch.equal(new.eval()(x), model.eval()(x))  # the block is really in the way


def test_insertion_keeps_class_isinstance_and_iteration() -> None:
    change = rules({"stage": 1, "position": 2}, {"block": "test_tail", "after": "block"})
    new, _ = cr.rewrite(Residual(), change, example=SHAPE)
    assert type(new.layer1[0]).__name__ == "Bottleneck"
    assert len(new.layer1) == 2
    twin = copy.deepcopy(new)
    x = torch.randn(SHAPE)
    assert torch.equal(twin.eval()(x), new.eval()(x))
    restored = pickle.loads(pickle.dumps(new.layer1[0]))  # noqa: S301 - our own bytes
    assert torch.equal(restored.eval()(torch.ones(1, 8, 4, 4)), new.layer1[0](torch.ones(1, 8, 4, 4)))


def test_insertion_after_a_dense_block_runs_once() -> None:
    change = rules({"name": "dense.layer2"}, {"block": "test_tail", "after": "stage"})
    new, report = cr.rewrite(DenseNet(), change, example=SHAPE)
    calls = []
    tail = next(m for m in new.modules() if type(m).__name__ == "Tail")
    tail.register_forward_hook(lambda m, a, o: calls.append(tuple(o.shape)))
    new(torch.randn(SHAPE))
    assert calls == [(2, 16, 12, 12)]
    assert report.ok


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        return cr.rewrite(Residual(), ACMIX, example=SHAPE, seed=seed).model.layer1[0].conv2.block.conv1.weight

    assert torch.equal(weight(3), weight(3))
    assert not torch.equal(weight(3), weight(4))


def test_rewriting_does_not_disturb_the_callers_random_numbers() -> None:
    model = Residual()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    cr.rewrite(model, ACMIX, example=SHAPE)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    new, report = cr.rewrite(Residual().to(dtype), ACMIX, example=SHAPE)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert report.ok


def test_frozen_weights_stay_frozen() -> None:
    model = Residual().requires_grad_(False)
    new, _ = cr.rewrite(model, ACMIX, example=SHAPE)
    assert not new.layer1[0].conv2.conv.weight.requires_grad
    assert new.layer1[0].conv2.gate.requires_grad


def test_a_block_that_does_not_fit_is_a_refusal_with_the_value() -> None:
    wanted = rules({"role": "bottleneck_spatial"}, {"block": "acmix", "heads": 3}, expect={"sites": ">=0"})
    plan = cr.plan(Residual(), wanted, example=SHAPE)
    assert plan.edits == ()
    assert sum("not divisible by 3 heads" in r.reason for r in plan.refused) == 4


def test_wrong_options_are_one_line_with_the_closest_name() -> None:
    with pytest.raises(RuleError, match="no option 'windows'; did you mean 'window'"):
        cr.plan(Residual(), rules({"kernel": 3}, {"block": "acmix", "windows": 3}), example=SHAPE)
    with pytest.raises(RuleError, match=r"acmix\.heads"):
        cr.plan(Residual(), rules({"kernel": 3}, {"block": "acmix", "heads": 0}), example=SHAPE)
    with pytest.raises(RuleError, match="did you mean 'acmix'"):
        cr.plan(Residual(), rules({"kernel": 3}, {"block": "acmx"}), example=SHAPE)


def test_options_are_expressions_over_the_sites_facts() -> None:
    plan = cr.plan(
        Residual(),
        rules({"role": "bottleneck_spatial"}, {"block": "acmix", "heads": "out_channels // 4"}),
        example=SHAPE,
    )
    assert {e.options["heads"] for e in plan.edits} == {2}


def test_a_plan_does_precisely_what_it_says_and_fits_no_other_model() -> None:
    torch.manual_seed(0)
    model = Residual()
    plan = cr.plan(model, ACMIX, example=SHAPE)
    again = cr.Plan.from_json(plan.to_json())
    assert again == plan or again.to_dict() == plan.to_dict()
    new, report = cr.rewrite(model, again)
    assert report.plan.hash == plan.hash
    other = Residual(classes=6)
    with pytest.raises(ConvrewriteError, match="does not fit"):
        cr.rewrite(other, again)
    with pytest.raises(ConvrewriteError, match="does not fit"):
        cr.rewrite(new, again)


def test_a_changed_plan_is_refused() -> None:
    text = cr.plan(Residual(), ACMIX, example=SHAPE).to_json()
    with pytest.raises(ConvrewriteError, match="changed after it was made"):
        cr.Plan.from_json(text.replace('"window": 3', '"window": 5'))


def test_a_budget_chooses_the_sites_that_fit() -> None:
    base = sum(p.numel() for p in Residual().parameters())
    limited = {**ACMIX, "budget": {"params": "+60%"}}
    free, tight = (cr.plan(Residual(), r, example=SHAPE) for r in (ACMIX, limited))
    assert 0 < len(tight.edits) < len(free.edits)
    assert tight.totals.params_after <= base * 1.6
    dropped = [r for r in tight.refused if r.clause == "budget"]
    assert len(dropped) == len(free.edits) - len(tight.edits)
    assert "budget" in dropped[0].reason


def test_planned_parameters_are_those_of_the_rewritten_model() -> None:
    for change in (ACMIX, rules({"role": "bottleneck_spatial"}, {"block": "test_tail", "after": "stage"})):
        new, report = cr.rewrite(Residual(), change, example=SHAPE)
        assert report.plan.totals.params_after == sum(p.numel() for p in new.parameters())


def test_user_passes_run_where_they_are_placed() -> None:
    order: list[str] = []
    extra = cr.Pass("mine", lambda work: order.append("edited" if work.edited else "planned"), after="plan")
    late = cr.Pass("late", lambda work: order.append("edited" if work.edited else "planned"))
    cr.rewrite(Residual(), ACMIX, example=SHAPE, passes=[extra, late])
    assert order == ["planned", "edited"]
    with pytest.raises(ConvrewriteError, match="wants to follow 'plam'"):
        cr.rewrite(Residual(), ACMIX, example=SHAPE, passes=[cr.Pass("x", lambda w: None, after="plam")])


def test_a_model_that_is_itself_a_convolution_is_refused_with_advice() -> None:
    with pytest.raises(ConvrewriteError, match="wrap it"):
        cr.plan(nn.Conv2d(4, 4, 3), rules({"kernel": 3}, {"block": "acmix"}), example=(2, 4, 6, 6))
