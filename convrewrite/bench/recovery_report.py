"""What the rows of `bench recovery` say: steps to the original's accuracy, as a Markdown table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convrewrite.errors import ConvrewriteError, StoreError

Row = dict[str, Any]
Points = list[tuple[int, float]]

STYLES = {
    "original": ("original, trained on", "#000000", "-"),
    "exact": ("convrewrite's start: exact", "#0072B2", "-"),
    "fitted": ("convrewrite's start: fitted", "#009E73", "-."),
    "random": ("random attention, rest carried", "#D55E00", "--"),
    "scratch": ("everything random", "#999999", ":"),
}
"""Label, colour (of Okabe and Ito's palette) and line of each condition; told apart without colour too."""

EQUAL = 1e-9
"""Means that differ by less are the same: one image in a thousand differs by 1e-3."""

ORDER = ("exact", "fitted", "random", "scratch")


@dataclass(frozen=True)
class Summary:
    """One block and condition over its seeds.

    Attributes:
        reached: for each seed the first measured step from which on the accuracy never was below the original's at
            step 0 by more than the noise; None if there was none.
        begin, lowest, end: means over the seeds of the accuracy at step 0, of each run's lowest, and at the end.
        spread: standard deviation of the accuracy at the end over the seeds; 0 of a single one.
        original: mean accuracy of the originals at step 0, over the same seeds.
    """

    block: str
    condition: str
    reached: tuple[int | None, ...]
    begin: float
    lowest: float
    end: float
    spread: float
    original: float


def reached(points: Points, level: float) -> int | None:
    """The first measured step from which on the accuracy never is below `level`, or None."""
    found = None
    for step, accuracy in reversed(points):
        if accuracy < level:
            break
        found = step
    return found


def median_step(steps: Sequence[int | None]) -> float | None:
    """Median over seeds; None (never reached) counts as more than any step."""
    ordered = sorted(steps, key=lambda s: float("inf") if s is None else s)
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    known = [s for s in middle if s is not None]
    return statistics.fmean(known) if len(known) == len(middle) else None


def summaries(rows: Sequence[Row], images: int) -> Iterator[Summary]:
    """Of every block and condition, the originals' first.

    Args:
        images: tested on; the noise is the binomial standard deviation of the original's accuracy on that many.
    """
    originals = {row["seed"]: row["points"][0][1] for row in rows if row["condition"] == "original"}
    keys = dict.fromkeys((row["block"], row["condition"]) for row in rows)
    for block, condition in sorted(keys, key=lambda key: (key[0], ("original", *ORDER).index(key[1]))):
        mine = [r for r in rows if (r["block"], r["condition"]) == (block, condition) and r["seed"] in originals]
        if not mine:
            continue
        levels = {seed: accuracy - noise_of(accuracy, images) for seed, accuracy in originals.items()}
        ends = [row["points"][-1][1] for row in mine]
        yield Summary(
            block,
            condition,
            tuple(reached(row["points"], levels[row["seed"]]) for row in mine),
            statistics.fmean(row["points"][0][1] for row in mine),
            statistics.fmean(min(a for _, a in row["points"]) for row in mine),
            statistics.fmean(ends),
            statistics.stdev(ends) if len(ends) > 1 else 0.0,
            statistics.fmean(originals[row["seed"]] for row in mine),
        )


def noise_of(accuracy: float, images: int) -> float:
    """Standard deviation of an accuracy that is measured on so many images (binomial)."""
    return float((accuracy * (1 - accuracy) / images) ** 0.5)


def markdown(rows: Sequence[Row], images: int) -> str:
    """The table, a line for each block and condition."""
    header = "| block | start | at step 0 | lowest | at the end | over seeds | steps to the original's accuracy |"
    lines = [header, "|---|---|---|---|---|---|---|"]
    last = max((row["points"][-1][0] for row in rows), default=0)
    for s in summaries(rows, images):
        middle = median_step(s.reached)
        steps = f"more than {last}" if middle is None else f"{middle:g}"
        seeds = ", ".join("-" if step is None else str(step) for step in s.reached)
        name = f"`{s.block}`" if s.block else "the original"
        start = "trained on" if s.condition == "original" else s.condition
        spread = f"±{100 * s.spread:.1f}" if len(s.reached) > 1 else "one seed"
        shares = f"{s.begin:.1%} | {s.lowest:.1%} | {s.end:.1%} | {spread}"
        lines.append(f"| {name} | {start} | {shares} | {steps} ({seeds}) |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """One start of one block against random attention and against the original.

    Attributes:
        steps, random: median steps to the original's accuracy, None if it was not reached in the steps of the run.
        alone: the step from which on no convolution is left beside the blocks.
        tenth: whether `steps` is at most a tenth of `random`, or of all steps where random attention did not arrive.
        end, original, trained: mean accuracy at the end; of the original as it was, and trained on for as long.
    """

    block: str
    condition: str
    steps: float | None
    random: float | None
    alone: int
    tenth: bool
    end: float
    original: float
    trained: float


def verdicts(rows: Sequence[Row], images: int) -> Iterator[Verdict]:
    """Of every start that keeps the weights, where random attention was run too."""
    total = max((row["points"][-1][0] for row in rows), default=0)
    found = {(s.block, s.condition): s for s in summaries(rows, images)}
    for (block, condition), start in found.items():
        random = found.get((block, "random"))
        if condition in ("original", "random", "scratch") or random is None:
            continue
        seeds = [r["seed"] for r in rows if (r["block"], r["condition"]) == (block, condition)]
        on = [r["points"][-1][1] for r in rows if r["condition"] == "original" and r["seed"] in seeds]
        steps, others = median_step(start.reached), median_step(random.reached)
        limit = (total if others is None else others) / 10
        alone = next(r.get("alone", 0) for r in rows if (r["block"], r["condition"]) == (block, condition))
        tenth = steps is not None and steps <= limit
        yield Verdict(block, condition, steps, others, alone, tenth, start.end, start.original, statistics.fmean(on))


def verdict_table(rows: Sequence[Row], images: int) -> str:
    """The criteria as Markdown, a line for each start."""
    total = max((row["points"][-1][0] for row in rows), default=0)
    lines = [
        "| block | start | steps | random | a tenth? | last convolution goes at | at the end | original | trained on "
        "| at or above? |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in verdicts(rows, images):
        steps, random = (f"more than {total}" if n is None else f"{n:g}" for n in (v.steps, v.random))
        shares = f"{v.end:.1%} | {v.original:.1%} | {v.trained:.1%}"
        tenth, above = ("yes" if held else "no" for held in (v.tenth, v.end >= v.original - EQUAL))
        lines.append(f"| `{v.block}` | {v.condition} | {steps} | {random} | {tenth} | {v.alone} | {shares} | {above} |")
    return "\n".join(lines)


def conclusion(rows: Sequence[Row], images: int) -> str:
    """How many blocks meet each criterion, and which, each by the best of its starts; Markdown, two paragraphs."""
    found = list(verdicts(rows, images))
    best = {v.block: max((o for o in found if o.block == v.block), key=lambda o: o.end - o.original) for v in found}
    soon = [block for block in best if any(v.tenth for v in found if v.block == block)]
    gaps = {block: v.end - v.original for block, v in best.items()}
    noise = {block: noise_of(v.original, images) for block, v in best.items()}
    above = [block for block, gap in gaps.items() if gap >= -EQUAL]
    near = [block for block, gap in gaps.items() if -noise[block] <= gap < -EQUAL]
    below = [block for block in best if block not in above and block not in near]
    late = [block for block in best if block not in soon]
    first = f"At the original's accuracy in a tenth of the steps of random attention: {_names(soon, best)}."
    second = f"At the end at or above the original: {_names(above, best)}."
    third = f"Below by less than the noise: {_names(near)}. Below by more: {_names(below)}."
    return f"{first} Not: {_names(late)}.\n\n{second} {third}"


def _names(blocks: Sequence[str], of: Mapping[str, object] | None = None) -> str:
    count = f"{len(blocks)} of {len(of)} blocks, " if of is not None else ""
    return count + (", ".join(f"`{block}`" for block in blocks) or "none")


def picture(rows: Sequence[Row], path: Path) -> None:
    """A panel for each block: accuracy against steps, mean and range over the seeds, as PNG.

    Raises:
        ConvrewriteError: matplotlib is not installed. StoreError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install 'convrewrite[train]'"
        raise ConvrewriteError("the picture needs matplotlib, which is not installed", fix=fix) from None
    blocks = sorted({row["block"] for row in rows} - {""})
    if not blocks:
        raise ConvrewriteError("there are no runs to draw yet", where=str(path))
    columns = min(len(blocks), 3)
    lines = -(-len(blocks) // columns)
    figure = Figure(figsize=(1 + 3.4 * columns, 0.9 + 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _panel(axes, block, rows, handles)
        if number > len(blocks) - columns:
            axes.set_xlabel("optimizer steps (log from 1 on)")
        if number % columns == 1 or columns == 1:
            axes.set_ylabel("accuracy (log of error)")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), columns + 1))
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(path)) from error


def _panel(axes: Any, block: str, rows: Sequence[Row], handles: dict[str, Any]) -> None:
    """Errors on a log axis that is labelled with accuracies: chance and the last percent are both to be seen."""
    axes.set_title(block)
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yscale("log")
    for condition, (label, colour, line) in STYLES.items():
        owner = "" if condition == "original" else block
        mine = [row["points"] for row in rows if (row["block"], row["condition"]) == (owner, condition)]
        if not mine:
            continue
        steps = [step for step, _ in mine[0]]
        errors = [[max(1 - points[i][1], 1e-4) for points in mine] for i in range(len(steps))]
        means = [statistics.fmean(e) for e in errors]
        (handle,) = axes.plot(steps, means, line, color=colour, marker="o", markersize=2.5)
        axes.fill_between(steps, [min(e) for e in errors], [max(e) for e in errors], color=colour, alpha=0.18, lw=0)
        handles.setdefault(label, handle)
    started = [1 - row["points"][0][1] for row in rows if row["condition"] == "original"]
    if started:
        axes.axhline(statistics.fmean(started), color="#000000", lw=0.7, alpha=0.6)
    ticks = [a for a in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99) if 1 - a >= axes.get_ylim()[0]]
    axes.set_yticks([1 - a for a in ticks], [f"{a:.0%}" for a in ticks])
    axes.set_yticks([], minor=True)
    axes.invert_yaxis()
    last = max(row["points"][-1][0] for row in rows)
    marks = [0, *(m for m in (1, 3, 10, 30, 100, 300, 1000, 3000) if m <= last)]
    axes.set_xticks(marks, [str(m) for m in marks])
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, alpha=0.25)
