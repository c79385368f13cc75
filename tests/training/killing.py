"""Kills training at random moments and goes on: ``python -m tests.training.killing COMMAND KILLS SEED FOLDER``.

Prints JSON: for each kill the step reached, and whether the final folder equals, byte for byte, that of a run
that was never interrupted. A process of its own, so that it can fork without threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import convrewrite as cr

from .tiny import QUICK, images, rewritten

SETTINGS = {**QUICK, "steps": 6, "checkpoint_every": 1, "ema": 0.9, "accumulate": 2, "mixup": 0.2}
RESULT = ("model.safetensors", "recipe.json", "plan.json", "history.csv", "training.json")


def train(command: str, out: Path, *, resume: bool) -> None:
    """One whole run, or the rest of one."""
    function: Any = {"finetune": cr.finetune, "distill": cr.distill}[command]
    # theseus and dropout draw random numbers in every step
    function(rewritten(), images(), out=out, resume=resume, overwrite=not resume, theseus=True, **SETTINGS)


def child(command: str, out: Path, *, resume: bool) -> int:
    """Train in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        train(command, out, resume=resume)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def step_of(out: Path) -> int:
    """Step of the checkpoint; -1 before the first one."""
    state = out.with_name(f"{out.name}.training") / "last" / "state.json"
    return int(json.loads(state.read_text())["step"]) if state.is_file() else -1


def main(command: str, kills: int, seed: int, folder: Path) -> None:
    """Run, kill, go on, compare, `kills` times; several of these may fall on one run.

    Many kills get longer runs, so that they find more moments than the one before the first checkpoint.
    """
    SETTINGS["steps"] = 6 if kills < 10 else 24
    torch.set_num_threads(1)
    rewritten()  # before the forks, so that none of them has to do it
    whole = folder / "whole"
    begun = time.monotonic()
    assert wait(child(command, whole, resume=False)) == 0
    seconds = time.monotonic() - begun
    draw = random.Random(seed)
    found = []
    while len(found) < kills:
        out = folder / f"killed{len(found)}"
        steps, resume = [], False
        for _ in range(draw.randint(1, 3)):
            pid = child(command, out, resume=resume)
            time.sleep(draw.uniform(0.05, 0.95) * seconds)
            os.kill(pid, signal.SIGKILL)
            died = wait(pid) == -signal.SIGKILL
            steps.append(step_of(out))
            resume = steps[-1] >= 0
            if not died:
                break  # it was done before
        assert wait(child(command, out, resume=resume)) == 0
        same = all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULT)
        left = [path.name for path in out.parent.glob(f".{out.name}*")]
        found += [{"step": step, "same": same, "left": left} for step in steps]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
