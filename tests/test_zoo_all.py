"""All of torchvision's models: convolutions are sites with shape and role, keys are kept, equal copies change no bit.

`test_zoo.py` rewrites the classification models; here are the others, and the capture of all 121.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import convrewrite as cr
from convrewrite.errors import RuleError

from . import copyblock  # noqa: F401 - registers the blocks
from .test_dense_models import BOXES, DENSE, FEW
from .test_zoo import COPY

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

NAMES = torchvision.models.list_models()
BIG = {
    "fasterrcnn_resnet50_fpn_v2",
    "fcn_resnet50",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "raft_small",
}
BIG |= {"quantized_inception_v3", "regnet_y_128gf", "retinanet_resnet50_fpn_v2", "ssd300_vgg16"}
CLASSIFIERS = set(torchvision.models.list_models(module=torchvision.models))
SMALL_INPUT = {"ssd": 300, "raft": 128, "s3d": 224, "mvit": 224, "swin3d": 224}
# One member of each family that only adds depth or width is rewritten; the others are captured.
REWRITTEN = [
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
    "raft_small",
    "quantized_googlenet",
    "quantized_inception_v3",
    "quantized_mobilenet_v2",
    "quantized_mobilenet_v3_large",
    "quantized_resnet18",
    "quantized_shufflenet_v2_x0_5",
]


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    gc.collect()


def build(name: str, **more: Any) -> nn.Module:
    """Random weights, downloads nothing."""
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None, **more}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builder(**options)


def on_meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(name)
    except NotImplementedError:  # its constructor computes with tensors
        return build(name)


def shape_of(name: str) -> tuple[int, ...]:
    size = 299 if name.endswith("inception_v3") else 224
    size = next((s for prefix, s in SMALL_INPUT.items() if name.startswith(prefix)), size)
    return (1, 3, size, size)


def each(names: list[str], big: set[str]) -> list[Any]:
    """The names, those that take long marked."""
    return [pytest.param(name, marks=pytest.mark.big) if name in big else name for name in names]


def test_there_are_121_models_or_more() -> None:
    assert len(NAMES) >= 121


@pytest.mark.parametrize("name", each(NAMES, {"regnet_y_128gf"}))
def test_every_convolution_is_a_site_with_shapes_a_role_and_a_part(name: str) -> None:
    model = on_meta(name)
    sites = cr.inspect(model, example=shape_of(name))
    flat = {s.path for s in sites if s.op == "conv2d"}
    assert flat == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(len(s.in_shape) == 4 and len(s.out_shape) == 4 and s.calls for s in sites if s.op == "conv2d")
    assert all(s.role != "other" and s.part and s.stage is not None for s in sites if s.op == "conv2d")
    others = {s.path for s in sites if s.op != "conv2d"}
    kinds = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert others == {n for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in CLASSIFIERS and n.startswith(("r3d", "mc3", "s3d", "swin3d"))]
)
def test_a_video_model_has_nothing_to_rewrite_and_says_so(name: str) -> None:
    with pytest.raises(RuleError, match="0 sites, expected >=1"):
        cr.plan(on_meta(name), "acmix", example=shape_of(name))


@pytest.mark.parametrize("name", each(REWRITTEN, BIG))
def test_equal_copies_change_no_key_and_no_bit(name: str) -> None:
    options: dict[str, Any] = BOXES if "rcnn" in name else DENSE if name.startswith(("fcos", "retina")) else {}
    model = build(name, **(FEW if name.startswith("ssd") else options))
    small = 299 if name.endswith("inception_v3") else 128 if name.startswith("raft") else 96
    images = 2 if name.startswith("ssdlite") else 1  # its last maps have one pixel, too few for batch norm
    new, report = cr.rewrite(model, COPY, example=(images, 3, small, small))
    assert {e.path for e in report.plan.edits} == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert list(new.state_dict()) == list(model.state_dict())
    assert {d.mode: d.max_relative for d in report.drift} == {"eval": 0.0, "train": 0.0}
    assert report.ok
