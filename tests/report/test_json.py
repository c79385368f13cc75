"""The JSON form against its schema and its documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convrewrite.diffing import diff
from convrewrite.plans import Plan
from convrewrite.report import render, render_diff, render_plan, render_sites
from convrewrite.report.schema import report_schema
from convrewrite.reports import Report
from tests.report import sample

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def errors(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "$") -> Iterator[str]:
    """What is wrong with `value`: the keywords of JSON Schema 2020-12 that the report's schema uses, and no others."""
    known = {"$ref", "$defs", "$schema", "title", "type", "properties", "required", "additionalProperties", "items"}
    known |= {"prefixItems", "minItems", "maxItems", "enum", "anyOf", "minimum"}
    assert set(schema) <= known, f"the checker does not know {set(schema) - known}"
    if "$ref" in schema:
        yield from errors(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, at)
        return
    if "anyOf" in schema and all(list(errors(value, option, root, at)) for option in schema["anyOf"]):
        yield f"{at}: fits no option"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} not in {schema['enum']}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, _TYPES[k]) and isinstance(value, bool) == (k == "boolean") for k in kinds):
        yield f"{at}: {type(value).__name__} is not {kinds}"
        return
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{at}: {value} is too small"
    if isinstance(value, dict):
        yield from _object_errors(value, schema, root, at)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        for number, item in enumerate(value):
            prefix = schema.get("prefixItems", [])
            yield from errors(
                item, prefix[number] if number < len(prefix) else schema.get("items", {}), root, f"{at}[{number}]"
            )


def _object_errors(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
    yield from (f"{at}: {key} is missing" for key in schema.get("required", []) if key not in value)
    for key, item in value.items():
        if key in properties:
            yield from errors(item, properties[key], root, f"{at}.{key}")
        elif extra is False:
            yield f"{at}: {key} is not allowed"
        elif isinstance(extra, dict):
            yield from errors(item, extra, root, f"{at}.{key}")


def check(data: Any) -> list[str]:
    return list(errors(data, report_schema(), report_schema()))


def loaded(report: Report) -> Any:
    """Strict JSON: NaN and Infinity are not."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(render(report, "json"), parse_constant=refuse)


@pytest.mark.parametrize("make", [sample.report, sample.broken_report, sample.wide_report, sample.hostile_report])
def test_a_report_fits_the_schema(make: Any) -> None:
    assert check(loaded(make())) == []


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("ok",), "yes"),
        (("schema",), 2),
        (("sites", 0, "role"), "waist"),
        (("sites", 0, "conv", "groups"), 1.5),
        (("plan", "edits", 0, "start"), "cold"),
        (("plan", "funnels", 0, "steps", 0), ["convs"]),
        (("tensors", 0, "numel"), -1),
        (("laws", 0, "value"), "large"),
        (("drift", 0, "surprise"), 1),
        (("plan", "edits", 0, "before", "params"), True),
    ],
)
def test_a_damaged_report_does_not_fit(keys: tuple[Any, ...], value: Any) -> None:
    data = loaded(sample.report())
    target = data
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    assert len(check(data)) == 1


def test_a_missing_field_does_not_fit() -> None:
    data = loaded(sample.report())
    del data["plan"]["sites"]["conv1"]["conv"]["bias"]
    assert check(data) == ["$.plan.sites.conv1.conv: bias is missing"]


def test_what_is_not_finite_is_written_as_text() -> None:
    assert loaded(sample.broken_report())["drift"][1]["max_relative"] == "nan"


def test_every_field_of_the_schema_is_documented() -> None:
    def names(schema: dict[str, Any]) -> Iterator[str]:
        for key, value in schema.get("properties", {}).items():
            yield key
            yield from names(value)
        for value in schema.get("$defs", {}).values():
            yield from names(value)

    documented = set(re.findall(r"`([a-z_]+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert set(names(report_schema())) - documented == set()


def test_the_json_plan_is_the_file_that_apply_takes() -> None:
    made = sample.plan()
    again = Plan.from_json(render_plan(made, "json"))
    assert again.hash == made.hash
    assert again.edits[3].site == made.edits[3].site


def test_the_json_of_sites_carries_totals() -> None:
    data = json.loads(render_sites(sample.resnet50_sites(), "json"))
    assert data["totals"]["sites"] == len(data["sites"]) == 53
    assert data["totals"]["params"] == 23_454_912
    assert data["totals"]["roles"] == {"stem": 1, "bottleneck_spatial": 16, "pointwise": 32, "shortcut": 4}


def test_the_json_of_a_diff_tells_each_change_with_both_sides() -> None:
    data = json.loads(render_diff(diff(*sample.views()), "json"))
    assert data["same"] is False
    last = data["tensors"][-1]
    assert last == {
        "key": "fc.weight",
        "kind": "changed",
        "before": {"shape": [1000, 2048], "dtype": "torch.float32"},
        "after": {"shape": [10, 2048], "dtype": "torch.float32"},
    }
    assert [s["id"] for s in data["sites"]] == ["layer4.1.conv2", "layer4.2.conv2"]


def test_the_fates_of_an_empty_report_are_empty() -> None:
    assert loaded(replace(sample.report(), tensors=()))["fates"] == {}
