"""`finetune` and `distill` from Python: what they change, what they keep, and how they refuse."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.main import main
from torch import nn

import convrewrite as cr
from convrewrite import provenance
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.stands import stand_of
from convrewrite.training.losses import divergence, relative_error
from convrewrite.training.student import pairs_of, teacher_of

from ..nets import Residual
from .tiny import CLASSES, QUICK, RULES, SHAPE, Unreadable, equal_states, images, picture, rewritten, without_norms


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[cr.Trained, Path]:
    out = tmp_path_factory.mktemp("finetuned") / "out"
    return cr.finetune(rewritten(), images(), out=out, epochs=6, **QUICK), out


@pytest.fixture(scope="module")
def distilled() -> cr.Trained:
    return cr.distill(rewritten(), images(), epochs=6, patience=0, **QUICK)


def _measured(trained: cr.Trained, name: str) -> list[float]:
    return [row[name] for row in trained.history if name in row]


def test_fine_tuning_learns_and_ends_with_the_blocks_alone(finetuned: tuple[cr.Trained, Path]) -> None:
    trained, _ = finetuned
    losses = [row["loss"] for row in trained.history if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert blends_of(trained.model) == {}
    assert not trained.model.training
    assert isinstance(trained.model, Residual)
    anneal = [row["anneal"] for row in trained.history]
    assert anneal == sorted(anneal)
    assert (anneal[0], anneal[-1]) == (0.0, 1.0)
    note = provenance.of(trained.model)
    assert note is not None
    assert note.since.steps == 6 * (32 // 8)


def test_the_result_is_a_saved_folder_with_its_history(finetuned: tuple[cr.Trained, Path]) -> None:
    trained, out = finetuned
    back = cr.load(out)
    x = torch.randn(2, *SHAPE[1:])
    assert torch.equal(back(x), trained.model(x))
    assert {p.name for p in out.iterdir()} == {
        *("model.safetensors", "plan.json", "recipe.json"),
        *("history.csv", "curves.png", "training.json"),
    }
    lines = (out / "history.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,phase,loss,lr,anneal,gate,val_loss,val_accuracy,agreement"
    assert len(lines) == 1 + len(trained.history)
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((out.parent / "out.training" / "tensorboard").glob("events.*"))
    assert json.loads((out / "training.json").read_text())["steps"] == 24


def test_distilling_begins_block_by_block_and_brings_the_blocks_near_the_original(distilled: cr.Trained) -> None:
    phases = list(dict.fromkeys(row["phase"] for row in distilled.history))
    assert phases == ["blocks", "new", "all"]
    errors = [row["loss"] for row in distilled.history if row["phase"] == "blocks" and "loss" in row]
    assert errors[-1] < errors[0]
    assert _measured(distilled, "agreement")[0] == 1.0  # an exact start
    assert blends_of(distilled.model) == {}


def test_distilling_needs_no_labels() -> None:
    pictures = list(images(24).tensors[0])
    trained = cr.distill(rewritten(), pictures, steps=2, **QUICK)
    assert "val_accuracy" not in trained.history[0]
    assert trained.history[0]["agreement"] == 1.0


def test_the_model_given_and_the_caller_s_random_numbers_are_left_alone() -> None:
    model = rewritten().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cr.finetune(model, images(), steps=1, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_the_same_run_twice_gives_the_same_weights_bit_for_bit_and_another_seed_others() -> None:
    one, other = (cr.finetune(rewritten(), images(), steps=3, **QUICK) for _ in range(2))
    assert equal_states(one.model, other.model)
    assert one.history == other.history
    third = cr.finetune(rewritten(), images(), steps=3, seed=1, **QUICK)
    assert not equal_states(one.model, third.model)


def test_two_batches_accumulated_are_one_of_the_doubled_size() -> None:
    # Without batch norms, which see each batch on its own.
    settings = {**QUICK, "steps": 3, "optimizer": "sgd", "anneal": 0.0, "smoothing": 0.0, "new_first": 0.0}
    model = cr.rewrite(without_norms(), RULES, example=SHAPE).model
    one = cr.finetune(model, images(), **{**settings, "batch_size": 8})
    two = cr.finetune(model, images(), **{**settings, "batch_size": 4, "accumulate": 2})
    # The epochs are other permutations, but both see each of the 32 images once in the first 4 steps of 8.
    assert [row["step"] for row in one.history if "loss" in row] == [1, 2, 3]
    losses = [[row["loss"] for row in t.history if "loss" in row] for t in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_new_parts_alone_move_first_and_carried_norms_keep_their_statistics() -> None:
    start = rewritten()
    trained = cr.finetune(start, images(), steps=10, new_first=0.99, anneal=0.0, keep="last", **QUICK)
    old, new = start.state_dict(), trained.model.state_dict()
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    assert any(".gate" in key for key in moved)
    assert not any(key.startswith(("stem", "head")) or "bn" in key or ".conv." in key for key in moved)


def test_blends_that_never_anneal_are_kept() -> None:
    trained = cr.finetune(rewritten(), images(), steps=2, anneal=0.0, **QUICK)
    assert len(blends_of(trained.model)) == 4
    assert {float(b.anneal) for b in blends_of(trained.model).values()} == {0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.4, "cutmix": 1.0},
        {"ema": 0.99},
        {"imitate": 0.5, "features": 1.0},
        {"optimizer": "sgd", "clip": 0.0, "channels_last": True},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"theseus": True, "schedule": "cosine", "keep": "last"},
        {"deterministic": True, "accumulate": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_setting_trains_to_finite_weights(settings: dict[str, Any]) -> None:
    trained = cr.finetune(rewritten(), images(), steps=2, **{**QUICK, **settings})
    assert all(torch.isfinite(value).all() for value in trained.model.state_dict().values())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fresh_start_is_distilled_from_a_given_original_and_stops_when_agreement_stops() -> None:
    original = Residual().eval()
    trained = cr.distill(rewritten("fresh"), images(), teacher=original, epochs=30, patience=1, **QUICK)
    assert trained.history[-1]["step"] < 30 * 4
    assert trained.history[-1]["phase"] == "all"


def test_an_exact_start_holds_its_original() -> None:
    model = rewritten()
    teacher = teacher_of(model)
    torch.manual_seed(0)
    x = torch.randn(2, *SHAPE[1:])
    assert torch.equal(teacher(x), model.eval()(x))
    assert blends_of(teacher) == {}
    assert set(pairs_of(model, teacher)) == set(blends_of(model))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_data_set_with_other_classes_is_refused_or_gets_a_new_head(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(images().tensors[0], images().tensors[1] % 3)
    with pytest.raises(ConvrewriteError, match="3 classes, the model 5; --num-classes auto gives"):
        cr.finetune(rewritten(), data, steps=1, **QUICK)
    trained = cr.finetune(rewritten(), data, steps=2, num_classes="auto", out=tmp_path / "out", **QUICK)
    x = torch.randn(2, *SHAPE[1:])
    assert trained.model(x).shape == (2, 3)
    assert torch.equal(cr.load(tmp_path / "out")(x), trained.model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Residual(), images(), {}), "Residual: the model was not rewritten by convrewrite"),
        (lambda: (rewritten(), images(), {"epoch": 2}), "unknown setting 'epoch'; did you mean 'epochs'"),
        (lambda: (rewritten(), images(), {"lr": -1.0}), "setting 'lr' is -1.0: input should be greater than 0"),
        (lambda: (rewritten(), images(9), {}), r"do not fill one batch of 8; --batch-size 7"),
        (lambda: (rewritten(), list(images().tensors[0]), {}), "it has no label; convrewrite distill needs none"),
        (lambda: (rewritten(), Unreadable(picture(), 7), {}), "image 3: the label is 7, the model has classes 0 to 4"),
        (lambda: (rewritten(), Unreadable(picture(float("inf"))), {}), "image 3: the image holds NaN or infinite"),
        (lambda: (rewritten(), images(), {"lr": 1e30, "clip": 0.0}), r"the loss is not finite at step \d; lower --lr"),
        (
            lambda: (rewritten("fresh"), images(), {"imitate": 1.0}),
            "it starts fresh; name .*--teacher",
        ),
        (lambda: (_trained(), images(), {"imitate": 1.0}), "not in this model any more: it was trained; name"),
        (
            lambda: (rewritten(), images(), {"imitate": 1.0, "teacher": Residual(7)}),
            "the original has 7 classes, the model 5",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(make: Any, message: str) -> None:
    model, data, settings = make()
    with pytest.raises(ConvrewriteError, match=message) as error:
        cr.finetune(model, data, **{**QUICK, "steps": 6, **settings})
    assert "\n" not in str(error.value)


def _trained() -> nn.Module:
    return cr.finetune(rewritten(), images(), steps=1, anneal=0.0, **QUICK).model


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(ConvrewriteError, match=r"^training needs accelerate; pip install 'convrewrite\[train\]'$"):
        cr.finetune(rewritten(), images(), **QUICK)


def test_divergence_is_kullback_leibler_s_and_zero_for_equals() -> None:
    one, other = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    assert float(divergence(one, one, 2.0)) == pytest.approx(0, abs=1e-7)
    p, q = (torch.softmax(x.double() / 2, 1) for x in (other, one))
    assert float(divergence(one, other, 2.0)) == pytest.approx(4 * float((p * (p / q).log()).sum()), rel=1e-5)


def test_the_relative_error_is_zero_for_equals_and_one_for_the_channels_means() -> None:
    target = torch.randn(4, 3, 5, 5)
    assert float(relative_error(target, target)) == 0.0
    means = target.mean((0, 2, 3), keepdim=True).expand_as(target)
    assert float(relative_error(means, target)) == pytest.approx(1.0)


@pytest.mark.parametrize("start", ["exact", "fresh"])
def test_the_control_is_the_original_trained_in_the_same_way(tmp_path: Path, start: str) -> None:
    original = Residual(CLASSES)
    source = {"kind": "factory", "name": "tests.nets:Residual", "options": {"classes": CLASSES}}
    model = cr.rewrite(original, RULES, example=SHAPE, start=start, source=source).model
    settings = {**QUICK, "steps": 8, "seed": 3, "keep": "last"}
    beside = {} if start == "exact" else {"teacher": original}
    control = cr.finetune(model, images(), original=True, out=tmp_path / "control", **beside, **settings)
    assert not [m for m in control.model.modules() if stand_of(m) is not None]
    assert list(control.model.state_dict()) == list(original.state_dict())
    first, rows = control.history[0], [row for row in control.history if row["step"]]
    assert {row["phase"] for row in rows} == {"all"} and "anneal" not in first  # there is nothing new to train first
    with torch.no_grad():
        old, trained = original.state_dict(), control.model.state_dict()
    assert not torch.equal(old["stem.weight"], trained["stem.weight"])
    blocks = cr.finetune(model, images(), out=tmp_path / "blocks", **settings)
    if start == "exact":  # the same images, measured before the first step
        assert first["val_loss"] == pytest.approx(blocks.history[0]["val_loss"], rel=1e-5)
    x = torch.randn(2, *SHAPE[1:])
    assert torch.equal(cr.load(tmp_path / "control")(x), control.model(x))


def test_a_model_that_lost_its_original_says_so_when_asked_for_the_control() -> None:
    with pytest.raises(
        ConvrewriteError, match=r"the original is not in this model: .*; name the original with --teacher"
    ):
        cr.finetune(rewritten("fresh"), images(), original=True, steps=1, **QUICK)


def test_diff_shows_what_two_trainings_measured(tmp_path: Path) -> None:
    for name, original in (("control", True), ("blocks", False)):
        source = {"kind": "factory", "name": "tests.nets:Residual", "options": {"classes": CLASSES}}
        model = cr.rewrite(Residual(CLASSES), RULES, example=SHAPE, source=source).model
        trained = cr.finetune(model, images(), original=original, out=tmp_path / name, steps=4, **QUICK)
    kept = max(
        (r for r in trained.history if "val_loss" in r), key=lambda r: (r["anneal"], r["val_accuracy"], -r["val_loss"])
    )
    done = CliRunner().invoke(main, ["diff", str(tmp_path / "control"), str(tmp_path / "blocks")])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.strip().startswith("accuracy"))
    assert f"{100 * kept['val_accuracy']:.2f} %" in line and "points" in line
    done = CliRunner().invoke(main, ["diff", str(tmp_path / "control"), str(tmp_path / "blocks"), "--format", "json"])
    assert json.loads(done.output)["measured"]["after"]["val_accuracy"] == kept["val_accuracy"]
