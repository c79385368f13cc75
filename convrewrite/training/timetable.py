"""When what happens in a run: phases, learning rate and annealing as functions of the step. No state of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convrewrite.training.settings import Purpose, Settings


@dataclass(frozen=True)
class Timetable:
    """One run of `total` optimizer steps.

    Attributes:
        per_epoch: steps between two measurements.
        blocks_end: steps before it train block by block. new_end: those before it the new parts alone.
        fade: steps after `blocks_end` over which the blends anneal; None if they do not.
        warmup: steps with rising learning rate.
    """

    total: int
    per_epoch: int
    blocks_end: int
    new_end: int
    fade: int | None
    warmup: int

    def phase(self, step: int) -> str:
        """ "blocks", "new" or "all", of the step that follows `step` finished ones."""
        return "blocks" if step < self.blocks_end else "new" if step < self.new_end else "all"

    def rate(self, step: int) -> float:
        """Factor of the learning rates: linear warm-up, then half a cosine down to 0 (Loshchilov & Hutter 2017)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return (1 + math.cos(math.pi * (step - self.warmup) / max(self.total - self.warmup, 1))) / 2

    @property
    def taken_over(self) -> int | None:
        """Finished steps at which the blocks have taken over from their convolutions; None if they do not."""
        return None if self.fade is None else self.blocks_end + self.fade

    def measures(self, step: int) -> bool:
        """Whether to measure after `step` finished steps."""
        return step == self.total or step % self.per_epoch == 0


def timetable(settings: Settings, purpose: Purpose, batches: int, *, blockwise: bool) -> Timetable:
    """The timetable of a run.

    Args:
        batches: of one epoch, in one process.
        blockwise: whether there are blocks with a convolution to imitate.
    """
    per_epoch = max(batches // settings.accumulate, 1)
    total = settings.steps or settings.epochs * per_epoch
    blocks_end = round(settings.blocks_first * total) if purpose == "distill" and blockwise else 0
    new_end = min(blocks_end + round(settings.new_first * total), total)
    fade = max(round(settings.anneal * total) - blocks_end, 0) if settings.anneal else None
    return Timetable(total, min(per_epoch, total), blocks_end, new_end, fade, round(settings.warmup * total))
