"""Detectors, segmentation and optical flow rewritten in backbone, neck and head: laws, a training step, prediction."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.blocks.blend import Blend
from convrewrite.editing import apply_plan
from convrewrite.pipeline import example_of, real_example

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

# Few and small boxes: what is tested is that all parts run, not what an untrained detector finds.
BOXES = {
    "min_size": 96,
    "max_size": 128,
    "rpn_pre_nms_top_n_train": 20,
    "rpn_post_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 5,
    "box_score_thresh": 0.0,
}
DENSE = {"min_size": 96, "max_size": 128, "detections_per_img": 5, "topk_candidates": 20}
FEW = {"detections_per_img": 5, "topk_candidates": 20}

# model -> (arguments, which of backbone, neck and head it has convolutions to replace in)
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fasterrcnn_resnet50_fpn": (BOXES, ("backbone", "neck", "head")),
    "fasterrcnn_mobilenet_v3_large_fpn": (BOXES, ("neck", "head")),
    "maskrcnn_resnet50_fpn": (BOXES, ("backbone", "neck", "head")),
    "retinanet_resnet50_fpn": (DENSE, ("backbone", "neck", "head")),
    "fcos_resnet50_fpn": (DENSE, ("backbone", "neck", "head")),
    "ssd300_vgg16": (FEW, ("backbone", "head")),
    "ssdlite320_mobilenet_v3_large": (FEW, ()),
    "deeplabv3_resnet50": ({}, ("backbone", "head")),
    "lraspp_mobilenet_v3_large": ({}, ()),
    "raft_small": ({}, ("backbone", "head")),
}
SHAPE = (1, 3, 128, 128)
SMALL = (1, 3, 64, 64)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {} if name.startswith("raft") else {"weights_backbone": None}
    return torchvision.models.get_model(name, weights=None, **options, **MODELS[name][0])


def rules(parts: tuple[str, ...]) -> dict[str, Any]:
    """One 3x3 of each part becomes ACmix; behind the backbone's last 1x1 comes a non-local block."""
    found: list[dict[str, Any]] = [
        {
            "id": part,
            "match": {"part": part, "kernel": 3, "groups": 1, "stride": 1},
            "pick": {"first": 1} if part == "head" else {"last": 1},
            "replace": {"block": "acmix", "heads": 4, "window": 3},
            "shared": "together",
        }
        for part in parts
    ]
    inserted = {
        "id": "tail",
        "match": {"part": "backbone", "kernel": 1},
        "pick": {"last": 1},
        "insert": {"block": "non_local", "after": "here"},
    }
    return {"version": 1, "name": "dense", "rules": [*found, inserted]}


def train_one_step(model: nn.Module, example: tuple[Any, ...]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    output = model.train()(*example)
    values = output.values() if isinstance(output, dict) else output
    loss = torch.stack([v.float().square().mean() for v in values]).sum()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    blends = [m for m in model.modules() if isinstance(m, Blend)]
    assert all(b.gate.grad is not None for b in blends)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def check_prediction(name: str, output: Any) -> None:
    """What torchvision promises that each model returns in eval mode."""
    if name.startswith(("deeplab", "lraspp")):
        assert output["out"].shape == (2, 21, 64, 64)
    elif name.startswith("raft"):
        assert len(output) == 12 and output[-1].shape == (2, 2, 128, 128)
    else:
        found = output[0]
        keys = {"boxes", "labels", "scores"} | ({"masks"} if name.startswith("mask") else set())
        assert set(found) == keys
        assert found["boxes"].shape == (len(found["labels"]), 4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.big) if n == "ssd300_vgg16" else n for n in MODELS])
def test_every_part_is_rewritten_with_the_laws_held_and_trains_and_predicts(name: str) -> None:
    model = build(name)
    shape = SMALL if name in ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large") else SHAPE
    shape = (
        (2, *SHAPE[1:]) if name.startswith("ssdlite") else shape
    )  # its last maps have one pixel, too few for one image
    new, report = cr.rewrite(model, rules(MODELS[name][1]), example=shape)
    assert report.ok and all(law.status == "held" for law in report.laws)
    assert {d.mode: d.max_relative for d in report.drift} == {"eval": 0.0, "train": 0.0}
    assert {e.site.part for e in report.plan.edits if e.action == "replace"} == set(MODELS[name][1])
    assert type(new) is type(model)
    example = real_example(new, example_of(new, shape))
    train_one_step(new, example)
    with torch.no_grad():
        inputs = example[:1] if isinstance(example[0], list) else example
        check_prediction(name, new.eval()(*inputs))


def test_the_mask_head_that_sees_no_box_keeps_running_after_a_rewrite() -> None:
    options = BOXES | {"box_score_thresh": 1.1}
    torch.manual_seed(0)
    model = torchvision.models.get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, **options)
    rule = {
        "id": "mask",
        "match": {"name": "roi_heads.mask_head.0.0"},
        "replace": {"block": "acmix", "heads": 4, "window": 3},
    }
    plan = cr.plan(model, {"version": 1, "name": "mask", "rules": [rule]}, example=SHAPE)
    assert plan.edits[0].in_shape == (1, 256, 14, 14)
    new = apply_plan(model, plan).eval()
    with torch.no_grad(), warnings.catch_warnings():
        (found,) = new([torch.rand(3, 96, 96)])
    assert found["masks"].shape == (0, 1, 96, 96)
    assert isinstance(found["boxes"], Tensor) and len(found["boxes"]) == 0
