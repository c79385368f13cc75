"""`convrewrite bench recovery`: accuracy against training steps, from each start of each block, on a small network."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.bench.fits import accuracy, mnist, small_resnet
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.pipeline import rewrite
from convrewrite.ruleschema import Rule
from convrewrite.training.annealing import Annealer
from convrewrite.training.groups import param_groups
from convrewrite.training.timetable import Timetable

Digits = tuple[Tensor, Tensor]

WARMUP = 0.05
NEW_RATE = 10.0
FADE = 0.5
MARKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Shares of the steps after which the accuracy is measured, besides step 0."""

TEST_NOISE = 20_000
"""Seed of the noise on the test images: the same for every run."""


@dataclass(frozen=True)
class Entry:
    """A block with options, and those starts of it that keep the weights."""

    block: str
    options: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[str, ...] = ("fitted",)


ENTRIES = (
    Entry("acmix", {"heads": 4, "window": 3}),
    Entry("sasa_wide", {}, ("exact",)),
    Entry("sasa", {"heads": 4, "window": 3}),
    Entry("aa_conv", {"heads": 2, "upsilon": 0.25, "min_key_dim": 8, "outputs": "chosen"}),
    Entry("outlook", {"heads": 4}),
    Entry("gpsa", {}, ("exact",)),
    Entry("outlook_wide", {}, ("exact",)),
)
"""A window of 3 sees what the convolution saw."""


@dataclass(frozen=True)
class Study:
    """What is run; rows of different studies are not mixed.

    Attributes:
        steps: of every run. original_steps: of the training of the original that all runs of a seed begin with.
        train, test: images to train on, and others to test on, of the 5,000. shrink: an image is averaged over squares
            of this side, and becomes 28 // shrink pixels wide. noise: deviation of the noise on every image.
        width: channels of the network's first stage; the others have two and four times as many.
        lr: of carried and fitted parameters; new ones have ten times that.
        calibrate: images that fitted starts see.
    """

    steps: int = 100
    original_steps: int = 400
    train: int = 2000
    test: int = 1000
    batch: int = 32
    shrink: int = 3
    noise: float = 0.15
    width: int = 8
    lr: float = 1e-3
    calibrate: int = 128

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an image of the digits."""
        return (1, 1, 28 // self.shrink, 28 // self.shrink)


@dataclass(frozen=True)
class Run:
    """One line of the results: a block ("" for the original), how it started, a seed."""

    block: str
    condition: str
    seed: int


def runs(entries: tuple[Entry, ...], seeds: int) -> Iterator[Run]:
    """All runs, seed by seed, so that a study that was stopped early has whole seeds."""
    for seed in range(seeds):
        yield Run("", "original", seed)
        for entry in entries:
            for condition in ("random", *entry.starts, "scratch"):
                yield Run(entry.block, condition, seed)


def study(
    setting: Study,
    seeds: int,
    rows: Path,
    *,
    entries: tuple[Entry, ...] = ENTRIES,
    data: Digits | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Do the runs that `rows` does not have yet, and write each there as it is done.

    Args:
        rows: a file of JSON lines, first the settings, then a row for each run. data: (images, labels) in place of
            the digits, (N, 1, 28, 28) and (N,).

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
        if run in done:
            continue
        digits = digits or prepared(data)
        if run.seed not in originals:
            say(f"original of seed {run.seed}")
            originals = {run.seed: trained_original(setting, digits, run.seed)}
        began = time.perf_counter()
        entry = next((e for e in entries if e.block == run.block), None)
        points, params = _measured(setting, digits, originals[run.seed], run, entry)
        row = {**asdict(run), "points": points, "params": params, "seconds": round(time.perf_counter() - began, 1)}
        found.append(row)
        write(rows, setting, entries, found)
        at = f"{points[0][1]:.1%} at step 0, {points[-1][1]:.1%} at {points[-1][0]}"
        say(f"{run.block or 'original'}, {run.condition}, seed {run.seed}: {at}, {row['seconds']:.0f} s")
    return found


def prepared(data: Digits | None = None) -> Digits:
    """All digits, (N, 1, 28, 28) between 0 and 1, and their labels, in an order that is always the same."""
    if data is not None:
        return data
    train, test = mnist()
    return torch.cat([train[0], test[0]]), torch.cat([train[1], test[1]])


def trained_original(setting: Study, digits: Digits, seed: int) -> nn.Module:
    """The network that every run of a seed starts from: small_resnet, trained from scratch."""
    torch.manual_seed(seed)
    model = small_resnet(setting.width)
    steps = setting.original_steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    model.train()
    for images, labels in batches(setting, digits, seed + 1000, steps):
        _backward(model, images, labels)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def batches(setting: Study, digits: Digits, seed: int, steps: int) -> Iterator[Digits]:
    """Training batches (B, 1, side, side): shifted by up to two pixels, shrunk, with fresh noise; drawn by the seed."""
    images, labels = digits[0][: setting.train], digits[1][: setting.train]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < setting.batch:
            order += torch.randperm(len(images), generator=generator).tolist()
        index, order = order[: setting.batch], order[setting.batch :]
        down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
        yield _noisy(images[index].roll((down, right), (2, 3)), setting, generator), labels[index]


def test_set(setting: Study, digits: Digits) -> Digits:
    """The images that no run is trained on, with noise that is always the same."""
    generator = torch.Generator().manual_seed(TEST_NOISE)
    images, labels = (part[setting.train : setting.train + setting.test] for part in digits)
    return _noisy(images, setting, generator), labels


def _noisy(images: Tensor, setting: Study, generator: torch.Generator) -> Tensor:
    small = F.avg_pool2d(images, setting.shrink)
    return small + setting.noise * torch.randn(small.shape, generator=generator)


def _measured(
    setting: Study, digits: Digits, original: nn.Module, run: Run, entry: Entry | None
) -> tuple[list[tuple[int, float]], int]:
    """((step, accuracy) at each mark, parameters at the end) of one run."""
    model = begun(setting, digits, original, run, entry)
    torch.manual_seed(run.seed)
    scratch = run.condition == "scratch"
    rate = setting.lr * (NEW_RATE if scratch else 1.0)
    groups = param_groups(model, lr=rate, new_multiplier=1.0 if scratch else NEW_RATE)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    table = Timetable(setting.steps, setting.steps, 0, 0, None, round(WARMUP * setting.steps))
    annealer = Annealer(model, round(FADE * setting.steps))
    test, marks = test_set(setting, digits), marks_of(setting.steps)
    points = [(0, accuracy(model, *test))]
    for step, (images, labels) in enumerate(batches(setting, digits, run.seed, setting.steps)):
        model.train()
        _backward(model, images, labels)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * table.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        annealer.step()
        if step + 1 in marks:
            points.append((step + 1, accuracy(model, *test)))
    return points, sum(p.numel() for p in model.parameters())


def begun(setting: Study, digits: Digits, original: nn.Module, run: Run, entry: Entry | None) -> nn.Module:
    """The network of a run at step 0."""
    if entry is None:
        return copy.deepcopy(original)
    if run.condition == "scratch":
        torch.manual_seed(run.seed + 1)
        original = small_resnet(setting.width)
    images: Tensor | None = None
    if run.condition == "fitted":
        few = replace(setting, batch=setting.calibrate)
        images = next(batches(few, digits, run.seed + 2000, 1))[0]
    start = run.condition if run.condition in entry.starts else "fresh"
    match = {"kernel": 3, "stride": 1, "in_channels": ">1"}
    rule = Rule(id="all", match=match, replace={"block": entry.block, **entry.options}, start=start)
    return rewrite(
        original,
        rule,
        example=setting.shape,
        seed=run.seed,
        calibrate=images,
        calibrate_images=setting.calibrate,
        force=True,
    ).model


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]


def marks_of(steps: int) -> list[int]:
    """After how many steps the accuracy is measured, besides 0."""
    return sorted({max(1, round(share * steps)) for share in MARKS})


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
        other = [e.block for e in entries or () if head["blocks"].get(e.block, _plain(e)) != _plain(e)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvrewriteError("not a file of recovery runs", where=str(rows), fix="give another --out") from error
    if not same or other:
        raise ConvrewriteError("holds runs of other settings", where=str(rows), fix="give another --out")
    return found


def write(rows: Path, setting: Study, entries: tuple[Entry, ...], found: list[dict[str, Any]]) -> None:
    """Write all rows, whole or not at all."""
    blocks = {entry.block: _plain(entry) for entry in entries}
    if rows.is_file():
        blocks = {**json.loads(rows.read_text("utf-8").splitlines()[0])["blocks"], **blocks}
    lines = [json.dumps(item) for item in ({"study": asdict(setting), "blocks": blocks}, *found)]
    temporary = rows.with_name(f".{rows.name}.saving-{os.getpid()}")
    try:
        rows.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, rows)
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(rows)) from error


def _plain(entry: Entry) -> dict[str, Any]:
    return {"options": dict(entry.options), "starts": list(entry.starts)}
