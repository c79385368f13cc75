"""The pipeline over torchvision's classification models: equal copies change no bit, exact starts keep the output."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn

import convrewrite as cr
from convrewrite.errors import RuleError

from . import copyblock  # noqa: F401 - registers the blocks

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

BIG = (
    *("regnet_y_128gf", "regnet_y_32gf", "vit_h", "vit_l", "convnext_large", "vgg", "efficientnet_b7"),
    *("efficientnet_v2_l", "swin_b", "swin_s", "swin_v2_b", "swin_v2_s", "wide_resnet101_2"),
)
MODELS = [
    pytest.param(name, marks=pytest.mark.big) if name.startswith(BIG) else name
    for name in torchvision.models.list_models(module=torchvision.models)
]
SIZES = {"inception_v3": 299, "maxvit_t": 224}
FIXED = ("vit_", "swin", "maxvit")
COPY = {
    "version": 1,
    "name": "copy",
    "rules": [
        {"id": "all", "match": {"op": "conv2d"}, "replace": {"block": "test_copy"}, "shared": "together"},
    ],
}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    size = SIZES.get(name, 224 if name.startswith(FIXED) else 64)
    return model, (2, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_equal_copies_of_every_convolution_change_no_key_and_no_bit(name: str) -> None:
    model, shape = build(name)
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    new, report = cr.rewrite(model, COPY, example=shape)
    assert len(report.plan.edits) == convs
    assert list(new.state_dict()) == list(model.state_dict())
    assert {d.mode: d.max_relative for d in report.drift} == {"eval": 0.0, "train": 0.0}
    assert report.ok


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", ["acmix"])
def test_an_exact_start_keeps_the_output(name: str, rules: str) -> None:
    model, shape = build(name)
    if not any(s.role == "bottleneck_spatial" and s.groups == 1 for s in cr.inspect(model, example=shape)):
        with pytest.raises(RuleError, match="0 sites, expected >=1"):
            cr.plan(model, rules, example=shape)
        return
    plan = cr.plan(model, rules, example=shape)
    _, report = cr.rewrite(model, plan)
    assert report.ok
    assert max(d.max_relative for d in report.drift) <= 1e-5
