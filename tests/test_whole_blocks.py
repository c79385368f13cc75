"""A block of span "block" takes the place of a whole residual block: counts, laws, refusals, and nobody else inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

import convrewrite as cr
from convrewrite.blocks.outlooker import Outlooker
from convrewrite.errors import RuleError
from convrewrite.report.plantext import plan_text
from tests.nets import Bottleneck, Residual

SMALL = (1, 3, 12, 12)


def rule(match: dict[str, Any], id: str = "whole", **rest: Any) -> dict[str, Any]:
    change = {} if "insert" in rest else {"replace": {"block": "outlooker", "heads": 2}}
    return {"id": id, "match": match, "start": "fresh", **change, **rest}


def rules(*them: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "f", "rules": list(them)}


STRIDED = "outlooker: the block changes from 8x12x12 to 8x6x6, outlooker keeps channels and size"
SPATIAL = rules(rule({"role": "bottleneck_spatial"}))


def refused(plan: cr.Plan) -> dict[str, str]:
    return {r.site.id: r.reason for r in plan.refused if r.clause in ("block", "claimed", "rewritten", "start")}


# --- what it does


def test_resnet50_s_third_stage_counts_as_by_hand() -> None:
    """A bottleneck there: 1x1 1024-256, 3x3 256, 1x1 256-1024 and three norms; an Outlooker by its formula, N = 32."""
    with torch.device("meta"):
        model = ResNet(TorchvisionBottleneck, [3, 4, 6, 3])
    third = rules(rule({"role": "bottleneck_spatial", "stage": 3}, replace={"block": "outlooker"}))
    plan = cr.plan(model, third)
    assert [e.path for e in plan.edits] == [f"layer3.{i}" for i in range(1, 6)]
    assert plan.edits[0].calls == ("layer3.1.conv1", "layer3.1.conv2", "layer3.1.conv3")
    assert [e.site.path for e in plan.edits] == [f"layer3.{i}.conv2" for i in range(1, 6)]
    old = 2 * 1024 * 256 + 9 * 256**2 + 2 * (256 + 256 + 1024)
    attention = 2 * 1024**2 + 1024 + 1025 * 32 * 81
    new = attention + 2 * 1024 * 3072 + 3072 + 1024 + 4 * 1024
    pixels = 14 * 14
    old_flops = 2 * pixels * (2 * 1024 * 256 + 9 * 256**2)
    new_flops = pixels * (4 * 1024**2 + 2 * 1024 * 25 + 4 * 1024 * 3072) + 2 * (pixels // 4) * 1024 * 32 * 81
    for edit in plan.edits:
        assert (edit.before.params, edit.after.params) == (old, new)
        assert (edit.before.flops, edit.after.flops) == (old_flops, new_flops)
    assert plan.totals.params_after == 25_557_032 + 5 * (new - old)
    rewritten, _ = cr.rewrite(model, third)
    assert sum(p.numel() for p in rewritten.parameters()) == plan.totals.params_after


def test_the_laws_hold_and_the_block_s_tensors_are_dropped_by_its_edit() -> None:
    model = Residual()
    new, report = cr.rewrite(model, SPATIAL, example=SMALL)
    assert {law.law for law in report.laws if law.status != "held"} == {"start"}  # skipped: no exact start is claimed
    assert report.ok
    dropped = {t.name: t.edit for t in report.tensors if t.fate == "dropped"}
    gone = ("layer1.0", "layer1.1", "layer2.1")
    assert dropped == {k: k[:8] for k in model.state_dict() if k.startswith(gone)}
    assert [type(m) for m in new.layer1] == [Outlooker, Outlooker]
    assert isinstance(new.layer2[0], Bottleneck)
    assert torch.equal(new.layer2[0].conv2.weight, model.layer2[0].conv2.weight)


def test_it_starts_as_in_the_authors_code_and_not_as_the_identity() -> None:
    new, _ = cr.rewrite(Residual(), SPATIAL, example=SMALL)
    for linear in (new.layer1[0].attn.proj, new.layer1[0].mlp.fc1, new.layer1[0].mlp.fc2):
        assert 0.01 < linear.weight.std() < 0.03
        assert not linear.bias.any()


def test_the_convolutions_of_a_replaced_block_stay_sites_that_are_taken() -> None:
    before, new = cr.inspect(Residual(), example=SMALL), cr.rewrite(Residual(), SPATIAL, example=SMALL).model
    after = cr.inspect(new, example=SMALL)
    facts = ("path", "role", "stage", "block", "position", "kernel", "block_path", "stage_path", "in_shape")
    key = {s.path: [getattr(s, f) for f in facts] for s in before}
    assert sorted(s.path for s in after) == sorted(key)
    assert all([getattr(s, f) for f in facts] == key[s.path] for s in after)
    assert {s.path for s in after if s.rewritten} == {
        f"{block}.conv{i}" for block in ("layer1.0", "layer1.1", "layer2.1") for i in (1, 2, 3)
    }
    cost = Outlooker.cost(cr.plan(Residual(), SPATIAL, example=SMALL).edits[0].site.place(), new.layer1[0].options)
    assert [s.params for s in after if s.path.startswith("layer1.0.")] == [cost.params, 0, 0]


@pytest.mark.parametrize("pick", [{"every": 2}, {"last": 1}, {"first": 1}, {"every": 2, "offset": 1, "per": "stage"}])
def test_planning_again_finds_nothing_whatever_was_picked(pick: dict[str, Any]) -> None:
    _, report = cr.rewrite(Residual(), rules(rule({"role": "bottleneck_spatial"}, pick=pick)), example=SMALL)
    assert next(law for law in report.laws if law.law == "stable").status == "held"


def test_two_convolutions_of_one_block_make_one_edit() -> None:
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1])
    plan = cr.plan(model, rules(rule({"role": "basic_spatial", "stage": 1})))
    assert [(e.id, e.site.path, e.calls) for e in plan.edits] == [
        ("layer1.0", "layer1.0.conv1", ("layer1.0.conv1", "layer1.0.conv2"))
    ]
    assert refused(plan) == {"layer1.0.conv2": "layer1.0 is replaced as a whole for layer1.0.conv1"}


def test_linear_layers_in_the_block_count_before() -> None:
    """ConvNeXt-T's last block of 192 channels at 28 x 28: depthwise 7x7, norm, two linear layers by 4, layer scale."""
    with torch.device("meta"):
        model = torchvision.models.convnext_tiny()
    plan = cr.plan(model, rules(rule({"role": "depthwise", "stage": 2}, pick={"last": 1})))
    (edit,) = plan.edits
    assert edit.path == "features.3.2"
    assert edit.before.params == 192 * 49 + 192 + 2 * 192 + 2 * 192 * 768 + 768 + 192 + 192
    assert edit.before.flops == 28 * 28 * 2 * (192 * 49 + 2 * 192 * 768)


def test_saved_and_loaded_and_read_back_from_json(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 12, 12)
    plan = cr.plan(model, SPATIAL, example=SMALL)
    again = cr.Plan.from_json(plan.to_json())
    assert again == plan
    new, report = cr.rewrite(model, again)
    cr.save(new, tmp_path / "saved", report=report)
    loaded = cr.load(tmp_path / "saved", base=model)
    assert torch.equal(loaded.eval()(x), new(x))


def test_the_plan_says_that_the_whole_block_goes() -> None:
    text = plan_text(cr.plan(Residual(), SPATIAL, example=SMALL), verbose=False)
    line = next(line for line in text.splitlines() if line.strip().startswith("~  layer1.0"))
    assert "layer1.0 " in line
    assert "block of 3 convolutions 8>8 12x12" in line
    assert "outlooker" in text
    assert "fresh" in text


def test_what_hangs_on_the_block_stays_on_its_place() -> None:
    model, seen = Residual(), []
    model.layer1[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    new, _ = cr.rewrite(model, SPATIAL, example=SMALL, force=True)
    seen.clear()
    new(torch.randn(2, 3, 12, 12))
    assert seen == [Outlooker]


# --- who else is there


def test_an_insertion_at_the_block_s_border_goes_onto_what_replaces_it() -> None:
    tail = rule(
        {"role": "bottleneck_spatial"}, "tail", insert={"block": "criss_cross", "after": "block"}, pick={"first": 2}
    )
    for order in (
        (rule({"role": "bottleneck_spatial", "stage": 1}), tail),
        (tail, rule({"role": "bottleneck_spatial", "stage": 1})),
    ):
        new, report = cr.rewrite(Residual(), rules(*order), example=SMALL)
        assert report.ok
        assert all(isinstance(m, Outlooker) and hasattr(m, "convrewrite_after") for m in new.layer1)


def test_the_first_rule_owns_what_lies_in_the_block() -> None:
    conv = rule({"name": "layer1.0.conv1"}, "conv", replace={"block": "acmix", "heads": 2, "window": 3})
    inner = rule({"name": "layer1.0.conv1"}, "inner", insert={"block": "criss_cross", "after": "here"})
    whole = rule({"name": "layer1.0.conv2"})
    for other, what in ((conv, "conv"), (inner, "inner")):
        first = cr.plan(Residual(), rules(whole, {**other, "expect": {"sites": ">=0"}}), example=SMALL)
        assert [e.path for e in first.edits] == ["layer1.0"]
        assert refused(first)["layer1.0.conv1"] == "layer1.0 is claimed by rule f/whole"
        second = cr.plan(Residual(), rules(other, {**whole, "expect": {"sites": ">=0"}}), example=SMALL)
        assert [e.path for e in second.edits] == ["layer1.0.conv1"]
        assert refused(second)["layer1.0.conv2"] == f"layer1.0.conv1 is claimed by rule f/{what}"


def test_a_block_with_something_of_ours_in_it_is_left_alone() -> None:
    optional = {"expect": {"sites": ">=0"}}
    inner = rule({"name": "layer1.0.conv1"}, insert={"block": "criss_cross", "after": "here"})
    conv = rule({"name": "layer1.0.conv1"}, replace={"block": "acmix", "heads": 2, "window": 3})
    whole = rules(rule({"name": "layer1.0.conv2"}, **optional))
    reasons = []
    for other in (inner, conv):
        first = cr.rewrite(Residual(), rules(other), example=SMALL).model
        reasons.append(refused(cr.plan(first, whole, example=SMALL))["layer1.0.conv2"])
    assert reasons == [
        "f/whole inserted a block into layer1.0",
        "layer1.0.conv1 in its block was rewritten by f/whole",
    ]


# --- what it refuses


def test_a_block_that_changes_size_or_channels_is_refused_with_both_shapes() -> None:
    assert refused(cr.plan(Residual(), SPATIAL, example=SMALL)) == {"layer2.0.conv2": STRIDED}


def test_no_exact_start_and_the_way_out_is_named() -> None:
    exact = rules({**rule({"name": "layer1.0.conv2"}), "start": "exact"})
    with pytest.raises(RuleError, match="outlooker has no exact start for replace; use start: fresh"):
        cr.plan(Residual(), exact, example=SMALL)


def test_a_convolution_whose_block_no_module_is_is_refused() -> None:
    with pytest.raises(
        RuleError, match=r"0 sites can be changed, expected >=1: no module is its whole block \(1 of 1\)"
    ):
        cr.plan(Residual(), rules(rule({"role": "stem"})), example=SMALL)


def test_a_block_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), Bottleneck()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(self.stem(x)))

    shared = rules(rule({"role": "bottleneck_spatial"}, shared="together"))
    with pytest.raises(RuleError, match="its block is called 2 times"):
        cr.plan(Twice(), shared, example=SMALL)
