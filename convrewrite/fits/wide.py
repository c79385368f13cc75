"""Heads of full width, fewer than the kernel has taps: the best spatial patterns for a given number of heads.

    W[o, c, u] ~ sum_h mix[o, c, h] s[h, u],    s_h > 0, sum_u s_hu = 1

With all taps told apart this is exact. Fewer heads span a subspace of the taps: the ones-vector, and the best others,
which are the top singular vectors of the kernel, whitened, and then the least-squares patterns for the mix that
stands. Since ones are in the span, any pattern becomes positive by adding a constant, and nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convrewrite.fits.target import Target, solve

CONTRAST = 0.9
"""How far a pattern goes down from 1 / T towards 0 at its lowest tap: logits stay mild, and alive."""

SWEEPS = 2


def best_patterns(target: Target, heads: int, groups: int, *, centred: bool) -> Tensor:
    """Patterns for `heads` full-width heads: (heads, T), positive, each of sum 1."""
    free = _spatial_basis(target, heads)
    if target.covariance is not None and heads > 1:
        for _ in range(SWEEPS):
            mix = best_mix(target, _positive(free), groups, centred=centred)
            free = _improved(target, mix, _positive(free), centred=centred)[1:]
    return _positive(free) if heads > 1 else _single(free)


def best_mix(target: Target, patterns: Tensor, groups: int, *, centred: bool) -> Tensor:
    """The mix (O, C / groups, M) of least error for `patterns` (M, T), by least squares."""
    system, joint = target.seen_through(patterns, centred=centred)
    outputs, channels, heads = joint.shape
    if groups == 1:
        flat = solve(system.reshape(channels * heads, -1), joint.flatten(1).t())
        return flat.t().reshape(joint.shape)
    each, index = channels // groups, torch.arange(groups)
    system = system.view(groups, each, heads, groups, each, heads)[index, :, :, index].flatten(3).flatten(1, 2)
    own = joint.view(groups, outputs // groups, groups, each, heads)[index, :, index]  # (G, O/G, C/G, M)
    mix = solve(system, own.flatten(2).transpose(1, 2)).transpose(1, 2)
    return mix.reshape(outputs, each, heads)


def spread_groups(mix: Tensor, groups: int) -> Tensor:
    """(O, C / groups, M) -> (O, C, M), zeros between the groups."""
    if groups == 1:
        return mix
    outputs, each, heads = mix.shape
    dense = mix.new_zeros(outputs, groups, each, heads)
    index = torch.arange(outputs)
    dense[index, index * groups // outputs] = mix
    return dense.flatten(1, 2)


def _spatial_basis(target: Target, heads: int) -> Tensor:
    """The best directions beside the ones-vector, by the marginals: (heads - 1, T); of one head (1, T)."""
    levels, vectors = torch.linalg.eigh(target.spatial)
    root = levels.clamp(min=1e-9 * float(levels.max())).sqrt()
    half, inverse = (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
    weight = target.weight * target.scale[:, None, None]
    rows = torch.einsum("oct,cd->odt", weight, target.channel).flatten(0, 1)
    gram = half @ (weight.flatten(0, 1).t() @ rows) @ half
    if heads > 1:
        ones = half.sum(1) / half.sum(1).norm()
        away = torch.eye(len(ones), dtype=ones.dtype) - ones[:, None] * ones
        gram = away @ gram @ away
    best = torch.linalg.eigh(gram)[1].flip(1)[:, : max(heads - 1, 1)]
    basis: Tensor = best.t() @ inverse
    return basis


def _positive(free: Tensor) -> Tensor:
    """The ones-vector and `free` made positive, each of sum 1, peaks up: (M, T)."""
    taps = free.shape[1]
    free = free - free.mean(1, keepdim=True)
    free = torch.where((free.amax(1) < -free.amin(1))[:, None], -free, free)
    lowest = -free.amin(1, keepdim=True)
    shaped = 1 + CONTRAST * free / lowest.clamp(min=1e-300)
    return torch.cat([torch.ones(1, taps, dtype=free.dtype), shaped]) / taps


def _single(free: Tensor) -> Tensor:
    """The one pattern nearest to a direction that may have negative entries, or its negative."""
    free = free if float(free.clamp(min=0).norm()) >= float((-free).clamp(min=0).norm()) else -free
    pattern = free.clamp(min=0.01 * float(free.amax()))
    return pattern / pattern.sum()


def _improved(target: Target, mix: Tensor, patterns: Tensor, *, centred: bool) -> Tensor:
    """Least-squares patterns for a given dense `mix` (O, C or C / groups, M), the first of `patterns` held: (M, T)."""
    groups = target.channels // mix.shape[1]
    mix = spread_groups(mix, groups)
    assert target.covariance is not None
    size, taps = target.channels * target.taps, target.taps
    part = target.covariance[:size, :size]
    if not centred:
        mean = target.mean[:-1].flatten()
        part = part + mean[:, None] * mean
    heads = mix.shape[2]
    weighed = mix * target.scale.square()[:, None, None]
    across = torch.einsum("och,odk->chdk", weighed, mix)  # (C, M, C, M)
    system = torch.einsum("chdk,cudv->hukv", across, part.view(-1, taps, target.channels, taps))
    joint = target.weight.flatten(1) @ target.covariance[:size, :size]
    if not centred:
        joint = joint + target.mean_out[:, None] * mean
    right = torch.einsum("och,ocu->hu", weighed, joint.view(-1, target.channels, taps))
    right = right - torch.einsum("huv,v->hu", system[:, :, 0], patterns[0])
    inner = system[1:, :, 1:].reshape((heads - 1) * taps, -1)
    free = solve(inner, right[1:].reshape(-1, 1)).view(heads - 1, taps)
    return torch.cat([patterns[:1], free])
