"""The second analyser: where `torch.export` agrees, where it sees less, and where it refuses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.crosscheck import cross_check
from convrewrite.pipeline import example_of

from .nets import SHAPE, Residual, Shared, TwoOutputs, WithFunctional


def checked(model: nn.Module) -> list[str]:
    return cross_check(model, example_of(model, SHAPE), cr.inspect(model, example=SHAPE)).lines()


def test_both_see_the_same_network() -> None:
    assert checked(Residual()) == ["cross-check: torch.export sees the same 14 convolutions with the same shapes"]
    assert checked(Shared()) == ["cross-check: torch.export sees the same 3 convolutions with the same shapes"]
    assert checked(WithFunctional()) == ["cross-check: torch.export sees the same 3 convolutions with the same shapes"]


def test_a_rewritten_network_is_compared_by_its_sites() -> None:
    rule = {"id": "a", "match": {"name": "layer1.0.conv2"}, "replace": {"block": "acmix", "heads": 2, "window": 3}}
    new, _ = cr.rewrite(Residual(), {"version": 1, "name": "a", "rules": [rule]}, example=SHAPE)
    found = cross_check(new, example_of(new, SHAPE), cr.inspect(new, example=SHAPE))
    assert not found.missing


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
