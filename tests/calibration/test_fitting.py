"""Fitting a whole model on images: measured errors, anchoring, batch norms, order, determinism, limits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convrewrite as cr
from convrewrite import provenance
from convrewrite.calibration import fitted_edits
from convrewrite.calibration.agreement import agreement, outputs
from convrewrite.calibration.fitting import Settings, fit_on_images
from convrewrite.calibration.images import Images
from convrewrite.calibration.moments import bytes_needed
from convrewrite.calibration.norms import re_estimate
from convrewrite.editing import edit_model
from convrewrite.errors import ConvrewriteError
from convrewrite.plans import Plan

SHAPE = (1, 3, 12, 12)


class Net(nn.Module):
    """Three convolutions, batch norms behind two of them; the last is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        x = F.relu(self.twice(x))
        x = F.relu(self.twice(x), inplace=True)
        return self.head(x.mean((2, 3)))


def images(count: int = 40) -> Tensor:
    return F.avg_pool2d(torch.randn(count, 3, 16, 16), 5, 1) * 5


@pytest.fixture
def net() -> nn.Module:
    """With the statistics of its images, and a head that tells classes apart."""
    torch.manual_seed(3)
    model = Net().train()
    for parameter in (model.stem.weight, model.first.weight, model.second.weight, model.twice.weight):
        parameter.data *= 3
    for _ in range(20):
        model(images())
    model.head.weight.data *= 20
    return model.eval()


def rule(names: list[str], **change: Any) -> cr.Rule:
    change = change or {"block": "acmix", "heads": 2}
    return cr.Rule(id="r", match={"name": names}, replace=change, start="fitted", shared="together")


def planned(net: nn.Module, names: list[str], **change: Any) -> Plan:
    return cr.plan(net, rule(names, **change), example=SHAPE)


def test_the_report_tells_the_error_of_every_site_in_forward_order(net: nn.Module) -> None:
    model, report = cr.rewrite(net, rule(["twice", "second", "first"]), example=SHAPE, calibrate=images())
    found = report.calibration
    assert found is not None and (found.images, found.held_out) == (32, 8)
    assert [s.edit for s in found.sites] == ["first", "second", "twice"]
    assert all(0 < s.nmse < 1 and s.nmse_free and s.nmse_fit and s.covariance == "full" for s in found.sites if s.nmse)
    assert report.ok and isinstance(model, Net)
    assert {t.name: t.fate for t in report.tensors}["first.weight"] == "absorbed"
    assert next(law for law in report.laws if law.law == "start").status == "skipped"


def test_what_a_fit_expects_is_what_is_measured_on_the_same_images(net: nn.Module) -> None:
    net = net.double()
    plan, x = planned(net, ["first", "second"], block="sasa_wide", heads=3), images().double()
    edited = edit_model(net, plan)
    done = fit_on_images(net, edited.model, plan.edits, Images(x, x), Settings(norms=False))
    for site in done.calibration.sites:
        assert site.nmse_fit is not None and site.nmse_fit > 1e-3
        assert site.nmse == pytest.approx(site.nmse_fit, rel=1e-4)


def test_anchored_fits_stay_nearer_to_the_original_than_unanchored_ones(net: nn.Module) -> None:
    plan, x = planned(net, ["first", "second"], block="sasa_wide", heads=2), images(80)
    apart = {}
    for anchored in (True, False):
        edited = edit_model(net, plan)
        fit_on_images(net, edited.model, plan.edits, Images(x[:60], x[60:]), Settings(anchored=anchored, norms=False))
        new = edited.model
        with torch.no_grad():
            ours = new.second(F.relu(new.norm1(new.first(F.relu(new.stem(x[60:]))))))  # type: ignore[operator]
            theirs = net.second(F.relu(net.norm1(net.first(F.relu(net.stem(x[60:]))))))  # type: ignore[operator]
        apart[anchored] = float((ours - theirs).square().sum())
    assert apart[True] < 0.98 * apart[False]


def test_the_same_seed_gives_the_same_bits_and_leaves_the_original_and_the_random_state_alone(net: nn.Module) -> None:
    before, x = copy.deepcopy(net.state_dict()), images()
    state = torch.get_rng_state()
    runs = [cr.rewrite(net, rule(["first"]), example=SHAPE, calibrate=x, seed=5) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in (*net.modules(), *runs[0].model.modules()))


def test_a_covariance_beyond_the_budget_is_replaced_by_its_marginals(net: nn.Module) -> None:
    plan, x = planned(net, ["first"]), images()
    assert bytes_needed(8, 9) == 4 * 8 * 81**2
    edited = edit_model(net, plan)
    done = fit_on_images(net, edited.model, plan.edits, Images(x, x), Settings(memory=bytes_needed(8, 9) - 1))
    assert done.calibration.sites[0].covariance == "marginals"
    assert done.calibration.sites[0].nmse is not None and done.calibration.sites[0].nmse < 0.5


def test_without_images_the_fit_is_there_and_the_error_is_said_to_be_expected(net: nn.Module) -> None:
    _, report = cr.rewrite(net, rule(["first"]), example=SHAPE)
    found = report.calibration
    assert found is not None and found.images == 0 and found.divergence is None
    assert found.sites[0].nmse is None and found.sites[0].error == found.sites[0].nmse_free


def test_a_rewrite_without_fitted_edits_has_no_calibration(net: nn.Module) -> None:
    exact = cr.Rule(id="r", match={"name": ["first"]}, replace={"block": "acmix", "heads": 2})
    assert cr.rewrite(net, exact, example=SHAPE, calibrate=images()).report.calibration is None


def test_fits_above_the_limit_are_refused_with_a_line_for_each_site(net: nn.Module) -> None:
    with pytest.raises(ConvrewriteError) as caught:
        cr.rewrite(net, rule(["first", "second"]), example=SHAPE, calibrate=images(), max_nmse=1e-6)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("first: acmix fits with NMSE ") and "--max-nmse" in lines[1]
    cr.rewrite(net, rule(["first"]), example=SHAPE, max_nmse=1.0)
    cr.rewrite(net, rule(["first"]), example=SHAPE, max_nmse=1e-6, force=True)


def test_images_that_make_the_model_overflow_end_in_one_line(net: nn.Module) -> None:
    with pytest.raises(ConvrewriteError, match="its values on the calibration images are not finite"):
        cr.rewrite(net, rule(["first"]), example=SHAPE, calibrate=images() * 1e37)


def test_batch_norms_are_measured_again_only_where_it_helps(net: nn.Module) -> None:
    x = images(60)
    wanted, broken = outputs(net, x[40:]), copy.deepcopy(net)
    broken.norm1.running_mean.add_(1.0)  # type: ignore[operator, union-attr]
    found = re_estimate(broken, x[:40], x[40:], wanted)
    assert found is not None and "norm1.running_mean" in found.changed
    assert found.after.divergence < found.before.divergence
    assert agreement(wanted, outputs(broken, x[40:])).divergence == pytest.approx(found.after.divergence)
    same = copy.deepcopy(net)
    kept = re_estimate(same, x[:40], x[40:], wanted)
    assert kept is not None and kept.changed == ()
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), net.state_dict().values(), strict=True))
    assert re_estimate(nn.Conv2d(3, 2, 1), x[:40], x[40:], wanted) is None


def test_statistics_measured_again_are_listed_and_keep_the_laws(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(original: nn.Module, edited: Any, plan: Plan, given: Images | None) -> Any:
        edited.model.norm1.running_mean.add_(0.5)
        return fitted_edits(original, edited, plan, None)[0], ("norm1.running_mean",)

    monkeypatch.setattr("convrewrite.pipeline.fitted_edits", shifted)
    report = cr.rewrite(net, rule(["second"]), example=SHAPE).report
    assert {t.name: t.fate for t in report.tensors}["norm1.running_mean"] == "re-estimated"
    assert next(law for law in report.laws if law.law == "kept").status == "held"

    def secretly(*args: Any) -> Any:
        return shifted(*args)[0], ()

    monkeypatch.setattr("convrewrite.pipeline.fitted_edits", secretly)
    with pytest.raises(ConvrewriteError, match=r"norm1\.running_mean is not the same"):
        cr.rewrite(net, rule(["second"]), example=SHAPE)


def test_agreement_is_divergence_in_nats_and_the_share_of_equal_top_classes() -> None:
    old, new = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).double(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    found = agreement([old], [new])
    p, q = torch.softmax(old[1], 0), torch.softmax(new[1], 0)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum()) / 2)
    assert found.top1 == 0.5
    maps = agreement([torch.ones(1, 2, 2, 2) * torch.tensor([1.0, 3.0])], [torch.full((1, 2, 2, 2), 1.0)])
    assert maps.top1 is None and maps.divergence == pytest.approx(2.0)


def few(names: list[str], nmse: float, start: str = "fitted") -> cr.Rule:
    change = {"block": "sasa_wide", "nmse": nmse}
    return cr.Rule(id="r", match={"name": names}, replace=change, start=start, shared="together")


@pytest.mark.parametrize("with_images", [True, False])
def test_heads_chosen_by_nmse_are_the_fewest_and_stand_in_the_plan_that_is_saved(
    net: nn.Module, with_images: bool, tmp_path: Path
) -> None:
    data = images() if with_images else None
    planned = cr.plan(net, few(["first", "twice"], 0.1), example=SHAPE)
    assert [e.options["heads"] for e in planned.edits] == [None, None]
    assert any("the fit chooses the fewest sasa_wide heads that lose at most 0.1 of" in note for note in planned.notes)
    model, report = cr.rewrite(net, planned, calibrate=data)
    assert report.calibration is not None and report.ok
    heads = {e.path: e.options["heads"] for e in report.plan.edits}
    first = report.calibration.sites[0]  # with nothing before it that is lost already
    expected = first.nmse_fit if with_images else first.nmse_free
    assert first.edit == "first" and expected is not None and expected <= 0.1
    for path, number in heads.items():
        assert 1 < number < 9 and model.get_submodule(path).heads == number
    fewer = {"block": "sasa_wide", "heads": heads["first"] - 1}
    worse = cr.rewrite(net, rule(["first"], **fewer), example=SHAPE, calibrate=data).report.calibration
    assert worse is not None
    assert ((worse.sites[0].nmse_fit if with_images else worse.sites[0].nmse_free) or 0) > 0.1

    after = sum(p.numel() for p in model.parameters())
    assert report.plan.totals.params_after == after < planned.totals.params_after
    assert sum(e.after.params - e.before.params for e in report.plan.edits) == after - planned.totals.params_before
    assert not any("the fit chooses" in note for note in report.plan.notes)
    assert any("heads chosen at" in note for note in report.plan.notes)

    cr.save(model, tmp_path / "model", report=report)
    loaded, x = cr.load(tmp_path / "model", base=Net()), images(2)
    saved = Plan.from_json((tmp_path / "model" / "plan.json").read_text())
    assert saved.hash == report.plan.hash != planned.hash
    assert torch.equal(loaded(x), model(x))
    again, repeated = cr.rewrite(net, saved, calibrate=data)
    assert repeated.plan.hash == saved.hash and torch.equal(again(x), model(x))


def test_heads_are_chosen_again_with_images_from_all_that_the_plan_allows(net: nn.Module) -> None:
    """What the fit without images settled on, before, does not limit the one with images."""
    x = torch.randn(64, *SHAPE[1:])  # noise: pixels are not alike, so that more heads are needed than the prior expects
    free = cr.rewrite(net, few(["first"], 0.1), example=SHAPE).report.plan.edits[0].options["heads"]
    aware = cr.rewrite(net, few(["first"], 0.1), example=SHAPE, calibrate=x).report.plan.edits[0].options["heads"]
    assert aware > free


def test_a_rewrite_that_chooses_heads_remembers_the_model_that_it_was_made_of_and_no_plan_before(
    net: nn.Module,
) -> None:
    model, report = cr.rewrite(net, few(["first"], 0.1), example=SHAPE)
    note = provenance.of(model)
    assert note is not None and note.source is None and note.plan == report.plan


@pytest.mark.parametrize("start", ["exact", "fresh"])
def test_heads_by_nmse_are_refused_where_nothing_is_fitted(net: nn.Module, start: str) -> None:
    with pytest.raises(
        ConvrewriteError, match=rf"chooses the heads of a fitted start, this one is {start}; use start: fit"
    ):
        cr.plan(net, few(["first"], 0.1, start), example=SHAPE)


@pytest.mark.parametrize("nmse", [0, -1, 1.5])
def test_an_nmse_that_is_no_share_is_one_line(net: nn.Module, nmse: float) -> None:
    with pytest.raises(ConvrewriteError, match=r"sasa_wide\.nmse: input should be") as caught:
        cr.plan(net, few(["first"], nmse), example=SHAPE)
    assert "\n" not in str(caught.value)


def test_heads_are_not_asked_to_make_up_for_what_the_sites_before_lost(net: nn.Module) -> None:
    """`twice` reads what `second` with one head left of the image; more heads would bring none of that back."""
    x = images(60)
    rules = [cr.Rule(id="poor", match={"name": ["second"]}, replace={"block": "sasa_wide", "heads": 1}, start="fitted")]
    rules.append(few(["twice"], 0.2))
    report = cr.rewrite(net, rules, example=SHAPE, calibrate=x).report
    assert report.calibration is not None
    poor, after = report.calibration.sites
    assert poor.nmse_fit is not None and poor.nmse_fit > 0.2
    assert after.nmse_fit is not None and after.nmse_fit > 0.2
    assert {e.path: e.options["heads"] for e in report.plan.edits}["twice"] < 9
