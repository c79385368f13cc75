"""The table of a model's convolutions, as `inspect` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from convrewrite.report import figures
from convrewrite.report.document import Document, Section, Table, table
from convrewrite.sites import ROLES, Site

_HEADERS = (
    "site",
    "role",
    "part",
    "stage.block",
    "kernel",
    "stride",
    "groups",
    "dilation",
    "channels",
    "size",
    "params",
    "FLOPs",
)


def site_table(sites: Sequence[Site]) -> Table:
    """One row per call of a convolution, in the order of execution."""
    rewritten = any(s.rewritten for s in sites)
    headers = (*_HEADERS, "rewritten by") if rewritten else _HEADERS
    rows = [_row(s) + ((figures.plain(s.rewritten),) if rewritten else ()) for s in sites]
    tones = ["replaced" if s.rewritten else "" for s in sites]
    return table(headers, rows, "llll" + "r" * 4 + "ll" + "rr" + ("l" if rewritten else ""), tones)


def _row(site: Site) -> tuple[str, ...]:
    return (
        figures.plain(site.id),
        site.role,
        site.part or "",
        figures.place(site),
        figures.shape(site.kernel) if site.op == "conv2d" else site.op,
        figures.pair(site.stride),
        str(site.groups),
        figures.pair(site.dilation),
        figures.channels(site),
        figures.sizes(site),
        figures.count(site.params),
        figures.count(site.flops),
    )


def totals(sites: Sequence[Site]) -> dict[str, Any]:
    """Number of sites, their parameters (a shared module once), FLOPs and the number in each role."""
    roles = Counter(s.role for s in sites)
    order = [*ROLES, *sorted(set(roles) - set(ROLES))]
    return {
        "sites": len(sites),
        "params": sum({s.path: s.params for s in sites}.values()),
        "flops": sum(s.flops for s in sites),
        "roles": {role: roles[role] for role in order if roles[role]},
    }


def totals_line(sites: Sequence[Site]) -> str:
    """ "53 convolutions (1 stem, 16 bottleneck_spatial, ...), params 23.45M, FLOPs 8.17G (2 per multiply-add)"."""
    sums = totals(sites)
    roles = ", ".join(f"{number} {figures.plain(role)}" for role, number in sums["roles"].items())
    return (
        f"{figures.plural(len(sites), 'convolution')}{f' ({roles})' if roles else ''}, "
        f"params {figures.total(sums['params'])}, FLOPs {figures.total(sums['flops'])} (2 per multiply-add)"
        f"{_out_of_scope(sites)}"
    )


def _out_of_scope(sites: Sequence[Site]) -> str:
    """ "; out of scope: 20 conv3d, for only conv2d is rewritten", or nothing."""
    others = Counter(s.op for s in sites if s.op != "conv2d")
    counted = ", ".join(f"{number} {op}" for op, number in sorted(others.items()))
    return f"; out of scope: {counted}, for only conv2d is rewritten" if counted else ""


def sites_document(sites: Sequence[Site]) -> Document:
    """The page of `inspect`."""
    return Document("Convolutions", (), (Section("", table=site_table(sites)),), totals_line(sites))
