"""`convrewrite bench`: how long inspect, plan and rewrite take, next to plain tracing and copying."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
from convrewrite.cli.common import clean_errors, put


@click.group(name="bench")
def command() -> None:
    """Benchmarks; alternating runs, medians of ratios."""


@command.command()
@click.argument("models", nargs=-1)
@click.option(
    "--rules", default="acmix", show_default=True, metavar="FILE", help="Rule file, or the name of a built-in one."
)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Timed runs, after one to warm up.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@clean_errors
def rewrite(models: tuple[str, ...], rules: str, runs: int, as_json: bool) -> None:
    """Time inspect, plan and rewrite against symbolic_trace + deepcopy of the same model, in turn."""
    from tabulate import tabulate

    rows = [row for name in models or ("resnet50", "regnet_y_128gf") for row in _measure(name, rules, runs)]
    if as_json:
        put(json.dumps(rows, indent=1), None)
        return
    shown = [
        (r["model"], r["step"], f"{r['seconds']:.3f}", f"{r['ratio']:.2f}", f"{r['low']:.2f}..{r['high']:.2f}")
        for r in rows
    ]
    headers = ("model", "step", "seconds", "x trace+copy", "spread")
    click.echo(tabulate(shown, headers=headers))


def _measure(name: str, rules: str, runs: int) -> list[dict[str, Any]]:
    import copy

    import torch

    from convrewrite.pipeline import PLANNING, PassManager, Work, example_of, inspect, rule_files
    from convrewrite.sources import resolve

    source = resolve(name)
    model = source.model

    def base() -> None:
        torch.fx.symbolic_trace(model)
        copy.deepcopy(model)

    files = rule_files(rules)

    def work() -> Work:
        return Work(model, example_of(model, source.example), name, files)

    def edited() -> None:
        from convrewrite.pipeline import REWRITING

        PassManager([p for p in REWRITING if p.name != "verify"]).run(work())

    steps: dict[str, Callable[[], Any]] = {
        "inspect": lambda: inspect(model, example=source.example),
        "plan": lambda: PassManager(PLANNING).run(work()),
        "rewrite without verify": edited,
    }
    found = []
    for step, function in steps.items():
        pairs = [(_time(base), _time(function)) for _ in range(runs + 1)][1:]
        ratios = [b / a for a, b in pairs]
        seconds = statistics.median(b for _, b in pairs)
        found.append(
            {
                "model": source.name,
                "step": step,
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
        )
    return found


def _time(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
