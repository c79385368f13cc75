"""Comparing two models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from convrewrite.diffing import ModelView, diff, merged, view_of
from convrewrite.report import render_diff
from tests.report import sample
from tests.report.sample import Golden

BEFORE, AFTER = sample.views()


def view(modules: dict[str, str]) -> ModelView:
    return ModelView("m", (), {}, modules)


def test_the_diff_reads_as_reviewed(golden: Golden) -> None:
    golden("diff_resnet50.txt", render_diff(diff(BEFORE, AFTER), "text"))


def test_a_model_does_not_differ_from_itself() -> None:
    found = diff(BEFORE, replace(BEFORE, name="again"))
    assert found.same
    assert "Same: no module, convolution or tensor differs" in render_diff(found, "text")
    assert "Modules" not in render_diff(found, "text")


def test_modules_come_go_and_change_class() -> None:
    found = diff(view({"": "A", "a": "X", "b": "Y"}), view({"": "A", "a": "Z", "c": "Y"}))
    assert [(m.path, m.kind, m.before, m.after) for m in found.modules] == [
        ("a", "changed", "X", "Z"),
        ("b", "removed", "Y", ""),
        ("c", "added", "", "Y"),
    ]


def test_changes_inside_a_changed_module_are_folded_into_it() -> None:
    found = diff(BEFORE, AFTER)
    assert [m.path for m in found.outermost] == ["layer4.1.conv2", "layer4.2.conv2"]
    assert found.inside("layer4.1.conv2") == 3
    assert len(found.modules) == 8
    assert "layer4.1.conv2.block.query  " in render_diff(found, "text", verbose=True)


def test_a_sibling_whose_name_starts_the_same_is_not_inside() -> None:
    found = diff(view({"a": "X"}), view({"a": "Y", "ab": "Z", "a.b": "Z"}))
    assert [m.path for m in found.outermost] == ["a", "ab"]
    assert found.inside("a") == 1


def test_a_root_of_another_class_does_not_hide_its_children() -> None:
    found = diff(view({"": "A", "a": "X"}), view({"": "B", "a": "Y"}))
    assert [m.path for m in found.outermost] == ["", "a"]
    assert "(root)" in render_diff(found, "text")


def test_a_convolution_tells_the_facts_that_differ_and_no_others() -> None:
    site = sample.resnet50_sites()[0]
    other = replace(site, conv=replace(site.conv, kernel=(3, 3)), cost=replace(site.cost, params=1728))
    a, b = (ModelView("m", (s,), {}, {}) for s in (site, other))
    (change,) = diff(a, b).sites
    assert change.facts == (("kernel", "7x7", "3x3"), ("params", "9408", "1728"))
    assert diff(a, b).totals()["before"]["flops"] == site.flops


def test_a_position_that_shifted_is_no_change() -> None:
    site = sample.resnet50_sites()[5]
    assert diff(ModelView("m", (site,), {}, {}), ModelView("m", (replace(site, index=9),), {}, {})).same


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ({"w": ((2, 2), "torch.float32")}, {"w": ((2, 3), "torch.float32")}, "changed"),
        ({"w": ((2, 2), "torch.float32")}, {"w": ((2, 2), "torch.float16")}, "changed"),
        ({}, {"w": ((), "torch.int64")}, "added"),
        ({"w": ((2, 2), "torch.float32")}, {}, "removed"),
    ],
)
def test_tensors_differ_by_key_shape_and_dtype(
    before: dict[str, tuple[tuple[int, ...], str]], after: dict[str, tuple[tuple[int, ...], str]], kind: str
) -> None:
    (change,) = diff(ModelView("m", (), before, {}), ModelView("m", (), after, {})).tensors
    assert (change.key, change.kind) == ("w", kind)


def test_totals_count_tensors_and_elements() -> None:
    tensors = {"a": ((2, 3), "torch.float32"), "b": ((), "torch.int64")}
    totals = diff(ModelView("m", (), {}, {}), ModelView("m", (), tensors, {}, 6)).totals()
    assert totals["after"] == {"params": 6, "flops": 0, "convs": 0, "elements": 7, "tensors": 2}
    assert totals["before"]["params"] is None


@pytest.mark.parametrize(
    ("before", "after", "order"),
    [
        ("abc", "abc", "abc"),
        ("abc", "ac", "abc"),
        ("abc", "c", "abc"),
        ("ac", "abc", "abc"),
        ("", "ab", "ab"),
        ("ab", "", "ab"),
        ("abcd", "dx", "abcdx"),
    ],
)
def test_names_of_both_sides_are_merged_in_order(before: str, after: str, order: str) -> None:
    assert merged(list(before), list(after)) == list(order)


def test_long_lists_are_cut_unless_verbose() -> None:
    a, b = view({}), view({f"m{k}": "X" for k in range(100)})
    short, long = render_diff(diff(a, b), "text"), render_diff(diff(a, b), "text", verbose=True)
    assert "60 more in the verbose form" in short
    assert "m99" not in short
    assert "m99" in long


def test_a_view_of_a_model_counts_a_shared_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False)).to("meta")
    model[2].weight = model[0].weight
    seen = view_of(model, (), "net")
    assert seen.params == 9 + 3 + 3
    assert seen.modules == {"": "Sequential", "0": "Linear", "1": "BatchNorm1d", "2": "Linear"}
    assert seen.tensors["1.num_batches_tracked"] == ((), "torch.int64")
    assert seen.tensors["2.weight"] == ((3, 3), "torch.float32")


def test_hostile_names_stay_on_their_line() -> None:
    found = diff(view({}), replace(view({sample.HOSTILE: sample.HOSTILE}), name=sample.HOSTILE))
    for format in ("text", "markdown"):
        assert all(c == "\n" or c.isprintable() for c in render_diff(found, format))
    assert "<script" not in render_diff(found, "html")
    assert "<script" not in render_diff(found, "markdown")
