"""`convrewrite bench rewrite`: time of inspect, plan and rewrite beside plain tracing and copying, in turn."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from convrewrite.pipeline import PLANNING, REWRITING, PassManager, Work, example_of, inspect, rule_files
from convrewrite.sources import resolve


def measure(name: str, rules: str, runs: int) -> list[dict[str, Any]]:
    """One row a step: seconds (median), and ratio to `symbolic_trace` and `deepcopy` of the same model."""
    source = resolve(name)
    model, files = source.model, rule_files(rules)

    def base() -> None:
        torch.fx.symbolic_trace(model)
        copy.deepcopy(model)

    def work() -> Work:
        return Work(model, example_of(model, source.example), name, files)

    steps: dict[str, Callable[[], Any]] = {
        "inspect": lambda: inspect(model, example=source.example),
        "plan": lambda: PassManager(PLANNING).run(work()),
        "rewrite without verify": lambda: PassManager([p for p in REWRITING if p.name != "verify"]).run(work()),
    }
    return [{"model": source.name, "step": step, **_row(base, function, runs)} for step, function in steps.items()]


def _row(base: Callable[[], Any], function: Callable[[], Any], runs: int) -> dict[str, float]:
    pairs = [(_time(base), _time(function)) for _ in range(runs + 1)][1:]
    ratios = [b / a for a, b in pairs]
    return {
        "seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def _time(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
