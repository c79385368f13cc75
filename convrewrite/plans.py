"""The plan: which edits a rule file makes on a model and why every other site is left alone. Pure data, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from convrewrite.errors import PlanError
from convrewrite.sites import Cost, Site, _tuples

FORMAT = 1
START = Literal["exact", "fitted", "fresh"]


FITTED = "fitted to the conv"
"""`Edit.how` of an edit whose block is solved from the convolution's weights."""

_NOT_NEAR = ("pick", "claimed", "rewritten", "shared", "op", "budget")


@dataclass(frozen=True)
class Edit:
    """One change at one site.

    Attributes:
        id: unique in the plan: the site's id, for an insertion "site.id after block" and the like.
        rule: id of the rule, "file/rule".
        action: "replace" or "insert".
        at: for an insertion "after" or "before"; "" for a replacement.
        path: the module that is exchanged or wrapped; of a block that stands for a whole residual block, that one.
        block: registry name. options: fully resolved, every option of the block present.
        start: how the edit starts: exact, fitted or fresh.
        how: what makes the start what it is: "blend", "zero gate", "fitted to the conv", ...
        calls: ids of all the sites that this one edit changes (several where a module is shared).
        in_shape, out_shape: of the place the block takes, (N, C, H, W).
        before, after: cost of what stood there and of what will (an insertion has nothing before).
        absorbs: modules after the convolution that the block stands for too; they become the identity.
    """

    id: str
    site: Site
    rule: str
    action: Literal["replace", "insert"]
    at: str
    path: str
    block: str
    options: Mapping[str, Any]
    start: START
    how: str
    calls: tuple[str, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    before: Cost
    after: Cost
    absorbs: tuple[str, ...] = ()

    @property
    def whole_block(self) -> bool:
        """Whether it replaces the residual block that its site lies in, and not the convolution alone."""
        return self.action == "replace" and self.path != self.site.path


@dataclass(frozen=True)
class Refusal:
    """Why one rule leaves one site alone.

    Attributes:
        clause: the first clause that rejected the site ("kernel"); "pick", "claimed", "block",
            "budget" or "rewritten" where the match itself was fine.
        reason: the sentence with the value seen ("kernel 1x1, wanted 3").
        failed: number of clauses that reject it; 1 makes it a near miss.
    """

    site: Site
    rule: str
    clause: str
    reason: str
    failed: int = 1


@dataclass(frozen=True)
class Funnel:
    """How one rule narrows the sites down: (label, sites left) from all convolutions to the edits."""

    rule: str
    steps: tuple[tuple[str, int], ...]
    edits: int


@dataclass(frozen=True)
class Totals:
    """Sums over the whole model before and after. FLOPs = 2 x MACs of convolutions, linears and blocks."""

    params_before: int = 0
    params_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    convs: int = 0


@dataclass(frozen=True)
class Plan:
    """Edits in order, refusals with reasons, funnels and totals.

    Attributes:
        model: how the model was named ("torchvision:resnet50", or its class name).
        fingerprint: hash of the sites and state-dict shapes the plan was made for.
        rules: the rule files as plain data, for replay and for the report.
        input_shape: (N, C, H, W) the plan's costs are for.
        seed: fixes the new blocks' random initialisation.
    """

    model: str
    fingerprint: str
    rules: tuple[Mapping[str, Any], ...]
    input_shape: tuple[int, ...]
    seed: int
    edits: tuple[Edit, ...]
    refused: tuple[Refusal, ...]
    funnels: tuple[Funnel, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 over what the plan does and to which model; not over versions, costs or reasons."""
        return digest(
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "seed": self.seed,
                "edits": [
                    [e.id, e.rule, e.action, e.at, e.path, e.block, dict(e.options), e.start, e.how, list(e.absorbs)]
                    for e in self.edits
                ],
            }
        )

    @property
    def near_misses(self) -> tuple[Refusal, ...]:
        """Sites that one single clause of a rule rejected."""
        return tuple(r for r in self.refused if r.failed == 1 and r.clause not in _NOT_NEAR)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; each site is written once."""
        sites = {e.site.id: e.site for e in self.edits} | {r.site.id: r.site for r in self.refused}
        return {
            "format": FORMAT,
            "hash": self.hash,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "input_shape": list(self.input_shape),
            "seed": self.seed,
            "rules": [dict(r) for r in self.rules],
            "edits": [_with_site_id(e) for e in self.edits],
            "refused": [_with_site_id(r) for r in self.refused],
            "funnels": [asdict(f) for f in self.funnels],
            "totals": asdict(self.totals),
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "sites": {key: site.to_dict() for key, site in sorted(sites.items())},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, *, where: str = "plan") -> Plan:
        """Read what `to_json` wrote; a damaged, edited or foreign plan is a PlanError."""
        try:
            data = json.loads(text)
        except ValueError as error:
            fix = "make it with 'convrewrite plan --out'"
            raise PlanError(f"not a plan: {error}", where=where, fix=fix) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan of format {FORMAT}", where=where, fix="make it with 'convrewrite plan --out'")
        try:
            plan = cls._from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"damaged plan: {error!r}", where=where, fix="make it again") from None
        if plan.hash != data.get("hash"):
            raise PlanError("the plan was changed after it was made", where=where, fix="make it again")
        return plan

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Plan:
        sites = {key: Site.from_dict(value) for key, value in data["sites"].items()}

        def edit(e: dict[str, Any]) -> Edit:
            values = {k: _tuples(v) for k, v in e.items() if k not in ("options", "site")}
            values["before"], values["after"] = Cost(**e["before"]), Cost(**e["after"])
            return Edit(site=sites[e["site"]], options=e["options"], **values)

        return cls(
            model=data["model"],
            fingerprint=data["fingerprint"],
            rules=tuple(data["rules"]),
            input_shape=tuple(data["input_shape"]),
            seed=data["seed"],
            edits=tuple(edit(e) for e in data["edits"]),
            refused=tuple(Refusal(**{**r, "site": sites[r["site"]]}) for r in data["refused"]),
            funnels=tuple(Funnel(f["rule"], _tuples(f["steps"]), f["edits"]) for f in data["funnels"]),
            totals=Totals(**data["totals"]),
            notes=tuple(data["notes"]),
            versions=data["versions"],
        )


def digest(data: Any) -> str:
    """SHA-256 of the canonical JSON of `data`."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _with_site_id(item: Edit | Refusal) -> dict[str, Any]:
    values = {k: getattr(item, k) for k in item.__dataclass_fields__}
    values["site"] = item.site.id
    for key, value in values.items():
        if isinstance(value, Cost):
            values[key] = asdict(value)
        elif isinstance(value, Mapping):
            values[key] = dict(value)
        elif isinstance(value, tuple):
            values[key] = list(value)
    return values
