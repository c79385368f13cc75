"""A bias where a block has none: the linear function of a pixel that is as nearly 1 everywhere as can be.

Queries without a bias cannot prefer an offset whatever the content. But activations have a mean (behind a ReLU a
large one), and a . x with a = M^-1 mean, M the channels' second moments about zero, is then nearly constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convrewrite.fits.target import Target, solve

STEADY = 0.5
"""Least share of 1 that the function must explain to be used; below, it changes sign too often."""


def nearly_one(target: Target) -> tuple[Tensor, float]:
    """(a, share): a (C,) with mean a . x of 1, and which share of the constant it explains, from 0 to 1.

    `a` is 0 where the share is 0: without images, or where the input has mean 0.
    """
    mean = target.mean[:-1].mean(1)  # over taps
    about = target.channel + mean[:, None] * mean
    found = solve(about, mean[:, None], 1e-4)[:, 0]
    share = float(found @ mean)
    if not target.images or share <= 0:
        return torch.zeros_like(found), 0.0
    return found / share, min(share, 1.0)
