"""The JSON Schema for editors: well-formed, described throughout, and of one mind with the loader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from convrewrite.clauses import WORDS
from convrewrite.rulefile import builtin_names, json_schema, path_of, template
from convrewrite.ruleschema import RuleFile
from convrewrite.selectors import SELECTORS
from tests.rules.test_rulefile import BAD, GOOD
from tests.rules.test_selectors import NET, WRONG, test_a_match_fits_as_many_of_resnet50_as_its_table_says

SCHEMA = json_schema()
RIGHT = [case[0] for case in test_a_match_fits_as_many_of_resnet50_as_its_table_says.pytestmark[0].args[1]]


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(child)


def faults(data: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]


def file_with(match: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "rules": [{"id": "a", "match": match, "replace": {"block": "b"}}]}


def test_the_schema_is_plain_json_without_marks_of_ours() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert "x-convrewrite" not in json.dumps(SCHEMA)


def test_every_reference_leads_somewhere() -> None:
    for node in nodes(SCHEMA):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in SCHEMA["$defs"]


def test_every_pattern_is_a_regular_expression() -> None:
    patterns = [node["pattern"] for node in nodes(SCHEMA) if isinstance(node.get("pattern"), str)]
    assert len(patterns) > 10
    for pattern in patterns:
        re.compile(pattern)


def test_every_selector_and_every_key_of_a_file_is_described() -> None:
    match = SCHEMA["$defs"]["Match"]["properties"]
    assert set(match) == {*SELECTORS.names(), *WORDS}
    assert set(SCHEMA["properties"]) == set(RuleFile.model_fields)
    owners = [SCHEMA, *(SCHEMA["$defs"][name] for name in ("Match", "Rule", "Pick", "Expect", "Insert", "Test"))]
    for owner in owners:
        assert all(value.get("description") for value in owner["properties"].values())


def test_the_schema_itself_is_valid() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_valid_files_are_valid_by_the_schema() -> None:
    assert faults(yaml.safe_load(GOOD)) == []
    assert faults(yaml.safe_load(template("x"))) == []
    for name in builtin_names():
        assert faults(yaml.safe_load(path_of(name).read_text())) == []


@pytest.mark.parametrize("match", RIGHT, ids=map(repr, RIGHT))
def test_every_match_that_works_is_valid_by_the_schema(match: dict[str, Any]) -> None:
    assert NET
    assert faults(file_with(match)) == []


# What only reading the value, or the rest of the file, can tell.
BEYOND = (
    *("range", "can never match", "least value", "expression", "unknown name", "unknown variable", "unknown selector"),
    *("gives a", "not part of the language", "is no name", "no whole number", "depthwize", "lst", "empty list"),
)


@pytest.mark.parametrize("match", [m for m, why in WRONG if not any(word in why for word in BEYOND)], ids=repr)
def test_a_match_of_the_wrong_shape_is_wrong_by_the_schema_too(match: dict[str, Any]) -> None:
    assert faults(file_with(match))


SHAPE = re.compile(r"unknown key|missing|no mapping|no list|not text|too small|wanted '|would match everything")


@pytest.mark.parametrize(
    "text", [text for text, lines in BAD if lines and SHAPE.search(lines[0]) and "regular expr" not in lines[0]]
)
def test_a_file_of_the_wrong_shape_is_wrong_by_the_schema_too(text: str) -> None:
    assert faults(yaml.safe_load(text))
