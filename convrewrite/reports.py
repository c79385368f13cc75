"""The report: all that happened in one rewrite, as data; `convrewrite.report` makes it readable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from convrewrite.plans import Plan
from convrewrite.sites import Site

SCHEMA = 1
Fate = Literal["carried", "re-estimated", "absorbed", "new", "dropped"]


@dataclass(frozen=True)
class TensorFate:
    """What became of one tensor of the state dict.

    Attributes:
        name: key in the rewritten model; for a dropped tensor its key in the original.
        source: key in the original, "" for a new tensor.
        fate: carried (same values), re-estimated (a batch norm's statistics, measured again on calibration images),
            absorbed (its values live on inside others), new, or dropped.
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
class SiteFit:
    """How well one block was fitted to its convolution.

    NMSE is the mean square difference from the original's output there, as a share of that output's variance.

    Attributes:
        edit: the edit's id. block: its name.
        nmse_free: what the fit without images expected, from a prior on natural images; it is no measurement.
        nmse_fit: what the fit on images expects on these images; None without images, as all that follows.
        nmse: measured on the held-out images, the sites before this one being fitted already.
        divergence, agreement: of the whole model from the original on the held-out images, once this site was fitted;
            the mean KL divergence in nats and the share of equal top classes (None where there are no classes).
        covariance: "full", or "marginals" where the full one was beyond the memory budget.
        seconds: spent on this site.
    """

    edit: str
    block: str
    nmse_free: float | None = None
    nmse_fit: float | None = None
    nmse: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    covariance: Literal["full", "marginals", "prior"] = "prior"
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """The best known NMSE: measured, else expected on images, else expected without."""
        known = (self.nmse, self.nmse_fit, self.nmse_free)
        return next((value for value in known if value is not None), None)


@dataclass(frozen=True)
class Calibration:
    """How the fitted edits were fitted, and how close the model is to the original for it.

    Attributes:
        images: fitted on; 0 if there were none. held_out: measured on.
        sites: in the order in which they were fitted.
        divergence, agreement: of the finished model on the held-out images, as in `SiteFit`; None without images.
        norms: "re-estimated" if new batch-norm statistics brought the model closer to the original, "kept" if not,
            "none" if there are none or they were not tried.
        norms_before, norms_after: divergence with the old and with the new statistics.
    """

    images: int
    held_out: int
    seed: int
    sites: tuple[SiteFit, ...]
    divergence: float | None = None
    agreement: float | None = None
    norms: Literal["re-estimated", "kept", "none"] = "none"
    norms_before: float | None = None
    norms_after: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything about one rewrite.

    Attributes:
        timings: seconds per pass, in order.
        calibration: of the fitted edits; None if there are none.
    """

    plan: Plan
    sites: tuple[Site, ...]
    tensors: tuple[TensorFate, ...] = ()
    laws: tuple[LawResult, ...] = ()
    drift: tuple[Drift, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    forced: bool = False
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None

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
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
