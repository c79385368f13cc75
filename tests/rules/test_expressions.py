"""The arithmetic language: what it computes, and all that it refuses, in one line each."""

from __future__ import annotations

import re
import time

import pytest

from convrewrite.errors import ConvrewriteError
from convrewrite.expressions import MissingFactError, parse
from convrewrite.facts import FACTS, site_facts
from tests.rules.networks import resnet50, site

FACTS_OF_A_SITE = {
    "in_channels": 64,
    "out_channels": 256,
    "kernel": 3,
    "h": 14,
    "w": 10,
    "area": 140,
    "stage": 3,
    "role": "bottleneck_spatial",
    "vars": {"head_dim": 32, "mode": "wide"},
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1 + 2 * 3", 7),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("7 / 2", 3.5),
        ("7 % 3", 1),
        ("2 ** 10", 1024),
        ("-(3)", -3),
        ("+3", 3),
        ("in_channels * kernel", 192),
        ("out_channels // vars.head_dim", 8),
        ("clamp(out_channels // 32, 1, 8)", 8),
        ("clamp(0, 1, 8)", 1),
        ("clamp(5, 1, 8)", 5),
        ("min(h, w)", 10),
        ("max(h, w, 20)", 20),
        ("gcd(48, 36)", 12),
        ("round_to(50, 8)", 48),
        ("round_to(52, 8)", 56),
        ("round_to(1, 8)", 8),
        ("divisor_near(256, 7)", 8),
        ("divisor_near(48, 7)", 6),
        ("divisor_near(17, 9)", 1),
        ("iff(area <= 14*14, 7, 5)", 7),
        ("if(area <= 100, 7, 5)", 5),
        ("if (area > 100, 1, 2) + if(h > w, 10, 20)", 11),
        ("1 < 2 < 3", True),
        ("1 < 3 < 2", False),
        ("h == 14 and w == 10", True),
        ("h == 1 or w == 1", False),
        ("not h == 1", True),
        ("role == 'bottleneck_spatial'", True),
        ("role != 'stem'", True),
        ("vars.mode == 'wide'", True),
        ("iff(h > 1, 'a', 'b')", "a"),
        ("  h  ", 14),
    ],
)
def test_an_expression_has_the_value_that_arithmetic_gives_it(text: str, wanted: object) -> None:
    value = parse(text, {"head_dim", "mode"}).value(FACTS_OF_A_SITE)
    assert value == wanted
    assert type(value) is type(wanted)


def test_and_and_or_stop_early_so_that_a_guard_can_guard() -> None:
    assert parse("w == 0 or h // w == 1").value(FACTS_OF_A_SITE) is True
    assert parse("w != 10 and 1 // 0 == 1").value(FACTS_OF_A_SITE) is False
    assert parse("iff(w == 10, 1, 1 // 0)").value(FACTS_OF_A_SITE) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty expression"),
        (" ", "an empty expression"),
        ("1 +", "column 4"),
        ("out_chanels * 2", "column 1: unknown name 'out_chanels'; did you mean 'out_channels'?"),
        ("1 + widht", "column 5: unknown name 'widht'"),
        ("  1 + zzz", "column 7: unknown name 'zzz'"),
        ("vars.haed_dim", "unknown variable 'vars.haed_dim'; did you mean 'head_dim'?"),
        ("vars", "unknown name 'vars'"),
        ("clmp(1, 2, 3)", "unknown function 'clmp'; did you mean 'clamp'?"),
        ("clamp(1, 2)", "clamp takes 3 arguments, got 2"),
        ("if(1, 2)", "iff takes 3 arguments, got 2"),
        ("min(1)", "min takes 2 to 16 arguments, got 1"),
        ("min", "'min' is a function"),
        ("min(a=1, b=2)", "not part of the language"),
        ("min(1, *(2, 3))", "not part of the language"),
        ("__import__('os')", "unknown function '__import__'"),
        ("h.__class__", "an attribute is not part of the language"),
        ("vars.a.b", "an attribute is not part of the language"),
        ("().__class__", "not part of the language"),
        ("[1, 2][0]", "not part of the language"),
        ("lambda: 1", "lambda is not part of the language"),
        ("1 if h else 2", "'a if c else b' is not part of the language"),
        ("[x for x in (1, 2)]", "not part of the language"),
        ("(h := 3)", "not part of the language"),
        ("f'{h}'", "not part of the language"),
        ("b'x' == h", "not part of the language"),
        ("1j", "not part of the language"),
        ("...", "not part of the language"),
        ("None", "not part of the language"),
        ("h & 1", "not part of the language"),
        ("h << 60", "not part of the language"),
        ("~h", "not part of the language"),
        ("h @ w", "not part of the language"),
        ("role in ('stem', 'head')", "not part of the language"),
        ("role is 'stem'", "not part of the language"),
        ("role == 'bottlneck'", "unknown role 'bottlneck'; did you mean 'bottleneck_spatial'?"),
        ("import os", "column 1"),
        ("h; w", "column 2"),
        ("h\x00", "cannot be read|null bytes"),
        ("1e999", "a number beyond"),
        ("9" * 30, "a number beyond"),
        ("(" * 240 + "1" + ")" * 240, "nested deeper|too many nested|cannot be read"),
        ("+" * 100 + "1", "nested deeper than 24"),
        ("-" * 499 + "1", "nested deeper than 24|cannot be read"),
        ("1" + "+1" * 300, "601 characters, at most 500"),
    ],
)
def test_what_is_not_of_the_language_is_refused_when_it_is_read(text: str, message: str) -> None:
    with pytest.raises(ConvrewriteError, match=message if "|" in message else re.escape(message)) as caught:
        parse(text, {"head_dim"})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 // 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9**9**9", "exponent 387420489, at most 64"),
        ("9**64", "beyond 1e+18"),
        ("10**9 * 10**9 * 10", "beyond 1e+18"),
        ("(-8) ** 0.5", "not a real number"),
        ("10.0 ** 64 ** 1", "beyond 1e+18"),
        ("clamp(1, 5, 2)", "clamp needs low <= high"),
        ("gcd(1.5, 2)", "gcd needs whole numbers"),
        ("round_to(5, 0)", "round_to needs a step above 0"),
        ("divisor_near(0, 2)", "divisor_near needs a number from 1"),
        ("divisor_near(10**12, 2)", "divisor_near needs a number from 1"),
        ("role + 1", "used as a number"),
        ("role and 1", "used as true or false"),
        ("role == vars.head_dim", "compares text with a number"),
        ("min(role, 1)", "used as a number"),
    ],
)
def test_what_cannot_be_computed_is_one_line_that_quotes_the_expression(text: str, message: str) -> None:
    with pytest.raises(ConvrewriteError, match=re.escape(message)) as caught:
        parse(text).value(FACTS_OF_A_SITE)
    assert f"'{text}'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_notorious_tower_of_powers_ends_at_once() -> None:
    started = time.perf_counter()
    with pytest.raises(ConvrewriteError):
        parse("9**9**9**9").value({})
    assert time.perf_counter() - started < 0.5


def test_a_fact_that_a_site_lacks_is_an_error_of_its_own() -> None:
    with pytest.raises(MissingFactError, match="'stage' has no value at this site"):
        parse("stage * 2").value({"stage": None})


def test_an_expression_knows_the_names_it_uses_and_what_it_gives() -> None:
    expression = parse("clamp(out_channels // vars.head_dim, 1, h)")
    assert expression.names == {"out_channels", "vars.head_dim", "h"}
    assert [parse(t).kind for t in ("h", "h > 1", "role", "vars.x", "if(h>1, 1, 2)", "not h")] == [
        "number",
        "truth",
        "text",
        "any",
        "number",
        "truth",
    ]


def test_every_documented_fact_has_a_value_at_an_ordinary_site() -> None:
    conv2 = next(s for s in resnet50() if s.path == "layer2.0.conv2")
    facts = site_facts(conv2, 4, {"x": 1})
    assert {name: facts[name] for name in FACTS} == {
        "in_channels": 128,
        "out_channels": 128,
        "kernel": 3,
        "stride": 2,
        "dilation": 1,
        "groups": 1,
        "h": 56,
        "w": 56,
        "h_out": 28,
        "w_out": 28,
        "area": 3136,
        "area_out": 784,
        "stage": 2,
        "stage_from_end": 3,
        "n_stages": 4,
        "block": 0,
        "block_from_end": 4,
        "position": 2,
        "index": 12,
        "params": 147456,
        "flops": 231211008,
        "role": "bottleneck_spatial",
    }
    assert facts["vars"] == {"x": 1}


def test_an_oblong_kernel_has_no_single_size() -> None:
    with pytest.raises(MissingFactError, match="'kernel'"):
        parse("kernel * 2").value(site_facts(site("a", kernel=(1, 7))))
