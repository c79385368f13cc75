"""What a fit gets: the convolution to approximate, and the second moments of the patches that it sees.

Everything is float64 on the CPU. A patch is indexed (channel, tap), taps in row-major order, as a convolution's
weight is. Besides the C channels of the input there is one more, the *border channel*: 1 on the map and 0 in the
zero padding, since that is what a bias in front of a padded convolution multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from convrewrite.sites import ConvSpec

CORRELATION = 0.8
"""Between neighbouring pixels of one channel, where there are no images to measure it."""

RIDGE = 1e-6
"""Added to the diagonal of every normal equation, relative to its mean."""

ROUNDING = 1e-14
"""Of a mean square: what is left of a variance in float64 where there is none, with room to spare."""

LEAST_SPREAD = 1e-12
"""Of an output's mean square: a smaller variance counts as this much, as an error by a variance of 0 says nothing."""


@dataclass(frozen=True)
class Window:
    """Taps of a patch: those of a block's window that is laid over the convolution's kernel, centres together.

    Attributes:
        size: taps (rows, columns). first: (row, column) of the kernel's first tap in it; negative where the
            window is smaller than the kernel.
    """

    size: tuple[int, int]
    first: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.size[0] * self.size[1]

    @classmethod
    def over(cls, spec: ConvSpec, size: tuple[int, int]) -> Window | None:
        """A window of `size` taps with the convolution's dilation; None where its taps miss the convolution's."""
        first = []
        for i in range(2):
            step = spec.dilation[i]
            ours, theirs = step * (size[i] - 1), step * (spec.kernel[i] - 1)
            if (ours // 2 - theirs // 2) % step:
                return None
            first.append((ours // 2 - theirs // 2) // step)
        return cls(size, (first[0], first[1]))

    @classmethod
    def of_kernel(cls, spec: ConvSpec) -> Window:
        return cls(spec.kernel, (0, 0))

    def place(self, weight: Tensor) -> Tensor:
        """A kernel (O, C, kh, kw) in the window, zeros around it, what sticks out cut off: (O, C, taps)."""
        out = weight.new_zeros(*weight.shape[:2], *self.size)
        rows, columns = (_overlap(self.first[i], weight.shape[2 + i], self.size[i]) for i in range(2))
        out[:, :, rows[0], columns[0]] = weight[:, :, rows[1], columns[1]]
        return out.flatten(2)

    def misses(self, weight: Tensor) -> Tensor:
        """The part of a kernel (O, C, kh, kw) that `place` cuts off, same shape."""
        rows, columns = (_overlap(self.first[i], weight.shape[2 + i], self.size[i]) for i in range(2))
        left = weight.clone()
        left[:, :, rows[1], columns[1]] = 0
        return left


def _overlap(first: int, kernel: int, size: int) -> tuple[slice, slice]:
    """The common taps, counted in the window and in the kernel."""
    low, high = max(first, 0), min(first + kernel, size)
    return slice(low, high), slice(low - first, high - first)


@dataclass(frozen=True)
class Target:
    """The linear map ``y = weight . patch + bias`` that a block is to come close to, and over which patches.

    Without images (`images` False) the second moments are a prior: channels independent, neighbouring pixels
    correlated, mean 0. An anchored target is corrected for what the sites before it got wrong; `floor` is then the
    part of the original's output that no convolution of the new patches explains.

    Attributes:
        weight: (O, C, T), dense over groups. bias: (O,).
        window: which taps the T are.
        mean: (C + 1, T), of the patches, the border channel last.
        channel: (C, C) and spatial: (T, T), the covariance's marginals: its mean over taps, and over channels
            (that one with mean diagonal 1), so that their Kronecker product approximates it.
        covariance: ((C + 1) T, (C + 1) T), or None where it would not fit into memory or nothing was measured.
        groups: of the convolution, if `covariance` is None; `weight` is then 0 between them, and so are all kernels
            that come close to it. within: (groups, C / groups, T, C / groups, T), the covariance in each group, where
            it was measured; else that of the marginals.
        mean_out: (O,), of the original's output.
        scale: (O,), by what each output channel is multiplied next (of a batch norm |gamma| / sqrt(var + eps)).
        power: sum over channels of scale^2 times the variance of the original's output.
        floor: the same of what `weight` and `bias` leave over of the original's output.
        rest: (O, (C + 1) T), the covariance of what they leave over with the patch; small, but not 0, since the
            correction is damped. None where nothing was corrected.
    """

    weight: Tensor
    bias: Tensor
    window: Window
    mean: Tensor
    channel: Tensor
    spatial: Tensor
    covariance: Tensor | None
    mean_out: Tensor
    scale: Tensor
    power: float
    floor: float = 0.0
    rest: Tensor | None = None
    images: bool = True
    groups: int = 1
    within: Tensor | None = None

    @property
    def channels(self) -> int:
        """C, without the border channel."""
        return self.weight.shape[1]

    @property
    def taps(self) -> int:
        return self.weight.shape[2]

    @property
    def unexplained(self) -> float:
        """The part of every NMSE that no convolution of these patches takes away."""
        return self.floor / self._unit

    @property
    def _unit(self) -> float:
        """What errors are divided by: `power`, or its least value where the output hardly varies."""
        steady = LEAST_SPREAD * float((self.mean_out * self.scale).square().sum())
        return max(self.power, steady, torch.finfo(torch.float64).tiny)

    def times(self, maps: Tensor) -> Tensor:
        """maps (R, C or C + 1, T) . covariance -> the same shape; the border channel needs a full covariance.

        With groups only the covariance in each is taken.
        """
        rows, channels, taps = maps.shape
        if self.covariance is not None:
            part = self.covariance[: channels * taps, : channels * taps]
            return (maps.flatten(1) @ part).view(rows, channels, taps)
        assert channels == self.channels
        if self.within is not None:
            parts = maps.view(rows, self.groups, -1, taps)
            return torch.einsum("rgct,gctdu->rgdu", parts, self.within).reshape(maps.shape)
        return self.across(maps) @ self.spatial

    def across(self, maps: Tensor) -> Tensor:
        """maps (R, C, T) . `channel`, of each group by itself -> the same shape."""
        parts = maps.view(len(maps), self.groups, -1, maps.shape[2])
        return torch.einsum("rgct,gcd->rgdt", parts, diagonal_blocks(self.channel, self.groups)).reshape(maps.shape)

    def in_groups(self, groups: int) -> Tensor:
        """The covariance in each of so many groups: (G, C / G, T, C / G, T)."""
        if self.covariance is not None:
            size, each = self.channels * self.taps, self.channels // groups
            blocks = diagonal_blocks(self.covariance[:size, :size], groups)
            return blocks.view(groups, each, self.taps, each, self.taps)
        if self.within is not None:
            return self.within
        return torch.einsum("gcd,uv->gcudv", diagonal_blocks(self.channel, groups), self.spatial)

    def best_bias(self, weight: Tensor) -> Tensor:
        """The bias (O,) that goes with `weight` (O, C, T): output means are then the original's."""
        return self.mean_out - (weight * self.mean[: self.channels]).sum((1, 2))

    def nmse(self, weight: Tensor, bias: Tensor, border: Tensor | None = None) -> float:
        """Mean square error of ``weight . patch + bias + border . border channel``, by the output's variance.

        Both are summed over output channels with squared `scale`.

        Args:
            weight: (O, C, T). bias: (O,). border: (O, T).
        """
        gap = self.weight - weight  # (O, C, T)
        if border is not None and self.covariance is not None:
            gap = torch.cat([gap, -border[:, None]], 1)  # (O, C + 1, T)
        variance = (self.times(gap) * gap).sum((1, 2)).clamp(min=0)
        if self.rest is not None:
            variance = variance + 2 * (self.rest[:, : gap[0].numel()] * gap.flatten(1)).sum(1)
        shift = (gap * self.mean[: gap.shape[1]]).sum((1, 2)) + self._constant() - bias
        if border is not None and self.covariance is None:
            shift = shift - border.sum(1)
        error = ((variance + shift.square()) * self.scale.square()).sum()
        return (float(error) + self.floor) / self._unit

    def _constant(self) -> Tensor:
        """What is added to ``weight . patch`` to have the original's mean."""
        return self.mean_out - (self.weight * self.mean[: self.channels]).sum((1, 2))

    @cached_property
    def joint(self) -> Tensor:
        """`times` of `weight`: the covariance of outputs and patches, (O, C, T)."""
        return self.times(self.weight)

    def seen_through(self, patterns: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Normal equations of kernels ``sum_h mix[o, c, h] patterns[h, u]``.

        Args:
            patterns: (M, T). centred: the bias is free, so that means play no part; else there is none.

        Returns:
            (C, M, C, M) the features' second moments, and (O, C, M) those of features and outputs.
        """
        if self.covariance is not None:
            size = self.channels * self.taps
            part = self.covariance[:size, :size].view(self.channels, self.taps, self.channels, self.taps)
            system = torch.einsum("hu,cudk->chdk", patterns, part @ patterns.t())
        else:
            system = torch.einsum("cd,hk->chdk", self.channel, patterns @ self.spatial @ patterns.t())
        joint = self.joint @ patterns.t()
        if not centred:
            mean = self.mean[:-1] @ patterns.t()  # (C, M)
            system = system + mean[:, :, None, None] * mean
            joint = joint + self.mean_out[:, None, None] * mean
        return system, joint

    def anchored(self, cross: Tensor, power: Tensor, ridge: float) -> Target:
        """Corrected towards the original's output, by the regression of what `weight` leaves over on the patches.

            W <- W + cross (covariance + lambda I)^-1

        Args:
            cross: (O, (C + 1) T), the covariance of y - weight . patch with the patch, border channel included.
            power: (O,), the variance of y. ridge: lambda, relative to the mean diagonal of the covariance.
        """
        if self.covariance is None:
            return self
        size = self.channels * self.taps
        part, weight = self.covariance[:size, :size], self.weight.flatten(1)
        change = solve(part, cross[:, :size].t(), ridge).t()  # (O, C T)
        joint = weight @ part + cross[:, :size]  # the covariance of y with the patch
        weight = weight + change
        left = power - 2 * (weight * joint).sum(1) + ((weight @ part) * weight).sum(1)
        floor = float((left.clamp(min=0) * self.scale.square()).sum())
        rest = cross - change @ self.covariance[:size]
        weight = weight.view_as(self.weight)
        return replace(self, weight=weight, bias=self.best_bias(weight), floor=floor, rest=rest)


def prior(weight: Tensor, bias: Tensor | None, spec: ConvSpec, window: Window | None = None) -> Target:
    """The target where there are no images: channels independent and alike, pixels correlated, mean 0.

    Args:
        weight: the convolution's, (O, C / groups, kh, kw). bias: (O,) or None.
        window: the block's; by default the kernel.
    """
    window = window or Window.of_kernel(spec)
    dense = window.place(dense_weight(weight, spec.groups))
    outputs, channels, taps = dense.shape
    spatial = torch.kron(_decay(window.size[0]), _decay(window.size[1]))
    constant = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    mean = torch.zeros(channels + 1, taps, dtype=torch.float64)
    mean[-1] = 1.0
    full = dense_weight(weight, spec.groups)
    apart = torch.kron(_decay(spec.kernel[0]), _decay(spec.kernel[1]))
    return Target(
        weight=dense,
        bias=constant,
        window=window,
        mean=mean,
        channel=torch.eye(channels, dtype=torch.float64),
        spatial=spatial,
        covariance=None,
        mean_out=constant,
        scale=torch.ones(outputs, dtype=torch.float64),
        power=_energy(full, apart),
        floor=_energy(window.misses(full), apart),
        images=False,
        groups=spec.groups,
    )


def _energy(weight: Tensor, spatial: Tensor) -> float:
    flat = weight.flatten(2)
    return float(((flat @ spatial) * flat).sum())


def _decay(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    return CORRELATION ** (place[:, None] - place).abs()


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """(n count, n count) -> (count, n, n)."""
    each = len(matrix) // count
    return matrix.view(count, each, count, each).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def dense_weight(weight: Tensor, groups: int) -> Tensor:
    """(O, C / groups, kh, kw) -> (O, C, kh, kw) in float64, zeros between the groups."""
    weight = weight.detach().double().cpu()
    if groups == 1:
        return weight
    outputs, each = weight.shape[:2]
    dense = weight.new_zeros(outputs, groups, each, *weight.shape[2:])
    index = torch.arange(outputs)
    dense[index, index * groups // outputs] = weight
    return dense.flatten(1, 2)


def solve(matrix: Tensor, right: Tensor, ridge: float = RIDGE) -> Tensor:
    """(matrix + ridge mean-diagonal I)^-1 right, for symmetric positive matrices (..., n, n); 0 where they are 0.

    Raises:
        ValueError: the matrix is not finite, so that no ridge would make it positive.
    """
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)[..., None]
    system = matrix / level[..., None]
    if not bool(torch.isfinite(system).all()):
        raise ValueError("the matrix of a normal equation is not finite")
    while True:
        damped = system + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return torch.cholesky_solve(right, factor) / level[..., None]
        ridge *= 10
