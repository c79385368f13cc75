"""The JSON format: the data as it is, for tools. ``docs/report.md`` documents every field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from convrewrite.diffing import Diff
from convrewrite.plans import Plan
from convrewrite.report import REPORTS
from convrewrite.report.sitetable import totals
from convrewrite.reports import Report
from convrewrite.sites import Site


class JsonFormat:
    """JSON, keys sorted, so that two reports can be compared line by line. Always complete."""

    def report(self, report: Report, *, verbose: bool) -> str:
        return _dump(report.to_dict())

    def plan(self, plan: Plan, *, verbose: bool) -> str:
        return plan.to_json() + "\n"

    def sites(self, sites: Sequence[Site]) -> str:
        return _dump({"sites": [s.to_dict() for s in sites], "totals": totals(sites)})

    def diff(self, diff: Diff, *, verbose: bool) -> str:
        return _dump(diff.to_dict())


REPORTS.register("json")(JsonFormat())


def _dump(data: Any) -> str:
    return json.dumps(_finite(data), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, and a broken model drifts by just these: they become "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
