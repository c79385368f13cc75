"""The way of all blends from convolution to block: one number from 0 to 1 that a training loop steps."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of

Schedule = Literal["linear", "cosine"]


class Annealer:
    """Moves ``anneal`` of every `Blend` of `model` from where it is (0 at first) to 1 over `steps` calls of `step()`.

    Step it after ``optimizer.step()``. It touches buffers only and draws no random numbers, so it fits any loop,
    under DistributedDataParallel too. A model without blends is left alone.

    Args:
        steps: calls of `step` until the blocks have taken over; 0 takes over at once.
        schedule: "linear", or "cosine" (slow at both ends).
        delay: calls before the way begins.
        theseus: training draws conv or block at random, the block with the annealed probability, instead of
            mixing the two (Xu et al. 2020, arXiv 2002.02925).

    Example:
        >>> annealer = Annealer(model, steps=1000)  # doctest: +SKIP
        >>> for images, labels in batches:  # doctest: +SKIP
        ...     ...  # forward, backward, optimizer.step()
        ...     annealer.step()
        >>> model = convrewrite.finalize(model)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, steps: int, schedule: Schedule = "linear", *, delay: int = 0, theseus: bool = False
    ) -> None:
        if steps < 0 or delay < 0:
            raise ConvrewriteError(f"annealing over {steps} steps after {delay} is not possible", fix="give 0 or more")
        if schedule not in ("linear", "cosine"):
            raise ConvrewriteError(f"unknown schedule '{schedule}'", fix="linear or cosine")
        self.blends = tuple(blends_of(model).values())
        self.steps, self.schedule, self.delay = steps, schedule, delay
        self.count = 0
        self._starts = tuple(float(blend.anneal) for blend in self.blends)
        for blend in self.blends:
            blend.draws = theseus
        self.set(0)

    @property
    def value(self) -> float:
        """The least ``anneal`` of the blends now, in [0, 1]; exactly 1 at the end."""
        return self._from(min(self._starts, default=0.0))

    def _from(self, start: float) -> float:
        """Where a blend is now that began at `start`."""
        share = anneal_at(self.count - self.delay, self.steps, self.schedule)
        return 1.0 if share == 1.0 else start + (1 - start) * share

    @property
    def done(self) -> bool:
        """Whether the blocks have taken over."""
        return self.value == 1.0

    def step(self) -> float:
        """One step on; returns the new `value`."""
        return self.set(self.count + 1)

    def set(self, count: int) -> float:
        """Be where `count` steps lead; returns the new `value`."""
        self.count = count
        for blend, start in zip(self.blends, self._starts, strict=True):
            blend.anneal.fill_(self._from(start))
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Where it is; the schedule itself comes from the constructor."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be where `state_dict` was taken."""
        self.set(int(state["count"]))


def anneal_at(step: int, steps: int, schedule: Schedule) -> float:
    """The schedule: 0 at step 0 (or before), exactly 1 from step `steps` on."""
    if step >= steps:
        return 1.0
    if step <= 0:
        return 0.0
    share = step / steps
    return share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
