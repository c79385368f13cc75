"""What a benchmark returns: pure data, and JSON of it."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convrewrite.bench.targets import Verdict
from convrewrite.bench.timing import Spread

CONV = "conv3x3"


@dataclass(frozen=True)
class Comparison:
    """One thing measured against another in the same rounds.

    Attributes:
        subject: a contender ("outlook", "non_local/dot_product"), or a model.
        place: "64@56" (channels @ side), or the model's input.
        mode: "eager" or "compiled". backend: "auto", or the one that was forced.
        measure: "forward", "forward+backward", "inference", "training step", or one of them with "memory " before.
        against: "conv3x3", "original", or a baseline; kind: "conv3x3", "original", "peer" or "plain".
        ours, theirs: medians, in seconds or bytes.
        ratio: of ours / theirs, of each round; of memory, whose peak does not vary, one number.
    """

    subject: str
    place: str
    mode: str
    backend: str
    measure: str
    against: str
    kind: str
    ours: float
    theirs: float
    ratio: Spread

    @property
    def median(self) -> float:
        return self.ratio.median


@dataclass(frozen=True)
class About:
    """How a result was obtained."""

    command: str
    device: str
    threads: int
    torch: str
    batch: int
    rounds: int
    clock: str


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome; `left_out` says what was not measured, and why."""

    about: About
    comparisons: tuple[Comparison, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
