"""A plan as text, and the answer to `--why`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from convrewrite.errors import ConvrewriteError, PlanError
from convrewrite.plans import Plan
from convrewrite.report import REPORTS, render_plan, why
from tests.report import sample
from tests.report.sample import Golden

SITES = sample.resnet50_sites()


def test_the_plan_of_resnet50_reads_as_reviewed(golden: Golden) -> None:
    golden("plan_resnet50.txt", render_plan(sample.plan(), "text"))


def test_the_verbose_plan_reads_as_reviewed(golden: Golden) -> None:
    golden("plan_resnet50_verbose.txt", render_plan(sample.plan(), "text", verbose=True))


def test_a_plan_without_edits_reads_as_reviewed(golden: Golden) -> None:
    golden("plan_nothing.txt", render_plan(sample.empty_plan(), "text"))


def test_a_plan_reads_the_same_after_it_was_saved_and_loaded() -> None:
    made = sample.plan()
    assert render_plan(Plan.from_json(made.to_json()), "text") == render_plan(made, "text")


def test_every_edit_is_listed_however_many_there_are() -> None:
    made = sample.wide_report().plan
    text = render_plan(made, "text")
    assert len(made.edits) == 60
    listed = [line.split()[1] for line in text.splitlines() if line.startswith("  ~ ")]
    assert listed == [e.id for e in made.edits]
    assert "Plan: 60 to replace, 0 to insert. 240 convolutions untouched." in text


def test_near_misses_are_cut_at_five_and_all_shown_when_verbose() -> None:
    made = sample.wide_report().plan
    short, long = render_plan(made, "text"), render_plan(made, "text", verbose=True)
    assert (short.count("  near miss  "), long.count("  near miss  ")) == (5, 240)
    assert "and 235 more near misses (-v shows all)" in short
    assert "more near misses" not in long


def test_nothing_to_do_names_the_step_that_emptied_the_funnel_and_the_value() -> None:
    text = render_plan(sample.empty_plan(), "text")
    assert "Nothing to do for acmix/bottleneck-3x3: no site is left after 'groups 1'" in text
    assert "groups 32, wanted 1 (16 sites)" in text
    assert "Plan:" not in text
    assert "Touched" not in text


def test_nothing_to_do_says_that_the_sites_are_rewritten_already() -> None:
    made = sample.empty_plan()
    refused = tuple(replace(r, clause="rewritten", reason="rewritten by this rule") for r in made.refused)
    steps = replace(made.funnels[0], steps=(("convs", 53), ("role bottleneck_spatial", 16)))
    text = render_plan(replace(made, refused=refused, funnels=(steps,)), "text")
    assert "Nothing to do for acmix/bottleneck-3x3: 16 rewritten already." in text


def test_a_plan_without_rules_says_so() -> None:
    made = replace(sample.empty_plan(), funnels=(), refused=(), rules=())
    assert "Nothing to do: there are no rules." in render_plan(made, "text")


def test_a_start_that_changes_the_output_is_told() -> None:
    made = sample.plan()
    assert "Start 17 exact: the output stays as it is" in render_plan(made, "text")
    edits = (replace(made.edits[0], start="fresh", how="paper"), *made.edits[1:])
    text = render_plan(replace(made, edits=edits), "text")
    assert "Start 16 exact, 1 fresh: the output changes at start" in text
    assert "fresh (paper)" in text


def test_modules_that_go_with_the_convolution_are_named() -> None:
    made = sample.plan()
    edits = (replace(made.edits[0], absorbs=("bn1", "maxpool")), *made.edits[1:])
    text = render_plan(replace(made, edits=edits), "text")
    assert text.count("conv 3x3 64>64 56x56 and bn1, maxpool") == 1


def test_an_edit_of_a_shared_module_counts_all_its_calls() -> None:
    made = sample.plan()
    shared = replace(made.edits[0], calls=("layer1.0.conv2", "layer1.1.conv2"))
    text = render_plan(replace(made, edits=(shared, *made.edits[2:16])), "text")
    assert "layer1.0.conv2 (2 calls)" in text
    assert "Plan: 15 to replace, 0 to insert. 37 convolutions untouched." in text


def test_the_text_has_no_trailing_blanks_and_ends_in_one_newline() -> None:
    for made in (sample.plan(), sample.empty_plan()):
        text = render_plan(made, "text", verbose=True)
        assert all(line == line.rstrip() for line in text.splitlines())
        assert text.endswith("\n")
        assert not text.endswith("\n\n")


def test_hostile_names_do_not_reach_the_terminal() -> None:
    text = render_plan(sample.hostile_report().plan, "text", verbose=True)
    assert all(c == "\n" or c.isprintable() for c in text)


def test_why_tells_facts_and_what_every_rule_does(golden: Golden) -> None:
    golden("why_layer3.5.conv3.txt", why(sample.plan(), SITES, "layer3.5.conv3"))


def test_why_tells_of_a_site_that_is_replaced() -> None:
    text = why(sample.plan(), SITES, "layer1.0.conv2")
    assert "matches: is replaced by acmix form=ordered heads=4 window=7; params 36.9K => 54.8K" in text


def test_why_tells_who_claimed_a_site() -> None:
    made = sample.plan()
    site = made.edits[0].site
    claimed = replace(made.refused[0], site=site, rule="tail/non-local", clause="claimed", reason="claimed by a/b")
    text = why(replace(made, refused=(claimed,)), SITES, site.id)
    assert "matches, claimed by another rule: claimed by a/b" in text


def test_why_counts_the_clauses_behind_the_first() -> None:
    text = why(sample.plan(), SITES, "conv1")
    assert "does not match: role stem, wanted bottleneck_spatial (and 1 more clause)" in text


def test_why_says_when_a_rule_has_no_verdict() -> None:
    assert "does not look at it" in why(replace(sample.plan(), refused=()), SITES, "conv1")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("layer1.0.conv22", "did you mean 'layer1.0.conv2'?"),
        ("layer1.1", "inside it: layer1.1.conv1, layer1.1.conv2, layer1.1.conv3"),
        (
            "layer1",
            "inside it: layer1.0.conv1, layer1.0.conv2, layer1.0.conv3, layer1.0.downsample.0, layer1.1.conv1 "
            "and 5 more",
        ),
        ("???", "'convrewrite inspect' lists all"),
    ],
)
def test_why_of_no_site_is_one_line_with_a_way_out(path: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        why(sample.plan(), SITES, path)
    assert str(caught.value) == f"torchvision:resnet50: no convolution at '{path}'; {hint}"


def test_why_of_a_path_called_twice_tells_both_calls() -> None:
    calls = [replace(SITES[0], call=k, calls=2) for k in (0, 1)]
    text = why(sample.plan(), calls, "conv1")
    assert "conv1@0\n" in text
    assert "conv1@1\n" in text
    assert "conv1@1\n" not in why(sample.plan(), calls, "conv1@0")


def test_an_unknown_format_is_an_error_with_the_closest() -> None:
    assert REPORTS.names() == ["html", "json", "markdown", "text"]
    with pytest.raises(ConvrewriteError, match="did you mean 'markdown'"):
        render_plan(sample.plan(), "markdwn")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((1, 3, 224, 224), "at 1x3x224x224, rules"),  # the stem of the sample sees 224 x 224
        ((1, 3, 128, 160), "at 1x3x128x160 (resized to 224x224 inside), rules"),
        ((1, 3, 300, 300), "at 1x3x300x300 (resized to 224x224 inside), rules"),
        ((1, 3, 448, 448), "at 1x3x448x448, rules"),  # cut into patches of 2 x 2, not resized
    ],
)
def test_a_model_that_resizes_its_images_says_to_which_size(given: tuple[int, ...], said: str) -> None:
    assert said in render_plan(replace(sample.plan(), input_shape=given), "text").splitlines()[0]
