"""Fused models: the same output with less work, and nothing folded that somebody else still reads."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from click.testing import CliRunner
from convrewrite.cli.main import main
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convrewrite as cr
from convrewrite import provenance
from convrewrite.blocks.acmix import ACmix
from convrewrite.blocks.acmix_fused import FusedACmix
from convrewrite.blocks.base import conv_spec
from convrewrite.blocks.blend import Blend, Sum
from convrewrite.blocks.folding import Affine
from convrewrite.editing import apply_plan
from convrewrite.errors import ConvrewriteError, EditError, StoreError
from convrewrite.finalizing import blends_of
from convrewrite.fusing import Fused, fuse_model
from convrewrite.identity import identity
from convrewrite.sites import Place
from convrewrite.sources import resolve
from convrewrite.sources.examples import tensors_in

from . import copyblock  # noqa: F401 - registers the blocks
from .nets import Residual
from .randomnets import networks, rule_sets

SINGLE, DOUBLE = 1e-5, 1e-10
"""Largest difference, relative to the largest output: float32 as the issue of deployment asks, float64 as a proof."""

SHAPE, SMALL = (1, 3, 64, 64), (1, 3, 16, 16)


def lively(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    """In eval mode, with batch norms that have seen something: statistics of noise, gains and biases at random."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = None  # the mean over what comes
            norm.reset_running_stats()
    with torch.no_grad():
        model.train()(torch.randn(8, *shape[1:]))
    return model.eval()


def applied(model: nn.Module, rules: Any, shape: tuple[int, ...] = SHAPE, *, start: str | None = None) -> nn.Module:
    """Rewritten, without the laws, which other tests are about."""
    plan = cr.plan(model, rules, start=start, example=shape)
    new = apply_plan(model, plan)
    provenance.attach(new, plan=plan, identity=identity(model))
    return new


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def check(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Fused:
    """Fused, it computes the same: in float32, and in float64 so exactly that nothing but rounding is left."""
    fused = fuse_model(model, example=shape)
    x = torch.randn(shape)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = double(x.double())
        # Rounding of a deep network at random weights may be more than the bound; folding adds no more of it.
        allowed = max(SINGLE, 3 * relative(model(x), exact))
        assert relative(fused.model(x), exact) <= allowed
        assert relative(cr.fuse(double, example=x.double())(x.double()), exact) <= DOUBLE
    return fused


def count(fused: Fused, became: str, *, name: str | None = None) -> int:
    return sum(1 for f in fused.fusions if f.became == became and name in (None, f.name))


# --- real networks


def test_every_norm_of_a_resnet_goes_into_its_convolution() -> None:
    fused = check(lively(torchvision.models.resnet18()))
    assert len(fused.fusions) == 20  # 20 convolutions, each with a batch norm
    assert all(f.norm for f in fused.fusions)
    assert fused.norms_left == ()
    assert isinstance(fused.model, torchvision.models.ResNet)


def test_acmix_takes_up_the_norm_after_it() -> None:
    model = applied(torchvision.models.resnet50(), "acmix", start="fresh")
    fused = check(lively(model))
    assert count(fused, "folded", name="acmix") == 16
    assert count(fused, "", name="Conv2d") == 37  # 53 convolutions, 16 of them became ACmix
    assert all(f.norm for f in fused.fusions)
    assert fused.norms_left == ()


def test_attention_that_holds_its_convolutions_is_convolutions_again() -> None:
    for original, rules, sites in (
        (lively(torchvision.models.resnet18(), (1, 3, 32, 32)), "sasa-exact", 16),  # two 3x3 in each of eight blocks
        (lively(Residual()), "outlook-exact", 4),
        (lively(Residual()), "gpsa-late", 2),  # those of the last stage
    ):
        model = applied(original, rules, SMALL)
        fused = check(model, SMALL)
        assert count(fused, "convolution") == sites
        want = cr.fuse(original, example=SHAPE)
        for path, conv in want.named_modules():
            if isinstance(conv, nn.Conv2d):
                again = fused.model.get_submodule(path)
                assert type(again) is nn.Conv2d
                assert relative(again.weight, conv.weight) <= 1e-6


def test_attention_that_has_learned_takes_up_the_norm() -> None:
    model = applied(Residual(), "sasa-exact", SMALL)
    for name, parameter in model.named_parameters():
        if name.endswith("query.weight"):
            nn.init.normal_(parameter, std=0.1)
    fused = check(lively(model), SMALL)
    assert count(fused, "folded", name="sasa_wide") == 4
    assert fused.norms_left == ()


@pytest.mark.parametrize(
    ("name", "sites"),
    [("regnet_x_400mf", 22), ("mobilenet_v2", 17)],
)
def test_grouped_and_depthwise_convolutions_come_back(name: str, sites: int) -> None:
    rules = {
        "version": 1,
        "rules": [
            {
                "id": "r",
                "match": {"kernel": 3, "not": {"groups": 1}},
                "replace": {"block": "sasa_wide"},
                "start": "exact",
            }
        ],
    }
    model = applied(lively(torchvision.models.get_model(name)), rules)
    fused = check(model)
    assert count(fused, "convolution", name="sasa_wide") == sites
    assert fused.norms_left == ()


@pytest.mark.filterwarnings("ignore")
def test_timm_s_norms_leave_their_activation() -> None:
    timm = pytest.importorskip("timm")
    for name in ("regnetx_002", "mobilenetv3_small_050"):
        fused = check(lively(timm.create_model(name)))
        assert fused.norms_left == ()


def test_an_inserted_block_goes_while_its_gate_is_zero_and_stays_otherwise() -> None:
    model = lively(applied(torchvision.models.resnet18(), "danet"))
    for module in model.modules():  # lively() has opened no gate: W_8 is no norm's
        assert not isinstance(module, Sum)
    assert count(check(model), "identity", name="dual_attention") == 1
    for name, parameter in model.named_parameters():
        if name.endswith(("conv8.weight", "gamma")):
            nn.init.normal_(parameter, std=0.1)
    fused = check(model)
    assert count(fused, "identity") == 0
    assert fused.norms_left == ()  # its own four went into its convolutions


# --- blends


def blended(gate: float, anneal: float) -> nn.Module:
    model = applied(Residual(), "acmix", SMALL)
    for blend in blends_of(model).values():
        blend.anneal.fill_(anneal)
        if gate:
            nn.init.uniform_(blend.gate, -gate, gate)
    return lively(model)


@pytest.mark.parametrize(
    ("gate", "anneal", "became", "kind"),
    [
        (0, 0, "convolution", nn.Conv2d),
        (1, 1, "block", FusedACmix),
        (0, 1, "block", FusedACmix),
        (1, 0, "sum", Sum),
        (0, 0.25, "sum", Sum),
        (1, 0.5, "sum", Sum),
    ],
)
def test_a_blend_becomes_what_takes_part(gate: float, anneal: float, became: str, kind: type[nn.Module]) -> None:
    fused = check(blended(gate, anneal), SMALL)
    assert count(fused, became, name="acmix") == 4
    assert isinstance(fused.model.get_submodule("layer1.0.conv2"), kind)
    assert not blends_of(fused.model)
    assert fused.norms_left == ()


def test_one_open_gate_of_one_channel_keeps_the_block() -> None:
    model = blended(0, 0)
    with torch.no_grad():
        blends_of(model)["layer1.0.conv2"].gate[3] = 1e-6
    fused = check(model, SMALL)
    assert [f.became for f in fused.fusions if f.name == "acmix"] == ["sum", *["convolution"] * 3]


def test_a_blend_beside_a_convolution_whose_weight_is_computed_keeps_it_as_it_is() -> None:
    model = Residual()
    parametrizations.weight_norm(model.layer1[0].conv2)
    new = lively(applied(model, "acmix", SMALL))
    fused = check(new, SMALL)
    assert fused.norms_left == ("layer1.0.bn2",)
    blends_of(new)["layer1.0.conv2"].gate.data.fill_(0.5)
    fused = check(new, SMALL)
    assert isinstance(fused.model.get_submodule("layer1.0.conv2"), Blend)


# --- ACmix


@pytest.mark.parametrize("layout", ["authors", "ordered"])
@pytest.mark.parametrize(
    ("kernel", "side", "options"),
    [(3, 3, {"padding": 1}), (5, 3, {"padding": 2, "stride": 2}), (3, 3, {"padding": 2, "dilation": 2})],
)
def test_acmix_without_attention_is_one_dense_convolution(
    layout: str, kernel: int, side: int, options: dict[str, Any]
) -> None:
    conv = nn.Conv2d(6, 8, kernel, bias=False, **options)
    x = torch.randn(2, 6, 11, 9, dtype=torch.float64)
    place = Place((2, 6, 11, 9), tuple(conv(x.float()).shape), conv_spec(conv))
    block = ACmix(place, ACmix.Options(heads=2, kernel_conv=side, layout=layout, rates="channel")).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        block.rate1.zero_()
        for projection in (block.conv1, block.conv2, block.conv3):
            assert projection.bias is not None
            assert block.plain() is None  # a bias counts where the path pads with zeros, and no convolution does that
            projection.bias.zero_()
        plain = block.plain()
        assert type(plain) is nn.Conv2d
        assert relative(plain(x), block(x)) <= DOUBLE
        block.rate1[5] = 1e-3
    assert block.plain() is None


def test_acmix_is_fused_for_every_backend_and_layout_in_memory() -> None:
    at = Place((2, 16, 20, 18), (2, 16, 20, 18), conv_spec(nn.Conv2d(16, 16, 3, padding=1)))
    block = ACmix(at, ACmix.Options()).eval()
    fused = block.fused(Affine(torch.rand(16).double(), torch.rand(16).double()))
    assert fused is not None
    x = torch.randn(at.in_shape)
    with torch.no_grad():
        want = fused(x)
        assert cr.set_backend(fused, "aten") == 1
        assert relative(fused(x), want) <= SINGLE
        assert relative(fused(x.to(memory_format=torch.channels_last)), want) <= SINGLE
        assert fused.half()(x.half()).dtype == torch.float16


# --- what may not be folded


class Traps(nn.Module):
    """Convolutions whose outputs are read by more than the norm that follows, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.twice, self.norm_twice = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.added, self.norm_added = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.changed, self.norm_changed = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.two, self.norm_one, self.norm_two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.one, self.other, self.norm_shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.batch, self.norm_batch = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.seen, self.norm_seen = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bare, self.norm_bare = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.last, self.norm_last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.seen_outputs: list[Tensor] = []
        self.norm_seen.register_forward_hook(lambda module, args, out: self.seen_outputs.append(args[0]))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = self.norm_twice(self.twice(x)) + self.twice(x * 2)
        y = self.added(x)
        x = self.norm_added(y) + y
        x = self.norm_changed(self.changed(x).add_(1))
        y = self.two(x)
        x = self.norm_one(y) * self.norm_two(y)
        x = self.norm_shared(self.one(x)) + self.norm_shared(self.other(x))
        x = self.norm_batch(self.batch(x))
        x = self.norm_seen(self.seen(x))
        x = self.norm_bare(self.bare(x))
        y = self.last(x)
        return {"out": self.norm_last(y), "features": [y]}


def test_nothing_is_folded_that_anybody_else_reads() -> None:
    model = Traps()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    model.eval()
    fused = fuse_model(model, example=(2, 3, 9, 9))
    assert [(f.path, f.norm) for f in fused.fusions] == [("bare", "norm_bare")]
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        want, got = model(x), fused.model(x)
    assert relative(got["out"], want["out"]) <= SINGLE
    assert relative(got["features"][0], want["features"][0]) <= SINGLE


def test_what_only_train_mode_reads_does_not_count_and_what_only_eval_mode_reads_does() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            x = self.norm_a(a) + (a if self.training else 0)
            b = self.b(x)
            return self.norm_b(b) + (0 if self.training else b)

    model = lively(Moody())
    fused = fuse_model(model, example=SMALL)
    assert [f.path for f in fused.fusions] == ["a"]
    x = torch.randn(SMALL)
    with torch.no_grad():
        assert relative(fused.model(x), model(x)) <= SINGLE


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(networks(), rule_sets(), st.floats(0, 1))
def test_random_networks_under_random_rules(
    network: tuple[nn.Module, tuple[int, ...]], rules: dict[str, Any], anneal: float
) -> None:
    model, shape = network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ConvrewriteError):  # rules that find nothing: the network as it is
            model = applied(model, rules, shape)
        for blend in blends_of(model).values():
            blend.anneal.fill_(anneal)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.3)
        model.double().eval()
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng():
            try:
                want = model(x)
            except RuntimeError:  # reflects more than there is
                reject()
            got = cr.fuse(model, example=x)(x)
    for a, b in zip(tensors_in(got), tensors_in(want), strict=True):
        assert float((a - b).abs().max()) <= 1e-8 * max(1.0, float(b.abs().max()))  # small outputs of large sums


# --- the copy


def test_the_model_given_is_left_as_it_is() -> None:
    model = blended(0, 1).train()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    cr.fuse(model, example=SMALL)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_train_mode_is_refused_and_eval_mode_is_not() -> None:
    fused = cr.fuse(blended(0, 1), example=SMALL)
    with pytest.raises(EditError, match=r"^Residual: a fused model is for inference: .*; train the model that was"):
        fused.train()
    assert not any(m.training for m in fused.modules())
    assert fused.eval() is fused
    assert not any(p.requires_grad for p in fused.parameters())


def test_copies_of_a_fused_model_stay_fused() -> None:
    fused = cr.fuse(lively(Residual()), example=SMALL)
    x = torch.randn(SMALL)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), cr.fuse(fused, example=SMALL)):  # noqa: S301
        assert torch.equal(twin(x), fused(x))
        assert isinstance(twin, Residual)
        with pytest.raises(EditError, match="for inference"):
            twin.train()


def test_saving_and_training_a_fused_model_end_in_one_line(tmp_path: Path) -> None:
    fused = cr.fuse(blended(0, 1), example=SMALL)
    with pytest.raises(StoreError, match=r"^Residual: a fused model is not saved; save the model before fuse\(\)"):
        cr.save(fused, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_is_fused_at_its_plan_s_size(tmp_path: Path) -> None:
    model = blended(1, 1)
    cr.save(cr.finalize(model), tmp_path / "out")
    loaded = cr.load(tmp_path / "out", base=Residual())
    x = torch.randn(SMALL)
    with torch.no_grad():
        assert relative(cr.fuse(loaded)(x), model(x)) <= SINGLE


def test_hooks_of_a_block_see_its_fused_form() -> None:
    model = blended(0, 1)
    shapes: list[torch.Size] = []
    blends_of(model)["layer1.0.conv2"].register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    fused = fuse_model(model, example=SMALL)
    assert "layer1.0.bn2" in fused.norms_left  # what the hook sees is the same as before
    shapes.clear()
    fused.model(torch.randn(SMALL))
    assert shapes == [(1, 8, 16, 16)]


def test_a_fused_model_is_inspected_and_exported() -> None:
    fused = cr.fuse(blended(0, 1), example=SMALL)
    assert [s.rewritten for s in cr.inspect(fused, example=SMALL)].count("acmix/bottleneck-3x3") == 4
    x = torch.randn(SMALL)
    with torch.no_grad():
        want = fused(x)
        assert relative(torch.export.export(fused, (x,)).module()(x), want) <= SINGLE


def test_a_model_without_weights_or_with_a_foreign_input_is_one_line() -> None:
    with pytest.raises(EditError, match=r"^Residual: a model without weights cannot be fused"):
        cr.fuse(Residual().to("meta"), example=SMALL)
    with pytest.raises(EditError, match=r"^Residual: the model does not run on the example: .*; give inputs that fit"):
        cr.fuse(Residual(), example=(1, 4, 8, 8))


def test_every_registered_block_is_covered_by_the_contract() -> None:
    from .blocks.test_contract import TAKEN, shipped

    assert {name for name, _ in shipped()} == {name for name, _ in TAKEN}


# --- the command


def run_fuse(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["fuse", *args])
    return done.exit_code, done.output


def test_the_command_tells_what_it_did_and_writes_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = blended(0, 1)
    source = resolve("tests.nets:Residual", input=SMALL)
    cr.save(cr.finalize(model), "saved", source=source.recipe)
    code, said = run_fuse("saved", "--input", "1x3x16x16", "--out", "m.pt2", "--rounds", "2")
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0] == "batch norms: 8 into convolutions, 4 into what was rewritten"  # three in each of four blocks
    assert lines[1] == "4 x acmix: what depends on weights alone done beforehand"
    assert re.fullmatch(r"output: differs by \S+ of its largest value", lines[2])
    assert re.match(
        r"time: \S+ ms => \S+ ms, \S+ x \(half of the pairs within .*\); 1x3x16x16, eager, threads: ", lines[3]
    )
    x = torch.randn(SMALL)
    with torch.no_grad():
        assert relative(torch.export.load("m.pt2").module()(x), model(x)) <= SINGLE
    code, said = run_fuse("saved", "--out", "m.pt2")
    assert (code, said) == (1, "error: m.pt2: the file is there already; name another, or --overwrite\n")


def test_the_command_writes_no_folder_and_nothing_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run_fuse("resnet18", "--out", str(tmp_path / "folder"))
    assert code == 1
    assert "a fused model is written as .onnx or .pt2; a folder is what 'apply' writes" in said
    monkeypatch.setattr(Affine, "bias", lambda self, bias, like: nn.Parameter(like.new_ones(like.shape[0])))
    code, said = run_fuse(
        "tests.nets:Residual", "--input", "1x3x16x16", "--out", str(tmp_path / "m.pt2"), "--rounds", "0"
    )
    assert code == 1
    assert re.search(r"error: .*the output differs by .* more than rounding; look at it in Python; --force", said)
    assert list(tmp_path.iterdir()) == []
