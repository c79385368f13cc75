"""The second analyser: where `torch.export` agrees, where it sees less, and where it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.crosscheck import cross_check
from convrewrite.pipeline import example_of

from .nets import SHAPE, Aliased, Residual, Shared, TwoOutputs, WithFunctional


def checked(model: nn.Module) -> list[str]:
    return cross_check(model, example_of(model, SHAPE), cr.inspect(model, example=SHAPE)).lines()


def test_both_see_the_same_network() -> None:
    assert checked(Residual()) == ["cross-check: torch.export sees the same 14 convolutions with the same shapes"]
    assert checked(Shared()) == ["cross-check: torch.export sees the same 3 convolutions with the same shapes"]
    assert checked(WithFunctional()) == ["cross-check: torch.export sees the same 3 convolutions with the same shapes"]


ACMIX = {"block": "acmix", "heads": 2, "window": 3}
NON_LOCAL = {"block": "non_local", "after": "here"}


@pytest.mark.parametrize(
    ("network", "edit", "left"),
    [
        (
            Residual,
            {"match": {"name": "layer1.*.conv2"}, "replace": ACMIX},
            "12 convolutions {}, beside 2 rewritten sites",
        ),
        (Residual, {"match": {"name": "layer1.0.conv2"}, "insert": NON_LOCAL}, "14 convolutions {}"),
        (
            WithFunctional,
            {"match": {"name": "middle:*"}, "replace": ACMIX},
            "2 convolutions {}, beside 1 rewritten site",
        ),
    ],
    ids=["replaced", "inserted", "functional"],
)
def test_what_convolves_in_a_block_is_no_disagreement(
    network: type[nn.Module], edit: dict[str, Any], left: str
) -> None:
    new, _ = cr.rewrite(network(), {"version": 1, "name": "a", "rules": [{"id": "a", **edit}]}, example=SHAPE)
    assert checked(new) == ["cross-check: torch.export sees the same " + left.format("with the same shapes")]


def test_a_rewritten_network_still_misses_what_is_missing() -> None:
    rule = {"id": "a", "match": {"name": "layer1.0.conv2"}, "replace": ACMIX}
    new, _ = cr.rewrite(Residual(), {"version": 1, "name": "a", "rules": [rule]}, example=SHAPE)
    sites = cr.inspect(new, example=SHAPE)
    assert cross_check(new, example_of(new, SHAPE), sites[:-1]).extra == ("layer2.1.conv3",)


def test_a_module_that_is_called_by_two_names_is_the_same_site() -> None:
    class ByBothNames(Aliased):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.stem(x)))

    assert checked(ByBothNames()) == ["cross-check: torch.export sees the same 3 convolutions with the same shapes"]


def test_a_head_of_train_mode_is_seen_only_here() -> None:
    assert checked(TwoOutputs())[1].endswith(": aux")


def test_a_wrong_shape_and_a_convolution_that_we_miss_are_told() -> None:
    model = Residual()
    sites = list(cr.inspect(model, example=SHAPE))
    sites[0] = replace(sites[0], out_shape=(2, 8, 11, 12))
    found = cross_check(model, example_of(model, SHAPE), sites[:-1])
    assert not found.agrees
    assert found.lines()[1:] == ["  only in torch.export: layer2.1.conv3", "  stem: 2x8x11x12 here, 2x8x12x12 there"]


def test_a_refusal_is_one_line_with_the_cause() -> None:
    class OnData(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.sum()) > 0 else torch.relu(self.conv(x))

    (line,) = checked(OnData())
    assert line.startswith("cross-check: torch.export refuses the model: ") and "data-dependent" in line
