"""YAML in, plain data and line numbers out; everything else is one line with file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convrewrite.errors import RuleError
from convrewrite.yamlfile import Problems, dotted, load, read


def test_every_key_and_list_item_has_the_line_it_stands_on() -> None:
    data, lines = load(
        "version: 1\n\nrules:\n  - id: a\n    match: {role: stem,\n            kernel: 3}\n  - id: b\n", "f"
    )
    assert data == {"version": 1, "rules": [{"id": "a", "match": {"role": "stem", "kernel": 3}}, {"id": "b"}]}
    wanted = {
        (): 1,
        ("version",): 1,
        ("rules",): 3,
        ("rules", 0): 4,
        ("rules", 0, "id"): 4,
        ("rules", 0, "match"): 5,
        ("rules", 0, "match", "role"): 5,
        ("rules", 0, "match", "kernel"): 6,
        ("rules", 1): 7,
        ("rules", 1, "id"): 7,
    }
    assert lines == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", 3),
        ("-3", -3),
        ("0x1F", 31),
        ("0b11", 3),
        ("010", 8),
        ("1_000", 1000),
        ("0.5", 0.5),
        ("true", True),
        ("off", False),
        ("~", None),
        ("'3'", "3"),
        ("56:56", "56:56"),
        ("2024-01-01", "2024-01-01"),
        ("3..4", "3..4"),
        ("'>=2'", ">=2"),
        ("+10%", "+10%"),
        ("=", "="),
        ("!!str 3", "3"),
        ("[1, [2]]", [1, [2]]),
    ],
)
def test_scalars_are_read_as_people_mean_them(text: str, wanted: object) -> None:
    data, _ = load(f"key: {text}", "f")
    assert data["key"] == wanted
    assert type(data["key"]) is type(wanted)


def test_an_anchor_can_be_used_again_and_gets_both_lines() -> None:
    data, lines = load("a: &x {k: 1}\nb: *x\n", "f")
    assert data == {"a": {"k": 1}, "b": {"k": 1}}
    assert lines["b",] == 2


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1: the file is empty; a rule file starts with 'version: 1'"),
        ("# only a comment\n", "f:1: the file is empty"),
        ("- a\n- b\n", "f:1: the file holds a list, wanted keys and values"),
        ("\nword\n", "f:2: the file holds a plain value"),
        ("a: 1\nb: 2\na: 3\n", "f:3: the key 'a' is given twice, first in line 1"),
        ("a:\n  b: 1\n  b: 1\n", "f:3: the key 'b' is given twice, first in line 2"),
        ("a:\n\tb: 1\n", "f:2: a tab where YAML wants spaces"),
        ("1: a\n", "f:1: '1' is not text, wanted a key; put it in quotes"),
        ("a: 1\non: 2\n", "f:2: 'on' is not text"),
        ("? [a]\n: b\n", "f:1: a list or mapping is not text"),
        ("~: b\n", "f:1: '~' is not text"),
        (
            "a: !!python/object/apply:os.system ['ls']\n",
            "f:1: the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("a: !thing 3\n", "f:1: the tag '!thing' is not supported"),
        ("a: !!set {b}\n", "is not supported"),
        ("a: !!binary aGk=\n", "is not supported"),
        ("a: !!int x\n", "'x' is not a number"),
        ("x: &b {k: 1}\na:\n  <<: *b\n", "f:3: '<<' is not supported"),
        ("a: .nan\n", "'.nan' is not a number that can be used"),
        ("a: -.inf\n", "is not a number that can be used"),
        ("a: " + "9" * 5000 + "\n", "is not a number that can be used"),
        ("a: 0x_\n", "is not a number that can be used"),
        ("a: *gone\n", "f:1: not YAML: found undefined alias"),
        ("a: [1, 2\nb: 3\n", "f:2: not YAML"),
        ("a: 'open\n", "not YAML"),
        ("a: b: c\n", "f:1: not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "f:2: not YAML"),
        ("%YAML 9.9\n---\na: 1\n", "f:1: not YAML"),
        ('a: "\\U99999999"\n', "not YAML"),
        ("a: \x00\n", "f:1: a character that YAML does not allow"),
        ("a: 1\nb: \x07\n", "f:2: a character that YAML does not allow"),
        ("a: &a [*a]\n", "f:1: nested deeper than 40 levels"),
        ("a: " + "[" * 60 + "]" * 60, "f:1: nested deeper than 40 levels"),
        ("a: " + "[" * 1500 + "]" * 1500, "nested deeper than 40 levels"),
        (BOMB, "more than 20000 values once its anchors are expanded"),
        ("a: " + "x" * 200_001, "at most 200000"),
    ],
)
def test_what_is_no_plain_mapping_is_one_line_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        load(text, "f")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_says_so_in_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"version: 1\nname: \xff\xfe\n")
    with pytest.raises(RuleError, match=r"b\.yaml:2: not UTF-8 text"):
        read(binary)
    with pytest.raises(RuleError, match="no such file"):
        read(tmp_path / "gone.yaml")
    with pytest.raises(RuleError, match="is a directory"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert load(read(tmp_path / "bom.yaml"), "f")[0] == {"version": 1}


def test_problems_are_told_all_at_once_in_file_order() -> None:
    problems = Problems("f", {("b",): 9, ("a",): 2})
    problems.add(("b", "x", 0), "late")
    problems.add(("a",), "early", "mend it")
    problems.add((), "nowhere")
    with pytest.raises(RuleError) as caught:
        problems.check()
    assert str(caught.value).splitlines() == ["f: nowhere", "f:2: a: early; mend it", "f:9: b.x[0]: late"]


def test_no_problem_is_no_error() -> None:
    Problems("f").check()


def test_a_key_path_reads_as_in_code() -> None:
    assert dotted(("rules", 0, "match", "kernal")) == "rules[0].match.kernal"
