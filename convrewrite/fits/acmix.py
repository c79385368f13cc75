"""ACmix: its convolution path as the best low-rank factors of the convolution, its attention path switched off.

The path is, for each of its d groups of N filters, a kernel of rank r = min(kc^2, 3N, C) over channels:

    W[n, c, u] ~ sum_j A[n, j, u] P[j, c]

A becomes the grouped convolution, P the 1 x 1 projections. First the singular vectors of the group's kernel, whitened
by the patches' spatial and channel covariance; then sweeps that solve A for P and P for A exactly. The block has
no output bias: the projections' biases give the constant, through the border channel (`fits.target`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convrewrite.blocks.acmix import ACmix, ACmixOptions
from convrewrite.blocks.base import BlockOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.target import Target, Window, solve
from convrewrite.sites import ConvSpec, Place

SWEEPS = 4
STEPS = 12
"""Conjugate gradient steps for P in each sweep."""
RIDGE = 1e-10
"""Variance that every number of a patch is given on top, relative to the mean: so much the kernel counts where the
images show nothing, as in a channel that is constant on them. Factors could be anything there, and large."""
WEAKEST = 1e-5
"""Of the largest: singular values that are far below it are left out, not divided by."""
LARGEST = 100.0
"""Mean square of what a projection gives, in units of its variance at the start: beside one that gives more, as from a
channel that hardly varies, the ridge of the least squares would be all that counts for the others."""


@dataclass
class _Factors:
    """A (d, N, r, T) and P (d, r, C + 1), whose last column is the bias of the projections."""

    mix: Tensor
    project: Tensor

    def maps(self) -> Tensor:
        """The kernel, with the border channel: (d, N, C + 1, T)."""
        return torch.einsum("gnju,gjc->gncu", self.mix, self.project)


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    assert isinstance(options, ACmixOptions)
    size = options.kernel_conv
    window = Window.over(spec, (min(size, spec.kernel[0]), min(size, spec.kernel[1])))
    return window or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, ACmixOptions) and place.conv is not None
    spec, size = place.conv, options.kernel_conv
    for other in ((size, size), _window(spec, options).size):
        if Window.over(spec, other) is None:
            return f"the taps of kernel_conv {size} fall between those of a {spec.kernel[0]}x{spec.kernel[1]} kernel"
    return None


@fit_of("acmix", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set the block to the best convolution of its kind; the attention path's rate becomes 0."""
    assert isinstance(block, ACmix)
    rows = _groups(block)  # (d, N)
    rank = min(block.options.kernel_conv**2, 3 * block.options.heads, target.channels)
    tried = [(_error(f, target, rows), f) for f in _solved(_ridged(target), rows, rank)]
    error, factors = min(tried, key=lambda found: found[0] if math.isfinite(found[0]) else math.inf)
    _write(block, spec, factors, target.window)
    return error


def _solved(target: Target, rows: Tensor, rank: int) -> list[_Factors]:
    """The best factors last, unless the images tell too little: then one before; first the block that gives 0."""
    first = _start(target, rows, rank)
    nothing = _Factors(torch.zeros_like(first.mix), torch.zeros_like(first.project))
    if target.covariance is None:
        return [nothing, first]
    factors = _Factors(first.mix.clone(), first.project.clone())
    for _ in range(SWEEPS):
        _solve_mix(factors, target, rows)
        _solve_project(factors, target, rows)
    _solve_mix(factors, target, rows)
    return [nothing, first, factors]


def _error(factors: _Factors, target: Target, rows: Tensor) -> float:
    """The NMSE of what the factors give."""
    maps = factors.maps()
    kernel, border = torch.zeros_like(target.weight), target.weight.new_zeros(len(target.weight), target.taps)
    kernel[rows.flatten()] = maps[:, :, :-1].flatten(0, 1)
    border[rows.flatten()] = maps[:, :, -1].flatten(0, 1)
    return target.nmse(kernel, torch.zeros_like(target.bias), border)


def _ridged(target: Target) -> Target:
    """The target with `RIDGE` in its second moments, all of them; the prior, which needs none, as it is."""
    if not target.images:
        return target

    def ridged(matrix: Tensor) -> Tensor:
        level = float(matrix.diagonal().mean())
        return matrix + RIDGE * (level or 1.0) * torch.eye(len(matrix), dtype=matrix.dtype)

    whole = None if target.covariance is None else ridged(target.covariance)
    return replace(target, channel=ridged(target.channel), spatial=ridged(target.spatial), covariance=whole)


def _groups(block: ACmix) -> Tensor:
    """Output channel of filter n of group i: (d, N)."""
    heads, dim = block.options.heads, block.head_dim
    channels = torch.arange(heads * dim)
    return channels.view(dim, heads) if block.options.layout == "authors" else channels.view(heads, dim).t()


def _start(target: Target, rows: Tensor, rank: int) -> _Factors:
    """Singular vectors of each group's whitened kernel, and projection biases that give the output's mean."""
    half = _root(target.spatial)
    scaled = target.weight * target.scale[:, None, None]
    work = (scaled @ half)[rows].transpose(2, 3).flatten(1, 2)  # (d, N*T, C), spatially white
    gram = work @ target.channel @ work.transpose(1, 2)
    levels, vectors = torch.linalg.eigh(gram)
    count = min(rank, vectors.shape[-1])
    levels, vectors = levels[:, -count:].flip(1), vectors[:, :, -count:].flip(2)
    strength = levels.clamp(min=0).sqrt()[:, :, None]
    weak = (WEAKEST * strength.amax(1, keepdim=True)).square()
    project = vectors.transpose(1, 2) @ work * (strength / (strength.square() + weak).clamp(min=1e-300))
    mix = (vectors * strength.transpose(1, 2)).view(len(rows), -1, target.taps, count).permute(0, 1, 3, 2)
    mix = mix @ torch.linalg.inv(half) / target.scale[rows][:, :, None, None].clamp(min=1e-12)
    centre = (project @ target.mean[:-1]).mean(2, keepdim=True)  # (d, r, 1), what a projection gives on average
    per_tap = mix.sum(3)  # (d, N, r)
    missing = target.mean_out[rows][:, :, None] - per_tap @ centre
    bias = torch.linalg.pinv(per_tap, rtol=1e-6) @ missing
    return _Factors(mix, torch.cat([project, bias], 2))


def _root(matrix: Tensor) -> Tensor:
    levels, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * levels.clamp(min=1e-9 * float(levels.max())).sqrt()) @ vectors.t()
    return root


def _moments(target: Target) -> tuple[Tensor, Tensor]:
    """Second moments about zero: of the patch with the border channel (C', T, C', T), with the output (O, C', T)."""
    assert target.covariance is not None
    mean = target.mean.flatten()
    channels, taps = target.channels, target.taps
    about = (target.covariance + mean[:, None] * mean).view(channels + 1, taps, channels + 1, taps)
    size = channels * taps
    joint = target.weight.flatten(1) @ target.covariance[:size] + target.mean_out[:, None] * mean
    return about, joint.view(-1, channels + 1, taps)


def _solve_mix(factors: _Factors, target: Target, rows: Tensor) -> None:
    """A by least squares for the P that stands, group by group."""
    about, joint = _moments(target)
    _tamed(factors, about)
    outer, taps = about.flatten(1), target.taps
    for start in range(0, len(rows), 16):
        project = factors.project[start : start + 16]  # (g, r, C')
        groups, rank, channels = project.shape
        seen = (project.flatten(0, 1) @ outer).view(groups, rank, taps, channels, taps)
        system = torch.einsum("gjucv,gkc->gjukv", seen, project).flatten(3, 4).flatten(1, 2)
        right = torch.einsum("gncu,gjc->gjun", joint[rows[start : start + 16]], project).flatten(1, 2)
        mix = solve(system, right)  # (g, r*T, N)
        factors.mix[start : start + 16] = mix.view(groups, rank, taps, -1).permute(0, 3, 1, 2)


def _tamed(factors: _Factors, about: Tensor) -> None:
    """Move the size of projections that give more than `LARGEST` to their mix; the kernel stays."""
    inner = about.diagonal(dim1=1, dim2=3).mean(2)  # (C', C')
    square = torch.einsum("gjc,cd,gjd->gj", factors.project, inner, factors.project)
    size = (square / LARGEST).clamp(min=1).sqrt()[:, :, None]
    factors.project, factors.mix = factors.project / size, factors.mix * size[:, None]


def _solve_project(factors: _Factors, target: Target, rows: Tensor) -> None:
    """P for the A that stands, by conjugate gradients on all groups at once; the error never grows."""
    about, joint = _moments(target)
    flat = about.flatten(2).flatten(0, 1)
    weights = target.scale[rows].square()[:, :, None, None]  # (d, N, 1, 1)
    mix = factors.mix

    def apply(project: Tensor) -> Tensor:
        maps = torch.einsum("gnju,gjc->gncu", mix, project)
        seen = (maps.flatten(0, 1).flatten(1) @ flat).view_as(maps) * weights
        return torch.einsum("gncu,gnju->gjc", seen, mix)

    right = torch.einsum("gncu,gnju->gjc", joint[rows] * weights, mix)
    spatial = about.diagonal(dim1=0, dim2=2).mean(2)  # (T, T)
    left = torch.einsum("gnju,uv,gnkv->gjk", mix * weights, spatial, mix)
    inner = about.diagonal(dim1=1, dim2=3).mean(2)
    project = factors.project
    residual = right - apply(project)
    ready = _precondition(left, inner, residual)
    direction, power = ready, (residual * ready).sum((1, 2))
    for _ in range(STEPS):
        image = apply(direction)
        step = power / (direction * image).sum((1, 2)).clamp(min=1e-300)
        project = project + step[:, None, None] * direction
        residual = residual - step[:, None, None] * image
        ready = _precondition(left, inner, residual)
        before, power = power, (residual * ready).sum((1, 2))
        direction = ready + (power / before.clamp(min=1e-300))[:, None, None] * direction
    factors.project = project


def _precondition(left: Tensor, inner: Tensor, residual: Tensor) -> Tensor:
    """The inverse of the Kronecker product that the system resembles: (d, r, r) and (C', C')."""
    return solve(inner, solve(left, residual, 1e-3).transpose(1, 2), 1e-3).transpose(1, 2)


def _write(block: ACmix, spec: ConvSpec, factors: _Factors, window: Window) -> None:
    """Put the factors into fc, the projections and the grouped convolution."""
    heads, dim, size = block.options.heads, block.head_dim, block.options.kernel_conv
    taps, sources = size**2, 3 * heads
    count, channels = factors.project.shape[1], factors.project.shape[2] - 1
    square, _ = torch.linalg.qr(block.fc.weight.detach().double().cpu().view(taps, sources).t())  # (3N, min)
    kept = square.shape[1]
    rotate = square if taps <= sources else torch.eye(sources, dtype=torch.float64)
    outward = square.t() if taps <= sources else torch.linalg.qr(_fc(block))[0]  # fc, (kc^2, 3N)
    project = _spread(block, rotate.t() if taps <= sources else rotate)  # (d, kept, C + 1), the fresh start's
    project[:, :count] = factors.project
    values = rotate @ project  # (d, 3N, C + 1): what q, k and v must be
    mix = factors.mix.new_zeros(dim, heads, kept, factors.mix.shape[3])
    mix[:, :, :count] = factors.mix
    if taps > sources:
        mix = torch.einsum("gnsu,ts->gntu", mix, outward)
    place = Window.over(spec, (size, size))
    assert place is not None
    kernel = mix.new_zeros(dim * heads, mix.shape[2], size, size)
    top, left = place.first[0] - window.first[0], place.first[1] - window.first[1]
    kernel[:, :, top : top + window.size[0], left : left + window.size[1]] = mix.reshape(dim * heads, -1, *window.size)
    with torch.no_grad():
        block.fc.weight.copy_(outward.view(taps, sources, 1, 1))
        block.dep_conv.weight.copy_(kernel)
        for j, conv in enumerate((block.conv1, block.conv2, block.conv3)):
            part = values[:, j * heads : (j + 1) * heads].transpose(0, 1).reshape(heads * dim, channels + 1)
            conv.weight.copy_(part[:, :-1, None, None])
            assert conv.bias is not None
            conv.bias.copy_(part[:, -1])
        block.rate1.zero_()
        block.rate2.fill_(1.0)


def _fc(block: ACmix) -> Tensor:
    return block.fc.weight.detach().double().cpu().flatten(1)


def _spread(block: ACmix, rotate: Tensor) -> Tensor:
    """What the block's own start projects, seen through fc: (d, rows of `rotate`, C + 1), biases 0."""
    heads, dim = block.options.heads, block.head_dim
    convs = (block.conv1, block.conv2, block.conv3)
    parts = [c.weight.detach().double().cpu().flatten(1).view(heads, dim, -1) for c in convs]
    fresh = rotate @ torch.cat(parts).transpose(0, 1)  # (d, kept, C)
    return torch.cat([fresh, fresh.new_zeros(*fresh.shape[:2], 1)], 2)
