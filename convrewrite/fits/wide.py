"""Heads of full width, fewer than the kernel has taps: the best spatial patterns for a given number of heads.

    W[o, c, u] ~ sum_h mix[o, c, h] s[h, u],    s_h > 0, sum_u s_hu = 1

With all taps told apart this is exact. Fewer heads span a subspace of the taps: the top singular vectors of the kernel,
whitened, and then the least-squares patterns for the mix that stands. If a positive vector lies in the span, any
pattern becomes positive by adding of it, and nothing is lost; if not, or if that turns out better, the ones-vector is
put into the span, and takes the place of one of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convrewrite.fits.target import Target, solve

CONTRAST = 0.9
"""How far a pattern goes down from 1 / T towards 0 at its lowest tap: logits stay mild, and alive."""

LEAST = 0.05
"""Of a vector that others are made positive with: its lowest entry, relative to its mean."""

SWEEPS = 2


def best_patterns(target: Target, heads: int, groups: int, *, centred: bool) -> Tensor:
    """Patterns for `heads` full-width heads: (heads, T), positive, each of sum 1."""
    if heads == 1:
        return _single(_spatial_basis(target, 1, ones=False))
    ones = target.weight.new_full((target.taps,), 1 / target.taps)
    starts = [(ones, _spatial_basis(target, heads - 1, ones=True))]
    starts += _own_base(_spatial_basis(target, heads, ones=False), ones)
    tried = [_swept(target, base, free, groups, centred=centred) for base, free in starts]
    return min(tried, key=lambda found: found[0])[1]


def _swept(target: Target, base: Tensor, free: Tensor, groups: int, *, centred: bool) -> tuple[float, Tensor]:
    """The error that patterns leave which are improved by turns with their mix, and those patterns."""
    patterns = _positive(base, free)
    mix = best_mix(target, patterns, groups, centred=centred)
    measured = target.covariance is not None or target.within is not None
    for _ in range(SWEEPS if measured else 0):
        patterns = _positive(base, _improved(target, mix, patterns, centred=centred)[1:])
        mix = best_mix(target, patterns, groups, centred=centred)
    kernel = spread_groups(mix, groups) @ patterns
    return target.nmse(kernel, target.best_bias(kernel) if centred else torch.zeros_like(target.bias)), patterns


def _own_base(basis: Tensor, ones: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A positive vector in the span of `basis` (M, T), if the one nearest to `ones` is, and the rest of the span."""
    share = torch.linalg.lstsq(basis.t(), ones[:, None]).solution[:, 0]
    base = share @ basis
    if float(base.amin()) < LEAST * float(base.mean()) or float(base.mean()) <= 0:
        return []
    rest = torch.linalg.qr(torch.cat([share[:, None], torch.eye(len(share), dtype=share.dtype)], 1))[0][:, 1:]
    return [(base / base.sum(), rest.t() @ basis)]


def fewest_heads(error: Callable[[int], float], most: int, limit: float) -> int:
    """The least number of heads whose `error` is within `limit`; `most` where no smaller one's is.

    More heads are never worse, so this halves the range; `most` itself is not tried.
    """
    least = 1
    while least < most:
        middle = (least + most) // 2
        if error(middle) <= limit:
            most = middle
        else:
            least = middle + 1
    return most


def best_mix(target: Target, patterns: Tensor, groups: int, *, centred: bool) -> Tensor:
    """The mix (O, C / groups, M) of least error for `patterns` (M, T), by least squares."""
    if groups == 1:
        system, joint = target.seen_through(patterns, centred=centred)
        channels, heads = joint.shape[1:]
        flat = solve(system.reshape(channels * heads, -1), joint.flatten(1).t())
        return flat.t().reshape(joint.shape)
    own = _own(target.joint, groups) @ patterns.t()  # (G, O/G, C/G, M)
    each, heads = own.shape[2:]
    system = torch.einsum("hu,gcudv,kv->gchdk", patterns, target.in_groups(groups), patterns)
    if not centred:
        mean = (target.mean[:-1] @ patterns.t()).view(groups, each, heads)
        system = system + torch.einsum("gch,gdk->gchdk", mean, mean)
        own = own + target.mean_out.view(groups, -1, 1, 1) * mean[:, None]
    mix = solve(system.flatten(3).flatten(1, 2), own.flatten(2).transpose(1, 2)).transpose(1, 2)
    return mix.reshape(len(target.weight), each, heads)


def _own(maps: Tensor, groups: int) -> Tensor:
    """Of maps (O, C, T) those within the groups: (G, O / G, C / G, T)."""
    outputs, channels, taps = maps.shape
    index = torch.arange(groups)
    return maps.view(groups, outputs // groups, groups, channels // groups, taps)[index, :, index]


def spread_groups(mix: Tensor, groups: int) -> Tensor:
    """(O, C / groups, M) -> (O, C, M), zeros between the groups."""
    if groups == 1:
        return mix
    outputs, each, heads = mix.shape
    dense = mix.new_zeros(outputs, groups, each, heads)
    index = torch.arange(outputs)
    dense[index, index * groups // outputs] = mix
    return dense.flatten(1, 2)


def _spatial_basis(target: Target, count: int, *, ones: bool) -> Tensor:
    """The best directions by the marginals, beside the ones-vector or without it: (count, T)."""
    levels, vectors = torch.linalg.eigh(target.spatial)
    root = levels.clamp(min=1e-9 * float(levels.max())).sqrt()
    half, inverse = (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
    weight = target.weight * target.scale[:, None, None]
    rows = target.across(weight).flatten(0, 1)
    gram = half @ (weight.flatten(0, 1).t() @ rows) @ half
    if ones:
        even = half.sum(1) / half.sum(1).norm()
        away = torch.eye(len(even), dtype=even.dtype) - even[:, None] * even
        gram = away @ gram @ away
    best = torch.linalg.eigh(gram)[1].flip(1)[:, :count]
    basis: Tensor = best.t() @ inverse
    return basis


def _positive(base: Tensor, free: Tensor) -> Tensor:
    """A positive `base` (T,) and `free` made positive by adding of it, each of sum 1, peaks up: (M, T)."""
    ratio = free / base
    ratio = ratio - (ratio * base).sum(1, keepdim=True) / base.sum()
    ratio = torch.where((ratio.amax(1) < -ratio.amin(1))[:, None], -ratio, ratio)
    lowest = -ratio.amin(1, keepdim=True)
    shaped = torch.cat([base[None], base * (1 + CONTRAST * ratio / lowest.clamp(min=1e-300))])
    return shaped / shaped.sum(1, keepdim=True)


def _single(free: Tensor) -> Tensor:
    """The one pattern nearest to a direction that may have negative entries, or its negative."""
    free = free if float(free.clamp(min=0).norm()) >= float((-free).clamp(min=0).norm()) else -free
    pattern = free.clamp(min=0.01 * float(free.amax()))
    return pattern / pattern.sum()


def _improved(target: Target, mix: Tensor, patterns: Tensor, *, centred: bool) -> Tensor:
    """Least-squares patterns for a given `mix` (O, C / groups, M), the first of `patterns` held: (M, T)."""
    (outputs, each, heads), taps = mix.shape, target.taps
    groups = target.channels // each
    part, joint = target.in_groups(groups), _own(target.joint, groups)
    if not centred:
        mean = target.mean[:-1].view(groups, each, taps)
        part = part + torch.einsum("gcu,gdv->gcudv", mean, mean)
        joint = joint + target.mean_out.view(groups, -1, 1, 1) * mean[:, None]
    own = mix.view(groups, outputs // groups, each, heads)
    weighed = own * target.scale.square().view(groups, -1, 1, 1)
    across = torch.einsum("goch,godk->gchdk", weighed, own)
    system = torch.einsum("gchdk,gcudv->hukv", across, part)
    right = torch.einsum("goch,gocu->hu", weighed, joint)
    right = right - torch.einsum("huv,v->hu", system[:, :, 0], patterns[0])
    inner = system[1:, :, 1:].reshape((heads - 1) * taps, -1)
    free = solve(inner, right[1:].reshape(-1, 1)).view(heads - 1, taps)
    return torch.cat([patterns[:1], free])
