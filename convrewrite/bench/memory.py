"""Peak memory of one call: the most bytes alive at once beyond what was there before it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak of a call of `function`, which has been called before (what a first call sets up does not count).

    On CPU from the profiler's memory events (the process's resident size says nothing: freed memory stays with it); on
    a GPU from the caching allocator. What a native kernel allocates by itself is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns of what it is about to change, by version
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
            function()
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    events = results.events() if results is not None else []
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return highest([change for _, change in sorted(changes, key=lambda pair: pair[0])])


def highest(changes: list[int]) -> int:
    """The highest running sum, at least 0."""
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak
