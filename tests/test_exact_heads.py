"""Networks whose convolutions became attention, none kept, compute what they did before on real photographs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.blocks.base import BLOCKS, Block

from .photographs import efficientnet_lite0, photographs

LOGITS = 1e-4
"""Largest difference of a logit, relative to the largest logit: float32 rounding over some fifty layers."""

GRADIENT = 10.0
"""How far gradients of the attention's logits may be from those of a fresh block, as a factor."""

ESPRESSO, CATS = 967, {281, 282, 283, 284, 285}
"""Classes of ImageNet."""


def realistic(name: str, images: Tensor) -> nn.Module:
    """A network with seeded random weights and the batch statistics of the images, so that activations have a scale."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over what comes
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def check_attention_alone_keeps_the_output(model: nn.Module, rules: str, images: Tensor, sites: int) -> nn.Module:
    new, report = cr.rewrite(model, rules, example=(2, *images.shape[1:]))
    assert report.ok
    assert len(report.plan.edits) == sites
    assert {edit.how for edit in report.plan.edits} == {"holds the conv"}
    for edit in report.plan.edits:
        block = new.get_submodule(edit.path)
        assert isinstance(block, Block), edit.path
        assert not any(isinstance(part, nn.Conv2d) for part in block.modules()), edit.path
    with torch.no_grad():
        before, after = model(images), new(images)
    assert float((before - after).abs().max() / before.abs().max()) <= LOGITS
    assert torch.equal(before.argmax(1), after.argmax(1))
    return new


def test_resnet18_as_attention_alone_computes_the_same() -> None:
    images = photographs(64)
    check_attention_alone_keeps_the_output(realistic("resnet18", images), "sasa-exact", images, 16)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rules", ["sasa-exact", "outlook-exact"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "regnet_y_400mf", "regnet_x_400mf"])
def test_residual_networks_as_attention_alone_compute_the_same(name: str, rules: str) -> None:
    images = photographs(224 if rules == "sasa-exact" else 128)
    sites = 22 if name == "regnet_x_400mf" else 16  # 1 + 2 + 7 + 12 blocks
    check_attention_alone_keeps_the_output(realistic(name, images), rules, images, sites)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
def test_a_trained_efficientnet_as_attention_alone_sees_the_same() -> None:
    """16 depthwise convolutions, 3x3 and 5x5, strides 1 and 2, with real ImageNet weights."""
    images = photographs(224, mean=(0.5,) * 3, deviation=(0.5,) * 3)
    model = efficientnet_lite0()
    new = check_attention_alone_keeps_the_output(model, "sasa-exact", images, 16)
    with torch.no_grad():
        top = new(images).topk(5).indices.tolist()
    assert CATS & set(top[2])  # Chelsea; the weights are real
    assert ESPRESSO in top[4]


def check_learns_as_fast_as_fresh(model: nn.Module, rules: str, images: Tensor, *parameters: str) -> None:
    """Gradients of these parameters of every block at step 0, on the real inputs of its convolution."""
    inputs: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0].detach()))
    with torch.no_grad():
        model(images)
    plan = cr.plan(model, rules, example=(1, *images.shape[1:]))
    assert plan.edits
    for edit in plan.edits:
        cls = BLOCKS.get(edit.block)
        norms: list[list[float]] = []
        for hold in (True, False):
            torch.manual_seed(0)
            block = cls(edit.site.place(), cls.Options(**edit.options))
            if hold:
                conv = model.get_submodule(edit.path)
                assert isinstance(conv, nn.Conv2d)
                block.load_conv(conv)
            y = block(inputs[edit.path])
            (y * torch.randn_like(y)).mean().backward()
            learned = [block.get_parameter(name).grad for name in parameters]
            norms.append([float(gradient.norm()) for gradient in learned if gradient is not None])
        for held, fresh in zip(*norms, strict=True):
            assert 1 / GRADIENT <= held / fresh <= GRADIENT, (edit.path, held, fresh)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
def test_a_trained_efficientnet_s_attention_learns_as_fast_as_fresh_attention() -> None:
    images = photographs(224, mean=(0.5,) * 3, deviation=(0.5,) * 3)[:2]
    check_learns_as_fast_as_fresh(efficientnet_lite0(), "sasa-exact", images, "offset_bias", "query.weight")


def test_gated_positional_attention_learns_content_as_fast_as_fresh_attention() -> None:
    images = photographs(128)
    check_learns_as_fast_as_fresh(realistic("resnet18", images), "gpsa-late", images[:4], "qk.weight")
