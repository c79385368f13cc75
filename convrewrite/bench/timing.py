"""Times of several functions measured in turn, and the ratios of pairs that ran next to each other.

Machines drift: a ratio of two medians taken minutes apart says little. Here all functions run once a round, and a ratio
is taken within each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
Function = Callable[[], object]

LEAST_SECONDS = 0.005
"""A sample repeats its function until it takes at least this long, so that the clock's own grain does not show."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Quartiles by linear interpolation between the values; of one value, that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


def ratios(ours: list[float], theirs: list[float]) -> Spread:
    """Of ours / theirs, pair by pair: values of the same round stand at the same place."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def alternate(
    functions: Mapping[str, Function], *, rounds: int, device: torch.device, clock: Clock = "wall"
) -> dict[str, list[float]]:
    """Seconds a call of every function, one sample a round; each round begins with another function.

    Args:
        functions: what to time, by name. Each is called once before, to warm up and to see how often a sample calls it.
        clock: "wall", or "cpu": processor time of this process, which other programs on the machine disturb less. It
            adds up over threads, so it is for one thread, and it says nothing about a GPU.
    """
    read = time.perf_counter if clock == "wall" else time.process_time
    names = list(functions)
    calls: dict[str, int] = {}
    for name in names:
        functions[name]()
        seconds = _sample(functions[name], 1, read, device)
        calls[name] = max(1, min(100, round(LEAST_SECONDS / max(seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:
            samples[name].append(_sample(functions[name], calls[name], read, device))
    return samples


def _sample(function: Function, calls: int, read: Callable[[], float], device: torch.device) -> float:
    _wait(device)
    begun = read()
    for _ in range(calls):
        function()
    _wait(device)
    return (read() - begun) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
