"""`convrewrite bench recovery`: accuracy against training steps, from each start of each block, on a small network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrewrite.atomic import write_text
from convrewrite.bench.fits import mnist
from convrewrite.bench.recovery_setting import ENTRIES, Entry, Run, Study
from convrewrite.bench.recovery_training import Digits, begun, trained, trained_original
from convrewrite.errors import ConvrewriteError


def runs(entries: tuple[Entry, ...], seeds: int) -> Iterator[Run]:
    """All runs, seed by seed, so that a study that was stopped early has whole seeds."""
    for seed in range(seeds):
        yield Run("", "original", seed)
        for entry in entries:
            for condition in ("random", *entry.starts, "scratch"):
                yield Run(entry.name, condition, seed)


def study(
    setting: Study,
    seeds: int,
    rows: Path,
    *,
    entries: tuple[Entry, ...] = ENTRIES,
    conditions: tuple[str, ...] = (),
    data: Digits | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Do the runs that `rows` does not have yet, and write each there as it is done.

    Args:
        rows: a file of JSON lines, first the settings, then a row for each run. conditions: only these; all by default.
        data: (images, labels) in place of the digits, (N, 1, 28, 28) and (N,).

    Returns:
        The rows, also those of earlier calls.

    Raises:
        ConvrewriteError: the file holds rows of another study, or the digits are not installed.
    """
    found = read(rows, setting, entries)
    done = {Run(row["block"], row["condition"], row["seed"]) for row in found}
    digits: Digits | None = None
    originals: dict[int, nn.Module] = {}
    for run in runs(entries, seeds):
        if run in done or (conditions and run.condition not in conditions):
            continue
        digits = digits or prepared(data)
        if run.seed not in originals:
            say(f"original of seed {run.seed}")
            originals = {run.seed: trained_original(setting, digits, run.seed)}
        began = time.perf_counter()
        entry = next((e for e in entries if e.name == run.block), None)
        model = begun(setting, digits, originals[run.seed], run, entry)
        course = trained(setting, digits, model, originals[run.seed], run)
        row = {**asdict(run), **asdict(course), "seconds": round(time.perf_counter() - began, 1)}
        found.append(row)
        write(rows, setting, entries, found)
        at = f"{course.points[0][1]:.1%} at step 0, {course.points[-1][1]:.1%} at {course.points[-1][0]}"
        say(f"{run.block or 'original'}, {run.condition}, seed {run.seed}: {at}, {row['seconds']:.0f} s")
    return found


def prepared(data: Digits | None = None) -> Digits:
    """All digits, (N, 1, 28, 28) between 0 and 1, and their labels, in an order that is always the same."""
    if data is not None:
        return data
    train, test = mnist()
    return torch.cat([train[0], test[0]]), torch.cat([train[1], test[1]])


def read(rows: Path, setting: Study | None = None, entries: tuple[Entry, ...] | None = None) -> list[dict[str, Any]]:
    """The rows of a file, none if it is not there.

    Raises:
        ConvrewriteError: it is no such file, or holds rows of other settings.
    """
    if not rows.is_file():
        return []
    try:
        head, *found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
        same = setting is None or head["study"] == asdict(setting)
        other = [e.name for e in entries or () if head["blocks"].get(e.name, _plain(e)) != _plain(e)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvrewriteError("not a file of recovery runs", where=str(rows), fix="give another --out") from error
    if not same or other:
        raise ConvrewriteError("holds runs of other settings", where=str(rows), fix="give another --out")
    return found


def write(rows: Path, setting: Study, entries: tuple[Entry, ...], found: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    blocks = {entry.name: _plain(entry) for entry in entries}
    if rows.is_file():
        blocks = {**json.loads(rows.read_text("utf-8").splitlines()[0])["blocks"], **blocks}
    lines = [json.dumps(item) for item in ({"study": asdict(setting), "blocks": blocks}, *found)]
    write_text(rows, "\n".join(lines) + "\n")


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "block": entry.block,
        "options": dict(entry.options),
        "starts": list(entry.starts),
        "insert": entry.insert,
    }
