"""Fits on images that tell little, or nothing, of some channels: finite, and no worse than a block that gives zeros."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from convrewrite.blocks.base import conv_spec
from convrewrite.fits import acmix, target
from convrewrite.fits.base import FITS
from convrewrite.fits.target import Target, Window, solve

from .test_fits import OPTIONS, built, convolution, measured, seen, smooth

CHANNELS = 8


def _constant() -> Tensor:
    """Channels that never change, as behind a batch norm whose statistics were of other images."""
    images = smooth(24, CHANNELS)
    images[:, 2], images[:, 5] = 3.0, 0.0
    return images


def _copies() -> Tensor:
    images = smooth(24, CHANNELS)
    images[:, 1], images[:, 3] = images[:, 0], 1e4 * images[:, 0] + 1e-4 * images[:, 2]
    return images


def _scaled(decades: float, count: int = 24, side: int = 10) -> Tensor:
    return smooth(count, CHANNELS, side) * torch.logspace(-decades, decades, CHANNELS).double().view(1, -1, 1, 1)


IMAGES = {
    "well behaved": lambda: smooth(24, CHANNELS),
    "constant channels": _constant,
    "copies of channels": _copies,
    "a small variance beside a large mean": lambda: 1e-3 * smooth(24, CHANNELS) + 500.0,
    "all constant": lambda: torch.full((24, CHANNELS, 10, 10), 5.0, dtype=torch.float64),
    "all zero": lambda: torch.zeros(24, CHANNELS, 10, 10, dtype=torch.float64),
    "16 patches of 72 numbers": lambda: smooth(1, CHANNELS, 4),
    "8 patches of 72 numbers": lambda: smooth(2, CHANNELS, 2),
    "1e-6 to 1e6": lambda: _scaled(6),
    "1e-15 to 1e15": lambda: _scaled(15),
    "1e-6 to 1e6, 16 patches": lambda: _scaled(6, 1, 4),
}
SCALES = {
    "even": torch.ones(CHANNELS),
    "1e-8 to 1e8": torch.logspace(-8, 8, CHANNELS),
    "half of them 0": torch.tensor([0.0, 1.0]).repeat(CHANNELS // 2),
}


def of_zeros(aim: Target) -> float:
    """The NMSE of a block that gives 0 everywhere."""
    border = aim.weight.new_zeros(len(aim.weight), aim.taps)
    return aim.nmse(torch.zeros_like(aim.weight), torch.zeros_like(aim.bias), border)


def window_of(name: str, conv: nn.Conv2d) -> Window:
    block = built(name, conv, **OPTIONS.get(name, {}))
    return FITS.get(name).window(conv_spec(conv), block.options)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_acmix_is_finite_and_never_worse_than_zeros(heads: int, images: str, scale: str) -> None:
    torch.manual_seed(0)
    conv, x = convolution(bias=False), IMAGES[images]()
    block = built("acmix", conv, side=x.shape[2], heads=heads)
    aim = seen(conv, x, window_of("acmix", conv), scale=SCALES[scale].double())
    error = FITS.get("acmix").solve(block, conv_spec(conv), aim)
    assert math.isfinite(error) and 0 <= error <= of_zeros(aim)
    assert all(bool(torch.isfinite(p).all()) for p in block.parameters())
    with torch.no_grad():  # on the images themselves, in plain arithmetic
        weight = SCALES[scale].double().view(1, -1, 1, 1)
        left, whole = ((conv(x) - block(x)) * weight).square().sum(), (conv(x) * weight).square().sum()
    assert float(left) <= float(whole)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", sorted(set(FITS.names()) - {"acmix"}))
def test_every_other_fit_is_finite_and_no_worse_than_zeros(name: str, images: str) -> None:
    torch.manual_seed(0)
    conv, x = convolution(), IMAGES[images]()
    block = built(name, conv, side=x.shape[2], **OPTIONS.get(name, {}))
    aim = seen(conv, x, window_of(name, conv))
    error = FITS.get(name).solve(block, conv_spec(conv), aim)
    assert math.isfinite(error) and error <= of_zeros(aim) + 1e-9
    assert all(bool(torch.isfinite(p).all()) for p in block.parameters())


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_a_channel_that_was_constant_may_change_afterwards(heads: int) -> None:
    """What the images never showed is taken from the kernel, as far as the structure goes, and nothing is blown up."""
    torch.manual_seed(1)
    conv, x = convolution(bias=False), _constant()
    block = built("acmix", conv, heads=heads)
    FITS.get("acmix").solve(block, conv_spec(conv), seen(conv, x, window_of("acmix", conv)))
    other = smooth(24, CHANNELS)
    with torch.no_grad():
        zeros = float(conv(other).square().sum() / (conv(other) - conv(other).mean((0, 2, 3), True)).square().sum())
    assert measured(conv, block, other) < zeros


@pytest.mark.parametrize("heads", [1, 2])
def test_the_ridge_does_not_show_where_it_is_not_needed(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error and outputs with and without, on images that tell all; with more heads the error itself is rounding."""
    conv, found = convolution(bias=False), []
    torch.manual_seed(2)
    x = smooth(32, CHANNELS)
    for on in (True, False):
        if not on:
            monkeypatch.setattr(acmix, "RIDGE", 0.0)
            monkeypatch.setattr(acmix, "WEAKEST", 0.0)
            monkeypatch.setattr(acmix, "LARGEST", math.inf)
            monkeypatch.setattr(target, "ROUNDING", 0.0)
        torch.manual_seed(3)
        block = built("acmix", conv, heads=heads)
        error = FITS.get("acmix").solve(block, conv_spec(conv), seen(conv, x, window_of("acmix", conv)))
        with torch.no_grad():
            found.append((error, block(x)))
    (with_it, y), (without, want) = found
    assert with_it > 1e-4
    assert with_it == pytest.approx(without, rel=1e-6)
    assert float((y - want).norm() / want.norm()) <= 1e-6


def test_a_normal_equation_that_is_not_finite_ends() -> None:
    with pytest.raises(ValueError, match="not finite"):
        solve(torch.full((3, 3), math.nan, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))
