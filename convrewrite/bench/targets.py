"""What the blocks should reach, and whether numbers reach it. Printed by the benchmark, never asserted by a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Mark = Literal["pass", "falls short", "not measured"]

ANY_PEER = "every peer"


@dataclass(frozen=True)
class Target:
    """``ours / theirs`` is to be at most `limit`.

    Attributes:
        subject, place, measure: as in `Comparison`; mode: "eager", "compiled", or "native" (a native kernel forced).
        against: "conv3x3", the name of a baseline, or "every peer": then the worst ratio counts.
    """

    subject: str
    place: str
    mode: str
    measure: str
    against: str
    limit: float


@dataclass(frozen=True)
class Verdict:
    """A target, the ratio found, and the mark."""

    target: Target
    found: float | None
    mark: Mark


class Compared(Protocol):
    """The part of a `Comparison` that a target looks at."""

    @property
    def subject(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def measure(self) -> str: ...
    @property
    def against(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def median(self) -> float: ...


PLACES = ("64@56", "128@28", "256@14", "512@7")
FORWARD, BOTH, MEMORY = "forward", "forward+backward", "memory forward+backward"
NETWORK = ("inference", "training step")


def _series(
    subject: str, mode: str, measure: str, against: str, limits: Sequence[float], places: Sequence[str] = PLACES
) -> list[Target]:
    return [Target(subject, place, mode, measure, against, limit) for place, limit in zip(places, limits, strict=False)]


def _never_slower(subject: str) -> list[Target]:
    return [t for measure in (FORWARD, BOTH) for t in _series(subject, "eager", measure, ANY_PEER, (1, 1, 1, 1))]


def _network(rules: str, *others: str) -> list[Target]:
    """A rewritten ResNet-50: eight times as fast as each of the others, in a fifth of the memory."""
    limits = {f"{memory}{measure}": limit for measure in NETWORK for memory, limit in (("", 1 / 8), ("memory ", 1 / 5))}
    return [
        Target(f"resnet50 with {rules}", "3x224x224", "eager", measure, other, limit)
        for other in others
        for measure, limit in limits.items()
    ]


TARGETS: tuple[Target, ...] = (
    *_series("acmix", "eager", FORWARD, "LeapLabTHU/ACmix", (1 / 14, 1 / 16, 1 / 18, 1 / 13)),
    *_series("acmix", "eager", BOTH, "LeapLabTHU/ACmix", (1 / 9, 1 / 10, 1 / 11, 1 / 10)),
    *_series("acmix", "eager", MEMORY, "LeapLabTHU/ACmix", (1 / 8, 1 / 8, 1 / 8, 1 / 8)),
    *_series("acmix", "native", FORWARD, "LeapLabTHU/ACmix", (1 / 24,)),
    *_series("acmix", "native", BOTH, "LeapLabTHU/ACmix", (1 / 15,)),
    *_series("acmix", "compiled", FORWARD, "LeapLabTHU/ACmix", (1 / 24,)),
    *_series("acmix", "compiled", BOTH, "LeapLabTHU/ACmix", (1 / 15,)),
    *_series("sasa", "native", FORWARD, "conv3x3", (2.2, 1.6, 1.1, 0.9)),
    *_series("sasa", "native", BOTH, "conv3x3", (2.6, 1.6, 1.1, 0.95)),
    *_series("sasa", "compiled", FORWARD, "conv3x3", (7.9, 2.1, 1.1, 0.9)),
    *_series("sasa", "compiled", BOTH, "conv3x3", (5.9, 2.0, 1.1, 0.95)),
    *_series("sasa", "eager", FORWARD, "unfold", (0.2, 0.2, 0.2, 0.2)),
    *_series("sasa", "eager", BOTH, "unfold", (0.2, 0.2, 0.2, 0.2)),
    *_series("sasa", "native", MEMORY, "unfold", (0.1, 0.1, 0.1, 0.1)),
    *_series("outlook", "eager", FORWARD, "conv3x3", (3.2,)),
    *_series("outlook", "eager", BOTH, "conv3x3", (3.3,)),
    *_series("outlook", "compiled", FORWARD, "conv3x3", (2.0,)),
    *_series("outlook", "compiled", BOTH, "conv3x3", (2.1,)),
    *_never_slower("outlook"),
    *_series("aa_conv", "eager", FORWARD, "leaderj1001/Attention-Augmented-Conv2d", (0.2, 0.3)),
    *_series("aa_conv", "eager", BOTH, "leaderj1001/Attention-Augmented-Conv2d", (0.35, 0.45)),
    *_series("aa_conv", "eager", MEMORY, "leaderj1001/Attention-Augmented-Conv2d", (1 / 30,)),
    *_never_slower("criss_cross"),
    *_never_slower("non_local/embedded_gaussian"),
    *_never_slower("non_local/gaussian"),
    *_never_slower("non_local/dot_product"),
    *_never_slower("non_local/concatenation"),
    *_never_slower("position_attention"),
    *_never_slower("channel_attention"),
    *_series("non_local/dot_product", "eager", FORWARD, "AlexHex7/Non-local_pytorch", (1 / 25,)),
    *_series("non_local/concatenation", "eager", FORWARD, "AlexHex7/Non-local_pytorch", (1 / 25,), ("128@28",)),
    *_network("acmix", "LeapLabTHU/ACmix"),
    *_network("sasa", "MerHS/SASA-pytorch", "unfold"),
)


def judge(comparisons: Sequence[Compared], targets: Sequence[Target] = TARGETS) -> tuple[Verdict, ...]:
    """A verdict for every target whose subject was measured at its place."""
    seen = {(c.subject, c.place) for c in comparisons}
    return tuple(_verdict(t, comparisons) for t in targets if (t.subject, t.place) in seen)


def _verdict(target: Target, comparisons: Sequence[Compared]) -> Verdict:
    found = [c.median for c in comparisons if _about(target, c)]
    if not found:
        return Verdict(target, None, "not measured")
    worst = max(found)
    return Verdict(target, worst, "pass" if worst <= target.limit else "falls short")


def _about(target: Target, compared: Compared) -> bool:
    mode, backends = ("eager", {"native"}) if target.mode == "native" else (target.mode, {"auto"})
    if target.mode == "eager":
        backends = backends | {"aten"}  # forced where a native kernel is there too
    against = compared.kind == "peer" if target.against == ANY_PEER else compared.against == target.against
    return (
        (compared.subject, compared.place, compared.measure) == (target.subject, target.place, target.measure)
        and compared.mode == mode
        and compared.backend in backends
        and against
    )
