"""The one-line spelling of a match: what it means, that it reads back, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convrewrite.errors import RuleError
from convrewrite.match import select
from convrewrite.selectline import parse, to_line
from convrewrite.sites import ROLES
from tests.rules.networks import resnet50

SAME = [
    ("role:stem", {"role": "stem"}),
    (
        "role:bottleneck_spatial,stage:3..4,not name:layer3.0.*",
        {"role": "bottleneck_spatial", "stage": "3..4", "not": {"name": "layer3.0.*"}},
    ),
    ("kernel:3|5", {"kernel": [3, 5]}),
    ("kernel:1x7|>=5", {"kernel": ["1x7", ">=5"]}),
    ("position:last|1", {"position": ["last", 1]}),
    ("params:>=1.5M", {"params": ">=1.5M"}),
    ("name:0", {"name": "0"}),
    ("name:conv1|layer[34].*", {"name": ["conv1", "layer[34].*"]}),
    ("name:re:layer(1|2)\\.0,kernel:3", {"name": "re:layer(1|2)\\.0", "kernel": 3}),
    ("name:re:a{1,2}", {"name": "re:a{1,2}"}),
    ('name:"a,b"', {"name": "a,b"}),
    ('name:"a|b"|c', {"name": ["a|b", "c"]}),
    ('name:"[a"', {"name": "[a"}),
    ('name:"a\\"b"', {"name": 'a"b'}),
    ("follows:relu+batch_norm", {"follows": ["relu", "batch_norm"]}),
    ("where:clamp(h, 1, 20) > 3 and w > 2", {"where": "clamp(h, 1, 20) > 3 and w > 2"}),
    ("use:late|wide", {"use": ["late", "wide"]}),
    ("not role:stem,not kernel:1", {"not": [{"role": "stem"}, {"kernel": 1}]}),
    ("not role:stem|head", {"not": {"role": ["stem", "head"]}}),
]


@pytest.mark.parametrize(("line", "match"), SAME, ids=[line for line, _ in SAME])
def test_a_line_and_a_match_say_the_same_both_ways(line: str, match: dict[str, Any]) -> None:
    assert parse(line) == match
    assert to_line(match) == line


def test_spaces_around_the_parts_mean_nothing() -> None:
    assert parse(" role : stem ,  not  kernel: 3 | 5 ") == {"role": "stem", "not": {"kernel": [3, 5]}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "'' is no 'key:value'"),
        (",", "is no 'key:value'"),
        ("role:stem,", "is no 'key:value'"),
        ("role", "'role' is no 'key:value'"),
        ("role:", "'role:' is no 'key:value'"),
        ("not", "'not' is no 'key:value'"),
        ("not not role:stem", "unknown key 'not role'"),
        ("kernal:3", "unknown key 'kernal'; did you mean 'kernel'?"),
        ("notrole:stem", "unknown key 'notrole'"),
        ("any:x", "unknown key 'any'"),
        ("stage:3,stage:4", "'stage' is given twice; write stage:this|that for either"),
        ("kernel:3|", "an empty value for 'kernel'"),
        ("kernel:|3", "an empty value for 'kernel'"),
        ('name:"a', "a closing '\"' is missing"),
        ("where:clamp(h, 1", "a closing ')' is missing"),
        ("name:a[b", "a closing ']' is missing"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_line_of_error(line: str, message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)) as caught:
        parse(line)
    assert str(caught.value).startswith("--select: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "match",
    [
        {"any": [{"kernel": 3}]},
        {"all": [{"kernel": 3}]},
        {"not": {"kernel": 3, "stage": 1}},
        {"not": {"not": {"kernel": 3}}},
        {"stage": {"from_end": 1}},
        {"kernel": True},
    ],
)
def test_a_match_that_no_line_can_say_is_refused(match: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match="in one line; use a rule file"):
        to_line(match)


NAMES = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=12).filter(
    lambda text: text == text.strip()
)
NUMBERS = st.one_of(st.integers(1, 99), st.sampled_from(["3..4", ">=2", "<=9", "!=3", ">1", "<5"]))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "role": st.sampled_from(ROLES),
    "kernel": NUMBERS,
    "stage": NUMBERS,
    "groups": st.one_of(NUMBERS, st.just("depthwise")),
    "name": NAMES,
    "inside": NAMES,
    "follows": st.sampled_from(["relu", "batch_norm", "conv2d"]),
}


def _match_part(key: str) -> st.SearchStrategy[Any]:
    return st.one_of(VALUES[key], st.lists(VALUES[key], min_size=2, max_size=3))


MATCHES = st.fixed_dictionaries({}, optional={key: _match_part(key) for key in VALUES}).filter(bool)
NEGATED = st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.fixed_dictionaries({key: _match_part(key)}))


@settings(max_examples=150, deadline=None)
@given(match=MATCHES, negated=st.lists(NEGATED, max_size=3))
def test_every_flat_match_reads_back_from_its_line(match: dict[str, Any], negated: list[dict[str, Any]]) -> None:
    if negated:
        match = {**match, "not": negated[0] if len(negated) == 1 else negated}
    assert parse(to_line(match)) == match


@settings(max_examples=150, deadline=None)
@given(line=st.one_of(st.text(max_size=40), st.text('role:stem,kernel|"\\()[]{}not 3<>=.*', max_size=40)))
def test_any_text_is_a_match_or_one_line_of_error(line: str) -> None:
    told = ""
    try:
        select(resnet50()[:3], parse(line))
    except RuleError as error:
        told = str(error)
    assert all(part.startswith("--select") and part.isprintable() for part in told.split("\n") if told)
