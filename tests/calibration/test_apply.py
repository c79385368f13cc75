"""`apply --calibrate`: the folder of images on the command line, its errors, what is saved, and what a kill leaves."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from convrewrite.cli.main import main
from PIL import Image

import convrewrite as cr
from convrewrite.report import REPORTS, render
from convrewrite.report.schema import report_schema
from convrewrite.reports import Report

NET = f"{Path(__file__).parents[1] / 'nets.py'}:Residual"
ARGUMENTS = (NET, "--rules", "acmix", "--set", "heads=2", "--start", "fitted", "--input", "1x3x12x12")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["apply", *map(str, (*ARGUMENTS, *args))])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("photos"), random.Random(0)
    for i in range(12):
        small = Image.new("RGB", (4, 4))
        small.putdata([tuple(chance.randrange(256) for _ in range(3)) for _ in range(16)])
        small.resize((20, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def saved(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    result = run("--calibrate", photos, "--out", out)
    assert result.exit_code == 0, result.output
    fits = result.stdout.partition("\nFits\n")[2]
    assert "9 images fitted on, 3 held out to measure on." in fits
    for path in ("layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "layer2.1.conv2"):  # five measurements each
        assert re.search(rf"^ +{re.escape(path)} +acmix( +\d\S*){{5}}$", fits, re.MULTILINE), fits
    return out


def test_a_calibrated_model_is_loaded_without_its_images_and_fits_nothing_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convrewrite.editing.prior", lambda *args: pytest.fail("a fit at load"))
    model = cr.load(saved)
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values() if t.is_floating_point())
    assert float(model.layer1[0].conv2.rate1.detach()) == 0.0  # type: ignore[index, union-attr, operator, arg-type]


def test_the_saved_reports_tell_of_the_fits_and_follow_the_schema(saved: Path) -> None:
    from jsonschema import validate

    data = json.loads((saved / "report.json").read_text())
    validate(data, report_schema())
    found = data["calibration"]
    assert found["images"] == 9 and found["held_out"] == 3 and len(found["sites"]) == len(data["plan"]["edits"])
    assert all(site["nmse"] > 0 for site in found["sites"])
    for name in ("report.txt", "report.md", "report.html"):
        assert "held out to measure on" in (saved / name).read_text()


def test_every_format_says_that_an_error_without_images_is_no_measurement() -> None:
    from tests.nets import Residual

    report: Report = cr.rewrite(
        Residual(), "acmix", start="fitted", example=(1, 3, 12, 12), overrides={("*", "heads"): 2}
    ).report
    for name in set(REPORTS.names()) - {"json"}:
        text = " ".join(render(report, name).split())
        assert "It is no measurement" in text, name


def test_the_plan_shows_fitted_edits_and_that_the_output_changes() -> None:
    result = CliRunner().invoke(main, ["plan", *ARGUMENTS])
    assert result.exit_code == 0 and "fitted to the conv" in result.stdout
    assert "the output changes at start" in result.stdout


def test_fits_above_max_nmse_fail_with_a_line_each_and_write_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    result = run("--calibrate", photos, "--max-nmse", "1e-9", "--out", out)
    assert result.exit_code == 1 and not out.exists() and list(tmp_path.iterdir()) == []
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 4 and all("fits with NMSE" in line for line in lines)
    assert run("--calibrate", photos, "--max-nmse", "1e-9", "--force").exit_code == 0


@pytest.mark.parametrize("content", ["nothing", "broken", "missing"])
def test_a_bad_folder_is_one_line_and_writes_nothing(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    if content != "missing":
        folder.mkdir()
    if content == "broken":
        (folder / "a.jpg").write_bytes(b"x")
    result = run("--calibrate", folder, "--out", tmp_path / "model")
    assert result.exit_code == 1 and not (tmp_path / "model").exists()
    assert len(result.stderr.strip().splitlines()) == 1 and "photos" in result.stderr


def test_a_block_that_cannot_be_fitted_says_so() -> None:
    result = CliRunner().invoke(main, ["plan", NET, "--rules", "botnet", "--start", "fitted", "--input", "1x3x12x12"])
    assert result.exit_code == 1
    assert "has no fitted start for replace, it cannot be solved from a convolution" in result.stderr


def _killed(kills: int, folder: Path) -> list[dict[str, Any]]:
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, "-W", "error", "-m", "tests.calibration.killing", str(kills), "0", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for (
        kill
    ) in found:  # the old folder or the new one, and where there was none perhaps none; the next run is as the first
        assert kill["left"] == "all" or (kill["left"], kill["stood"]) == ("nothing", False), kill
        assert kill["same"] and not kill["stays"], kill
    return found


def test_a_calibration_that_is_killed_leaves_all_or_nothing_and_is_repeated_to_the_same_bytes(tmp_path: Path) -> None:
    assert len(_killed(2, tmp_path)) == 2


@pytest.mark.slow
def test_thirty_kills_of_a_calibration_leave_all_or_nothing_and_nothing_in_the_way(tmp_path: Path) -> None:
    found = _killed(30, tmp_path)
    assert len(found) == 30
    assert sum(kill["died"] for kill in found) > 20
    assert {kill["stood"] for kill in found if kill["died"]} == {True, False}
    assert any(kill["hidden"] for kill in found)  # some died while the folder was being filled


def test_a_kill_at_any_moment_leaves_nothing_half_written(photos: Path, tmp_path: Path) -> None:
    code = "from convrewrite.cli.main import main; main()"
    out = tmp_path / "model"
    command = [sys.executable, "-c", code, "apply", *ARGUMENTS, "--calibrate", str(photos), "--out", str(out)]
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - begun
    names = sorted(p.name for p in out.iterdir())
    for share in (0.9,):  # each is a process of its own, which is slow to start
        target = tmp_path / f"killed{share}"
        process = subprocess.Popen([*command[:-1], str(target)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists() or sorted(p.name for p in target.iterdir()) == names
        if target.exists():
            cr.load(target)
