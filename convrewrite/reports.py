"""The report: all that happened in one rewrite, as data; `convrewrite.report` makes it readable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from convrewrite.plans import Plan
from convrewrite.sites import Site

SCHEMA = 1
Fate = Literal["carried", "absorbed", "new", "dropped"]


@dataclass(frozen=True)
class TensorFate:
    """What became of one tensor of the state dict.

    Attributes:
        name: key in the rewritten model; for a dropped tensor its key in the original.
        source: key in the original, "" for a new tensor.
        fate: carried (same values), absorbed (its values live on inside others), new, or dropped.
        numel: elements. norm: L2 norm (0 where it has no values, e.g. on the meta device).
        parameter: True for a parameter, False for a buffer.
        edit: id of the edit that touched it, "" if none.
    """

    name: str
    source: str
    fate: Fate
    numel: int
    norm: float
    parameter: bool
    edit: str = ""


@dataclass(frozen=True)
class LawResult:
    """One law of `verify`: held, broken, or not applicable (with the reason in `detail`)."""

    law: str
    status: Literal["held", "broken", "skipped"]
    detail: str
    value: float | None = None


@dataclass(frozen=True)
class Drift:
    """How far the rewritten model's output is from the original's at start, in one mode.

    Attributes:
        mode: "eval" or "train".
        max_relative: max |new - old| / max |old|. cosine: of the flattened outputs.
        agreement: share of samples with the same top-1; None where the output is not (N, classes).
    """

    mode: str
    max_relative: float
    cosine: float
    agreement: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything about one rewrite. `timings` are seconds per pass, in order."""

    plan: Plan
    sites: tuple[Site, ...]
    tensors: tuple[TensorFate, ...] = ()
    laws: tuple[LawResult, ...] = ()
    drift: tuple[Drift, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    forced: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if no law is broken."""
        return not any(law.status == "broken" for law in self.laws)

    def carried(self) -> dict[str, dict[str, float]]:
        """Per fate: number of tensors, of elements, and the L2 norm over all of them."""
        sums: dict[str, dict[str, float]] = {}
        for t in self.tensors:
            entry = sums.setdefault(t.fate, {"tensors": 0, "elements": 0, "norm": 0.0})
            entry["tensors"] += 1
            entry["elements"] += t.numel
            entry["norm"] = (entry["norm"] ** 2 + t.norm**2) ** 0.5
        return sums

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, schema in ``docs/report.md``."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "forced": self.forced,
            "plan": self.plan.to_dict(),
            "sites": [s.to_dict() for s in self.sites],
            "tensors": [asdict(t) for t in self.tensors],
            "fates": self.carried(),
            "laws": [asdict(law) for law in self.laws],
            "drift": [asdict(d) for d in self.drift],
            "timings": dict(self.timings),
            "notes": list(self.notes),
        }
