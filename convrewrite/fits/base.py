"""The registry of fits: for a block's name, whether it can be fitted at a place and the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.fits.target import Target, Window
from convrewrite.registry import Registry
from convrewrite.sites import ConvSpec, Place

Solve = Callable[[nn.Module, ConvSpec, Target], float]
Refuse = Callable[[Place, BlockOptions], str | None]
Choose = Callable[[ConvSpec, BlockOptions], Window]
Settle = Callable[[nn.Module, ConvSpec, Target], BlockOptions]


@dataclass(frozen=True)
class Fit:
    """How one kind of block is fitted.

    Attributes:
        solve: sets the block's parameters from a target and returns the NMSE it expects, see `Target.nmse`.
        refuse: why the block cannot be fitted at a place, or None.
        window: the taps that `solve` wants to know about.
        settle: the options that a block built with the planned ones should have; others where the target decides.
    """

    solve: Solve
    refuse: Refuse
    window: Choose
    settle: Settle


FITS: Registry[Fit] = Registry("fit", package="convrewrite.fits")


def _never(place: Place, options: BlockOptions) -> str | None:
    return None


def _kernel(spec: ConvSpec, options: BlockOptions) -> Window:
    return Window.of_kernel(spec)


def _as_planned(block: nn.Module, spec: ConvSpec, target: Target) -> BlockOptions:
    options: BlockOptions = block.options  # type: ignore[assignment]
    return options


def fit_of(
    block: str, *, refuse: Refuse = _never, window: Choose = _kernel, settle: Settle = _as_planned
) -> Callable[[Solve], Solve]:
    """Decorator: `(block, spec, target) -> NMSE` is how blocks registered as `block` are fitted."""

    def add(solve: Solve) -> Solve:
        FITS.register(block)(Fit(solve, refuse, window, settle))
        return solve

    return add


def refuse_fit(block: str, place: Place, options: BlockOptions) -> str | None:
    """Why `block` has no fitted start at `place`, or None where it has."""
    if block not in FITS:
        return "it cannot be solved from a convolution"
    if place.conv is None:
        return "there is no convolution to fit to"
    return FITS.get(block).refuse(place, options)


def can_fit(block: str, place: Place, options: BlockOptions) -> bool:
    """Whether `block` has a fitted start at `place`."""
    return refuse_fit(block, place, options) is None
