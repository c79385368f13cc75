"""Every built-in rule file on torchvision's classification models: where it matches, laws hold and training runs.

Two depths. *Planned*: each rule file on every model, on the meta device; where it matches, the plan is carried out
there, and the parameters that then exist are those that the plan says. *Rewritten*: with weights, at a small input, all
laws checked, and a forward and a backward pass in train and in eval mode. Without `big` only the smallest model of
each family is rewritten (VGG, all large, not at all; nor Inception, nor wide ResNets); `-m "zoo and big"` rewrites the
others, and plans the largest.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.annotate import Graph, annotate
from convrewrite.capture import capture
from convrewrite.editing import edit_model
from convrewrite.errors import RuleError
from convrewrite.laws.case import tensors_of
from convrewrite.pipeline import example_of
from convrewrite.planning import make_plan
from convrewrite.plans import Plan
from convrewrite.rulefile import builtin_names, load_rules

from .test_zoo import BIG, FIXED, SIZES
from .test_zoo import build as build_small

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

NAMES = torchvision.models.list_models(module=torchvision.models)
SMALLEST = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
)
"""One of each family; of those whose members differ in kind (basic blocks, bottlenecks) one of each kind."""


def marked(name: str, *, big: bool) -> Any:
    return pytest.param(name, marks=pytest.mark.big) if big else name


PLANNED = [marked(name, big=name == "regnet_y_128gf") for name in NAMES]
SLOW = ("inception_v3", "wide_resnet50_2")
REWRITTEN = [marked(name, big=name.startswith(BIG) or name in SLOW or name not in SMALLEST) for name in NAMES]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()


def without_weights(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model on the meta device; RegNets compute their widths with tensors, so those are built and moved."""
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings(), torch.device("cpu" if name.startswith("regnet") else "meta"):
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    size = SIZES.get(name, 224 if name.startswith(FIXED) else 64)
    return model.to("meta"), (2, 3, size, size)


def planned(model: nn.Module, graph: Graph, rules: str, shape: tuple[int, ...]) -> Plan | None:
    """The plan, or None where the rule file finds nothing; any other error is one."""
    try:
        return make_plan(model, graph, [load_rules(rules)], name="", input_shape=shape)
    except RuleError as error:
        assert ": 0 sites, expected" in str(error) or "0 sites can be changed" in str(error), f"{rules}: {error}"
        return None


@pytest.mark.parametrize("name", PLANNED)
def test_what_a_plan_counts_is_what_stands_there_after_it(name: str) -> None:
    model, shape = without_weights(name)
    graph = annotate(capture(model, example_of(model, shape)))
    for rules in builtin_names():
        plan = planned(model, graph, rules, shape)
        if plan is not None:
            assert plan.edits, rules
            edited = edit_model(model, plan).model
            assert sum(p.numel() for p in edited.parameters()) == plan.totals.params_after, rules


@pytest.mark.parametrize("name", REWRITTEN)
def test_laws_hold_and_training_runs_wherever_a_rule_file_matches(name: str) -> None:
    empty, shape = without_weights(name)
    graph = annotate(capture(empty, example_of(empty, shape)))
    matching = [rules for rules in builtin_names() if planned(empty, graph, rules, shape) is not None]
    if matching:
        model, shape = build_small(name)
        for rules in matching:
            new, report = cr.rewrite(model, rules, example=shape)
            assert report.ok, rules
            _trains(new, shape, rules)
            del new, report  # or the largest model would be there three times while the next rule file is applied


@pytest.mark.parametrize("rules", builtin_names())
def test_laws_hold_on_resnet50_started_fresh(rules: str) -> None:
    model, shape = build_small("resnet50")
    new, report = cr.rewrite(model, rules, start="fresh", example=shape)
    assert report.ok
    _trains(new, shape, rules)


def test_every_rule_file_matches_one_of_the_rewritten_models() -> None:
    """ResNet-50 has all that the rule files look for; a file that finds nothing would pass the tests above unseen."""
    model, shape = without_weights("resnet50")
    graph = annotate(capture(model, example_of(model, shape)))
    assert [r for r in builtin_names() if planned(model, graph, r, shape) is None] == []


def _trains(model: nn.Module, shape: tuple[int, ...], rules: str) -> None:
    """One forward and backward pass in each mode, all of it finite."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        model.train(training).zero_grad()
        outputs: list[Tensor] = tensors_of(model(x))
        scale = max(float(t.detach().abs().max()) for t in outputs) or 1.0
        assert scale < float("inf"), rules
        sum((t / scale).square().mean() for t in outputs).backward()  # type: ignore[union-attr]
        for key, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"{rules}: {key}"
