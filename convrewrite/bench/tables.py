"""A benchmark's result as Markdown: who ran what where, tables of ratios, and the marks against the targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from convrewrite.bench.results import CONV, About, Comparison, Result
from convrewrite.bench.targets import ANY_PEER, BOTH, FORWARD, MEMORY, Target, Verdict

MIB = 2**20
WHOLE = ("inference", "training step")
"""Measures of whole networks, for which images a second are given too."""

HEADERS = ("at", "mode", "measure", "against", "ours", "theirs", "ratio (quartiles)", "MiB", "theirs", "ratio")


SUMMARY = (
    "Training is forward and backward. Under x conv and the training beside it, times in units of a 3 x 3 convolution "
    "of as many channels; MiB is the peak of training; the columns after a form are ours / that form's."
)


def markdown(result: Result) -> str:
    """The whole result. A ratio is ours / theirs: below 1 ours is faster, or takes less memory."""
    parts = [_about(result.about)]
    if any(c.against == CONV for c in result.comparisons):
        parts.append(_summary(result.comparisons))
    for subject in dict.fromkeys(c.subject for c in result.comparisons):
        rows = _rows([c for c in result.comparisons if c.subject == subject], result.about.batch)
        parts.append(f"### {subject}\n\n{_table(HEADERS, rows)}")
    if result.verdicts:
        parts.append("### Targets\n\n" + verdicts(result.verdicts))
    if result.left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in result.left_out))
    return "\n\n".join(parts) + "\n"


def _summary(comparisons: Sequence[Comparison]) -> str:
    """A line for each contender and form: medians alone, in units of the convolution and of the other form."""
    headers = ("what", "at", "mode", "x conv", "training", "MiB", "against", "forward", "training", "memory")
    ratios = {(*_who(c), c.against, c.measure): c for c in comparisons}
    rows = []
    for who in dict.fromkeys(_who(c) for c in comparisons):
        others = [c.against for c in comparisons if _who(c) == who and c.measure == FORWARD and c.against != CONV]
        conv = [ratio_text(ratios[*who, CONV, measure].median) for measure in (FORWARD, BOTH)]
        peak = f"{ratios[*who, CONV, MEMORY].ours / MIB:.1f}"
        mode = who[2] if who[3] == "auto" else f"{who[2]}, {who[3]}"
        for other in others or [""]:
            found = [ratio_text(ratios[*who, other, m].median) if other else "" for m in (FORWARD, BOTH, MEMORY)]
            rows.append((who[0], who[1], mode, *conv, peak, other, *found))
    return _table(headers, rows) + "\n\n" + SUMMARY


def _who(c: Comparison) -> tuple[str, str, str, str]:
    return c.subject, c.place, c.mode, c.backend


def _about(about: About) -> str:
    clock = "processor time" if about.clock == "cpu" else "wall time"
    threads = f"{about.threads} thread" + ("s" if about.threads > 1 else "")
    return (
        f"`{about.command}`\n\n{about.device}; {threads}; torch {about.torch}; batch {about.batch}; "
        f"{clock}; median and quartiles of {about.rounds} rounds in which all run in turn. Ratios are ours / theirs."
    )


def _rows(comparisons: Sequence[Comparison], batch: int) -> list[tuple[str, ...]]:
    """A row for each pair of a time and the peak of memory that goes with it."""
    peaks = {_key(c, c.measure.removeprefix("memory ")): c for c in comparisons if c.measure.startswith("memory ")}
    return [_row(c, peaks[_key(c, c.measure)], batch) for c in comparisons if not c.measure.startswith("memory ")]


def _key(c: Comparison, measure: str) -> tuple[str, ...]:
    return c.place, c.mode, c.backend, measure, c.against


def _row(c: Comparison, peak: Comparison, batch: int) -> tuple[str, ...]:
    mode = c.mode if c.backend == "auto" else f"{c.mode}, {c.backend}"
    spread = f"{ratio_text(c.ratio.median)} ({ratio_text(c.ratio.low)} to {ratio_text(c.ratio.high)})"
    memory = f"{peak.ours / MIB:.1f}", f"{peak.theirs / MIB:.1f}", ratio_text(peak.ratio.median)
    images = c.measure in WHOLE
    times = (_time(seconds, batch if images else None) for seconds in (c.ours, c.theirs))
    return c.place, mode, c.measure, c.against, *times, spread, *memory


def _time(seconds: float, batch: int | None) -> str:
    text = f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
    return text if batch is None else f"{text}, {batch / seconds:.1f} images/s"


def ratio_text(value: float) -> str:
    """Three digits that count: 0.0312, 0.31, 3.1, 31."""
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def verdicts(found: Sequence[Verdict]) -> str:
    """A line for each target: at most so much, found so much, pass or falls short."""
    headers = ("what", "at", "mode", "measure", "against", "at most", "found", "mark")
    return _table(headers, [_verdict(v) for v in found])


def _verdict(v: Verdict) -> tuple[str, ...]:
    t: Target = v.target
    found = "" if v.found is None else ratio_text(v.found)
    against = f"{t.against}, the worst" if t.against == ANY_PEER else t.against
    return t.subject, t.place, t.mode, t.measure, against, ratio_text(t.limit), found, v.mark


def _table(headers: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    from tabulate import tabulate

    return str(tabulate(rows, headers=tuple(headers), tablefmt="github", disable_numparse=True))
