"""Rule files: what loads, what is refused with file, line and closest name, extending, options, built-ins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convrewrite.errors import RuleError
from convrewrite.facts import site_facts
from convrewrite.rulefile import (
    Rule,
    RuleFile,
    builtin_names,
    load_rules,
    parse_rules,
    path_of,
    resolve_options,
    template,
)
from tests.rules.networks import site

GOOD = """\
version: 1
name: late
summary: One of everything.
reference: https://arxiv.org/abs/2111.14556
vars: {head_dim: 32, mode: wide, share: 0.5}
selectors:
  late: {stage: {from_end: [1, 2]}}
  plain: {kernel: 3, groups: 1, use: late}
roles:
  - {match: {name: "features.transition*"}, role: downsample}
rules:
  - id: a
    title: First
    match: {use: [plain], role: bottleneck_spatial, where: "out_channels % vars.head_dim == 0"}
    exclude: {name: "layer3.0.*"}
    pick: {every: 2, offset: 1, per: stage, limit: 6}
    replace: {block: acmix, heads: "clamp(out_channels // vars.head_dim, 1, 8)", window: 7}
    start: fitted
    shared: together
    expect: {sites: {min: 2, max: 6}, stages: [3, 4], includes: [layer4.1.conv2], excludes: ["layer1.*"]}
  - id: b
    match: {role: stem}
    insert: {block: non_local, after: stage, mode: vars.mode, share: vars.share}
    expect: {sites: ">=0"}
budget: {params: 30M, flops: {max: "+10%"}, prefer: "-flops"}
expect: {sites: ">=1"}
tests:
  - {model: "torchvision:resnet50", sites: {a: 4, b: ">=1"}, start: fresh}
  - {model: "torchvision:resnet18", sites: {a: [layer4.1.conv2]}}
  - {model: "torchvision:vgg16", sites: 0}
"""


def test_a_file_with_one_of_everything_loads_with_all_its_values() -> None:
    file = parse_rules(GOOD, "late.yaml")
    assert (file.name, file.vars["head_dim"], len(file.rules), len(file.tests)) == ("late", 32, 2, 3)
    first, second = file.rules
    assert first.exclude == [{"name": "layer3.0.*"}]
    assert (first.pick.every, first.pick.offset, first.pick.per, first.pick.limit) == (2, 1, "stage", 6)
    assert (first.start, first.shared, first.action) == ("fitted", "together", "replace")
    assert first.change.options == {"heads": "clamp(out_channels // vars.head_dim, 1, 8)", "window": 7}
    assert (first.expect.sites.least, first.expect.sites.most) == (2, 6)
    assert second.insert is not None
    assert (second.action, second.insert.at, second.insert.anchor) == ("insert", "after", "stage")
    assert (second.start, second.shared, second.pick.every) == ("exact", "error", 1)
    assert file.budget is not None
    assert file.budget.params is not None
    assert file.budget.flops is not None
    assert file.budget.params.most(10) == 30e6
    assert file.budget.flops.most(1000) == pytest.approx(1100)
    assert file.where("b") == "late.yaml:21"
    assert file.notes == ()


def test_a_file_as_data_loads_as_an_equal_file() -> None:
    data = parse_rules(GOOD, "late.yaml").to_data()
    assert load_rules(data).to_data() == data
    assert all(type(value) in (int, float, str, bool, dict, list) for value in _leaves(data))


def _leaves(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [leaf for value in data.values() for leaf in _leaves(value)]
    return [leaf for value in data for leaf in _leaves(value)] if isinstance(data, list) else [data]


def test_a_rule_expects_at_least_one_site_unless_it_says_otherwise() -> None:
    rule = Rule(id="x", match={"role": "stem"}, replace={"block": "acmix"})
    assert not rule.expect.sites.fits(0)
    assert rule.expect.sites.fits(1)
    assert Rule(id="x", match={"a": 1}, replace={"block": "b"}, expect={"sites": ">=0"}).expect.sites.fits(0)


RULE = "version: 1\nrules:\n  - id: a\n    match: {role: stem}\n    replace: {block: acmix}\n"

# (text, lines of the message, each in full)
BAD = [
    ("rules: []\n", ["f.yaml:1: version: missing; add 'version: 1'"]),
    ("version: 2\n", ["f.yaml:1: version: 2, wanted 1"]),
    ("version: '1'\n", ["f.yaml:1: version: '1', wanted 1"]),
    ("version: true\n", ["f.yaml:1: version: 'True', wanted 1"]),
    (RULE + "rule: []\n", ["f.yaml:6: rule: unknown key; did you mean 'rules'?"]),
    (
        RULE + "zzzz: 1\n",
        [
            "f.yaml:6: zzzz: unknown key; known: version, name, summary, reference, extends, vars, "
            "selectors, roles, rules, budget, expect, tests"
        ],
    ),
    (
        RULE + "name: a b\n",
        ["f.yaml:6: name: 'a b' is not allowed here, wanted letters, digits, '_', '.' and '-', at most 80"],
    ),
    (RULE + "name: 3\n", ["f.yaml:6: name: 3 is not text; put it in quotes"]),
    (RULE + "vars: [a]\n", ["f.yaml:6: vars: ['a'] is no mapping, wanted keys and values"]),
    (RULE + "vars: {a: [1]}\n", ["f.yaml:6: vars.a: [1] is neither a number nor text"]),
    (
        RULE + "vars: {a b: 1}\n",
        ["f.yaml:6: vars.a b: not a name that expressions can use; write letters, digits and '_'"],
    ),
    (
        RULE + "vars: {if: 1}\n",
        ["f.yaml:6: vars.if: not a name that expressions can use; write letters, digits and '_'"],
    ),
    (
        RULE + "selectors: {x: {}}\n",
        ["f.yaml:6: selectors.x: an empty selector would match everything; say what to look for"],
    ),
    (
        RULE + "selectors: {x: {use: y}, y: {use: x}}\n",
        ["f.yaml:6: selectors.x: uses itself: x > y > x", "f.yaml:6: selectors.y: uses itself: y > x > y"],
    ),
    (
        RULE + "roles: [{match: {name: a}, role: stm}]\n",
        ["f.yaml:6: roles[0].role: 'stm' is no role; did you mean 'stem'?"],
    ),
    (
        RULE + "roles: [{match: {}, role: stem}]\n",
        ["f.yaml:6: roles[0].match: an empty selector would match everything; say what to look for"],
    ),
    (RULE + "roles: [{match: {name: a}}]\n", ["f.yaml:6: roles[0].role: missing"]),
    (RULE + "rules2: x\n", ["f.yaml:6: rules2: unknown key; did you mean 'rules'?"]),
    ("version: 1\nrules: 3\n", ["f.yaml:2: rules: 3 is no list"]),
    ("version: 1\nrules: [3]\n", ["f.yaml:2: rules[0]: 3 is no mapping, wanted keys and values"]),
    (
        RULE + "  - {id: a, match: {role: stem}, replace: {block: b}}\n",
        ["f.yaml:6: rules[1].id: 'a' is rules[0] already"],
    ),
    (RULE + "  - {match: {role: stem}, replace: {block: b}}\n", ["f.yaml:6: rules[1].id: missing"]),
    (
        RULE + "  - {id: a/b, match: {role: stem}, replace: {block: b}}\n",
        ["f.yaml:6: rules[1].id: 'a/b' is not allowed here, wanted letters, digits, '_', '.' and '-', at most 80"],
    ),
    (RULE + "  - {id: b, replace: {block: b}}\n", ["f.yaml:6: rules[1].match: missing"]),
    (
        RULE + "  - {id: b, match: , replace: {block: b}}\n",
        ["f.yaml:6: rules[1].match: None is no mapping, wanted keys and values"],
    ),
    (
        RULE + "  - {id: b, match: {}, replace: {block: b}}\n",
        ["f.yaml:6: rules[1].match: an empty selector would match everything; say what to look for"],
    ),
    (RULE + "  - {id: b, match: {role: stem}}\n", ["f.yaml:6: rules[1]: wanted exactly one of 'replace' and 'insert'"]),
    (
        RULE + "    insert: {block: b, after: here}\n",
        ["f.yaml:3: rules[0]: wanted exactly one of 'replace' and 'insert'"],
    ),
    (RULE + "  - {id: b, match: {role: stem}, replace: {heads: 3}}\n", ["f.yaml:6: rules[1].replace.block: missing"]),
    (
        RULE + "  - {id: b, match: {role: stem}, insert: {block: c}}\n",
        ["f.yaml:6: rules[1].insert: wanted exactly one of 'after' and 'before'; write 'after: here'"],
    ),
    (
        RULE + "  - {id: b, match: {role: stem}, insert: {block: c, after: here, before: here}}\n",
        ["f.yaml:6: rules[1].insert: wanted exactly one of 'after' and 'before'; write 'after: here'"],
    ),
    (
        RULE + "  - {id: b, match: {role: stem}, insert: {block: c, before: stage}}\n",
        ["f.yaml:6: rules[1].insert.before: 'stage', wanted 'here' or 'block'"],
    ),
    (
        RULE + "    start: exat\n",
        ["f.yaml:6: rules[0].start: 'exat', wanted 'exact', 'fitted' or 'fresh'; did you mean 'exact'?"],
    ),
    (RULE + "    shared: split\n", ["f.yaml:6: rules[0].shared: 'split', wanted 'error' or 'together'"]),
    (RULE + "    pick: {evry: 2}\n", ["f.yaml:6: rules[0].pick.evry: unknown key; did you mean 'every'?"]),
    (RULE + "    pick: {every: 0}\n", ["f.yaml:6: rules[0].pick.every: 0 is too small, the least is 1"]),
    (RULE + "    pick: {every: two}\n", ["f.yaml:6: rules[0].pick.every: 'two' is no whole number"]),
    (RULE + "    pick: {every: true}\n", ["f.yaml:6: rules[0].pick.every: True is no whole number"]),
    (RULE + "    pick: {per: layer}\n", ["f.yaml:6: rules[0].pick.per: 'layer', wanted 'stage' or 'block'"]),
    (
        RULE + "    exclude: {}\n",
        ["f.yaml:6: rules[0].exclude: an empty selector would match everything; say what to look for"],
    ),
    (
        RULE + "    exclude: [{kernel: 1}, {kernl: 2}]\n",
        ["f.yaml:6: rules[0].exclude[1].kernl: unknown key; did you mean 'kernel'?"],
    ),
    (RULE + "    exclude: x\n", ["f.yaml:6: rules[0].exclude[0]: 'x' is no mapping, wanted keys and values"]),
    (
        RULE + "    expect: {sites: many}\n",
        ["f.yaml:6: rules[0].expect.sites: 'many' is no number of sites; write 16, '>=1', '2..6' or {min: 2, max: 6}"],
    ),
    (
        RULE + "    expect: {sites: {min: 3, max: 2}}\n",
        ["f.yaml:6: rules[0].expect.sites: {'min': 3, 'max': 2} can never be met"],
    ),
    (
        RULE + "    expect: {includes: ['re:(']}\n",
        [
            "f.yaml:6: rules[0].expect.includes[0]: 're:(' is no regular "
            "expression: missing ), unterminated subpattern at position 0"
        ],
    ),
    (
        RULE + "    limits: {params: 3}\n",
        [
            "f.yaml:6: rules[0].limits: unknown key; known: id, title, match, exclude, "
            "pick, replace, insert, start, shared, expect"
        ],
    ),
    (RULE + "budget: {params: 30Q}\n", ["f.yaml:6: budget.params: '30Q' is no limit; write 30M, '+10%' or {max: 30M}"]),
    (RULE + "budget: {params: 10%}\n", ["f.yaml:6: budget.params: '10%' is no limit; write 30M, '+10%' or {max: 30M}"]),
    (RULE + "budget: {params: +10}\n", []),  # YAML reads a number: an absolute limit
    (RULE + "budget: {latency: 3}\n", ["f.yaml:6: budget.latency: unknown key; known: params, flops, prefer"]),
    (
        RULE + "budget: {prefer: size}\n",
        [
            "f.yaml:6: budget.prefer: 'size' is not allowed here, wanted flops, params, "
            "area, index, stage or out_channels, with or without '-'"
        ],
    ),
    (
        RULE + "tests: [{model: r, sites: {aa: 3}}]\n",
        ["f.yaml:6: tests[0].sites.aa: no rule of this id; did you mean 'a'?"],
    ),
    (
        RULE + "tests: [{model: r, sites: 3}]\n",
        ["f.yaml:6: tests[0].sites: 3 says nothing of any rule; write {rule-id: 16}, or 0 for none at all"],
    ),
    (RULE + "tests: [{sites: 0}]\n", ["f.yaml:6: tests[0].model: missing"]),
    (
        RULE + "extends: qqqqqqqq\n",
        ["f.yaml:6: extends[0]: no rule file 'qqqqqqqq'; give a path, or one of the built-in files: BUILTIN"],
    ),
]


@pytest.mark.parametrize(("text", "lines"), BAD, ids=[text.removeprefix(RULE) for text, _ in BAD])
def test_a_wrong_file_is_told_by_line_and_key_with_the_closest_name(text: str, lines: list[str]) -> None:
    if not lines:
        parse_rules(text, "f.yaml")
        return
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "f.yaml")
    assert str(caught.value).splitlines() == [line.replace("BUILTIN", ", ".join(builtin_names())) for line in lines]


def test_all_that_is_wrong_with_a_file_is_told_at_once_in_file_order() -> None:
    text = """\
version: 2
selectors:
  late: {stage: {from_end: 0}}
rules:
  - id: a
    match:
      kernal: 3
      role: bottlneck
      where: "out_chanels > 3"
      use: lat
    replace: {block: acmix}
    start: exat
  - id: a
    match: {}
    insert: {block: x}
tests:
  - {model: r, sites: {b: 3}}
"""
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "f.yaml")
    heads = [" ".join(line.split(" ")[:2]) for line in str(caught.value).splitlines()]
    assert heads == [
        "f.yaml:1: version:",
        "f.yaml:3: selectors.late.stage:",
        "f.yaml:7: rules[0].match.kernal:",
        "f.yaml:8: rules[0].match.role:",
        "f.yaml:9: rules[0].match.where:",
        "f.yaml:10: rules[0].match.use:",
        "f.yaml:12: rules[0].start:",
        "f.yaml:13: rules[1].id:",
        "f.yaml:14: rules[1].match:",
        "f.yaml:15: rules[1].insert:",
        "f.yaml:17: tests[0].sites.b:",
    ]


def test_a_fault_in_a_named_selector_is_told_once_where_it_stands() -> None:
    text = RULE.replace("{role: stem}", "{use: x}") + "selectors: {x: {kernal: 3}}\n"
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "f.yaml")
    assert str(caught.value) == "f.yaml:6: selectors.x.kernal: unknown key; did you mean 'kernel'?"


def test_selectors_that_double_at_every_step_are_refused_and_not_expanded() -> None:
    lines = ["selectors:", "  s0: {kernel: 3}"]
    lines += [f"  s{i}: {{all: [{{use: s{i - 1}}}, {{use: s{i - 1}}}]}}" for i in range(1, 19)]
    with pytest.raises(RuleError, match="more than 500 clauses once every 'use' is expanded"):
        parse_rules(RULE + "\n".join(lines), "f.yaml")


def test_selectors_and_variables_that_nothing_uses_are_noted() -> None:
    file = parse_rules(RULE + "vars: {dim: 3}\nselectors: {late: {stage: 4}}\n", "f.yaml")
    assert file.notes == (
        "f.yaml:7: selectors.late is used by no rule",
        "f.yaml:6: vars.dim is used by no expression",
    )


# --- Python side


def test_a_rule_can_be_written_in_python() -> None:
    rule = Rule(id="x", match={"role": "bottleneck_spatial"}, replace={"block": "acmix", "heads": 4})
    file = load_rules([rule])
    assert (file.name, file.rules[0].change.block, file.rules[0].change.options) == ("rules", "acmix", {"heads": 4})
    assert load_rules(rule).to_data() == file.to_data()
    assert load_rules(RuleFile(version=1, name="mine", rules=[rule])).name == "mine"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rule(id="x", match={"role": "stem"}), "Rule: wanted exactly one of 'replace' and 'insert'"),
        (lambda: Rule(id="x", matches={}, replace={"block": "b"}, match={"a": 1}), "Rule: matches: unknown key; did"),
        (lambda: Rule(id="x", match={"role": "stem"}, replace={"blok": "b"}), "Rule: replace.block: missing"),
        (lambda: load_rules([Rule(id="x", match={"kernal": 3}, replace={"block": "b"})]), "kernal: unknown key"),
        (lambda: load_rules(RuleFile(version=1, rules=[])), "no rules; add one under 'rules:'"),
        (lambda: load_rules([]), "no rules"),
        (lambda: load_rules([3]), "rules are a name, a path, a mapping"),  # type: ignore[list-item]
        (lambda: load_rules({"version": 1}), "no rules"),
        (lambda: load_rules({}), "rules: version: missing; add 'version: 1'"),
        (lambda: load_rules({"version": 1, 3: 4}), "the key 3 is not text"),  # type: ignore[dict-item]
        (lambda: load_rules({"version": 1, "vars": {"a": {1}}}), "vars.a: {1} is not plain data"),
        (lambda: load_rules({"version": 1, "vars": {"a": float("nan")}}), "vars.a: nan is not plain data"),
        (lambda: load_rules(3), "rules are a name, a path, a mapping"),  # type: ignore[arg-type]
        (lambda: load_rules(None), "rules are a name, a path, a mapping"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_in_python_is_the_same_one_line(build: Any, message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        build()
    assert len(str(caught.value).splitlines()) == 1


def test_loading_a_dict_leaves_the_dict_as_it_was() -> None:
    data: dict[str, Any] = {"version": 1, "rules": [{"id": "a", "match": {"stage": (3, 4)}, "replace": {"block": "b"}}]}
    load_rules(data)
    assert data == {"version": 1, "rules": [{"id": "a", "match": {"stage": (3, 4)}, "replace": {"block": "b"}}]}


# --- built-ins, paths, extends


def test_built_in_files_are_found_by_name_and_local_files_by_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert "acmix" in builtin_names()
    assert load_rules("acmix").name == load_rules("acmix.yaml").name == "acmix"
    (tmp_path / "acmix.yaml").write_text(RULE + "summary: mine\n")
    assert load_rules("acmix.yaml").summary == "mine"
    assert load_rules(Path("acmix.yaml")).summary == "mine"
    assert load_rules("acmix").summary != "mine"
    assert path_of("acmix").name == "acmix.yaml"


def test_a_file_without_a_name_is_called_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "My rules (1).yml").write_text(RULE)
    assert load_rules(tmp_path / "My rules (1).yml").name == "My-rules--1-"


@pytest.mark.parametrize("name", ["acmx", "no/such.yaml", "x" * 5000, "a\x00b", "a\nb", "", ".", "/"])
def test_a_name_that_means_no_file_is_one_line(name: str) -> None:
    with pytest.raises(RuleError, match="no rule file") as caught:
        load_rules(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_misspelt_built_in_suggests_the_nearest() -> None:
    with pytest.raises(RuleError, match=re.escape("no rule file 'acmx'; did you mean 'acmix'?")):
        load_rules("acmx")


BASE = """\
version: 1
vars: {dim: 32, other: 1}
selectors: {late: {stage: ">=3"}, wide: {out_channels: ">=256"}}
roles: [{match: {name: a}, role: stem}]
rules:
  - {id: one, match: {use: late}, replace: {block: base_block}}
  - {id: two, match: {use: wide}, replace: {block: base_block}}
"""


def test_an_extending_file_puts_its_own_over_what_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(
        "version: 1\nextends: base.yaml\nvars: {dim: 64}\nselectors: {late: {stage: 4}}\n"
        "rules:\n  - {id: two, match: {use: late}, replace: {block: own}}\n"
        "  - {id: three, match: {where: 'h > vars.other'}, replace: {block: own}}\n"
    )
    file = load_rules(tmp_path / "top.yaml")
    assert file.name == "top"
    assert file.vars == {"dim": 64, "other": 1}
    assert file.selectors == {"late": {"stage": 4}, "wide": {"out_channels": ">=256"}}
    assert [(r.id, r.change.block) for r in file.rules] == [("one", "base_block"), ("two", "own"), ("three", "own")]
    assert [c.role for c in file.roles] == ["stem"]
    assert load_rules(file.to_data()).to_data() == file.to_data()
    assert file.where("one") == f"{tmp_path}/base.yaml:6"
    assert file.where("two") == f"{tmp_path}/top.yaml:6"


def test_a_built_in_file_can_be_extended_by_name(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("version: 1\nextends: [acmix]\n")
    assert [r.id for r in load_rules(tmp_path / "top.yaml").rules] == ["bottleneck-3x3"]


def test_files_that_extend_each_other_are_told_their_cycle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nextends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("version: 1\nextends: a.yaml\n")
    with pytest.raises(RuleError, match=re.escape("extends itself: a.yaml > b.yaml > a.yaml")) as caught:
        load_rules(tmp_path / "a.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_faults_of_an_extended_file_are_told_with_its_own_lines(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nvars: {a: [1]}\nselectors: {x: {kernal: 1}}\n")
    (tmp_path / "top.yaml").write_text("version: 1\nextends: base.yaml\nrules: 3\n")
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path / "top.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{tmp_path}/base.yaml:2: vars.a" in lines[0]
    assert f"{tmp_path}/base.yaml:3: selectors.x.kernal" in lines[1]


def test_the_acmix_file_names_ten_models_and_their_counts() -> None:
    file = load_rules("acmix")
    assert file.reference == "https://arxiv.org/abs/2111.14556"
    assert len({test.model for test in file.tests}) >= 8
    assert file.rules[0].change.options == {"heads": 4, "window": 7}
    assert file.rules[0].start == "exact"


def test_a_scaffold_is_a_valid_file_of_its_name() -> None:
    assert parse_rules(template("my-rules"), "t.yaml").name == "my-rules"


@pytest.mark.parametrize("name", ["yes", "a b", "", "../x", "1", "a: b", "null"])
def test_a_scaffold_refuses_a_name_that_would_not_read_back(name: str) -> None:
    with pytest.raises(RuleError):
        template(name)


# --- options


FIELDS = {"heads": "int", "share": "float", "bias": "bool", "mode": "str"}
FACTS = site_facts(site("a", out_channels=256, size=(14, 14)), 4, {"dim": 32})


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({"heads": "clamp(out_channels // vars.dim, 1, 4)"}, {"heads": 4}),
        ({"heads": "out_channels / 32"}, {"heads": 8}),
        ({"heads": 4, "mode": "h"}, {"heads": 4, "mode": "h"}),
        ({"share": "1 / 4"}, {"share": 0.25}),
        ({"share": "2"}, {"share": 2.0}),
        ({"bias": "h > 7"}, {"bias": True}),
        ({"bias": False}, {"bias": False}),
        ({"heads": [1, 2]}, {"heads": [1, 2]}),
        ({}, {}),
    ],
)
def test_options_of_numeric_fields_are_computed_and_others_left(raw: dict[str, Any], wanted: dict[str, Any]) -> None:
    resolved = resolve_options(raw, FIELDS, FACTS)
    assert resolved == wanted
    assert [type(v) for v in resolved.values()] == [type(v) for v in wanted.values()]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"haeds": 4}, "unknown option 'haeds'; did you mean 'heads'?"),
        ({"zzz": 4}, "unknown option 'zzz'; known: heads, share, bias, mode"),
        ({"heads": "out_channels / 3"}, "gives 85.33333333333333, wanted a whole number"),
        ({"heads": "h > 3"}, "gives True, wanted a whole number"),
        ({"heads": "role"}, "gives 'other', wanted a whole number"),
        ({"heads": "out_chanels"}, "option 'heads': expression 'out_chanels', column 1: unknown name"),
        ({"heads": "vars.dmi"}, "unknown variable 'vars.dmi'; did you mean 'dim'?"),
        ({"heads": "stage"}, "'stage' has no value at this site"),
        ({"heads": "1 // 0"}, "division by zero"),
        ({"bias": "1"}, "gives 1, wanted true or false"),
        ({"share": "h > 2"}, "gives True, wanted a number"),
    ],
)
def test_an_option_that_cannot_be_computed_is_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        resolve_options(raw, FIELDS, FACTS)
    assert len(str(caught.value).splitlines()) == 1


def test_the_rule_language_needs_no_torch() -> None:
    modules = "match, rulefile, selectline, expectations"
    code = f"import sys; from convrewrite import {modules}; rulefile.load_rules('acmix'); rulefile.json_schema()"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
