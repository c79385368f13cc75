"""Blocks solved beside their convolutions: nothing changes at the start, and next to nothing when they take over."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.training.groups import kinds_of
from convrewrite.training.solving import is_solved, solvable, solve_blends
from convrewrite.training.student import apart_of, pairs_of, teacher_of

from ..nets import Residual
from .tiny import QUICK, RULES, SHAPE, equal_states, images, rewritten


def pictures(count: int = 128) -> Tensor:
    return images(count).tensors[0]


def of(block: str, **options: object) -> nn.Module:
    match = {"role": "bottleneck_spatial", "stride": 1}
    rule = {"id": "r", "match": match, "replace": {"block": block, **options}, "start": "exact"}
    torch.manual_seed(0)
    return cr.rewrite(Residual(5), {"version": 1, "name": "t", "rules": [rule]}, example=SHAPE).model


@pytest.fixture(scope="module")
def solved() -> nn.Module:
    model = rewritten()
    assert solve_blends(model, pictures()) is not None
    return model


def taken_over(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    cr.Annealer(model, steps=0)
    return cr.finalize(model).eval()


def settled() -> nn.Module:
    """Rewritten with statistics in its batch norms that are those of the images, as in a trained network."""
    torch.manual_seed(0)
    network = Residual(5).train()
    with torch.no_grad():
        for _ in range(40):
            network(pictures())
    return cr.rewrite(network.eval(), RULES, example=SHAPE).model


@torch.no_grad()
def error(model: nn.Module, x: Tensor) -> float:
    """Mean squared distance from what the original gives."""
    return float((model.eval()(x) - rewritten().eval()(x)).square().mean())


def test_a_solved_model_still_computes_the_original_bit_for_bit(solved: nn.Module) -> None:
    x = torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    assert torch.equal(solved.eval()(x), rewritten().eval()(x))


def test_after_they_took_over_solved_blocks_are_near_the_original_and_fresh_ones_are_not(solved: nn.Module) -> None:
    x = images(32, seed=1).tensors[0]
    errors = [error(taken_over(m), x) for m in (solved, rewritten())]
    assert errors[0] < 0.1 * errors[1]


def test_solved_blocks_count_as_fitted_and_their_gates_as_new(solved: nn.Module) -> None:
    kinds = kinds_of(solved)
    assert {kind for name, kind in kinds.items() if ".block." in name} == {"fitted"}
    assert {kind for name, kind in kinds.items() if name.endswith(".gate")} == {"new"}
    assert {kind for name, kind in kinds_of(rewritten()).items() if ".block." in name} == {"new"}


def test_the_same_images_and_seed_give_the_same_blocks_and_carried_weights_are_untouched(solved: nn.Module) -> None:
    again = rewritten()
    solve_blends(again, pictures())
    assert equal_states(again, solved)
    old, new = rewritten().state_dict(), solved.state_dict()
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    assert moved
    assert all(".block." in key for key in moved)


def test_a_block_that_has_no_fit_stays_and_one_that_holds_its_convolution_too() -> None:
    for block in ("mhsa", "gpsa"):
        model = of(block, heads=4) if block == "mhsa" else of(block)
        before = copy.deepcopy(model.state_dict())
        assert solvable(model) == []
        assert solve_blends(model, pictures()) is None
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_only_new_blocks_are_trained_block_by_block(solved: nn.Module) -> None:
    teacher = teacher_of(rewritten())
    assert apart_of(solved, pairs_of(solved, teacher)) == ()
    fresh = rewritten()
    assert set(apart_of(fresh, pairs_of(fresh, teacher))) == set(blends_of(fresh))
    holding = of("gpsa")
    assert pairs_of(holding, Residual(5))
    assert apart_of(holding, pairs_of(holding, Residual(5))) == ()


@pytest.mark.parametrize("purpose", [cr.finetune, cr.distill])
def test_training_solves_first_unless_told_not_to(purpose: object) -> None:
    assert callable(purpose)
    settings = {**QUICK, "batch_size": 32, "steps": 1, "lr": 1e-9, "keep": "last", "anneal": 1.0, "blocks_first": 0.0}
    start = settled()
    models = [
        purpose(start, images(count), solve=solve, **settings).model
        for count, solve in ((200, 128), (200, 0), (60, 128))  # 48 of 60 are left to train on: too few
    ]
    x = pictures(32)
    with torch.no_grad():
        wanted = start(x)
        near, far, few = (float((m(x) - wanted).square().mean()) for m in models)
    assert near < 0.2 * min(far, few)


def said(start: nn.Module, count: int, **settings: object) -> list[str]:
    lines: list[str] = []
    cr.finetune(start, images(count), steps=2, say=lines.append, **{**QUICK, **settings})  # type: ignore[arg-type]
    return lines


def test_a_run_says_how_its_blocks_begin() -> None:
    (line,) = said(settled(), 200, solve=128)
    found = re.fullmatch(
        r"solved 4 blocks from the convolution beside, on 103 images: lost is (\S+) of the output's variance in the "
        r"median, (\S+) at most \(layer\d\.\d\.conv2\)",
        line,
    )
    assert found, line
    assert 0 < float(found[1]) <= float(found[2]) < 1
    (line,) = said(settled(), 60)
    assert line.startswith(
        "untrained: 4 blocks, layer1.0.conv2, layer1.1.conv2, layer2.0.conv2, ... (48 images to train on, "
    )
    assert line.endswith("solving needs 64); once the convolution is gone (step 1) it shows what they learned")
    (line,) = said(settled(), 60, solve=0)
    assert " (--solve 0); " in line
    (line,) = said(of("mhsa"), 200)
    assert " (mhsa: it cannot be solved from a convolution); " in line
    assert said(of("sasa_wide"), 200) == []
    assert said(settled(), 200, anneal=0.0) == []


def test_what_was_trained_already_is_not_solved_again() -> None:
    trained = cr.finetune(rewritten(), images(100), steps=1, anneal=0.0, keep="last", **QUICK).model
    before = copy.deepcopy(trained.state_dict())
    with pytest.raises(ConvrewriteError, match=r"^layer1\.0\.conv2: the blend was trained already; solve before"):
        solve_blends(trained, pictures())
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    cr.finetune(trained, images(100), steps=1, **QUICK)  # no error: it goes on from there


def test_too_few_images_and_images_that_are_not_finite_are_one_line() -> None:
    model = rewritten()
    with pytest.raises(ConvrewriteError, match="63 images are too few"):
        solve_blends(model, pictures(63))
    with pytest.raises(ConvrewriteError, match="not finite"):
        solve_blends(model, pictures(64) / 0)
    assert not any(is_solved(blend) for blend in blends_of(model).values())


class StopError(Exception):
    """Raised in the middle of a run."""


def test_a_run_that_began_by_solving_and_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise StopError

    settings = {**QUICK, "steps": 3, "checkpoint_every": 1, "solve": 64}
    whole = cr.finetune(settled(), images(100), out=tmp_path / "whole", **settings)
    with pytest.raises(StopError):
        cr.finetune(settled(), images(100), out=tmp_path / "stopped", watch=stop, **settings)
    rest = cr.finetune(settled(), images(100), out=tmp_path / "stopped", resume=True, **settings)
    assert equal_states(whole.model, rest.model)
    assert whole.history == rest.history
