"""The JSON Schema (2020-12) of the report, for tools; ``docs/report.md`` says what each field means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convrewrite.plans import FORMAT
from convrewrite.reports import SCHEMA
from convrewrite.sites import PARTS, ROLES

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_INT: Schema = {"type": "integer"}
_INT_OR_NULL: Schema = {"type": ["integer", "null"]}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_NUMBER: Schema = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_NUMBER_OR_NULL: Schema = {"anyOf": [*_NUMBER["anyOf"], {"type": "null"}]}


def report_schema() -> Schema:
    """The schema of ``render(report, "json")``; every field is required and no other is allowed."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "convrewrite report",
        **_object(
            {
                "schema": {"enum": [SCHEMA]},
                "ok": _FLAG,
                "forced": _FLAG,
                "plan": _ref("plan"),
                "sites": _list(_ref("site")),
                "tensors": _list(_ref("tensor")),
                "fates": _map(_object({"tensors": _COUNT, "elements": _COUNT, "norm": _NUMBER})),
                "laws": _list(_ref("law")),
                "drift": _list(_ref("drift")),
                "timings": _map(_NUMBER),
                "notes": _list(_TEXT),
                "calibration": {"anyOf": [_ref("calibration"), {"type": "null"}]},
            }
        ),
        "$defs": _definitions(),
    }


def _definitions() -> Schema:
    return {
        "plan": _plan(),
        "edit": _edit(),
        "refusal": _object({"site": _TEXT, "rule": _TEXT, "clause": _TEXT, "reason": _TEXT, "failed": _COUNT}),
        "site": _site(),
        "conv": _conv(),
        "cost": _object({"params": _COUNT, "flops": _COUNT, "act_infer": _COUNT, "act_train": _COUNT}),
        "funnel": _object({"rule": _TEXT, "steps": _list(_pair_of(_TEXT, _COUNT)), "edits": _COUNT}),
        "totals": _object(
            dict.fromkeys(("params_before", "params_after", "flops_before", "flops_after", "convs"), _COUNT)
        ),
        "tensor": _object(
            {
                "name": _TEXT,
                "source": _TEXT,
                "fate": {"enum": ["carried", "re-estimated", "absorbed", "new", "dropped"]},
                "numel": _COUNT,
                "norm": _NUMBER,
                "parameter": _FLAG,
                "edit": _TEXT,
            }
        ),
        "law": _object(
            {"law": _TEXT, "status": {"enum": ["held", "broken", "skipped"]}, "detail": _TEXT, "value": _NUMBER_OR_NULL}
        ),
        "calibration": _calibration(),
        "fit": _fit(),
        "drift": _object({"mode": _TEXT, "max_relative": _NUMBER, "cosine": _NUMBER, "agreement": _NUMBER_OR_NULL}),
    }


def _calibration() -> Schema:
    return _object(
        {
            **dict.fromkeys(("images", "held_out"), _COUNT),
            "seed": _INT,
            "sites": _list(_ref("fit")),
            "norms": {"enum": ["re-estimated", "kept", "none"]},
            **dict.fromkeys(("divergence", "agreement", "norms_before", "norms_after"), _NUMBER_OR_NULL),
        }
    )


def _fit() -> Schema:
    return _object(
        {
            **dict.fromkeys(("edit", "block"), _TEXT),
            **dict.fromkeys(("nmse_free", "nmse_fit", "nmse", "divergence", "agreement"), _NUMBER_OR_NULL),
            "covariance": {"enum": ["full", "marginals", "prior"]},
            "seconds": _NUMBER,
        }
    )


def _plan() -> Schema:
    return _object(
        {
            "format": {"enum": [FORMAT]},
            "hash": _TEXT,
            "model": _TEXT,
            "fingerprint": _TEXT,
            "input_shape": _list(_COUNT),
            "seed": _INT,
            "rules": _list({"type": "object"}),
            "edits": _list(_ref("edit")),
            "refused": _list(_ref("refusal")),
            "funnels": _list(_ref("funnel")),
            "totals": _ref("totals"),
            "notes": _list(_TEXT),
            "versions": _map(_TEXT),
            "sites": _map(_ref("site")),
        }
    )


def _edit() -> Schema:
    return _object(
        {
            "id": _TEXT,
            "site": _TEXT,
            "rule": _TEXT,
            "action": {"enum": ["replace", "insert"]},
            "at": _TEXT,
            "path": _TEXT,
            "block": _TEXT,
            "options": {"type": "object"},
            "start": {"enum": ["exact", "fitted", "fresh"]},
            "how": _TEXT,
            "calls": _list(_TEXT),
            "in_shape": _list(_COUNT),
            "out_shape": _list(_COUNT),
            "before": _ref("cost"),
            "after": _ref("cost"),
            "absorbs": _list(_TEXT),
        }
    )


def _site() -> Schema:
    texts = ("id", "path", "op", "module_class", "rewritten")
    numbers_or_null = ("stage", "stage_from_end", "block", "block_from_end", "position")
    shapes = ("in_shape", "out_shape", "block_in_shape", "block_shape", "stage_shape", "pool_shape", "receptive_field")
    return _object(
        {
            **dict.fromkeys(texts, _TEXT),
            **dict.fromkeys(("index", "call", "calls"), _COUNT),
            **dict.fromkeys(numbers_or_null, _INT_OR_NULL),
            **dict.fromkeys(shapes, _list(_COUNT)),
            **dict.fromkeys(("block_path", "block_entry", "stage_path"), _TEXT_OR_NULL),
            **dict.fromkeys(("follows", "precedes", "pool_tail"), _list(_TEXT)),
            "kind": {"enum": ["module", "functional"]},
            "role": {"enum": list(ROLES)},
            "part": {"enum": [*PARTS, None]},
            "inside": _list(_pair_of(_TEXT, _TEXT)),
            "conv": _ref("conv"),
            "cost": _ref("cost"),
        }
    )


def _conv() -> Schema:
    return _object(
        {
            **dict.fromkeys(("in_channels", "out_channels", "groups"), _COUNT),
            **dict.fromkeys(("kernel", "stride", "padding", "dilation"), _list(_INT)),
            "bias": _FLAG,
            "padding_mode": _TEXT,
        }
    )


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


def _map(item: Schema) -> Schema:
    return {"type": "object", "additionalProperties": item}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _pair_of(*items: Schema) -> Schema:
    kinds: Sequence[Schema] = items
    return {"type": "array", "prefixItems": list(kinds), "minItems": len(kinds), "maxItems": len(kinds)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
