"""Rules against sites: who takes what, why not, in which order, and when that is an error."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from convrewrite.errors import RuleError
from convrewrite.expectations import judge
from convrewrite.match import MatchResult, correct_roles, match, search, sites_by_rule
from convrewrite.rulefile import RuleFile, load_rules, parse_rules
from convrewrite.rulevalues import Wish
from convrewrite.sites import Site
from tests.rules.networks import ids, resnet50, resnext50, site

NET = resnet50()
SPATIAL = [s.id for s in NET if s.role == "bottleneck_spatial"]


def rules(*parts: dict[str, Any], **top: Any) -> RuleFile:
    """A file of rules that replace by acmix and may find nothing, unless they say otherwise."""
    full = []
    for index, part in enumerate(parts):
        action = {} if "insert" in part else {"replace": {"block": "acmix"}}
        full.append({"id": f"r{index}", **action, "expect": {"sites": ">=0"}, **part})
    return load_rules({"version": 1, "name": "f", "rules": full, **top})


def taken(result: MatchResult, rule: str = "r0") -> list[str]:
    return [c.site.id for c in result.candidates if c.rule.id == rule]


def refusals(result: MatchResult, rule: str = "r0") -> dict[str, tuple[str, str]]:
    return {r.site.id: (r.clause, r.reason) for r in result.refused if r.rule == f"f/{rule}"}


def test_the_acmix_rule_takes_the_16_spatial_convolutions_of_resnet50_and_no_other() -> None:
    result = match(NET, load_rules("acmix"))
    assert [c.site.id for c in result.candidates] == SPATIAL
    assert len(result.refused) == 53 - 16
    assert {r.clause for r in result.refused} == {"role"}


def test_the_acmix_rule_refuses_a_grouped_net_and_says_what_was_nearest() -> None:
    with pytest.raises(RuleError) as caught:
        match(resnext50(), load_rules("acmix"))
    assert str(caught.value) == (
        "acmix.yaml:6: rule 'bottleneck-3x3': 0 sites, expected >=1: 53 convs > 16 role bottleneck_spatial > "
        "16 kernel 3 > 0 groups 1; nearest: layer1.0.conv2 (groups 32, wanted 1), layer1.1.conv2 (groups 32, wanted "
        "1), layer1.2.conv2 (groups 32, wanted 1)"
    )


def test_the_funnel_counts_the_sites_left_after_every_clause_and_pick() -> None:
    file = rules(
        {
            "match": {"role": "bottleneck_spatial", "stage": "3..4"},
            "exclude": {"name": "layer3.0.*"},
            "pick": {"every": 2},
        }
    )
    (funnel,) = match(NET, file).funnels
    assert funnel.rule == "f/r0"
    assert funnel.steps == (
        ("convs", 53),
        ("role bottleneck_spatial", 16),
        ("stage 3..4", 9),
        ("not name layer3.0.*", 8),
        ("every 2", 4),
    )
    assert funnel.edits == 4


def test_every_site_is_taken_or_refused_once_by_every_rule() -> None:
    file = rules(
        {"match": {"kernel": 3}, "pick": {"every": 3}},
        {"match": {"role": "bottleneck_spatial", "stage": [1, 2]}},
        {"match": {"kernel": 1}, "insert": {"block": "x", "after": "block"}},
    )
    result = match(NET, file)
    for rule in ("r0", "r1", "r2"):
        seen = taken(result, rule) + [r.site.id for r in result.refused if r.rule == f"f/{rule}"]
        assert sorted(seen) == sorted(ids(NET))


# --- pick. Spatial sites by stage: 3, 4, 6, 3.


@pytest.mark.parametrize(
    ("pick", "wanted"),
    [
        ({}, list(range(16))),
        ({"every": 2}, list(range(0, 16, 2))),
        ({"every": 2, "offset": 1}, list(range(1, 16, 2))),
        ({"offset": 14}, [14, 15]),
        ({"offset": 16}, []),
        ({"first": 2}, [0, 1]),
        ({"last": 2}, [14, 15]),
        ({"first": 1, "last": 1}, [0, 15]),
        ({"first": 99}, list(range(16))),
        ({"first": 10, "last": 10}, list(range(16))),
        ({"limit": 3}, [0, 1, 2]),
        ({"every": 2, "per": "stage"}, [0, 2, 3, 5, 7, 9, 11, 13, 15]),
        ({"first": 1, "per": "stage"}, [0, 3, 7, 13]),
        ({"last": 1, "per": "stage"}, [2, 6, 12, 15]),
        ({"last": 1, "per": "stage", "limit": 2}, [2, 6]),
        ({"first": 1, "last": 1, "per": "stage"}, [0, 2, 3, 6, 7, 12, 13, 15]),
        ({"every": 2, "last": 2}, [12, 14]),
        ({"first": 1, "per": "block"}, list(range(16))),
        ({"offset": 1, "per": "block"}, []),
    ],
)
def test_pick_takes_some_of_the_matching_sites_in_forward_order(pick: dict[str, Any], wanted: list[int]) -> None:
    result = match(NET, rules({"match": {"role": "bottleneck_spatial"}, "pick": pick}))
    assert taken(result) == [SPATIAL[i] for i in wanted]
    left = [SPATIAL[i] for i in range(16) if i not in wanted]
    assert all(refusals(result)[path][0] == "pick" for path in left)


def test_a_site_that_pick_passes_over_is_told_by_which_part() -> None:
    result = match(NET, rules({"match": {"kernel": 3}, "pick": {"every": 2, "per": "stage", "limit": 1}}))
    assert refusals(result)["layer1.1.conv2"] == ("pick", "not picked: every 2 per stage")
    assert refusals(result)["layer1.2.conv2"] == ("pick", "not picked: limit 1")


# --- claims


def test_the_first_rule_owns_a_site_and_the_later_one_is_told_by_whom() -> None:
    result = match(NET, rules({"match": {"stage": 4, "kernel": 3}}, {"match": {"kernel": 3}}))
    assert taken(result) == SPATIAL[13:]
    assert taken(result, "r1") == SPATIAL[:13]
    assert refusals(result, "r1")["layer4.1.conv2"] == ("claimed", "claimed by rule f/r0")
    assert result.funnels[1].steps[-2:] == (("kernel 3", 16), ("unclaimed", 13))


def test_a_site_that_pick_passes_over_is_free_for_the_next_rule() -> None:
    result = match(NET, rules({"match": {"kernel": 3}, "pick": {"every": 2}}, {"match": {"kernel": 3}}))
    assert taken(result, "r1") == SPATIAL[1::2]


def test_what_earlier_files_claim_is_theirs() -> None:
    result = match(NET, rules({"match": {"kernel": 3}}), {"layer1.0.conv2": "other/x"})
    assert refusals(result)["layer1.0.conv2"] == ("claimed", "claimed by rule other/x")
    assert len(taken(result)) == 15


def test_a_rule_that_loses_all_its_sites_does_not_meet_its_expectation() -> None:
    file = rules({"match": {"kernel": 3}}, {"match": {"kernel": 3}, "expect": {"sites": ">=1"}})
    with pytest.raises(RuleError, match=re.escape("rule 'r1': 0 sites, expected >=1: 53 convs > 16 kernel 3 > 0 unc")):
        match(NET, file)


def test_an_insertion_neither_claims_nor_minds_a_claim() -> None:
    insert = {"match": {"kernel": 3}, "insert": {"block": "x", "after": "here"}}
    result = match(NET, rules(insert, {"match": {"kernel": 3}}, insert))
    assert len(taken(result, "r0")) == len(taken(result, "r1")) == len(taken(result, "r2")) == 16


# --- insertion points


@pytest.mark.parametrize(
    ("place", "count", "first", "why"),
    [
        ({"after": "here"}, 53, "conv1", None),
        ({"before": "here"}, 53, "conv1", None),
        ({"after": "block"}, 16, "layer1.0.conv1", "same place of insertion as layer1.0.conv1"),
        ({"before": "block"}, 16, "layer1.0.conv1", "same place of insertion as layer1.0.conv1"),
        ({"after": "stage"}, 4, "layer1.0.conv1", "same place of insertion as layer1.0.conv1"),
    ],
)
def test_sites_that_mean_one_place_of_insertion_collapse_into_the_first(
    place: dict[str, str], count: int, first: str, why: str | None
) -> None:
    result = match(NET, rules({"match": {"kernel": ">=1"}, "insert": {"block": "x", **place}}))
    assert (len(taken(result)), taken(result)[0]) == (count, first)
    assert why is None or refusals(result)["layer1.0.conv2"] == ("pick", why)


def test_a_site_outside_blocks_cannot_be_inserted_after_its_block() -> None:
    result = match(NET, rules({"match": {"role": "stem"}, "insert": {"block": "x", "after": "block"}}))
    assert refusals(result)["conv1"] == ("block", "no module stands for the block of this site")


# --- shared modules

SHARED = [
    site("a", 0),
    *(site("s", i, calls=3, call=i - 1, size=(56 // i, 56 // i)) for i in (1, 2, 3)),
    site("b", 4),
]


def test_a_shared_module_is_an_error_that_names_it_and_the_way_out() -> None:
    with pytest.raises(RuleError, match="rule 'r0': module s is called 3 times; write 'shared: together'") as caught:
        match(SHARED, rules({"match": {"kernel": 3}}))
    assert len(str(caught.value).splitlines()) == 1


def test_a_shared_module_that_the_rule_does_not_take_is_no_error() -> None:
    assert taken(match(SHARED, rules({"match": {"name": ["a", "b"]}}))) == ["a", "b"]
    assert taken(match(SHARED, rules({"match": {"kernel": 3}, "exclude": {"name": "s"}}))) == ["a", "b"]
    assert taken(match(SHARED, rules({"match": {"kernel": 3}, "pick": {"first": 1}}))) == ["a"]


def test_together_the_calls_of_a_shared_module_are_one_candidate() -> None:
    result = match(SHARED, rules({"match": {"kernel": 3}, "shared": "together"}))
    assert [(c.site.id, c.calls) for c in result.candidates] == [
        ("a", ("a",)),
        ("s@0", ("s@0", "s@1", "s@2")),
        ("b", ("b",)),
    ]
    assert result.funnels[0].steps == (("convs", 5), ("kernel 3", 5), ("whole modules", 3))
    assert result.funnels[0].edits == 3


def test_together_means_that_every_call_must_match() -> None:
    result = match(SHARED, rules({"match": {"size": ">=20"}, "shared": "together"}))
    assert taken(result) == ["a", "b"]
    assert refusals(result)["s@0"] == ("shared", "shared with s@2, which the rule does not match")
    assert refusals(result)["s@2"] == ("size", "size 18x18, wanted >=20")


def test_together_pick_counts_modules_and_not_calls() -> None:
    result = match(SHARED, rules({"match": {"kernel": 3}, "shared": "together", "pick": {"limit": 2}}))
    assert taken(result) == ["a", "s@0"]


def test_the_same_module_claimed_by_one_call_is_claimed_in_full() -> None:
    together = {"match": {"kernel": 3}, "shared": "together"}
    result = match(SHARED, rules(together, together))
    assert refusals(result, "r1")["s@1"][0] == "claimed"


# --- sites that were rewritten before


def rewritten(path: str) -> list[Site]:
    return [replace(s, rewritten="f/r0") if s.id == path else s for s in NET]


def test_a_rewritten_site_is_left_alone_but_counts_for_pick_and_expect() -> None:
    net = rewritten("layer1.0.conv2")
    file = rules({"match": {"kernel": 3}, "pick": {"every": 2}, "expect": {"sites": 8}})
    result = match(net, file)
    assert taken(result) == SPATIAL[2::2]
    assert refusals(result)["layer1.0.conv2"] == ("rewritten", "already rewritten by f/r0")
    assert result.funnels[0].steps[-1] == ("not rewritten yet", 7)


def test_a_net_that_is_all_rewritten_has_nothing_left_to_do_and_that_is_no_error() -> None:
    net = [replace(s, rewritten="acmix/bottleneck-3x3") if s.id in SPATIAL else s for s in NET]
    result = match(net, load_rules("acmix"))
    assert result.candidates == ()
    assert result.unmet == ()


def test_a_rewritten_site_stays_with_the_rule_that_owned_it() -> None:
    file = rules({"match": {"stage": 4, "kernel": 3}}, {"match": {"kernel": 3}})
    result = match(rewritten("layer4.0.conv2"), file)
    assert refusals(result)["layer4.0.conv2"][0] == "rewritten"
    assert refusals(result, "r1")["layer4.0.conv2"][0] == "claimed"


def test_a_shared_module_rewritten_before_is_no_error() -> None:
    net = [replace(s, rewritten="f/r0") if s.path == "s" else s for s in SHARED]
    assert taken(match(net, rules({"match": {"kernel": 3}}))) == ["a", "b"]


# --- what is no 2-D convolution


def test_other_convolutions_are_listed_and_never_taken() -> None:
    net = [site("a"), site("b", 1, op="conv1d"), site("c", 2, op="conv_transpose2d")]
    result = match(net, rules({"match": {"in_channels": 64}}))
    assert taken(result) == ["a"]
    assert refusals(result)["b"] == ("op", "op conv1d, only conv2d can be rewritten")
    assert result.funnels[0].steps[0] == ("convs", 1)
    assert taken(match(net, rules({"match": {"op": "conv1d"}}))) == []


def test_functional_convolutions_are_candidates_like_others() -> None:
    assert taken(match([site("block:conv2d", kind="functional")], rules({"match": {"kernel": 3}}))) == ["block:conv2d"]


# --- expect


@pytest.mark.parametrize(
    ("expect", "line"),
    [
        ({"sites": 15}, "16 sites, expected 15: 53 convs > 16 kernel 3"),
        ({"sites": 17}, "16 sites, expected 17: 53 convs > 16 kernel 3; nearest: conv1 (kernel 7x7, wanted 3)"),
        ({"sites": "<=3"}, "16 sites, expected 0..3: 53 convs > 16 kernel 3"),
        ({"sites": {"min": 20}}, "16 sites, expected >=20: 53 convs > 16 kernel 3; nearest: conv1 (kernel 7x7"),
        ({"sites": {"max": 3}}, "16 sites, expected 0..3"),
        ({"sites": "1..3"}, "16 sites, expected 1..3"),
        ({"stages": [3, 4]}, "sites in stages 1, 2, 3, 4, expected 3, 4"),
        ({"stages": [1, 2, 3, 4, 5]}, "sites in stages 1, 2, 3, 4, expected 1, 2, 3, 4, 5"),
        ({"includes": ["conv1"]}, "no site is 'conv1', which 'includes' asks for"),
        ({"includes": ["layer5.*"]}, "no site is 'layer5.*'"),
        ({"excludes": ["layer1.*"]}, "layer1.0.conv2 is 'layer1.*', which 'excludes' forbids"),
    ],
)
def test_an_expectation_that_does_not_hold_is_an_error_with_what_was_seen(expect: dict[str, Any], line: str) -> None:
    file = rules({"match": {"kernel": 3}, "expect": expect})
    with pytest.raises(RuleError, match=re.escape(f"rule 'r0': {line}")) as caught:
        match(NET, file)
    assert len(str(caught.value).splitlines()) == 1
    assert len(search(NET, file).candidates) == 16


@pytest.mark.parametrize(
    "expect",
    [
        {"sites": 16},
        {"sites": ">=16"},
        {"sites": "<=16"},
        {"sites": "10..16"},
        {"sites": {"min": 16, "max": 16}},
        {"stages": [1, 2, 3, 4]},
        {"includes": ["layer4.*", "layer1.0.conv2"], "excludes": ["conv1", "*.conv1"]},
    ],
)
def test_an_expectation_that_holds_is_no_error(expect: dict[str, Any]) -> None:
    match(NET, rules({"match": {"kernel": 3}, "expect": expect}))


def test_the_expectation_of_a_whole_file_counts_all_rules_together() -> None:
    parts = ({"match": {"role": "stem"}}, {"match": {"kernel": 3}})
    match(NET, rules(*parts, expect={"sites": 17, "stages": [0, 1, 2, 3, 4]}))
    with pytest.raises(RuleError, match="f: all rules together: 17 sites, expected 16"):
        match(NET, rules(*parts, expect={"sites": 16}))


def test_all_unmet_expectations_are_told_at_once_with_their_lines() -> None:
    text = (
        "version: 1\nrules:\n  - {id: a, match: {kernel: 5}, replace: {block: x}}\n"
        "  - {id: b, match: {stage: 7}, replace: {block: x}}\n"
    )
    with pytest.raises(RuleError) as caught:
        match(NET, parse_rules(text, "f.yaml"))
    lines = str(caught.value).splitlines()
    assert [line.split(": 0")[0] for line in lines] == ["f.yaml:3: rule 'a'", "f.yaml:4: rule 'b'"]


def test_an_expression_that_cannot_be_computed_names_rule_and_site() -> None:
    with pytest.raises(RuleError, match=re.escape("rule 'r0': at conv1: expression '1 // stage > 1': division")):
        match(NET, rules({"match": {"where": "1 // stage > 1"}}))


def test_an_exclude_that_excludes_nothing_is_noted() -> None:
    result = match(NET, rules({"match": {"kernel": 3}, "exclude": [{"name": "layr*"}, {"stage": 1}]}))
    assert result.notes == ("rules: rule 'r0': 'not name layr*' excludes nothing",)


def test_named_selectors_and_variables_reach_the_match() -> None:
    file = rules(
        {"match": {"use": ["late", "spatial"], "where": "out_channels >= vars.least"}},
        selectors={"late": {"stage": {"from_end": [1, 2]}}, "spatial": {"role": "bottleneck_spatial"}},
        vars={"least": 512},
    )
    result = match(NET, file)
    assert taken(result) == SPATIAL[13:]
    assert [label for label, _ in result.funnels[0].steps] == [
        "convs",
        "stage 1 or 2 from the end",
        "role bottleneck_spatial",
        "where out_channels >= vars.least",
    ]


def test_matching_changes_nothing_it_is_given() -> None:
    net, file = resnet50(), rules({"match": {"kernel": 3}})
    before, data = list(net), file.to_data()
    claims: dict[str, str] = {}
    match(net, file, claims)
    assert (net, file.to_data(), claims) == (before, data, {})


def test_no_sites_at_all_is_an_unmet_expectation_and_no_crash() -> None:
    with pytest.raises(RuleError, match=r"0 sites, expected >=1: 0 convs$"):
        match([], load_rules("acmix"))


# --- roles


def test_a_role_correction_changes_the_sites_it_names_and_no_other() -> None:
    file = rules(
        {"match": {"role": "transition"}, "expect": {"sites": 4}},
        roles=[{"match": {"name": "*.downsample.0"}, "role": "transition"}],
    )
    corrected = correct_roles(NET, file)
    changed = [s.id for old, s in zip(NET, corrected, strict=True) if old != s]
    assert changed == [f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)]
    assert len(match(corrected, file).candidates) == 4


def test_a_role_correction_that_fits_nothing_is_an_error() -> None:
    file = rules({"match": {"kernel": 3}}, roles=[{"match": {"name": "gone.*"}, "role": "stem"}])
    with pytest.raises(RuleError, match=re.escape("roles[0]: no site is name gone.*; nothing to call stem")):
        correct_roles(NET, file)


def test_corrections_all_look_at_the_roles_as_found() -> None:
    file = rules(
        {"match": {"kernel": 3}},
        roles=[
            {"match": {"role": "downsample"}, "role": "stem"},
            {"match": {"role": "stem"}, "role": "head"},
        ],
    )
    roles = [s.role for s in correct_roles(NET, file)]
    assert (roles.count("head"), roles.count("stem")) == (1, 4)


# --- tests of a rule file


@pytest.mark.parametrize(
    ("found", "wish", "matched", "missing", "noisy"),
    [
        (["a", "b"], 2, ("a", "b"), (), ()),
        (["a", "b"], ">=1", ("a", "b"), (), ()),
        (["a"], 3, ("a",), ("2 more",), ()),
        (["a", "b", "c"], 1, ("a",), (), ("b", "c")),
        ([], 0, (), (), ()),
        (["a"], 0, (), (), ("a",)),
        (["a", "b"], ["b", "c"], ("b",), ("c",), ("a",)),
        (["a"], ["a"], ("a",), (), ()),
        ([], [], (), (), ()),
        (["a"], [], (), (), ("a",)),
    ],
)
def test_a_wish_is_judged_as_matched_missing_and_noisy(
    found: list[str], wish: Any, matched: tuple[str, ...], missing: tuple[str, ...], noisy: tuple[str, ...]
) -> None:
    result = judge(found, Wish.read(wish))
    assert (result.matched, result.missing, result.noisy) == (matched, missing, noisy)
    assert result.passed is (not missing and not noisy)


def test_a_judgement_reads_as_one_line() -> None:
    text = str(judge(["a", "b"], Wish.read(["b", "c"])))
    assert text == "1 matched, wanted b, c; missing: c; noisy: a"


def test_the_sites_of_every_rule_are_found_whatever_it_expects() -> None:
    file = load_rules("acmix")
    assert sites_by_rule(resnext50(), file) == {"bottleneck-3x3": ()}
    assert sites_by_rule(NET, file) == {"bottleneck-3x3": tuple(SPATIAL)}
    wishes = file.tests[5].sites
    wish = wishes.rule("bottleneck-3x3")
    assert wish is not None
    assert judge((), wish).passed
