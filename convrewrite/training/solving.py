"""Solve the blocks that stand beside their convolutions, so that nothing is lost when they take over."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite import provenance
from convrewrite.blocks.blend import Blend
from convrewrite.calibration.fitting import Settings, fit_on_images
from convrewrite.calibration.images import Images
from convrewrite.editing import exchange
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.fits.base import can_fit, refuse_fit
from convrewrite.plans import Edit
from convrewrite.reports import Calibration
from convrewrite.stands import stand_of

_SOLVED = "_convrewrite_solved"  # a plain attribute: not in the state dict, and copied with the module
HELD_OUT = 5
"""Every fifth image is not solved on but measured on."""
LEAST = 64
"""Fewer images do not tell which patches are possible: the blocks would do anything with others."""


def solve_blends(model: nn.Module, images: Tensor, *, seed: int = 0) -> Calibration | None:
    """Solve the block of every `Blend` of `model` from the convolution beside it, in place.

    What the model computes does not change: its blends are at 0. Each block is fitted, in the order of the forward
    pass, to what the convolution gives, on the activations that arrive once the blocks before it have taken over. Its
    parameters count as "fitted" in `param_groups` afterwards. Blocks that cannot be solved stay as they are.

    Args:
        model: untrained, from an exact start. images: (N, C, H, W), as the model wants them; 64 to 512.
        seed: draws the patches that are read.

    Returns:
        How well each block fits on images held out; None where no block could be solved.

    Raises:
        ConvrewriteError: a blend has been trained already, there are too few images, or their values are not finite.
    """
    edits = solvable(model)
    if not edits:
        return None
    if len(images) < LEAST:
        raise ConvrewriteError(f"{len(images)} images are too few to solve the blocks on", fix=f"give {LEAST} or more")
    blends = {edit.path: model.get_submodule(edit.path) for edit in edits}
    moved = next((path for path, blend in blends.items() if isinstance(blend, Blend) and not untouched(blend)), None)
    if moved is not None:
        raise ConvrewriteError("the blend was trained already", where=moved, fix="solve before the first step")
    original, final = (copy.deepcopy(getattr(model, "_orig_mod", model)).eval() for _ in range(2))
    for path in blends:
        original, final = _without(original, path, "block"), _without(final, path, "conv")
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    # The norms keep their statistics: at the start the convolutions still compute all.
    settings = Settings(seed=seed, norms=False)
    done = fit_on_images(original, final, edits, Images(images[~held_out], images[held_out]), settings)
    for path, blend in blends.items():
        assert isinstance(blend, Blend)
        blend.block.load_state_dict(final.get_submodule(path).state_dict())
    mark_solved(model)
    return done.calibration


def solvable(model: nn.Module) -> list[Edit]:
    """The edits of `model` whose block stands beside its convolution in a `Blend` and can be solved from it."""
    note = provenance.of(model)
    if note is None:
        return []
    by_id = {edit.id: edit for edit in note.plan.edits}
    found = []
    for path, blend in blends_of(getattr(model, "_orig_mod", model)).items():
        stand = stand_of(blend)
        edit = by_id.get(stand.edit) if stand is not None else None
        if edit is None or edit.path != path or not isinstance(blend.conv, nn.Conv2d):
            continue
        # `nmse` leaves the number of heads to the fit; here the architecture is the plan's and stays.
        if edit.options.get("nmse") is None and can_fit(edit.block, edit.site.place(), blend.block.options):
            found.append(edit)
    return found


@dataclass(frozen=True)
class Beginnings:
    """How the blocks that stand beside a convolution begin a run.

    Attributes:
        solved: of each solved block its NMSE (see `SiteFit`), measured on images held out. images: solved on.
        fresh: of each block that is not solved, why.
    """

    solved: dict[str, float]
    images: int
    fresh: dict[str, str]

    def lines(self, until: int | None) -> list[str]:
        """For the user; `until` is the step at which the blocks have taken over."""
        found = []
        if self.solved:
            worst = max(self.solved, key=self.solved.__getitem__)
            found.append(
                f"solved {_blocks(len(self.solved))} from the convolution beside, on {self.images} images: lost is "
                f"{statistics.median(self.solved.values()):.2g} of the output's variance in the median, "
                f"{self.solved[worst]:.2g} at most ({worst})"
            )
        for why in dict.fromkeys(self.fresh.values()):
            paths = [path for path, reason in self.fresh.items() if reason == why]
            shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
            end = "" if until is None else f"; once the convolution is gone (step {until}) it shows what they learned"
            found.append(f"untrained: {_blocks(len(paths))}, {shown} ({why}){end}")
        return found

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return {"solved": self.solved, "images": self.images, "untrained": self.fresh}


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def beginnings(model: nn.Module, found: Calibration | None, reason: str | None) -> Beginnings:
    """After `solve_blends` returned `found`, or was not called for `reason`."""
    note = provenance.of(model)
    assert note is not None
    by_id = {edit.id: edit for edit in note.plan.edits}
    sites = found.sites if found is not None else ()
    solved = {by_id[site.edit].path: site.error for site in sites}
    fresh = {}
    for path, blend in blends_of(getattr(model, "_orig_mod", model)).items():
        if path in solved:
            continue
        stand = stand_of(blend)
        edit = by_id.get(stand.edit) if stand is not None else None
        impossible = "whole blocks cannot be solved"
        if edit is not None and isinstance(blend.conv, nn.Conv2d):
            impossible = refuse_fit(edit.block, edit.site.place(), blend.block.options) or ""
            impossible = f"{edit.block}: {impossible}" if impossible else ""
        fresh[path] = impossible or reason or "not solved"
    measured = {path: error for path, error in solved.items() if error is not None}
    return Beginnings(measured, found.images if found is not None else 0, fresh)


def untouched(blend: Blend) -> bool:
    """Whether `blend` still computes its convolution alone."""
    return not float(blend.anneal) and not bool(blend.gate.detach().count_nonzero())


def mark_solved(model: nn.Module) -> None:
    """Note on the blocks of `model` that can be solved that they are."""
    for edit in solvable(model):
        blend = model.get_submodule(edit.path)
        assert isinstance(blend, Blend)
        setattr(blend.block, _SOLVED, True)


def is_solved(blend: Blend) -> bool:
    """Whether `solve_blends` has set the block of `blend`."""
    return bool(vars(blend.block).get(_SOLVED))


def _without(model: nn.Module, path: str, part: str) -> nn.Module:
    """`model` with the blend at `path` exchanged for its block, or its convolution, alone."""
    blend = model.get_submodule(path)
    assert isinstance(blend, Blend)
    return exchange(model, blend, blend.block if part == "conv" else blend.conv)
