"""Parameter groups: each parameter once, new parts faster, no decay where decay would do harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import convrewrite as cr
from convrewrite.training.groups import kinds_of

from .tiny import RULES, SHAPE, images, rewritten

BASIC = {
    "version": 1,
    "name": "t",
    "rules": [
        {"id": "r", "match": {"kernel": 3, "stride": 1}, "replace": {"block": "acmix", "heads": 4, "window": 7}},
    ],
}
RESNET18 = 11_689_512
"""Parameters of ResNet-18 with 1000 classes (He et al. 2016, as torchvision publishes it)."""
GATES = 4 * 64 + 3 * 128 + 3 * 256 + 3 * 512
"""One for each channel of the thirteen 3x3 convolutions of stride 1."""


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    with torch.device("meta"):
        original = torchvision.models.resnet18()
    return cr.rewrite(original, BASIC, example=(1, 3, 64, 64)).model


def _names(groups: list[dict[str, Any]], name: str) -> set[str]:
    return {n for group in groups if group["name"] == name for n in group["names"]}


def test_every_parameter_of_resnet18_is_in_one_group_and_the_carried_ones_are_the_original_s(
    resnet18: nn.Module,
) -> None:
    groups = cr.param_groups(resnet18)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(resnet18.parameters()))
    carried = sum(p.numel() for g in groups if g["name"].startswith("carried") for p in g["params"])
    assert carried == RESNET18
    summary = cr.trainable_summary(resnet18)
    assert summary.trained["carried"] == RESNET18
    assert summary.trained["new"] == sum(p.numel() for p in resnet18.parameters()) - RESNET18
    assert sum(p.numel() for n, p in resnet18.named_parameters() if n.endswith(".gate")) == GATES


def test_new_parts_learn_ten_times_as_fast_and_the_multipliers_are_obeyed(resnet18: nn.Module) -> None:
    rates = {g["name"]: g["lr"] for g in cr.param_groups(resnet18, lr=0.01)}
    assert rates == {
        "new": pytest.approx(0.1),
        "new, no decay": pytest.approx(0.1),
        "carried": pytest.approx(0.01),
        "carried, no decay": pytest.approx(0.01),
    }
    assert {g["lr"] for g in cr.param_groups(resnet18, lr=0.01, new_multiplier=3.0)} == {0.01, 0.03}


def test_gates_biases_norms_and_rates_do_not_decay_and_weights_do(resnet18: nn.Module) -> None:
    groups = cr.param_groups(resnet18, weight_decay=0.3)
    kept = _names(groups, "new, no decay") | _names(groups, "carried, no decay")
    decayed = _names(groups, "new") | _names(groups, "carried")
    assert {"bn1.weight", "bn1.bias", "fc.bias", "layer1.0.conv1.gate", "layer1.0.conv1.block.rate1"} <= kept
    assert {"conv1.weight", "fc.weight", "layer1.0.conv1.conv.weight"} <= decayed
    assert all(g["weight_decay"] == (0.0 if "no decay" in g["name"] else 0.3) for g in groups)


@pytest.mark.parametrize(
    ("block", "options", "table"),
    [("sasa", {}, "row_embedding"), ("mhsa", {}, "height_rel")],
)
def test_tables_of_relative_positions_do_not_decay(block: str, options: dict[str, Any], table: str) -> None:
    rule = {"id": "r", "match": {"role": "bottleneck_spatial"}, "exclude": {"stride": 2}}
    rules = {"version": 1, "name": "t", "rules": [{**rule, "replace": {"block": block, "heads": 4, **options}}]}
    with torch.device("meta"):
        model = cr.rewrite(_residual(), rules, example=SHAPE).model
    groups = cr.param_groups(model)
    assert any(name.endswith(table) for name in _names(groups, "new, no decay"))
    assert not any(name.endswith(table) for name in _names(groups, "new"))


def _residual() -> nn.Module:
    from ..nets import Residual

    return Residual()


def test_an_inserted_block_is_new_and_what_it_stands_after_is_carried() -> None:
    rule = {"id": "r", "match": {"role": "stem"}, "insert": {"block": "non_local", "after": "here"}}
    model = cr.rewrite(_residual(), {"version": 1, "name": "t", "rules": [rule]}, example=SHAPE).model
    kinds = kinds_of(model)
    assert kinds["stem.weight"] == "carried"
    inserted = {name: kind for name, kind in kinds.items() if "convrewrite_after" in name}
    assert inserted
    assert set(inserted.values()) == {"new"}


def test_a_block_that_holds_the_convolution_counts_as_fitted() -> None:
    rule = {"id": "r", "match": {"role": "bottleneck_spatial"}, "replace": {"block": "gpsa"}, "exclude": {"stride": 2}}
    model, report = cr.rewrite(_residual(), {"version": 1, "name": "t", "rules": [rule]}, example=SHAPE)
    assert {edit.how for edit in report.plan.edits} == {"holds the conv"}
    groups = cr.param_groups(model, lr=1.0, fitted_multiplier=2.0)
    assert {g["lr"] for g in groups if g["name"].startswith("fitted")} == {2.0}
    assert all(name.split(".")[2] == "conv2" for name in _names(groups, "fitted"))


def test_attention_that_is_added_to_a_whole_convolution_is_new_and_that_convolution_carried() -> None:
    replace = {"block": "aa_conv", "form": "residual", "heads": 2, "min_key_dim": 4}
    rule = {"id": "r", "match": {"role": "bottleneck_spatial"}, "replace": replace, "exclude": {"stride": 2}}
    model, report = cr.rewrite(_residual(), {"version": 1, "name": "t", "rules": [rule]}, example=SHAPE)
    assert {edit.how for edit in report.plan.edits} == {"holds the conv"}
    for edit in report.plan.edits:
        below = f"{edit.path}."
        kinds = {name.removeprefix(below): kind for name, kind in kinds_of(model).items() if name.startswith(below)}
        assert {name for name, kind in kinds.items() if kind == "carried"} == {"conv_out.weight"}
        assert {"qkv_conv.weight", "attn_out.weight"} < {name for name, kind in kinds.items() if kind == "new"}


def test_a_model_that_was_never_rewritten_is_carried_as_a_whole_and_frozen_parameters_are_left_out() -> None:
    model = _residual()
    model.get_submodule("stem").requires_grad_(requires_grad=False)
    groups = cr.param_groups(model)
    assert {g["name"].split(",")[0] for g in groups} == {"carried"}
    assert not {n for g in groups for n in g["names"]} & {"stem.weight", "stem.bias"}
    summary = cr.trainable_summary(model)
    assert summary.frozen == {"new": 0, "fitted": 0, "carried": 3 * 8 * 9 + 8}
    assert "224 frozen" in str(summary)


def test_a_twice_rewritten_model_knows_the_new_parts_of_both_rewrites() -> None:
    rule = {"id": "s", "match": {"role": "stem"}, "replace": {"block": "acmix", "heads": 4, "window": 3}}
    twice = cr.rewrite(rewritten(), {"version": 1, "name": "u", "rules": [rule]}, example=SHAPE).model
    kinds = kinds_of(twice)
    assert {kinds["stem.gate"], kinds["layer1.0.conv2.gate"]} == {"new"}
    assert {kinds["stem.conv.weight"], kinds["layer1.0.conv2.conv.weight"], kinds["head.weight"]} == {"carried"}


def test_the_groups_train_in_a_plain_loop() -> None:
    model = rewritten().train()
    optimizer = torch.optim.AdamW(cr.param_groups(model, lr=1e-3))
    annealer = cr.Annealer(model, steps=4)
    pictures, labels = images(8).tensors
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        annealer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert annealer.done
    assert sum(p.numel() for p in cr.finalize(model).parameters()) < sum(p.numel() for p in model.parameters())


def test_the_rules_used_here_change_four_sites() -> None:
    assert len(cr.plan(_residual(), RULES, example=SHAPE).edits) == 4
