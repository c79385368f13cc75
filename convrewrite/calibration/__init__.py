"""Fits on images: read them, measure what each site sees, refit site by site, and say how close the model stays."""

from __future__ import annotations

from typing import Any

from torch import nn

from convrewrite.calibration.fitting import Settings, fit_on_images
from convrewrite.calibration.images import Images, Preparation, read_images
from convrewrite.editing import Edited
from convrewrite.errors import ConvrewriteError, PlanError
from convrewrite.plans import FITTED, Plan
from convrewrite.reports import Calibration, SiteFit

DEFAULT_IMAGES = 256


def images_for(model: nn.Module, example: tuple[Any, ...], data: Any, *, limit: int, seed: int) -> Images:
    """`data` as `model` wants it, see `read_images`; an `Images` is taken as it is."""
    if isinstance(data, Images):
        return data
    if any(p.is_meta for p in model.parameters()):
        raise ConvrewriteError("the model is on the meta device, it has no weights to fit to", fix="load its weights")
    return read_images(data, Preparation.of(model, example), limit=limit, seed=seed)


def fitted_edits(
    original: nn.Module, edited: Edited, plan: Plan, images: Images | None
) -> tuple[Calibration | None, tuple[str, ...]]:
    """Fit the plan's fitted edits on `images`, in place in the rewritten model.

    Returns:
        (the report's part, None if no edit is fitted; keys of batch-norm statistics that were measured again)
    """
    edits = [e for e in plan.edits if e.how == FITTED]
    if not edits:
        return None, ()
    if images is None:
        sites = tuple(SiteFit(e.id, e.block, edited.solved.get(e.id)) for e in edits)
        return Calibration(0, 0, plan.seed, sites), ()
    done = fit_on_images(original, edited.model, edits, images, Settings(seed=plan.seed), free=edited.solved)
    return done.calibration, done.norms


def check_fits_well(calibration: Calibration | None, max_nmse: float | None) -> None:
    """Refuse a rewrite whose fits are worse than `max_nmse`, a line for each.

    Raises:
        PlanError: an NMSE is above the limit, or not a number.
    """
    if calibration is None or max_nmse is None:
        return
    known = "measured" if calibration.images else "expected without images"
    lines = [
        f"{fit.edit}: {fit.block} fits with NMSE {fit.error:.3g} ({known}), allowed {max_nmse:g}"
        for fit in calibration.sites
        if fit.error is not None and not fit.error <= max_nmse
    ]
    if lines:
        lines[-1] += "; exclude the sites, give more heads, or allow more with --max-nmse"
        raise PlanError("\n".join(lines))
