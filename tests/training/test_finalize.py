"""Finalized models: the same output, the convolutions gone, hooks and flags kept, saved and loaded like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convrewrite as cr
from convrewrite import provenance
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.finalizing import blends_of, put_head
from convrewrite.identity import identity
from convrewrite.sources import resolve

from ..nets import NETS, Residual
from .tiny import RULES, SHAPE, equal_states, rewritten

COPY = {
    **RULES,
    "rules": [{"id": "r", "match": {"op": "conv2d", "kernel": 3}, "replace": RULES["rules"][0]["replace"]}],
}


def _note(model: nn.Module) -> provenance.Provenance:
    note = provenance.of(model)
    assert note is not None
    return note


def _annealed(model: nn.Module, value: float = 1.0) -> nn.Module:
    for blend in blends_of(model).values():
        blend.anneal.fill_(value)
        nn.init.uniform_(blend.gate, -1, 1)
    return model


def test_the_output_is_the_same_bit_for_bit_and_the_model_given_is_left_as_it_is() -> None:
    model = _annealed(rewritten()).eval()
    x = torch.randn(2, *SHAPE[1:])
    final = cr.finalize(model)
    assert torch.equal(model(x), final(x))
    assert len(blends_of(model)) == 4
    assert blends_of(final) == {}
    # Each of the four sites lost its convolution (8 x 8 x 9) and its gate (8).
    lost = 4 * (8 * 8 * 9 + 8)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in final.parameters()) == lost
    assert isinstance(final, Residual)


def test_a_blend_below_one_is_refused_with_its_path() -> None:
    model = _annealed(rewritten())
    blends_of(model)["layer2.1.conv2"].anneal.fill_(0.5)
    with pytest.raises(ConvrewriteError, match=r"^layer2\.1\.conv2: .* still takes part \(anneal is 0\.5\)"):
        cr.finalize(model)


def test_hooks_train_flags_and_frozen_parameters_stay() -> None:
    model = _annealed(rewritten())
    blend = blends_of(model)["layer1.0.conv2"]
    calls: list[str] = []
    blend.register_forward_hook(lambda *_: calls.append("hook"))
    blend.block.requires_grad_(requires_grad=False)
    model.train()
    blend.eval()
    final = cr.finalize(model)
    block = final.get_submodule("layer1.0.conv2")
    assert not block.training
    assert final.training
    assert not any(p.requires_grad for p in block.parameters())
    final(torch.randn(2, *SHAPE[1:]))
    assert calls == ["hook"]


def test_finalizing_twice_or_without_blends_changes_nothing() -> None:
    final = cr.finalize(_annealed(rewritten()))
    assert identity(cr.finalize(final)) == identity(final)
    fresh = rewritten("fresh")
    assert equal_states(cr.finalize(fresh), fresh)


def test_a_finalized_model_is_saved_loaded_and_a_source(tmp_path: Path) -> None:
    final = cr.finalize(_annealed(rewritten())).eval()
    cr.save(final, tmp_path / "out")
    x = torch.randn(2, *SHAPE[1:])
    back = cr.load(tmp_path / "out", base=Residual)
    assert torch.equal(back(x), final(x))
    assert identity(back) == identity(final)
    assert _note(back).since == _note(final).since
    cr.save(back, tmp_path / "again")
    for name in ("model.safetensors", "plan.json", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_zoo_model_needs_no_base_and_plans_find_the_sites_rewritten(tmp_path: Path) -> None:
    source = resolve("resnet18", num_classes=3)
    rules = {**RULES, "rules": [{**RULES["rules"][0], "match": {"kernel": 3, "stride": 1, "stage": 4}}]}
    model = cr.rewrite(source.model, rules, example=(1, 3, 32, 32), source=source.recipe).model
    cr.save(cr.finalize(_annealed(model)), tmp_path / "out")
    again = resolve(str(tmp_path / "out"), meta=True)
    assert blends_of(again.model) == {}
    plan = cr.plan(
        again.model, {**rules, "rules": [{**rules["rules"][0], "expect": {"sites": ">=0"}}]}, example=(1, 3, 32, 32)
    )
    assert plan.edits == ()


def test_a_finalized_model_that_is_rewritten_once_more_is_complete_in_its_folder(tmp_path: Path) -> None:
    final = cr.finalize(_annealed(rewritten()))
    rule = {"id": "s", "match": {"role": "stem"}, "replace": {"block": "acmix", "heads": 4, "window": 3}}
    twice = cr.rewrite(final, {"version": 1, "name": "u", "rules": [rule]}, example=SHAPE).model
    cr.save(twice, tmp_path / "blended")
    x = torch.randn(2, *SHAPE[1:])
    base = cr.finalize(_annealed(rewritten()))
    assert torch.equal(cr.load(tmp_path / "blended", base=base).eval()(x), twice.eval()(x))
    done = cr.finalize(_annealed(twice))
    cr.save(done, tmp_path / "final")
    assert torch.equal(cr.load(tmp_path / "final", base=base).eval()(x), done.eval()(x))


@pytest.mark.parametrize("name", sorted(set(NETS) - {"dense"}))
def test_every_small_network_comes_back_finalized(name: str, tmp_path: Path) -> None:
    shape = (2, 3, 12, 12)
    rules = {**COPY, "rules": [{**COPY["rules"][0], "shared": "together"}]}
    model = _annealed(cr.rewrite(NETS[name](), rules, example=shape).model).eval()
    assert blends_of(model)
    final = cr.finalize(model)
    cr.save(final, tmp_path / "out")
    back = cr.load(tmp_path / "out", base=NETS[name])
    assert equal_states(back, final)
    one, other, old = (_tensors(m(torch.ones(shape))) for m in (back, final, model))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(one, other, old, strict=True))


def _tensors(output: Any) -> list[torch.Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def test_a_block_put_in_by_hand_is_still_refused(tmp_path: Path) -> None:
    model = _annealed(rewritten())
    blend = blends_of(model)["layer1.0.conv2"]
    model.set_submodule("layer1.0.conv2", blend.finalize())
    with pytest.raises(StoreError, match=r"layer1\.0\.conv2: .*finalize with convrewrite\.finalize\(model\)"):
        cr.save(model, tmp_path / "out")


@pytest.mark.parametrize("since", [{}, {"finalized": ["stem"]}, {"finalized": "x", "head": None, "steps": 0}, []])
def test_a_damaged_note_is_one_line(tmp_path: Path, since: Any) -> None:
    cr.save(cr.finalize(_annealed(rewritten())), tmp_path / "out")
    path = tmp_path / "out" / "recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "since": since}))
    with pytest.raises(StoreError, match="damaged"):
        cr.load(tmp_path / "out", base=Residual)


@pytest.mark.parametrize("paths", [["stem"], ["layer1.0.conv9"]])
def test_a_note_of_blends_that_are_not_there_is_one_line(tmp_path: Path, paths: list[str]) -> None:
    cr.save(cr.finalize(_annealed(rewritten())), tmp_path / "out")
    path = tmp_path / "out" / "recipe.json"
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps({**recipe, "since": {**recipe["since"], "finalized": paths}}))
    with pytest.raises(StoreError, match=paths[0]):
        cr.load(tmp_path / "out", base=Residual)


def test_a_new_head_is_remembered(tmp_path: Path) -> None:
    model = rewritten()
    put_head(model, "head", 9, seed=3)
    assert model.num_classes == 9
    cr.save(model, tmp_path / "out")
    back = cr.load(tmp_path / "out", base=Residual)
    assert equal_states(back, model)
    assert back(torch.ones(2, *SHAPE[1:])).shape == (2, 9)
    for path, message in (("drop", "Dropout is no classifier"), ("haed", "no such module")):
        with pytest.raises(StoreError, match=message):
            put_head(model, path, 3)
