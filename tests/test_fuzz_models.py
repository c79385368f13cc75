"""Random CNNs under random rules: a valid result or one clear line, and the user's model is never changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import convrewrite as cr
from convrewrite.errors import ConvrewriteError

from . import copyblock  # noqa: F401 - registers the blocks
from .randomnets import networks, rule_sets

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def check(model: nn.Module, shape: tuple[int, ...], rules: dict[str, Any]) -> None:
    state = copy.deepcopy(model.state_dict())
    flags = [(n, m.training) for n, m in model.named_modules()]
    random = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
            new, report = cr.rewrite(model, rules, example=shape)
    except ConvrewriteError as error:
        lines = str(error).splitlines()  # one per problem
        assert len(set(lines)) == len(lines) <= 40, str(error)
        assert all(": " in line and len(line) < 500 for line in lines), str(error)
    else:
        assert report.ok
        assert type(new) is type(model) or isinstance(new, torch.fx.GraphModule)
        block = rules["rules"][0].get("replace", {}).get("block")
        if rules["rules"][0]["start"] == "exact" and block != "acmix":
            assert {d.max_relative for d in report.drift} == {0.0}
        assert report.plan.totals.params_after == sum(p.numel() for p in new.parameters())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert list(state) == list(model.state_dict())
    assert flags == [(n, m.training) for n, m in model.named_modules()]
    assert torch.equal(random, torch.get_rng_state())


@settings(max_examples=25, derandomize=True, phases=[Phase.generate], **COMMON)
@given(networks(), rule_sets())
def test_random_networks_are_rewritten_or_refused_in_one_line(
    network: tuple[nn.Module, tuple[int, ...]], rules: dict[str, Any]
) -> None:
    check(*network, rules)


@pytest.mark.slow
@settings(max_examples=300, derandomize=True, phases=[Phase.generate], **COMMON)
@given(networks(), rule_sets())
def test_many_random_networks_are_rewritten_or_refused_in_one_line(
    network: tuple[nn.Module, tuple[int, ...]], rules: dict[str, Any]
) -> None:
    check(*network, rules)
