"""The HTML form: one file, well formed, complete, safe, and loading nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from convrewrite.diffing import diff
from convrewrite.report import render, render_diff, render_plan, render_sites
from convrewrite.sites import Site
from tests.report import sample

VOID = {"meta", "br", "hr", "img", "input", "link"}
PAGES = {
    "report": render(sample.report(), "html"),
    "verbose": render(sample.report(), "html", verbose=True),
    "forced": render(sample.broken_report(), "html"),
    "wide": render(sample.wide_report(), "html"),
    "hostile": render(sample.hostile_report(), "html"),
    "plan": render_plan(sample.plan(), "html"),
    "nothing": render_plan(sample.empty_plan(), "html"),
    "sites": render_sites(sample.resnet50_sites(), "html"),
    "diff": render_diff(diff(*sample.views()), "html"),
    "hostile plan": render_plan(sample.hostile_report().plan, "html", verbose=True),
    "hostile sites": render_sites(sample.hostile_report().sites, "html"),
}


class Page(HTMLParser):
    """Collects what a browser would make of a page; `faults` are tags closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rects(svg: str) -> list[tuple[float, float]]:
    """(left, right) of every rectangle."""
    found = re.findall(r'<rect class="[^"]*" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    return [(float(x), float(x) + float(width)) for x, width in found]


def drawings(page: str) -> list[tuple[int, str]]:
    """(width, content) of the pictures of the network."""
    return [(int(w), body) for w, body in re.findall(r'<svg class="net"[^>]* width="(\d+)"[^>]*>(.*?)</svg>', page)]


@pytest.mark.parametrize("name", PAGES)
def test_every_tag_is_closed_in_order(name: str) -> None:
    page = Page(PAGES[name])
    assert page.faults == []
    assert page.open == []


def test_the_checker_of_tags_finds_a_fault() -> None:
    assert Page("<p><b>x</p></b>").faults
    assert Page("<p><b>x</b>").open == ["p"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_nothing_and_loads_nothing(name: str) -> None:
    page = Page(PAGES[name])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    for _, attributes in page.tags:
        assert not any(key.startswith("on") or key in ("src", "href", "xlink:href") for key in attributes)
    assert "url(" not in PAGES[name]
    assert "@import" not in PAGES[name]
    assert "http" not in PAGES[name]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_that_it_is_utf8_and_has_a_title(name: str) -> None:
    assert PAGES[name].startswith("<!DOCTYPE html>\n")
    assert '<meta charset="utf-8">' in PAGES[name]
    assert re.search(r"<title>.+</title>", PAGES[name])
    assert "prefers-color-scheme:dark" in PAGES[name]


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("report", sample.resnet50_sites()),
        ("plan", sample.resnet50_sites()),
        ("sites", sample.resnet50_sites()),
        ("wide", sample.wide_sites()),
    ],
)
def test_every_site_is_in_the_picture_and_in_a_table(name: str, sites: tuple[Site, ...]) -> None:
    page = PAGES[name]
    drawn = "".join(body for _, body in drawings(page))
    for site in sites:
        assert f"<title>{site.id}: " in drawn
        assert f"<td class=s>{site.id}</td>" in page


def test_hostile_names_stay_text() -> None:
    for name in ("hostile", "hostile plan", "hostile sites"):
        page = PAGES[name]
        assert "<script" not in page
        assert "\x1b" not in page
        assert '<script>alert("1")</script>|`x`\\n\\x1b[31m&' in "".join(Page(page).text)


@pytest.mark.parametrize("name", ["report", "wide", "plan", "sites", "diff", "nothing", "hostile"])
def test_nothing_is_drawn_outside_the_picture(name: str) -> None:
    pictures = drawings(PAGES[name])
    assert [width for width, _ in pictures] == [1120, 366]
    for width, body in pictures:
        edges = rects(body)
        assert edges
        assert min(left for left, _ in edges) >= 0
        assert max(right for _, right in edges) <= width


def test_a_block_that_is_wider_than_the_page_is_wrapped() -> None:
    sites = [sample.conv_site(f"b.{k}", k, (8, 8), 3, (8, 8), stage=1, block=0, block_path="b") for k in range(80)]
    page = render_sites(sites, "html")
    assert "b …" in page
    assert all(right <= width for width, body in drawings(page) for _, right in rects(body))


def test_a_huge_network_is_drawn_smaller_and_whole() -> None:
    page = render_sites(sample.wide_sites(900), "html")
    assert len(drawings(page)) == 2
    for width, body in drawings(page):
        assert body.count("<title>") == 900
        assert max(right for _, right in rects(body)) <= width
        assert 'class="kernel"' not in body
    assert "kernel size" not in page


def test_a_change_is_marked_by_its_symbol_and_its_name() -> None:
    wide = drawings(PAGES["report"])[0][1]
    assert wide.count(">~ acmix</text>") == 16
    assert wide.count(">+ non_local</text>") == 1
    assert wide.count('class="cell r-bottleneck_spatial replaced"') == 16
    assert "~ acmix" not in drawings(PAGES["sites"])[0][1]


def test_what_stood_and_what_stands_are_drawn_above_each_other() -> None:
    wide = drawings(PAGES["report"])[0][1]
    before = re.findall(
        r'<rect class="cell r-bottleneck_spatial replaced" (x="[\d.]+") y="[\d.]+" (width="[\d.]+")', wide
    )
    after = re.findall(r'<rect class="cell replaced new" (x="[\d.]+") y="[\d.]+" (width="[\d.]+")', wide)
    assert len(after) == 16
    assert before == after


def test_stages_are_labelled_with_their_resolution_and_channels() -> None:
    text = " ".join(Page(drawings(PAGES["report"])[0][1]).text)
    for stage, (size, channels) in enumerate(((56, 256), (28, 512), (14, 1024), (7, 2048)), 1):
        assert f"Stage {stage} {size} × {size} {channels} channels" in text
    assert "Stem 112 × 112 64 channels" in text


def test_a_head_and_what_is_off_the_path_have_bands_of_their_own() -> None:
    head = sample.conv_site("classifier", 1, (8, 8), 1, (8, 8), role="head", stage=1)
    stray = sample.conv_site("aux", 2, (8, 8), 1, (8, 8))
    text = " ".join(Page(render_sites([head, stray], "html")).text)
    assert text.index("Head") < text.index("Off the path")


def test_every_change_has_bars_for_parameters_and_flops() -> None:
    page = PAGES["report"]
    assert page.count('data-name="params"') == page.count('data-name="FLOPs"') == 17
    widths = [float(w) for w in re.findall(r'<i style="width:([\d.]+)%"', page)]
    assert len(widths) == 4 * 17
    assert max(widths) == 100.0


def test_a_forced_report_shows_the_broken_law_as_text() -> None:
    text = " ".join(Page(PAGES["forced"]).text)
    assert "FORCED: this model was emitted" in text
    assert "✗ BROKEN: start (1 of 7 laws)" in text
    assert "BROKEN" not in " ".join(Page(PAGES["report"]).text)


def test_a_diff_shows_both_networks() -> None:
    wide = drawings(PAGES["diff"])[0][1]
    assert wide.count(">~ Blend</text>") == 2
    assert wide.count(">before</text>") == wide.count(">after</text>") == 5


def test_a_plan_of_nothing_shows_one_network_and_the_reason() -> None:
    page = PAGES["nothing"]
    assert "Nothing to do for acmix/bottleneck-3x3" in page
    assert ">after</text>" not in page
