"""Figures, each expected value worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convrewrite.report import figures
from tests.report.sample import PARAMS, conv_site, resnet50_sites

SITE = conv_site("c", 0, (128, 256), 3, (56, 28))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00K"),
        (1234, "1.23K"),
        (36_864, "36.9K"),
        (99_949, "99.9K"),
        (99_950, "100K"),
        (231_211_008, "231M"),
        (999_499, "999K"),
        (999_500, "1.00M"),
        (8_178_000_000, "8.18G"),
        (-36_864, "-36.9K"),
    ],
)
def test_a_count_has_three_significant_digits(number: int, text: str) -> None:
    assert figures.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (25_557_032, "25.56M"), (11_200_000_000, "11.20G"), (999_994, "999.99K"), (999_996, "1.00M")],
)
def test_a_total_has_two_decimals(number: int, text: str) -> None:
    assert figures.total(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12_897_485, "12.3 MiB"),
        (1024**2 - 1, "1.0 MiB"),
        (3 * 1024**3, "3.0 GiB"),
    ],
)
def test_bytes_are_in_binary_units(number: int, text: str) -> None:
    assert figures.size(number) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (100, 125.6, "+25.6 %"),
        (200, 194, "-3.0 %"),
        (5, 5, "0 %"),
        (0, 0, "0 %"),
        (0, 5, "new"),
        (5, 0, "-100.0 %"),
        (10**9, 10**9 + 1, "+0.0 %"),
    ],
)
def test_a_change_in_percent_has_its_sign(before: float, after: float, text: str) -> None:
    assert figures.percent(before, after) == text


def test_a_share_of_nothing_is_not_a_number() -> None:
    assert figures.share(1, 4) == "25.0 %"
    assert figures.share(0, 0) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.1e-7, "3.1e-07"), (0.0123, "0.0123"), (0.12, "0.12"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_a_drift_shows_its_size_and_what_is_not_finite(value: float, text: str) -> None:
    assert figures.small(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0004, "0.4 ms"), (0.0123, "12 ms"), (3.412, "3.41 s")])
def test_seconds_are_in_the_unit_that_reads_best(value: float, text: str) -> None:
    assert figures.seconds(value) == text


def test_a_change_that_is_none_is_one_figure() -> None:
    assert figures.change(36_864, 54_600) == "36.9K => 54.6K"
    assert figures.change(36_864, 36_864) == "36.9K"


def test_a_convolution_shows_only_what_is_not_the_default() -> None:
    assert figures.conv(conv_site("c", 0, (64, 64), 3, (56, 56))) == "conv 3x3 64>64 56x56"
    assert figures.conv(SITE) == "conv 3x3/2 128>256 56x56>28x28"
    spec = replace(SITE.conv, groups=32, dilation=(2, 2), kernel=(1, 7), stride=(2, 1))
    assert figures.conv(replace(SITE, conv=spec)) == "conv 1x7/2x1 g32 d2 128>256 56x56>28x28"


def test_the_place_of_a_site_is_its_stage_and_block() -> None:
    assert figures.place(SITE) == "-"
    assert figures.place(replace(SITE, stage=3)) == "3"
    assert figures.place(replace(SITE, stage=3, block=0)) == "3.0"


def test_options_are_in_the_order_of_their_names_whatever_order_they_came_in() -> None:
    assert (
        figures.options({"window": 7, "heads": 4}) == figures.options({"heads": 4, "window": 7}) == "heads=4 window=7"
    )
    assert figures.options({"gate": True, "mid": None, "sizes": [1, 2]}) == "gate=true mid=none sizes=[1,2]"
    assert figures.options({}) == ""


def test_text_from_a_model_cannot_break_a_line_or_reach_the_terminal() -> None:
    assert figures.plain("a\nb\x1b[31mc\u202e") == "a\\nb\\x1b[31mc\\u202e"
    assert figures.plain("features.0·ü") == "features.0·ü"


def test_words_are_in_the_plural_unless_there_is_one() -> None:
    assert figures.plural(1, "block") == "1 block"
    assert figures.plural(0, "block") == "0 blocks"


def test_the_sample_is_resnet50() -> None:
    """Parameters by torchvision's published count; 4.09 G multiply-adds by its documentation (GFLOPS 4.09)."""
    sites = resnet50_sites()
    assert len(sites) == 53
    assert sum(s.params for s in sites) == PARAMS - 53_120 - 2_049_000
    assert round((sum(s.flops for s in sites) / 2 + 2_048_000) / 1e9, 2) == 4.09
