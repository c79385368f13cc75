"""Fit every `fitted` edit on images, one after another in the order of the forward pass.

Each site is fitted on the activations of the *new* model, in which the sites before it are fitted already, towards
the output that the *original* has there. Two passes of both models up to the site are made for each: one over the
images to fit on, one over those held out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions
from convrewrite.calibration.agreement import agreement, batches, outputs, site_error
from convrewrite.calibration.images import Images
from convrewrite.calibration.moments import Sums, bytes_needed, draw, patches, scale_of
from convrewrite.calibration.norms import re_estimate
from convrewrite.calibration.watching import norms_after, order_of_calls, resting, watch
from convrewrite.capture import light_copy
from convrewrite.editing import solve_block
from convrewrite.errors import ConvrewriteError
from convrewrite.fits.base import FITS
from convrewrite.fits.target import Target
from convrewrite.plans import Edit
from convrewrite.reports import Calibration, SiteFit
from convrewrite.sites import ConvSpec

RIDGE = 1e-3
"""Of the anchoring regression, relative to the covariance's mean diagonal."""

PATCHES_PER_NUMBER = 8
"""A site reads this many patches for each number in a patch, if the images have as many."""

LEAST_PATCHES = 65_536


@dataclass(frozen=True)
class Settings:
    """How sites are fitted on images.

    Attributes:
        seed: draws the patches. memory: bytes for a site's covariance; a larger one is replaced by its marginals.
        samples: patches that a site reads; None: eight for each number in a patch, at least 65,536.
        anchored: fit on the new model's activations; without it each site is fitted as if it were the only one.
        norms: try to measure the batch norms again at the end.
    """

    seed: int = 0
    memory: int = 2 * 1024**3
    samples: int | None = None
    anchored: bool = True
    norms: bool = True


@dataclass(frozen=True)
class Fitted:
    """What the loop leaves: the report's part, and the state-dict keys of batch norms that changed."""

    calibration: Calibration
    norms: tuple[str, ...]


def fit_on_images(
    original: nn.Module,
    rewritten: nn.Module,
    edits: Sequence[Edit],
    images: Images,
    settings: Settings,
    *,
    free: dict[str, float] | None = None,
) -> Fitted:
    """Refit the blocks of `edits` in `rewritten` in place.

    Args:
        original: untouched. edits: the fitted ones. free: NMSE that each edit's fit without images expected.
    """
    original = light_copy(original).eval()
    first = next(batches(images.fit, original))
    sites = [e for e in edits if ":" not in e.path]
    with resting(original):
        calls = order_of_calls(original, [e.path for e in sites], first)
        followers = norms_after(original, list(calls), first)
    by_path = {e.path: e for e in sites}
    wanted = outputs(original, images.held_out)
    _finite(wanted, "the original")
    done: list[SiteFit] = []
    with _Progress(list(calls)) as steps:
        for number, path in enumerate(steps):
            begun = time.perf_counter()
            edit, block = by_path[path], rewritten.get_submodule(path)
            conv = original.get_submodule(path)
            assert isinstance(conv, nn.Conv2d) and isinstance(block, Block)
            scale = scale_of(followers.get(path), conv.out_channels)
            seen_in = rewritten if settings.anchored else original
            spec = edit.site.conv
            target = measure_site(
                original,
                seen_in,
                path,
                edit.block,
                block.options,
                spec,
                images.fit,
                calls[path],
                scale,
                settings,
                number,
            )
            expected = solve_block(block, edit, target, settings.seed)
            error = site_error(original, rewritten, path, path, images.held_out, calls=calls[path], scale=scale)
            now = agreement(wanted, outputs(rewritten, images.held_out))
            kind: Literal["full", "marginals"] = "full" if target.covariance is not None else "marginals"
            done.append(
                SiteFit(
                    edit.id, edit.block, (free or {}).get(edit.id), expected, error, now.divergence, now.top1, kind,
                    time.perf_counter() - begun,
                )
            )  # fmt: skip
    norms = re_estimate(rewritten, images.fit, images.held_out, wanted) if settings.norms and done else None
    last = agreement(wanted, outputs(rewritten, images.held_out))
    report = Calibration(
        images=len(images.fit),
        held_out=len(images.held_out),
        seed=settings.seed,
        sites=tuple(done),
        divergence=last.divergence,
        agreement=last.top1,
        norms="none" if norms is None else ("re-estimated" if norms.changed else "kept"),
        norms_before=None if norms is None else norms.before.divergence,
        norms_after=None if norms is None else norms.after.divergence,
    )
    return Fitted(report, norms.changed if norms else ())


def measure_site(
    original: nn.Module,
    seen_in: nn.Module,
    path: str,
    name: str,
    options: BlockOptions,
    spec: ConvSpec,
    images: Tensor,
    calls: int,
    scale: Tensor,
    settings: Settings,
    number: int,
) -> Target:
    """The target of the block `name` at one site, from one pass of both models up to it.

    Args:
        seen_in: the model whose activations the block will see. number: of the site, part of the seed.
    """
    conv = original.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    window = FITS.get(name).window(spec, options)
    full = bytes_needed(spec.in_channels, window.taps) <= settings.memory
    sums = Sums.empty(spec.out_channels, spec.in_channels, window.taps, full=full, groups=spec.groups)
    limit = settings.samples or max(LEAST_PATCHES, PATCHES_PER_NUMBER * spec.in_channels * window.taps)
    each = -(-limit // (len(images) * calls))
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    with resting(original), resting(seen_in):
        for batch in batches(images, original):
            theirs = watch(original, path, batch, calls=calls)
            ours = theirs if seen_in is original else watch(seen_in, path, batch, calls=calls)
            for x, y in zip(ours.inputs, theirs.outputs, strict=True):
                at = draw((y.shape[0], y.shape[2], y.shape[3]), each * len(batch), generator).to(y.device)
                for part in torch.split(at, _chunk(spec.in_channels * window.taps)):
                    values = y[part[:, 0], :, part[:, 1], part[:, 2]].double().cpu()
                    sums.add(patches(x, spec, window, part), values)
    _finite([sums.phi, sums.y], path)
    return sums.target(conv, window, scale, RIDGE)


def _chunk(numbers: int) -> int:
    """Patches at a time, so that they take 64 MiB at most."""
    return max(1, 64 * 1024**2 // (8 * numbers))


def _finite(tensors: Sequence[Tensor], where: str) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise ConvrewriteError("its values on the calibration images are not finite", where=where)


class _Progress:
    """A bar on standard error, on a terminal only."""

    def __init__(self, paths: list[str]) -> None:
        from tqdm import tqdm

        self._bar = tqdm(paths, disable=None, leave=False, desc="calibrate", unit="site")

    def __enter__(self) -> Iterator[str]:
        return iter(self._bar)

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
