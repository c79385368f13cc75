"""Checkpoints: whole or not at all, refused where they are of another run; killed runs end as if they were not."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import convrewrite as cr
from convrewrite.errors import ConvrewriteError
from convrewrite.training import checkpoints

from ..nets import Residual
from .tiny import QUICK, RULES, SHAPE, equal_states, images, rewritten

ROOT = Path(__file__).resolve().parents[2]


class StopError(Exception):
    """Raised in the middle of a run."""


def _stopping(step: int) -> Any:
    def watch(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise StopError

    return watch


def _train(out: Path, **settings: Any) -> cr.Trained:
    return cr.finetune(rewritten(), images(), out=out, **{**QUICK, "steps": 6, "checkpoint_every": 1, **settings})


def _stopped(out: Path, step: int = 4, **settings: Any) -> Path:
    with pytest.raises(StopError):
        _train(out, watch=_stopping(step), **settings)
    return out


def _killed(command: str, kills: int, folder: Path) -> list[dict[str, Any]]:
    arguments = [sys.executable, "-W", "error", "-m", "tests.training.killing", command, str(kills), "0", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_a_run_killed_at_random_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    found = _killed("distill", 2, tmp_path)
    assert len(found) >= 2
    assert all(kill["same"] and not kill["left"] for kill in found), found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_run_killed_thirty_times_goes_on_to_the_same_bytes(command: str, tmp_path: Path) -> None:
    found = _killed(command, 30, tmp_path)
    assert len(found) >= 30
    assert all(kill["same"] and not kill["left"] for kill in found), found
    assert len({kill["step"] for kill in found}) > 4  # the kills fell on different moments


def test_a_stopped_run_goes_on_with_the_same_history_and_weights(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    _stopped(tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    rest = _train(tmp_path / "stopped", resume=True)
    assert equal_states(whole.model, rest.model)
    assert whole.history == rest.history
    assert (tmp_path / "whole" / "history.csv").read_bytes() == (tmp_path / "stopped" / "history.csv").read_bytes()


def test_going_on_with_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = _train(tmp_path / "out")
    again = _train(tmp_path / "out", resume=True)
    assert equal_states(first.model, again.model)
    assert first.history == again.history


def test_a_run_is_not_begun_over_another_without_being_told_to(tmp_path: Path) -> None:
    _stopped(tmp_path / "out")
    with pytest.raises(ConvrewriteError, match=r"a run was begun here already; --resume to go on, --overwrite"):
        _train(tmp_path / "out")
    _train(tmp_path / "out", overwrite=True)
    with pytest.raises(ConvrewriteError, match="a model is saved there already"):
        _train(tmp_path / "out")


def test_nothing_to_go_on_from_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConvrewriteError, match=r"last: there is no checkpoint to go on from; begin without --resume$"):
        _train(tmp_path / "out", resume=True)


def _other_plan() -> Any:
    rules = {**RULES, "rules": [{**RULES["rules"][0], "replace": {"block": "acmix", "heads": 2, "window": 3}}]}
    return cr.rewrite(Residual(), rules, example=SHAPE).model


def _other_weights() -> Any:
    model = rewritten()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": _other_plan}, "the checkpoint is of another plan; begin without --resume"),
        ({"model": _other_weights}, "the run began with other weights"),
        ({"data": lambda: images(48)}, r"other images \(TensorDataset: 32 and 8 images, now TensorDataset: 38 and 10"),
        ({"lr": 0.5}, "the run began with lr 0.001, now 0.5; give the same settings"),
        ({"purpose": cr.distill}, r"of another command \(finetune, now distill\)"),
        ({"imitate": 0.5}, "the run began with another original to imitate"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = _stopped(tmp_path / "out", 2)
    change = dict(change)
    function: Any = change.pop("purpose", cr.finetune)
    model, data = change.pop("model", rewritten)(), change.pop("data", images)()
    with pytest.raises(ConvrewriteError, match=message) as error:
        function(model, data, out=out, resume=True, **{**QUICK, "steps": 6, "checkpoint_every": 1, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, file: str) -> None:
    out = _stopped(tmp_path / "out", 2)
    path = tmp_path / "out.training" / "last" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConvrewriteError, match=f"{file}: the checkpoint is damaged"):
        _train(out, resume=True)


def test_the_optimizer_s_file_is_read_without_unpickling_objects(tmp_path: Path) -> None:
    _stopped(tmp_path / "out", 2)
    state = torch.load(tmp_path / "out.training" / "last" / "optimizer.pt", weights_only=True)
    assert {"exp_avg", "exp_avg_sq", "step"} == set(state["optimizer"]["state"][0])


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("torch.save", OSError(errno.ENOSPC, "No space left on device")),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed")),
        ("convrewrite.training.checkpoints.write_tensors", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    out = _stopped(tmp_path / "out", 3)
    before = json.loads((tmp_path / "out.training" / "last" / "state.json").read_text())["step"]

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(ConvrewriteError, match=r"cannot write: (No space left|\[enforce)") as raised:
            _train(out, resume=True)
        assert "\n" not in str(raised.value)
    assert json.loads((tmp_path / "out.training" / "last" / "state.json").read_text())["step"] == before
    assert equal_states(_train(out, resume=True).model, _train(tmp_path / "whole").model)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_disk_that_really_refuses_is_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from convrewrite.errors import ConvrewriteError; from convrewrite.training import checkpoints as c\n"
        "model = torch.nn.Linear(300, 300); o = torch.optim.AdamW(model.parameters())\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: c.write(Path(sys.argv[1]), c.Parts(model, None, o), c.Standing(), {})\n"
        "except ConvrewriteError as error: print(error)\n"
    )
    arguments = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "last")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "last: cannot write: " in done.stdout
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_digest_sees_every_value() -> None:
    model = rewritten()
    before = checkpoints.digest_of(model)
    assert checkpoints.digest_of(rewritten()) == before
    with torch.no_grad():
        list(model.buffers())[-1].add_(1)
    assert checkpoints.digest_of(model) != before
