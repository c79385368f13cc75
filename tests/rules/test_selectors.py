"""Every selector: which sites of ResNet-50 (and of small odd cases) it fits, which not, and the reason it gives."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from convrewrite.errors import RuleError
from convrewrite.match import select
from convrewrite.selectors import SELECTORS
from convrewrite.sites import Site
from tests.rules.networks import ids, resnet50, resnext50, site

NET = resnet50()


def fits(one: Site, **match: Any) -> bool:
    """Whether the match fits this site, told by itself."""
    fitting, refused = select([one], match)
    assert len(fitting) + len(refused) == 1
    return bool(fitting)


def reason(one: Site, **match: Any) -> str:
    (refusal,) = select([one], match)[1]
    return refusal.reason


# How many of ResNet-50's 53 convolutions fit: counted in the table of He et al. 2015.
@pytest.mark.parametrize(
    ("match", "count"),
    [
        ({"op": "conv2d"}, 53),
        ({"op": "conv1d"}, 0),
        ({"op": ["conv1d", "conv2d"]}, 53),
        ({"role": "bottleneck_spatial"}, 16),
        ({"role": ["stem", "downsample"]}, 5),
        ({"role": "se"}, 0),
        ({"kernel": 3}, 16),
        ({"kernel": 1}, 36),
        ({"kernel": [3, 7]}, 17),
        ({"kernel": ">=3"}, 17),
        ({"kernel": "!=1"}, 17),
        ({"kernel": "2..6"}, 16),
        ({"kernel": "7x7"}, 1),
        ({"kernel": "1x7"}, 0),
        ({"kernel": "3"}, 16),
        ({"stride": 2}, 7),
        ({"stride": "<2"}, 46),
        ({"dilation": 1}, 53),
        ({"dilation": ">1"}, 0),
        ({"groups": 1}, 53),
        ({"groups": "depthwise"}, 0),
        ({"in_channels": 3}, 1),
        ({"in_channels": ">=1024"}, 5 + 2 + 2),
        ({"out_channels": 2048}, 4),
        ({"out_channels": "512..1024"}, 5 + 7 + 6),
        ({"size": 224}, 1),
        ({"size": "<=14", "kernel": 3}, 8),
        ({"size": "56x56", "kernel": 3}, 4),
        ({"size": "56x28"}, 0),
        ({"area": "50176"}, 1),
        ({"area": "<=196", "kernel": 3}, 8),
        ({"params": ">2M"}, 3 + 1),
        ({"params": "2359296"}, 3),
        ({"params": 2359296}, 3),
        ({"flops": "0..10"}, 0),
        ({"stage": 0}, 1),
        ({"stage": 4}, 10),
        ({"stage": "3..4"}, 29),
        ({"stage": [1, 4]}, 20),
        ({"stage": ">=3"}, 29),
        ({"stage": {"from_end": 1}}, 10),
        ({"stage": {"from_end": [1, 2]}}, 29),
        ({"stage": [1, {"from_end": 1}]}, 20),
        ({"stage_from_end": 2}, 19),
        ({"block": 0}, 16),
        ({"block": {"from_end": 1}}, 12),
        ({"block": ">=3"}, 12),
        ({"block_from_end": 1}, 12),
        ({"position": 1}, 20),
        ({"position": 2}, 16),
        ({"position": "middle"}, 16),
        ({"position": "last"}, 20),
        ({"position": "first"}, 20),
        ({"position": ["first", 3]}, 36),
        ({"position": "last", "role": "downsample"}, 4),
        ({"name": "conv1"}, 1),
        ({"name": "layer1.0.conv2"}, 1),
        ({"name": "layer1"}, 0),
        ({"name": "conv2"}, 0),
        ({"name": "layer3.*"}, 19),
        ({"name": "glob:layer3.*"}, 19),
        ({"name": "glob:conv1"}, 1),
        ({"name": "layer[34].?.conv2"}, 9),
        ({"name": ["conv1", "layer4.*"]}, 11),
        ({"name": "re:layer[12]\\.0\\..*"}, 8),
        ({"name": "re:layer1"}, 0),
        ({"name": "*.conv2"}, 16),
        ({"module": "Conv2d"}, 53),
        ({"module": "conv2d"}, 0),
        ({"module": "*Same*"}, 0),
        ({"inside": "Bottleneck"}, 52),
        ({"inside": "bottleneck"}, 0),
        ({"inside": "layer2"}, 13),
        ({"inside": ["layer1", "layer2.0"]}, 14),
        ({"inside": "layer2.*"}, 13),
        ({"inside": "layer"}, 0),
        ({"follows": "relu"}, 16),
        ({"follows": ["relu", "batch_norm"]}, 16),
        ({"follows": ["batch_norm", "relu"]}, 0),
        ({"follows": ["relu", "batch_norm", "conv2d", "relu"]}, 0),
        ({"precedes": "batch_norm"}, 32),
        ({"precedes": ["batch_norm", "relu"]}, 32),
        ({"precedes": "relu"}, 0),
        ({"where": "out_channels % 512 == 0"}, 22),
        ({"where": "area <= 14*14 and kernel == 3"}, 8),
        ({"where": "role == 'stem'"}, 1),
        ({"where": "stage == n_stages"}, 10),
        ({"all": [{"kernel": 3}, {"stage": 4}]}, 3),
        ({"any": [{"kernel": 7}, {"stage": 4, "kernel": 3}]}, 4),
        ({"not": {"kernel": 1}}, 17),
        ({"not": {"kernel": 1, "stage": 4}}, 46),
        ({"not": [{"kernel": 1}, {"stage": 0}]}, 16),
        ({"kernel": 3, "not": {"name": "layer3.0.*"}}, 15),
        ({"all": [{"any": [{"stage": 1}, {"stage": 2}]}, {"not": {"any": [{"kernel": 1}]}}]}, 7),
    ],
)
def test_a_match_fits_as_many_of_resnet50_as_its_table_says(match: dict[str, Any], count: int) -> None:
    assert len(select(NET, match)[0]) == count


def test_the_hand_written_net_is_resnet50() -> None:
    # torchvision's documentation gives 25,557,032 parameters: 2,049,000 in fc, 53,120 in the batch norms.
    assert len(NET) == 53
    assert sum(s.params for s in NET) == 25_557_032 - 2_049_000 - 53_120


ODD = {
    "1x7": site("a", kernel=(1, 7)),
    "depthwise": site("b", groups=64),
    "grouped": site("c", groups=32),
    "one channel": site("d", in_channels=1),
    "oblong map": site("e", size=(56, 28)),
    "off the path": site("f", stage=None),
    "shared": site("g", calls=2, call=1),
    "unshaped": replace(site("h"), in_shape=(), out_shape=()),
    "alone": site("i"),
}


@pytest.mark.parametrize(
    ("which", "match", "wanted"),
    [
        ("1x7", {"kernel": "1x7"}, True),
        ("1x7", {"kernel": "7x1"}, False),
        ("1x7", {"kernel": 1}, False),
        ("1x7", {"kernel": 7}, False),
        ("1x7", {"kernel": ">=3"}, False),
        ("1x7", {"kernel": ">=1"}, True),
        ("1x7", {"kernel": "!=1"}, True),
        ("depthwise", {"groups": "depthwise"}, True),
        ("depthwise", {"groups": 64}, True),
        ("depthwise", {"groups": ">1"}, True),
        ("grouped", {"groups": "depthwise"}, False),
        ("grouped", {"groups": ["depthwise", 32]}, True),
        ("one channel", {"groups": "depthwise"}, False),
        ("oblong map", {"size": 56}, False),
        ("oblong map", {"size": "56x28"}, True),
        ("oblong map", {"size": "<=56"}, True),
        ("oblong map", {"size": "<=28"}, False),
        ("off the path", {"stage": ">=0"}, False),
        ("off the path", {"stage": "!=3"}, False),
        ("off the path", {"stage": {"from_end": 1}}, False),
        ("off the path", {"where": "stage != 3"}, False),
        ("off the path", {"block": "!=1"}, False),
        ("off the path", {"position": "!=1"}, False),
        ("off the path", {"position": "last"}, False),
        ("off the path", {"not": {"stage": 1}}, True),
        ("shared", {"name": "g"}, True),
        ("shared", {"name": "g@1"}, True),
        ("shared", {"name": "g@0"}, False),
        ("unshaped", {"size": ">=1"}, False),
        ("unshaped", {"area": ">=1"}, False),
        ("unshaped", {"where": "h > 0"}, False),
        ("alone", {"inside": "*"}, False),
        ("alone", {"follows": "relu"}, False),
    ],
)
def test_odd_convolutions_match_what_they_are_and_nothing_else(which: str, match: dict[str, Any], wanted: bool) -> None:
    assert fits(ODD[which], **match) is wanted


@pytest.mark.parametrize(
    ("one", "match", "wanted"),
    [
        (NET[1], {"kernel": 3}, "kernel 1x1, wanted 3"),
        (NET[1], {"kernel": [3, 5]}, "kernel 1x1, wanted 3 or 5"),
        (NET[1], {"role": "stem"}, "role pointwise, wanted stem"),
        (NET[1], {"stage": "3..4"}, "stage 1, wanted 3..4"),
        (NET[1], {"stage": {"from_end": [1, 2]}}, "stage 1, wanted 1 or 2 from the end"),
        (NET[2], {"position": "last"}, "position 2 of 3, wanted last"),
        (NET[2], {"size": "<=28"}, "size 56x56, wanted <=28"),
        (NET[2], {"name": "layer2.*"}, "name layer1.0.conv2, wanted layer2.*"),
        (NET[2], {"inside": "BasicBlock"}, "inside Bottleneck in Sequential, wanted BasicBlock"),
        (NET[2], {"follows": ["batch_norm"]}, "follows relu, batch_norm, conv2d, wanted batch_norm"),
        (NET[0], {"follows": "relu"}, "follows nothing, wanted relu"),
        (NET[0], {"inside": "Bottleneck"}, "inside no module, wanted Bottleneck"),
        (NET[0], {"where": "h < 100"}, "not where h < 100"),
        (ODD["off the path"], {"stage": "3..4"}, "no stage known, wanted 3..4"),
        (ODD["off the path"], {"where": "stage > 1"}, "expression 'stage > 1': 'stage' has no value at this site"),
        (ODD["grouped"], {"groups": 1}, "groups 32, wanted 1"),
        (ODD["grouped"], {"groups": "depthwise"}, "groups 32, wanted depthwise"),
        (NET[2], {"not": {"kernel": 3}}, "is kernel 3, which is not wanted"),
        (NET[2], {"not": {"kernel": 3, "stage": 1}}, "is kernel 3, stage 1, which is not wanted"),
        (NET[2], {"any": [{"kernel": 5}, {"stage": 2}]}, "kernel 3x3, wanted 5 and stage 1, wanted 2"),
    ],
)
def test_the_reason_names_the_value_seen_and_the_value_wanted(one: Site, match: dict[str, Any], wanted: str) -> None:
    context = [one] if one not in NET else NET
    refused = {r.site.id: r.reason for r in select(context, match)[1]}
    assert refused[one.id] == wanted


def test_the_first_failing_clause_is_told_and_all_failing_ones_are_counted() -> None:
    refused = {r.site.id: r for r in select(NET, {"role": "bottleneck_spatial", "kernel": 3, "stage": 4})[1]}
    assert (refused["conv1"].clause, refused["conv1"].failed) == ("role", 3)
    assert (refused["layer1.0.conv2"].clause, refused["layer1.0.conv2"].failed) == ("stage", 1)


def test_a_grouped_net_does_not_match_groups_1() -> None:
    assert len(select(resnext50(), {"kernel": 3, "groups": 1})[0]) == 0
    assert len(select(resnext50(), {"kernel": 3, "groups": 32})[0]) == 16


# (match, part of the message): wrong for every network there is.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "an empty selector would match everything"),
    ({"kernal": 3}, "kernal: unknown key; did you mean 'kernel'?"),
    ({"xyzzy": 3}, "xyzzy: unknown key; known: "),
    ({"role": "bottlneck"}, "'bottlneck' is no role; did you mean 'bottleneck_spatial'?"),
    ({"role": 3}, "3 is no role"),
    ({"role": []}, "an empty list can never match"),
    ({"role": None}, "None is no role"),
    ({"op": "conv2"}, "'conv2' is no kind of convolution; did you mean 'conv2d'?"),
    ({"kernel": 0}, "0 can never match; the least value is 1"),
    ({"kernel": -1}, "'-1' is no number"),
    ({"kernel": "<1"}, "'<1' can never match"),
    ({"kernel": "<=0"}, "'<=0' can never match"),
    ({"kernel": "0x3"}, "0 can never match"),
    ({"kernel": "3x3x3"}, "'3x3x3' is no number"),
    ({"kernel": True}, "True is no number"),
    ({"kernel": 3.0}, "'3.0' is no whole number"),
    ({"kernel": 3.5}, "is no whole number"),
    ({"kernel": "three"}, "'three' is no number; write 3, [3, 5], '3..5', '>=3', '<=3', '!=3', '1x7'"),
    ({"kernel": []}, "an empty list can never match"),
    ({"kernel": [3, "x"]}, "'x' is no number"),
    ({"kernel": {"min": 3}}, "is no number"),
    ({"kernel": "1M"}, "'1M' is no whole number"),
    ({"stage": "4..3"}, "'4..3' is an empty range; write '3..4'"),
    ({"stage": "=>3"}, "'=>3' is no number"),
    ({"stage": {"from_end": 0}}, "0 can never match"),
    ({"stage": {"fromend": 1}}, "wanted {from_end: N}"),
    ({"stage": {}}, "wanted {from_end: N}"),
    ({"stage": "<0"}, "'<0' can never match"),
    ({"position": 0}, "0 can never match"),
    ({"position": "lst"}, "'lst' is no number; did you mean 'last'?"),
    ({"groups": "depthwize"}, "did you mean 'depthwise'?"),
    ({"params": "1X"}, "'1X' is no number"),
    ({"name": 0}, "0 is not text; put it in quotes"),
    ({"name": ""}, "'' is no name"),
    ({"name": " a"}, "' a' is no name"),
    ({"name": "a\nb"}, "is no name"),
    ({"name": "re:("}, "'re:(' is no regular expression"),
    ({"name": "re:a{99999999999}"}, "is no regular expression"),
    ({"follows": []}, "an empty chain says nothing"),
    ({"follows": "BatchNorm2d"}, "'BatchNorm2d' is no kind of operation"),
    ({"follows": [["relu"]]}, "is no kind of operation"),
    ({"where": 3}, "3 is no expression"),
    ({"where": "h * w"}, "'h * w' gives a number, wanted true or false"),
    ({"where": "role"}, "gives a text"),
    ({"where": "hh > 3"}, "unknown name 'hh'"),
    ({"where": "vars.x > 3"}, "unknown variable 'vars.x'"),
    ({"where": "__import__('os').system('ls') == 0"}, "not part of the language"),
    ({"any": []}, "an empty list"),
    ({"all": {}}, "an empty selector would match everything"),
    ({"not": {}}, "an empty selector would match everything"),
    ({"not": [{"kernal": 1}]}, "not[0].kernal: unknown key"),
    ({"any": [{"kernel": 3}, 3]}, "any[1]: 3 is no match, wanted keys and values"),
    ({"any": "x"}, "'x' is no match"),
    ({"use": "late"}, "unknown selector 'late'; define it under 'selectors:'"),
    ({"use": 3}, "unknown selector 3"),
    ({"use": []}, "an empty list"),
]


@pytest.mark.parametrize(("match", "message"), WRONG, ids=[repr(match) for match, _ in WRONG])
def test_a_value_that_could_never_be_right_is_an_error_and_no_silent_mismatch(
    match: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        select(NET, match)
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_is_wrong_with_a_match_is_told_at_once() -> None:
    with pytest.raises(RuleError) as caught:
        select(NET, {"kernal": 3, "role": "x", "not": {"stage": "b"}})
    assert len(str(caught.value).splitlines()) == 3


def test_a_match_nested_beyond_reason_is_refused() -> None:
    match: dict[str, Any] = {"kernel": 3}
    for _ in range(60):
        match = {"not": match}
    with pytest.raises(RuleError, match="nested deeper than 20 levels"):
        select(NET, match)


def test_every_selector_says_in_one_line_what_it_is() -> None:
    assert len(SELECTORS.names()) >= 20
    for name, selector in SELECTORS.items():
        assert selector.summary.endswith("."), name
        assert len(selector.summary) < 120, name


def test_ids_are_unique_in_the_hand_written_net() -> None:
    assert len(set(ids(NET))) == 53
