"""Capture and annotation on networks that break naive tracing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import convrewrite as cr
from convrewrite.capture import capture
from convrewrite.editing import apply_plan
from convrewrite.errors import CaptureError, ConvrewriteError

from .nets import NETS, SHAPE, Aliased, Opaque, Residual, Shared, TwoOutputs, WithFunctional


@pytest.mark.parametrize("name", NETS)
def test_capture_leaves_the_model_untouched(name: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    before = copy.deepcopy(model.state_dict())
    flags = {n: m.training for n, m in model.named_modules()}
    cr.inspect(model, example=SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == {n: m.training for n, m in model.named_modules()}
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", NETS)
def test_every_convolution_of_the_model_is_a_site_with_the_shapes_of_a_real_run(name: str) -> None:
    model = NETS[name]()
    seen: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    names = {m: n for n, m in model.named_modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, args, out: seen.setdefault(names[m], []).append((args[0].shape, out.shape))
            )
    model(torch.randn(SHAPE))
    sites = cr.inspect(model, example=SHAPE)
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for site in sites:
        if site.kind == "module":
            found.setdefault(site.path, []).append((site.in_shape, site.out_shape))
    assert found == {k: [(tuple(a), tuple(b)) for a, b in v] for k, v in seen.items()}


def test_roles_and_stages_of_a_small_residual_network() -> None:
    facts = {s.path: (s.role, s.stage, s.block, s.position) for s in cr.inspect(Residual(), example=SHAPE)}
    assert facts["stem"] == ("stem", 0, None, None)
    assert facts["layer1.0.conv2"] == ("bottleneck_spatial", 1, 0, 2)
    assert facts["layer2.0.skip"] == ("downsample", 2, 0, 1)
    assert facts["layer2.1.conv3"] == ("pointwise", 2, 1, 3)


def test_surroundings_of_a_site() -> None:
    site = next(s for s in cr.inspect(Residual(), example=SHAPE) if s.path == "layer1.1.conv2")
    assert site.follows[:3] == ("relu", "batch_norm", "conv2d")
    assert site.precedes[:3] == ("batch_norm", "relu", "conv2d")
    assert [c for _, c in site.inside] == ["Sequential", "Bottleneck"]
    assert (site.block_path, site.stage_path) == ("layer1.1", "layer1.1")
    assert site.stage_from_end == 2
    assert site.receptive_field == (7, 7)  # three 3x3 at stride 1: stem, layer1.0.conv2, itself


def test_a_module_called_twice_has_two_sites_and_an_alias_one() -> None:
    assert [s.id for s in cr.inspect(Shared(), example=SHAPE)] == ["stem", "conv@0", "conv@1"]
    assert [s.id for s in cr.inspect(Aliased(), example=SHAPE)] == ["stem", "first"]


def test_a_functional_convolution_is_a_site_named_by_its_weight() -> None:
    site = next(s for s in cr.inspect(WithFunctional(), example=SHAPE) if s.kind == "functional")
    assert site.id == "middle:weight"
    assert (site.kernel, site.padding, site.in_channels, site.out_channels) == ((3, 3), (1, 1, 1, 1), 8, 8)


def test_an_untraceable_block_stays_opaque_and_its_parts_are_captured() -> None:
    captured = capture(Opaque(), (torch.empty(SHAPE),))
    assert list(captured.opaque) == ["block"]
    assert {r.prefix for r in captured.regions} == {"", "block.conv", "block.inner"}


def test_what_replaced_a_convolution_directly_inside_an_opaque_module_is_still_its_site() -> None:
    rule = {"id": "all", "match": {"kernel": 3}, "replace": {"block": "sasa_wide"}}
    new, report = cr.rewrite(Opaque(), {"version": 1, "name": "opaque", "rules": [rule]}, example=SHAPE)
    assert [e.path for e in report.plan.edits].count("block.conv") == 1
    assert next(s for s in cr.inspect(new, example=SHAPE) if s.path == "block.conv").rewritten == "opaque/all"


def test_a_head_that_exists_only_in_train_mode_is_a_site() -> None:
    roles = {s.path: s.role for s in cr.inspect(TwoOutputs(), example=SHAPE)}
    assert roles["aux"] == "head"


def test_hooks_do_not_fire_during_capture() -> None:
    model = Residual()
    fired = []
    model.stem.register_forward_hook(lambda *a: fired.append(1))
    cr.inspect(model, example=SHAPE)
    assert fired == []


def test_an_input_that_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(CaptureError, match="does not run on an input of shape 1x5x8x8") as caught:
        cr.inspect(Residual(), example=(1, 5, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.compile(Residual()), "_orig_mod"),
        (lambda: nn.Sequential(torch.compile(Residual())), "^0: this part of the model is compiled; put its _orig_mod"),
        (lambda: nn.DataParallel(Residual()), "model.module"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "run one forward"),
        (lambda: torch.jit.trace(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_refused_with_advice(make: object, message: str) -> None:
    with pytest.raises(ConvrewriteError, match=message):
        cr.inspect(make(), example=SHAPE)  # type: ignore[operator]


def test_a_model_compiled_in_place_is_rewritten_with_a_note_that_the_copy_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    match = {"kernel": 3}
    rules = {"version": 1, "rules": [{"id": "all", "match": match, "replace": {"block": "sasa_wide"}}]}
    assert not any("compiled" in note for note in cr.plan(model, rules, example=SHAPE).notes)
    model.compile(backend="eager")
    assert any("call its .compile() again" in note for note in cr.plan(model, rules, example=SHAPE).notes)
    model(torch.randn(SHAPE))
    assert cr.rewrite(model, rules, example=SHAPE).model._compiled_call_impl is None
    with pytest.raises(ConvrewriteError, match="seed 'x' is no whole number"):
        cr.plan(model, rules, example=SHAPE, seed="x")  # type: ignore[arg-type]


def test_a_model_for_several_processes_is_refused_with_advice(tmp_path: Path) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Residual())
        with pytest.raises(CaptureError, match=r"wrapped by DistributedDataParallel; rewrite model\.module"):
            cr.inspect(wrapped, example=SHAPE)
        assert len(cr.inspect(wrapped.module, example=SHAPE)) == 14
    finally:
        distributed.destroy_process_group()


def test_a_model_on_the_meta_device_can_be_inspected() -> None:
    with torch.device("meta"):
        model = Residual()
    assert len(cr.inspect(model, example=SHAPE)) == 14


def test_a_real_run_during_capture_leaves_the_callers_random_numbers_alone() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + torch.rand(1) if float(x.sum()) > -1e9 else x  # runs on real tensors only

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = Drawing()
    torch.manual_seed(5)
    cr.inspect(model, example=SHAPE)
    assert torch.equal(torch.rand(3), expected)


CASES = [
    ("sasa-exact", "exact"),
    ("acmix", "exact"),
    ("criss-cross", "exact"),
    ("outlooker-stage3", "fresh"),
    ("hybrid", "fresh"),
]


@pytest.mark.parametrize(("rules", "start"), CASES)
def test_a_rewritten_network_costs_what_the_plan_said_it_would(rules: str, start: str) -> None:
    """Linear layers inside blocks count with their blocks, once; inserted blocks count although they are no sites."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    shape = (1, 3, 64, 64)
    first = cr.plan(model, rules, start=start, example=shape)
    some = {"id": "some", "match": {"role": "pointwise"}, "replace": {"block": "acmix"}}
    found = cr.plan(apply_plan(model, first), {"version": 1, "name": "any", "rules": [some]}, example=shape).totals
    assert (found.params_before, found.flops_before) == (first.totals.params_after, first.totals.flops_after)
