"""Checkpoints of the original into the rewritten model and back: bit for bit, to rounding, or one line why not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from click.testing import CliRunner
from convrewrite.cli.main import main
from safetensors.torch import load_file
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.blocks.base import Block
from convrewrite.errors import ConvrewriteError, PlanError, SourceError, StoreError
from convrewrite.finalizing import blends_of, put_head
from convrewrite.migrating import write_state
from convrewrite.sources import resolve

from . import copyblock  # noqa: F401 - registers the blocks
from .nets import Aliased, Residual, Shared, WithFunctional

SHAPE = (2, 3, 16, 16)
HELD = 1e-6
"""Largest difference of a weight that went through full-width heads, relative to the layer's largest, in float32."""

EVERY: dict[str, Any] = {"version": 1, "rules": [{"id": "r", "match": {"op": "conv2d", "kernel": 3}}]}


TAIL: dict[str, Any] = {
    "version": 1,
    "rules": [{"id": "t", "match": {"name": "layer2.0.conv2"}, "insert": {"block": "non_local", "after": "block"}}],
}
FACTORY = "tests.nets:Residual"


def rules(block: str, **options: Any) -> dict[str, Any]:
    rule = {**EVERY["rules"][0], "replace": {"block": block, **options}, "start": "exact", "shared": "together"}
    return {"version": 1, "rules": [rule]}


def trained(model: nn.Module) -> nn.Module:
    """Other weights and statistics than those it was built with, as a user's own training leaves them."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(torch.randn_like(tensor), alpha=1e-3)
        else:
            tensor.add_(7)
    return model


def equal(one: nn.Module, other: dict[str, Tensor]) -> bool:
    state = one.state_dict()
    return list(state) == list(other) and all(
        torch.equal(v, other[k]) and v.dtype == other[k].dtype for k, v in state.items()
    )


def worst(one: nn.Module, other: dict[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest value in it."""
    found = 0.0
    for key, value in one.state_dict().items():
        gap, size = (value.double() - other[key].double()).abs().max(), other[key].double().abs().max()
        found = max(found, float(gap) / (float(size) or 1.0))
    return found


def saved(model: nn.Module, folder: Path, name: str = "old.pth") -> Path:
    path = folder / name
    torch.save(model.state_dict(), path)
    return path


# --- into the rewritten model


def test_a_checkpoint_of_the_original_becomes_the_rewritten_model_with_its_output(tmp_path: Path) -> None:
    plan = cr.plan(torchvision.models.resnet18(), "sasa-exact", example=(1, 3, 64, 64), name="torchvision:resnet18")
    (tmp_path / "plan.json").write_text(plan.to_json())
    original = trained(torchvision.models.resnet18()).eval()
    model, report = cr.migrate(saved(original, tmp_path), tmp_path / "plan.json")
    assert report.ok
    assert report.plan.hash == plan.hash
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want, got = original(x), model.eval()(x)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5
    back = cr.revert(model)
    assert back.lost == ()
    assert worst(back.model, original.state_dict()) <= HELD


def test_it_is_what_rewriting_the_trained_original_gives() -> None:
    model = Residual()
    plan = cr.plan(model, "acmix", example=SHAPE)
    trained(model)
    want = cr.rewrite(model, plan).model
    got = cr.migrate(model.state_dict(), plan, model=Residual()).model
    assert equal(got, want.state_dict())


def test_other_wrappings_of_a_checkpoint_are_looked_through(tmp_path: Path) -> None:
    model = trained(Residual())
    plan = cr.plan(model, "acmix", example=SHAPE)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "ddp.pt")
    got = cr.migrate(tmp_path / "ddp.pt", plan, model=Residual()).model
    assert equal(cr.revert(got, base=Residual()).model, model.state_dict())


def test_a_saved_folder_stands_for_its_plan_and_says_how_to_build_the_original(tmp_path: Path) -> None:
    source = resolve(FACTORY)
    cr.save(cr.rewrite(source.model, TAIL, example=SHAPE, source=source.recipe).model, tmp_path / "saved")
    original = trained(Residual())
    got = cr.migrate(original.state_dict(), tmp_path / "saved").model
    assert equal(cr.revert(got).model, original.state_dict())


# --- back


@pytest.mark.parametrize("make", [Residual, Shared, Aliased, WithFunctional])
def test_blends_come_back_bit_for_bit(make: type[nn.Module]) -> None:
    original = trained(make())
    model = cr.rewrite(original, rules("acmix", heads=2, window=3), example=SHAPE).model
    assert blends_of(model)
    back = cr.revert(model, base=make())
    assert type(back.model) is make
    assert equal(back.model, original.state_dict())
    assert back.lost == ()


@pytest.mark.parametrize("make", [Residual, Shared, Aliased, WithFunctional])
@pytest.mark.parametrize("block", ["sasa_wide", "outlook_wide", "gpsa", "aa_conv"])
def test_blocks_that_hold_a_convolution_give_it_back(make: type[nn.Module], block: str) -> None:
    original = trained(make())
    options = {"form": "residual", "heads": 2} if block == "aa_conv" else {}
    model = cr.rewrite(original, rules(block, **options), example=SHAPE).model
    assert any(isinstance(m, Block) for m in model.modules())
    back = cr.revert(model, base=make()).model
    if block in ("gpsa", "aa_conv"):  # they have its very weights
        assert equal(back, original.state_dict())
    assert worst(back, original.state_dict()) <= HELD
    x = torch.randn(SHAPE)
    with torch.no_grad():
        want, got = original.eval()(x), back.eval()(x)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_comes_back_too(dtype: torch.dtype) -> None:
    original = trained(Residual()).to(dtype)
    model = cr.rewrite(original, rules("acmix", heads=2, window=3), example=SHAPE, force=True).model
    assert equal(cr.revert(model, base=Residual().to(dtype)).model, original.state_dict())


def test_what_was_trained_beside_the_blends_comes_back_trained() -> None:
    model = cr.rewrite(Residual(), "acmix", example=SHAPE).model
    trained(model.stem)
    blend = blends_of(model)["layer1.0.conv2"]
    trained(blend.conv)
    trained(blend.block)  # of no account while the gate is shut
    back = cr.revert(model, base=Residual()).model
    assert torch.equal(back.stem.weight, model.stem.weight)
    assert torch.equal(back.layer1[0].conv2.weight, blend.conv.weight)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.equal(back.eval()(x), model.eval()(x))


def test_a_new_head_stays_and_the_mode_too() -> None:
    model = cr.rewrite(Residual(), "acmix", example=SHAPE).model.eval()
    put_head(model, "head", 3)
    back = cr.revert(model, base=Residual(classes=5)).model
    assert not back.training
    assert torch.equal(back.head.weight, model.head.weight)
    assert back.num_classes == 3


def test_two_rewrites_are_undone_one_after_the_other() -> None:
    original = trained(Residual())
    first = cr.rewrite(original, TAIL, example=SHAPE, source=resolve(FACTORY).recipe).model
    second = cr.rewrite(first, "acmix", example=SHAPE).model
    once = cr.revert(second).model
    assert equal(once, first.state_dict())
    assert equal(cr.revert(once).model, original.state_dict())


def test_from_a_state_dict_with_its_plan(tmp_path: Path) -> None:
    original = trained(Residual())
    model, report = cr.rewrite(original, "acmix", example=SHAPE)
    path = saved(model, tmp_path)
    for given in (path, model.state_dict()):
        back = cr.revert(given, plan=report.plan, base=Residual())
        assert equal(back.model, original.state_dict())


# --- what cannot come back


def opened(model: nn.Module, path: str = "layer1.1.conv2") -> nn.Module:
    with torch.no_grad():
        blends_of(model)[path].gate[2] = -0.25
    return model


def test_an_open_gate_is_refused_by_its_site_and_forced_with_a_list_of_what_is_lost() -> None:
    original = trained(Residual())
    model = opened(cr.rewrite(original, "acmix", example=SHAPE).model)
    with pytest.raises(ConvrewriteError) as caught:
        cr.revert(model, base=Residual())
    assert str(caught.value) == (
        "Residual: 1 of 4 edits cannot be undone exactly "
        "(layer1.1.conv2: acmix takes part (gate up to 0.25, anneal 0)); "
        "--force takes the convolutions of blends and leaves inserted blocks out, which changes the outputs"
    )
    back = cr.revert(model, base=Residual(), force=True)
    assert back.lost == ("layer1.1.conv2: acmix takes part (gate up to 0.25, anneal 0)",)
    assert equal(back.model, original.state_dict())


def test_an_annealed_blend_is_refused() -> None:
    model = cr.rewrite(Residual(), "acmix", example=SHAPE).model
    for blend in blends_of(model).values():
        blend.anneal.fill_(0.5)
    with pytest.raises(ConvrewriteError, match=r"4 of 4 edits .*anneal 0\.5\).*; and 1 more\)"):
        cr.revert(model, base=Residual())


def test_a_block_without_convolution_cannot_be_forced() -> None:
    model = cr.rewrite(Residual(), "acmix", example=SHAPE, start="fresh").model
    for force in (False, True):
        with pytest.raises(ConvrewriteError, match=r"layer1\.0\.conv2: acmix is no convolution any more, has learned"):
            cr.revert(model, base=Residual(), force=force)
    for blend in blends_of(annealed := cr.rewrite(Residual(), rules("sasa", heads=2), example=SHAPE).model).values():
        blend.anneal.fill_(1)
    with pytest.raises(ConvrewriteError, match=r"sasa took the convolution's place and is none"):
        cr.revert(cr.finalize(annealed), base=Residual(), force=True)


def test_heads_that_have_learned_are_refused_with_their_largest_weight() -> None:
    model = cr.rewrite(Residual(), "sasa-exact", example=SHAPE).model
    block = model.get_submodule("layer2.0.conv2")
    with torch.no_grad():
        block.get_parameter("query.weight")[1, 2] = -0.125
    wanted = r"1 of 4 edits .* \(layer2\.0\.conv2: sasa_wide is no convolution any more, has learned .*0\.125\)\)$"
    with pytest.raises(ConvrewriteError, match=wanted):
        cr.revert(model, base=Residual())


def test_an_inserted_block_that_has_learned_is_refused_and_can_be_left_out() -> None:
    original = trained(Residual())
    model = cr.rewrite(original, TAIL, example=SHAPE).model
    next(p for n, p in model.named_parameters() if n.endswith("W.1.bias")).data[1] = 0.5
    with pytest.raises(ConvrewriteError, match=r"non_local has learned \(largest weight in the way 0\.5\)"):
        cr.revert(model, base=Residual())
    back = cr.revert(model, base=Residual(), force=True)
    assert len(back.lost) == 1
    assert equal(back.model, original.state_dict())


def test_a_block_that_replaced_a_whole_residual_block_is_refused() -> None:
    whole = {**rules("outlooker")["rules"][0], "match": {"name": "layer1.0.conv2"}, "start": "fresh"}
    model = cr.rewrite(Residual(), {"version": 1, "rules": [whole]}, example=SHAPE).model
    with pytest.raises(ConvrewriteError, match="outlooker stands for more than the convolution"):
        cr.revert(model, base=Residual(), force=True)


# --- wrong input


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    plan = cr.plan(Residual(), "acmix", example=SHAPE)
    state = dict(Residual().state_dict())
    del state["stem.bias"]
    state["more"] = torch.ones(2)
    with pytest.raises(SourceError, match=r"1 missing \(stem\.bias\); 1 unexpected \(more\)"):
        cr.migrate(state, plan, model=Residual())
    with pytest.raises(SourceError, match=r"of another shape \(head\.weight \(9, 8\), wanted \(5, 8\)"):
        cr.migrate(Residual(9).state_dict(), plan, model=Residual())
    with pytest.raises(SourceError, match=r"old\.pth: there is no such file"):
        cr.migrate(tmp_path / "old.pth", plan, model=Residual())


def test_a_checkpoint_of_the_other_side_is_recognised() -> None:
    model, report = cr.rewrite(Residual(), "sasa-exact", example=SHAPE)
    with pytest.raises(
        SourceError, match=r"; this is a checkpoint of the rewritten model: --reverse goes back from it$"
    ):
        cr.migrate(model.state_dict(), report.plan, model=Residual())
    with pytest.raises(SourceError, match=r"; this is a checkpoint of the original: leave --reverse out$"):
        cr.revert(Residual().state_dict(), plan=report.plan, base=Residual())


def test_a_plan_that_fits_something_else_or_says_too_little_is_one_line(tmp_path: Path) -> None:
    plan = cr.plan(Residual(), "acmix", example=SHAPE)
    with pytest.raises(SourceError, match=r"the plan does not say how to build its model, 'Residual'; name it"):
        cr.migrate(Residual().state_dict(), plan)
    with pytest.raises(PlanError, match="does not fit the model"):
        cr.migrate(Residual(9).state_dict(), plan, model=Residual(9))
    (tmp_path / "plan.json").write_text(plan.to_json().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PlanError, match=r"plan\.json: the plan was changed after it was made"):
        cr.migrate(Residual().state_dict(), tmp_path / "plan.json", model=Residual())
    with pytest.raises(PlanError, match=r"none\.json: cannot be read: No such file"):
        cr.migrate(Residual().state_dict(), tmp_path / "none.json", model=Residual())
    with pytest.raises(PlanError, match="the state dict: a state dict alone does not say what was rewritten"):
        cr.revert(Residual().state_dict())


def test_a_folder_with_another_plan_is_refused(tmp_path: Path) -> None:
    source = resolve(FACTORY)
    cr.save(cr.rewrite(source.model, TAIL, example=SHAPE, source=source.recipe).model, tmp_path / "saved")
    with pytest.raises(PlanError, match="the folder was made by another plan"):
        cr.revert(tmp_path / "saved", plan=cr.plan(Residual(), "acmix", example=SHAPE))


def test_models_that_have_no_way_back_are_one_line() -> None:
    with pytest.raises(ConvrewriteError, match=r"^Residual: the model was not rewritten by convrewrite"):
        cr.revert(Residual())
    model = cr.rewrite(Residual(), "acmix", example=SHAPE).model
    with pytest.raises(ConvrewriteError, match=r"^Residual: the model was fused"):
        cr.revert(cr.fuse(model))
    with pytest.raises(StoreError, match="another one than is built now"):
        cr.revert(model, base=Residual(classes=9))


def test_neither_direction_changes_what_it_was_given() -> None:
    base, model = Residual(), cr.rewrite(Residual(), "acmix", example=SHAPE).model
    states = [copy.deepcopy(m.state_dict()) for m in (base, model)]
    cr.migrate(Residual().state_dict(), cr.plan(base, "acmix", example=SHAPE), model=base)
    cr.revert(model, base=base)
    assert equal(base, states[0])
    assert equal(model, states[1])


# --- files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_written_weights_load_into_the_original_s_own_code(tmp_path: Path, suffix: str) -> None:
    original = trained(Aliased())
    path = tmp_path / f"new{suffix}"
    write_state(original, path)
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    fresh = Aliased()
    fresh.load_state_dict(state, strict=True)
    assert equal(fresh, original.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_is_not_replaced_unasked_and_no_half_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    write_state(Residual(), path)
    with pytest.raises(StoreError, match="is there already"):
        write_state(Residual(), path)
    before = path.read_bytes()

    def full(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StoreError, match=r"cannot be written: .*No space left"):
        write_state(Residual(), path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    with pytest.raises(StoreError, match=r"no file of weights; name one of \.safetensors"):
        write_state(Residual(), tmp_path / "a.bin")


def test_the_command_goes_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(cr.plan(Residual(), TAIL, example=SHAPE, name=FACTORY).to_json())
    original = trained(Residual())
    saved(original, tmp_path)

    def go(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["migrate", *args])
        return done.exit_code, done.output

    code, said = go("old.pth", "--plan", "plan.json", "--out", "new")
    assert (code, said) == (0, "1 edits; the output differs from the original's by 0\nwrote new\n")
    assert go("new", "--reverse", "--out", "back.pth") == (0, "wrote back.pth\n")
    assert equal(original, torch.load("back.pth", weights_only=True))
    assert go("old.pth", "--plan", "plan.json", "--out", "new.safetensors")[0] == 0
    assert go("new.safetensors", "--plan", "new", "--reverse", "--out", "back.safetensors")[0] == 0
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in load_file("back.safetensors").items())
    code, said = go("old.pth", "--plan", "plan.json", "--out", "new")
    assert code == 1
    assert said.startswith("error: new: a model is saved there already")
    assert go("new", "--reverse", "--out", "folder")[0] == 2
    assert go("old.pth", "--out", "folder")[0] == 2
    assert not Path("folder").exists()
