"""`convrewrite finetune` and `distill`: every setting is an option, and what is wrong is one line."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from convrewrite.cli.distill_command import command as distill
from convrewrite.cli.finetune_command import command as finetune
from convrewrite.cli.main import main
from PIL import Image

import convrewrite as cr
from convrewrite.finalizing import blends_of
from convrewrite.training.settings import Settings

from .tiny import rewritten

QUICK = ("--batch-size", "8", "--workers", "0", "--steps", "4", "--val-fraction", "0.2")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, and grey pictures of five classes."""
    folder = tmp_path_factory.mktemp("commands")
    cr.save(rewritten(), folder / "start")
    for number in range(20):
        path = folder / "pictures" / "abcde"[number % 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (14, 14), 10 * number).save(path)
    return folder


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_command_trains_says_what_it_measured_and_writes_a_folder(command: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = f"imagefolder:{place / 'pictures'}"
    done = run(command, place / "start", "--data", data, "--out", out, *QUICK)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("epoch 0  step 0  ")
    assert "accuracy" in lines[0]
    assert ("agreement" in lines[0]) == (command == "distill")
    assert lines[-1].endswith("anneal 1.00")
    assert "untrained: 4 blocks, " in done.stderr
    assert "(16 images to train on, solving needs 64); once the convolution is gone (step 2)" in done.stderr
    assert len(json.loads((out / "training.json").read_text())["blocks"]["untrained"]) == 4
    assert f"wrote {out}" in done.stderr
    assert blends_of(cr.load(out)) == {}
    again = run(command, place / "start", "--data", data, "--out", out, *QUICK)
    assert again.exit_code == 1
    assert "a model is saved there already" in again.stderr


def test_a_model_of_another_number_of_classes_gets_a_new_head_only_if_asked(place: Path, tmp_path: Path) -> None:
    data = "torchvision:FakeData?size=20&num_classes=3"
    arguments = ("finetune", place / "start", "--data", data, "--out", tmp_path / "out", *QUICK)
    refused = run(*arguments)
    assert refused.exit_code == 1
    what = "error: torchvision:FakeData: the data has 3 classes, the model 5"
    assert refused.stderr == f"{what}; --num-classes auto gives the model a new head\n"
    done = run(*arguments, "--num-classes", "auto")
    assert done.exit_code == 0, done.output
    assert cr.load(tmp_path / "out")(torch.zeros(1, 3, 12, 12)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagefolder:nowhere"], "error: nowhere: there is no such folder; write imagefolder:PATH\n"),
        (["--data", "mnist"], "error: 'mnist' is no source of images; write imagefolder:PATH, torchvision:NAME or"),
        (["--data", "imagefolder:P", "--augment", "spin"], "error: unknown augmentation 'spin'; "),
        (["--data", "imagefolder:P", "--lr", "-1"], "error: setting 'lr' is -1.0: input should be greater than 0\n"),
        (["--data", "imagefolder:P", "--resume"], "there is no checkpoint to go on from; begin without --resume\n"),
        (["--data", "imagefolder:P", "--batch-size", "64"], "16 images to train on do not fill one batch of 64; "),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, place: Path, tmp_path: Path) -> None:
    given = [a.replace("imagefolder:P", f"imagefolder:{place / 'pictures'}") for a in arguments]
    done = run("finetune", place / "start", "--out", tmp_path / "out", *QUICK, *given)
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_setting_is_an_option_of_one_of_the_commands_with_the_same_default() -> None:
    found = {p.name: p.get_default(click.Context(c)) for c in (finetune, distill) for p in c.params}
    assert set(Settings.model_fields) <= set(found)
    defaults = Settings().model_dump()
    assert {name: found[name] for name in defaults} == defaults


def test_the_page_on_training_names_the_defaults() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")
    settings = Settings()
    for name in ("blocks_first", "new_first", "anneal", "warmup"):
        assert f"`--{name.replace('_', '-')}` ({getattr(settings, name):g}" in page, name
    assert f"`--new-lr` ({settings.new_lr:g})" in page
