"""Kills `apply --calibrate` at random moments: ``python -m tests.calibration.killing KILLS SEED FOLDER``.

Prints JSON: what each kill left, and whether a run after it gave, byte for byte, what a run that was never interrupted
gave. A process of its own, so that it can fork without threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from convrewrite.cli.main import main as convrewrite
from PIL import Image

import convrewrite as cr

NET = f"{Path(__file__).parents[1] / 'nets.py'}:Residual"
ARGUMENTS = ("apply", NET, "--rules", "acmix", "--set", "heads=2", "--start", "fitted", "--input", "1x3x12x12")
RESULT = ("model.safetensors", "recipe.json", "plan.json")
WRITING = 0.5
"""Share of the kills that wait for the folder that is being filled: a moment that chance alone seldom finds."""


def pictures(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    for i in range(20):
        small = Image.new("RGB", (4, 4))
        small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(16)])
        small.resize((20, 16), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def child(photos: Path, out: Path, *, overwrite: bool) -> int:
    """Run the command in a forked process, without a word; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        arguments = [*ARGUMENTS, "--calibrate", str(photos), "--out", str(out)]
        convrewrite([*arguments, *(["--overwrite"] if overwrite else [])], standalone_mode=False)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def hidden(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.*"))


def kill(pid: int, out: Path, moment: float, *, writing: bool) -> bool:
    """Kill after `moment` seconds, or, once the folder is being filled, after a hundredth of that."""
    begun = time.monotonic()
    old = set(hidden(out))
    while writing and set(hidden(out)) <= old and time.monotonic() - begun < 60 and not ended(pid):
        time.sleep(0.0005)
    time.sleep(moment / 100 if writing else moment)
    os.kill(pid, signal.SIGKILL)  # a process that has ended stays known until it is waited for
    return wait(pid) == -signal.SIGKILL


def left(out: Path, names: list[str]) -> str:
    """What there is: "nothing", "all" or "half"; "all" was loaded."""
    if not out.exists():
        return "nothing"
    if sorted(path.name for path in out.iterdir()) != names:
        return "half"
    cr.load(out)
    return "all"


def main(kills: int, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    photos, whole = pictures(folder / "photos"), folder / "whole"
    with contextlib.redirect_stdout(io.StringIO()):  # it imports what the forks then have
        convrewrite([*ARGUMENTS, "--calibrate", str(photos)], standalone_mode=False)
    begun = time.monotonic()
    assert wait(child(photos, whole, overwrite=False)) == 0
    seconds = time.monotonic() - begun
    names, draw = sorted(path.name for path in whole.iterdir()), random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < kills:
        out, states = folder / f"killed{len(found)}", []
        if stood := draw.random() < 0.5:
            shutil.copytree(whole, out)
        for _ in range(min(draw.randint(1, 3), kills - len(found))):
            pid = child(photos, out, overwrite=True)
            writing = draw.random() < WRITING
            died = kill(pid, out, draw.uniform(0.05, 0.95) * seconds, writing=writing)
            states.append({"died": died, "stood": stood, "left": left(out, names), "hidden": len(hidden(out))})
            stood = out.exists()
        assert wait(child(photos, out, overwrite=True)) == 0
        same = all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULT)
        found += [{**state, "same": same, "stays": [path.name for path in hidden(out)]} for state in states]
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
