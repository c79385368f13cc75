"""Several processes train what one does with the doubled batch."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import convrewrite as cr
from convrewrite.training.sharding import spread

from .tiny import RULES, SHAPE, images, rewritten, without_norms

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
"""Relative, of the loss at each step: the sums over images are taken in another order. Without batch norms, whose
statistics are each process's own, and without randomness beyond the order of images."""


def _run(launcher: list[str], folder: Path, out: str, batch: int) -> list[dict[str, str]]:
    arguments = ["finetune", str(folder / "start"), "--data", f"imagefolder:{folder / 'pictures'}", "--augment", "none"]
    arguments += ["--out", str(folder / out), "--batch-size", str(batch), "--steps", "6", "--device", "cpu"]
    arguments += ["--workers", "0", "--lr", "1e-3", "--clip", "1", "--val-fraction", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "-m", "convrewrite.cli.main", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (folder / out / "history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder with a saved model and pictures."""
    for number in range(40):
        place = tmp_path / "pictures" / "abcde"[number % 5]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (6 * number, 50 * (number % 5), 255 - 6 * number)).save(place / f"{number}.png")
    source = {"kind": "factory", "name": "tests.training.tiny:without_norms", "options": {}}
    cr.save(cr.rewrite(without_norms(), RULES, example=SHAPE).model, tmp_path / "start", source=source)
    return tmp_path


# `--multi_gpu` means several processes on this machine, which `--device cpu` then keeps on its processor.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    "accelerate launch": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
    ],
    "accelerate launch with FSDP": [
        *("-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_loss_curve_of_one_with_the_doubled_batch(start: Path, launcher: str) -> None:
    one = _run([sys.executable], start, "one", 8)
    two = _run([sys.executable, *LAUNCHERS[launcher], _port()], start, "two", 4)
    for name, count in (("loss", 6), ("val_loss", 3)):
        curves = [[float(row[name]) for row in rows if row[name]] for rows in (one, two)]
        assert len(curves[0]) == count
        assert curves[1] == pytest.approx(curves[0], rel=TOLERANCE)


@pytest.mark.slow
def test_accelerate_launch_of_one_process_gives_the_same_run(start: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    assert _run([sys.executable, *launcher], start, "launched", 8) == _run([sys.executable], start, "plain", 8)


@pytest.mark.slow
def test_spread_parameters_train_as_whole_ones_and_go_on_to_the_same_weights(tmp_path: Path) -> None:
    launcher = [*LAUNCHERS["torchrun"], _port(), "-m", "tests.training.sharded", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["shares"]) == 24 and all(0.49 < share < 0.52 for share in found["shares"])
    for purpose in ("finetune", "distill"):
        whole, spread = found[purpose]["losses"]
        assert len(whole) == 6 and spread == pytest.approx(whole, rel=TOLERANCE)
        assert found[purpose]["resumed"] and found[purpose]["saved"]
    assert found["units"][1] == pytest.approx(found["units"][0], rel=TOLERANCE)


@pytest.mark.parametrize(("name", "value"), [("theseus", True), ("mixed_precision", "fp16")])
def test_what_fsdp_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(cr.ConvrewriteError, match=rf"^setting .{name}. is {value!r}: not with FSDP; change it"):
        cr.finetune(rewritten(), images(), **{name: value})


def test_a_parameter_without_dimensions_cannot_be_spread() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(cr.ConvrewriteError, match=r"^scale: FSDP cannot split a parameter without dimensions; launch"):
        spread(model, torch.device("cpu"), apart=False)
