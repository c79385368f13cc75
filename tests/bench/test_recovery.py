"""The recovery study runs what it says, goes on where it stopped, and counts steps as defined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.bench_command import command
from torch import Tensor, nn

from convrewrite.bench import recovery
from convrewrite.bench.fits import small_resnet
from convrewrite.bench.recovery import read, runs, study
from convrewrite.bench.recovery_report import (
    conclusion,
    markdown,
    median_step,
    noise_of,
    picture,
    reached,
    summaries,
    verdict_table,
    verdicts,
)
from convrewrite.bench.recovery_setting import ENTRIES, Entry, Run, Study
from convrewrite.bench.recovery_training import batches, begun, marks_of, recipe
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.training.settings import settings_from
from convrewrite.training.solving import is_solved

TINY = Study(steps=2, original_steps=1, train=16, test=8, batch=8, shrink=4, width=4)
WIDE = Entry("sasa_wide", {}, ("exact",))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Not digits: noise, with labels 0 to 9."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(24, 1, 28, 28, generator=generator), torch.arange(24) % 10


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(3)
    return small_resnet(4).eval()


@pytest.mark.parametrize(
    ("accuracies", "first"),
    [
        ([0.9, 0.9, 0.9], 0),
        ([0.1, 0.8, 0.9], 20),
        ([0.9, 0.8, 0.9], 20),  # it was there, and fell below again
        ([0.1, 0.85, 0.9], 10),  # the level itself counts
        ([0.9, 0.9, 0.8], None),
    ],
)
def test_the_accuracy_is_reached_when_it_never_falls_below_again(accuracies: list[float], first: int | None) -> None:
    assert reached(list(zip((0, 10, 20), accuracies, strict=True)), 0.85) == first


@pytest.mark.parametrize(
    ("steps", "middle"),
    [((5, 0, 9), 5), ((5, None, 9), 9), ((None, None, 9), None), ((4, 8), 6), ((4, None), None), ((7,), 7)],
)
def test_a_seed_that_never_got_there_counts_as_the_slowest(steps: tuple[int | None, ...], middle: float | None) -> None:
    assert median_step(steps) == middle


def test_noise_is_the_binomial_deviation() -> None:
    assert noise_of(0.9, 900) == pytest.approx(0.01)


def test_runs_come_seed_by_seed_and_the_original_once() -> None:
    conditions = [(r.block, r.condition) for r in runs((WIDE, Entry("sasa")), 2)]
    wide = [("sasa_wide", "random"), ("sasa_wide", "exact"), ("sasa_wide", "scratch")]
    one = [("", "original"), *wide, ("sasa", "random"), ("sasa", "fitted"), ("sasa", "scratch")]
    assert conditions == one * 2


def test_every_run_of_a_seed_sees_the_same_batches(digits: tuple[Tensor, Tensor]) -> None:
    first, again, other = (list(batches(TINY, digits, seed, 3)) for seed in (5, 5, 6))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert first[0][0].shape == (8, 1, 7, 7)
    assert {int(label) for _, labels in first for label in labels} <= set(digits[1][: TINY.train].tolist())


def test_an_exact_start_is_the_original_and_holds_no_convolution_there(original: nn.Module) -> None:
    model = begun(TINY, (torch.empty(0), torch.empty(0)), original, Run("sasa_wide", "exact", 0), WIDE).eval()
    x = torch.randn(4, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    left = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(left) == 3  # the stem and the two of stride 2


def test_random_attention_carries_the_rest_and_scratch_carries_nothing(original: nn.Module) -> None:
    none = (torch.empty(0), torch.empty(0))
    random, scratch = (
        begun(TINY, none, original, Run("sasa_wide", name, 0), WIDE).state_dict() for name in ("random", "scratch")
    )
    old = original.state_dict()
    shared = [key for key in old if key in random]
    assert len(shared) == len(old) - 6 and all(torch.equal(old[key], random[key]) for key in shared)
    drawn = [key for key in shared if key.endswith("weight") and old[key].dim() > 1]
    assert len(drawn) >= 6 and not any(torch.equal(old[key], scratch[key]) for key in drawn)
    assert random.keys() == scratch.keys()


def test_a_study_that_was_stopped_goes_on_to_the_same_rows(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    rows = tmp_path / "runs.jsonl"
    first = study(TINY, 1, rows, entries=(WIDE,), data=digits)
    assert [row["condition"] for row in first] == ["original", "random", "exact", "scratch"]
    assert all([step for step, _ in row["points"]] == [0, 1, 2] for row in first)
    rows.write_text("\n".join(rows.read_text("utf-8").splitlines()[:-2]) + "\n", "utf-8")
    said: list[str] = []
    again = study(TINY, 1, rows, entries=(WIDE,), data=digits, say=said.append)
    assert len(said) == 3  # the original is trained again, for two runs
    assert timeless(again) == timeless(first) == timeless(read(rows))
    study(TINY, 1, rows, entries=(WIDE,), data=digits, say=said.append)
    assert len(said) == 3


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    marks = ("points", "last")
    return [{**row, "seconds": 0, **{key: [tuple(point) for point in row[key]] for key in marks}} for row in rows]


def test_rows_of_another_study_are_not_added_to(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    rows = tmp_path / "runs.jsonl"
    recovery.write(rows, TINY, (WIDE,), [])
    with pytest.raises(ConvrewriteError, match="holds runs of other settings"):
        study(Study(), 1, rows, data=digits)
    with pytest.raises(ConvrewriteError, match="holds runs of other settings"):
        study(TINY, 1, rows, entries=(Entry("sasa_wide", {"window": 5}, ("exact",)),), data=digits)
    rows.write_text("no json\n", "utf-8")
    with pytest.raises(ConvrewriteError, match="not a file of recovery runs"):
        read(rows)


ROWS = [
    {"block": "", "condition": "original", "seed": 0, "points": [[0, 0.9], [10, 0.92]]},
    {"block": "", "condition": "original", "seed": 1, "points": [[0, 0.8], [10, 0.90]]},
    {"block": "b", "condition": "random", "seed": 0, "points": [[0, 0.1], [10, 0.89]]},
    {"block": "b", "condition": "random", "seed": 1, "points": [[0, 0.3], [10, 0.70]]},
    {"block": "b", "condition": "exact", "seed": 0, "points": [[0, 0.9], [10, 0.93]]},
]


def test_the_table_compares_each_seed_with_its_own_original() -> None:
    lines = markdown(ROWS, 100).splitlines()  # noise 3 and 4 points: the levels are 87 % and 76 %
    assert "| `b` | random | 20.0% | 20.0% | 79.5% | ±13.4 | more than 10 (10, -) |" in lines
    assert "| `b` | exact | 90.0% | 90.0% | 93.0% | one seed | 0 (0) |" in lines
    assert [(s.block, s.condition, s.original) for s in summaries(ROWS, 100)][1:] == [
        ("b", "exact", 0.9),
        ("b", "random", pytest.approx(0.85)),
    ]


def test_the_picture_is_a_png_and_needs_runs(tmp_path: Path) -> None:
    picture(ROWS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConvrewriteError, match="no runs to draw yet"):
        picture([], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("start", "other", "held"),
    [(0, None, True), (1, None, True), (2, None, False), (1, 10, True), (2, 10, False), (None, None, False)],
)
def test_a_tenth_is_of_random_attention_s_steps_or_of_all_if_it_did_not_arrive(
    start: int | None, other: int | None, held: bool
) -> None:
    def row(condition: str, first: int | None) -> dict[str, Any]:
        points = [[step, 0.9 if first is not None and step >= first else 0.1] for step in (0, 1, 2, 10)]
        return {"block": "b", "condition": condition, "seed": 0, "points": points, "alone": 5}

    rows = [{**row("original", 0), "block": ""}, row("random", other), row("exact", start), row("scratch", 0)]
    (found,) = verdicts(rows, 100)
    assert (found.block, found.condition, found.steps, found.random) == ("b", "exact", start, other)
    assert found.tenth == held
    assert (found.alone, found.original, found.trained) == (5, 0.9, 0.9)
    assert f"| {'yes' if held else 'no'} | 5 | " in verdict_table(rows, 100)


def test_the_conclusion_counts_blocks_by_the_best_of_their_starts() -> None:
    def row(block: str, condition: str, first: float, end: float) -> dict[str, Any]:
        return {"block": block, "condition": condition, "seed": 0, "points": [[0, first], [10, end]], "alone": 0}

    rows = [row("", "original", 0.9, 0.9), *(row(block, "random", 0.1, 0.5) for block in ("good", "near", "poor"))]
    rows += [row("good", "exact", 0.5, 0.6), row("good", "fitted", 0.9, 0.9), row("near", "exact", 0.89, 0.88)]
    rows.append(row("poor", "exact", 0.9, 0.86))  # the noise is 3 points
    first, second = conclusion(rows, 100).split("\n\n")
    assert first.endswith("2 of 3 blocks, `good`, `near`. Not: `poor`.")
    assert "above the original: 1 of 3 blocks, `good`. Below by less than the noise: `near`." in second
    assert second.endswith("Below by more: `poor`.")


def test_convrewrite_s_recipe_is_the_defaults_and_random_attention_sees_labels_alone() -> None:
    ours, random = (recipe(Study(), name) for name in ("exact", "random"))
    defaults = settings_from({"steps": 150, "lr": 3e-4, "imitate": 1.0, "smoothing": 0.0, "solve": 128})
    assert ours == defaults == recipe(Study(), "original")
    assert (random.imitate, random.lr) == (0.0, 3e-3)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.insert], ids=lambda entry: entry.name)
def test_inserted_blocks_start_as_nothing_and_take_part_where_random(original: nn.Module, entry: Entry) -> None:
    none = (torch.empty(0), torch.empty(0))
    x = torch.randn(4, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    exact, random = (begun(TINY, none, original, Run(entry.name, c, 0), entry).eval() for c in ("exact", "random"))
    with torch.no_grad():
        assert torch.equal(exact(x), original(x))
        assert not torch.equal(random(x), original(x))


def test_an_exact_start_beside_its_convolutions_has_solved_blocks(
    original: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    acmix = ENTRIES[0]
    setting = Study(train=24, shrink=4, width=4, calibrate=64)
    many = (digits[0].repeat(4, 1, 1, 1), digits[1].repeat(4))
    model = begun(replace(setting, train=96), many, original, Run("acmix", "exact", 0), acmix)
    blends = blends_of(model)
    assert len(blends) == 6
    assert all(is_solved(blend) for blend in blends.values())


def test_accuracy_is_measured_soon_and_at_the_end() -> None:
    assert marks_of(100) == [1, 2, 5, 10, 20, 35, 50, 65, 80, 100]
    assert marks_of(1) == [1]


def test_an_unknown_block_is_one_line_with_the_closest_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["recovery", "--out", str(tmp_path), "--block", "sasa_wid"])
    assert result.exit_code == 1 and "unknown block 'sasa_wid'" in result.output and "sasa_wide" in result.output
    assert len(result.output.splitlines()) == 1
