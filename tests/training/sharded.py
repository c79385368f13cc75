"""Trains with spread parameters and with whole ones: ``torchrun --nproc-per-node 2 -m tests.training.sharded FOLDER``.

Prints JSON: the losses of both, the shares that a process held, and whether a run that was interrupted ended with the
weights of one that was not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import convrewrite as cr
from convrewrite.training import sharding
from convrewrite.training.loop import Loop

from .tiny import QUICK, images, rewritten

SETTINGS = {**QUICK, "batch_size": 4, "steps": 6, "device": "cpu", "checkpoint_every": 1, "augment": "none"}
STOP = 4


class _StoppedError(Exception):
    """In all processes at once, after the step before `STOP` was saved."""


@contextmanager
def noting_shares(into: list[float]) -> Iterator[None]:
    """After each step, the share of the parameters and of the optimizer's moments that lies in this process."""
    taken = Loop._step

    def step(loop: Loop, *args: Any) -> Any:
        row = taken(loop, *args)
        moments = [state["exp_avg"] for state in loop.optimizer.state.values()]
        parameters: list[Any] = list(loop.model.parameters())
        for tensors in (parameters, moments):
            assert all(isinstance(tensor, DTensor) for tensor in tensors)
            into.append(sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors))
        return row

    with mock.patch.object(Loop, "_step", step):
        yield


def interrupted(run: Any, out: Path) -> Any:
    """A run that is stopped at step `STOP`, and gone on from the step before."""
    logged = Loop._log

    def stop(loop: Loop, row: dict[str, Any]) -> None:
        logged(loop, row)
        if row["step"] == STOP:
            raise _StoppedError

    with mock.patch.object(Loop, "_log", stop):
        try:
            run(rewritten(), images(), shard=True, out=out, **SETTINGS)
        except _StoppedError:
            dist.barrier()
    return run(rewritten(), images(), shard=True, out=out, resume=True, **SETTINGS)


def losses(trained: Any) -> list[float]:
    return [row["loss"] for row in trained.history if "loss" in row]


def main(folder: Path) -> dict[str, Any]:
    """Both purposes, with the whole model as one unit and with every child of a sequence as its own."""
    found: dict[str, Any] = {"shares": []}
    for purpose, run in (("finetune", cr.finetune), ("distill", cr.distill)):
        whole = run(rewritten(), images(), **SETTINGS)
        with noting_shares(found["shares"]):
            spread = run(rewritten(), images(), shard=True, out=folder / purpose, **SETTINGS)
        again = interrupted(run, folder / f"{purpose}-again")
        state, saved = spread.model.state_dict(), cr.load(folder / purpose).state_dict()
        rerun = again.model.state_dict()
        found[purpose] = {
            "losses": [losses(whole), losses(spread)],
            "resumed": all(torch.equal(value, rerun[name]) for name, value in state.items()),
            "saved": all(torch.equal(value, saved[name]) for name, value in state.items()),
        }
    with mock.patch.object(sharding, "LEAST", 1):
        spread = cr.finetune(rewritten(), images(), shard=True, **SETTINGS)
    found["units"] = [found["finetune"]["losses"][0], losses(spread)]
    return found


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
