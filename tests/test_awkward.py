"""What breaks naive tools: odd convolutions, wrapped, quantized and half-precision models, hooks, branches on data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convrewrite as cr
from convrewrite.blocks.blend import Blend
from convrewrite.capture import METHODS, capture
from convrewrite.errors import CaptureError
from convrewrite.laws.case import TOLERANCE
from convrewrite.pipeline import Rewritten, example_of

from . import copyblock  # noqa: F401 - registers the blocks
from .nets import SHAPE, Residual

BLOCK = {"block": "acmix", "heads": 2, "window": 3}


def rules(match: dict[str, Any], replace: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    rule = {"id": "all", "match": match, "replace": replace or BLOCK, **more}
    return {"version": 1, "name": "awkward", "rules": [rule]}


SPATIAL = rules({"role": "bottleneck_spatial"})


def with_conv(change: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    """The small ResNet, one of its 3x3 convolutions changed."""
    model = Residual()
    model.layer1[0].conv2 = change(model.layer1[0].conv2)
    return model


class Standardized(nn.Conv2d):
    """Weight standardisation as timm writes it: the stored weight is not the one that convolves."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Same(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def standardized(conv: nn.Conv2d) -> nn.Module:
    return Standardized(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "standardized": standardized,
    "weight_norm by a hook": lambda conv: quietly(nn.utils.weight_norm, conv),
}


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_convolution_with_a_computed_weight_is_kept_beside_its_block(name: str) -> None:
    model = with_conv(COMPUTED[name])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    assert len(report.plan.edits) == 4 and report.ok
    blend = new.get_submodule("layer1.0.conv2")
    assert isinstance(blend, Blend) and type(blend.conv).__name__ == type(model.layer1[0].conv2).__name__
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", COMPUTED)
def test_no_block_absorbs_a_weight_that_is_computed(name: str) -> None:
    rule = rules({"name": "layer1.*.conv2"}, {"block": "gpsa"})
    plan = cr.plan(with_conv(COMPUTED[name]), rule, example=SHAPE)
    assert {e.path: e.how for e in plan.edits} == {"layer1.0.conv2": "blend", "layer1.1.conv2": "holds the conv"}
    _, report = cr.rewrite(with_conv(COMPUTED[name]), rule, example=SHAPE)
    assert report.ok


def test_a_convolution_that_pads_by_itself_is_refused_with_both_sizes() -> None:
    plan = cr.plan(with_conv(lambda conv: Same(8, 8, 3)), SPATIAL, example=SHAPE)
    reasons = {r.site.path: r.reason for r in plan.refused}
    assert reasons["layer1.0.conv2"] == "Same gives 12x12 where its padding says 10x10"
    assert len(plan.edits) == 3


def test_hooks_stay_on_the_site_and_keep_their_effect() -> None:
    model = Residual()
    model.layer1[0].conv2.register_forward_hook(lambda module, args, out: out * 3)
    model.layer1[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    x = torch.randn(SHAPE)
    assert report.ok and torch.equal(new.eval()(x), model.eval()(x))
    new.get_submodule("layer1.0.conv2")._forward_hooks.clear()
    assert not torch.equal(new(x), model(x))


def test_torchvisions_conv_norm_activation_is_one_site_inside_its_module() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(ops.Conv2dNormActivation(3, 8), ops.Conv2dNormActivation(8, 8, groups=8))
    sites = cr.inspect(model, example=SHAPE)
    assert [(s.id, s.inside[-1][1], s.groups) for s in sites] == [
        ("0.0", "Conv2dNormActivation", 1),
        ("1.0", "Conv2dNormActivation", 8),
    ]


def test_stochastic_depth_draws_the_same_numbers_after_a_rewrite() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.drop = Residual().layer1, ops.StochasticDepth(0.5, "row")
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.drop(self.body(x))

    model = Dropped()
    new, report = cr.rewrite(model, SPATIAL, example=(8, 3, 12, 12))
    x = torch.randn(8, 3, 12, 12)
    outs = []
    for one in (model, new):
        torch.manual_seed(3)
        outs.append(one.train()(x))
    assert report.ok and torch.equal(*outs)


def test_frozen_batch_norm_stays_frozen() -> None:
    model = Residual().train()
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in frozen:
        norm.eval().requires_grad_(False)
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    norms = [m for m in new.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.shape == (8,)][: len(frozen)]
    assert report.ok and not any(m.training or m.weight.requires_grad for m in norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    model = Residual().to(dtype)
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    assert report.ok and {p.dtype for p in new.parameters()} == {dtype}
    assert max(d.max_relative for d in report.drift) <= TOLERANCE[dtype]


def test_channels_last_weights_stay_channels_last() -> None:
    model = Residual().to(memory_format=torch.channels_last)
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    assert report.ok
    assert new.get_submodule("layer1.0.conv2.conv").weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_on_the_meta_device_is_planned_and_rewritten_there() -> None:
    with torch.device("meta"):
        model = Residual()
    new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    assert len(report.plan.edits) == 4 and all(p.is_meta for p in new.parameters())
    assert "the laws were not checked" in report.notes[0]


class OnValues(nn.Module):
    """Its forward looks at the numbers, which meta tensors do not have, and changes a map in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = Residual().layer1
        self.deep = Residual().layer2

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        if float(x.sum()) > 1e9:
            return x
        keep = (x.flatten(1).sum(1) >= -1e9).nonzero()[:, 0]
        x = self.deep(x[keep]) * 1
        x[:, 0] = 0
        return x


def test_a_forward_that_branches_on_values_is_captured_in_pieces_with_stages_counted_through() -> None:
    model = OnValues()
    captured = capture(model, example_of(model, SHAPE))
    assert captured.method in METHODS[1:3] and list(captured.opaque) == ["OnValues"]
    facts = {s.path: (s.role, s.part, s.stage, s.block, s.out_shape[2:]) for s in cr.inspect(model, example=SHAPE)}
    assert facts["stem"] == ("stem", "backbone", 0, None, (12, 12))
    assert facts["body.1.conv2"] == ("bottleneck_spatial", "backbone", 1, 1, (12, 12))
    assert facts["deep.0.skip"] == ("downsample", "backbone", 2, 0, (6, 6))
    assert len(facts) == 14
    _, report = cr.rewrite(model, SPATIAL, example=SHAPE)
    assert len(report.plan.edits) == 4 and report.ok


def test_shapes_do_not_depend_on_the_weights() -> None:
    model = OnValues()
    first = cr.inspect(model, example=SHAPE)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 5e8)
    assert cr.inspect(model, example=SHAPE) == first


def test_calls_of_a_part_of_an_untraceable_module_are_sites_of_their_own() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.step = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            while float(x.sum()) < -1e9 or x.shape[-1] > 3:
                x = F.max_pool2d(self.step(x), 2)
            return self.step(x)

    sites = {s.id: s.out_shape[2:] for s in cr.inspect(Loop(), example=SHAPE)}
    assert sites == {"stem": (12, 12), "step@0": (12, 12), "step@1": (6, 6), "step@2": (3, 3)}
    plan = cr.plan(Loop(), rules({"name": "step"}, shared="together"), example=SHAPE)
    (edit,) = plan.edits
    assert edit.calls == ("step@0", "step@1", "step@2")
    taps = 2 * 2 * 8 * 8 * 9  # 2 per multiply-add, batch 2
    assert edit.before.flops == taps * (144 + 36 + 9)


def test_a_quantized_model_is_refused_with_the_reason() -> None:
    model = quietly(torch.ao.quantization.quantize_dynamic, Residual(), {nn.Linear})
    with pytest.raises(CaptureError, match=r"head: the model is quantized.*rewrite the float model first"):
        cr.inspect(model, example=SHAPE)


TAKES_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "inspect": cr.inspect,
    "plan": lambda model: cr.plan(model, "acmix"),
    "rewrite": lambda model: cr.rewrite(model, "acmix"),
    "diff": lambda model: cr.diff(model, Residual(), example=SHAPE),
    "finalize": cr.finalize,
    "fuse": cr.fuse,
    "save": lambda model: cr.save(model, "nowhere"),
    "param_groups": cr.param_groups,
    "trainable_summary": cr.trainable_summary,
    "Annealer": lambda model: cr.Annealer(model, steps=1),
}


@pytest.mark.parametrize("function", TAKES_A_MODEL)
def test_what_is_no_module_is_refused_in_one_line(function: str) -> None:
    with pytest.raises(cr.ConvrewriteError, match=r"^model is str, not an nn\.Module; build it first$"):
        TAKES_A_MODEL[function]("resnet50")
    both = Rewritten(Residual(), None)  # type: ignore[arg-type]
    with pytest.raises(cr.ConvrewriteError, match=r"^model is Rewritten, not an nn\.Module; give its \.model$"):
        TAKES_A_MODEL[function](both)


def test_a_quantizable_model_is_float_and_rewritten() -> None:
    class Quantizable(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.sum = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.layer2(self.sum.add(x, self.layer1(x))).mean((2, 3)))

    _, report = cr.rewrite(Quantizable(), SPATIAL, example=SHAPE)
    assert len(report.plan.edits) == 4 and report.ok


@pytest.mark.parametrize(("layer", "shape", "op"), [
    (nn.Conv1d(3, 4, 3), (2, 3, 9), "conv1d"),
    (nn.Conv3d(3, 4, 3), (2, 3, 9, 9, 9), "conv3d"),
    (nn.ConvTranspose2d(3, 4, 3), (2, 3, 9, 9), "conv_transpose2d"),
])  # fmt: skip
def test_other_convolutions_are_listed_and_out_of_scope(layer: nn.Module, shape: tuple[int, ...], op: str) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    (site,) = cr.inspect(model, example=(torch.empty(shape),))
    assert site.op == op
    from convrewrite.report import render_sites

    assert f"out of scope: 1 {op}, for only conv2d is rewritten" in render_sites((site,), "text")


def test_timms_convolution_classes_keep_their_class() -> None:
    layers = pytest.importorskip("timm.layers")
    for kind in (layers.StdConv2d, layers.ScaledStdConv2d):
        model = with_conv(lambda conv, kind=kind: kind(8, 8, 3, padding=1, bias=False))
        new, report = cr.rewrite(model, SPATIAL, example=SHAPE)
        assert report.ok and type(new.get_submodule("layer1.0.conv2.conv")) is kind


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_reparameterised_branches_are_sites_and_rewritten(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=4)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    sites = cr.inspect(model, example=(1, 3, 64, 64))
    assert sorted(s.path for s in sites) == sorted(convs)
    assert all(s.calls == 1 and s.role != "other" for s in sites)
    spatial = [s.path for s in sites if s.kernel == (3, 3) and s.stage == 2]
    assert len(spatial) > 1
    new, report = cr.rewrite(model, rules({"kernel": 3, "stage": 2}, {"block": "sasa_wide"}), example=(1, 3, 64, 64))
    assert report.ok and [e.path for e in report.plan.edits] == spatial
    assert {type(new.get_submodule(path)).__name__ for path in spatial} == {"SASAWide"}
