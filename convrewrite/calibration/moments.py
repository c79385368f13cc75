"""Second moments of the patches that a site sees, streamed over batches in float64.

Memory does not grow with the number of images: what is held is one matrix of ((C + 1) T)^2 numbers, or, where that
is beyond the budget, the covariance's two marginals (channels, taps). A site reads at most `samples` patches,
drawn evenly from all batches by a seeded generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.fits.target import ROUNDING, Target, Window, dense_weight
from convrewrite.sites import ConvSpec

NUMBER = 8
"""Bytes of a float64."""
MATRICES = 4
"""Of that size are alive at once while a site is fitted: the covariance, a factor, a copy and a product."""


def bytes_needed(channels: int, taps: int) -> int:
    """Memory that a full covariance of such patches takes while it is used."""
    return MATRICES * NUMBER * ((channels + 1) * taps) ** 2


def patches(x: Tensor, spec: ConvSpec, window: Window, at: Tensor) -> Tensor:
    """What the window sees at chosen outputs, with the border channel: (n, C + 1, T), float64 on the CPU.

    Args:
        x: (B, C, H, W), the convolution's input.
        at: (n, 3), image, output row and output column.
    """
    left, right, top, bottom = spec.padding
    before = [max(0, window.first[i]) * spec.dilation[i] for i in range(2)]
    reach = [window.size[i] - window.first[i] - spec.kernel[i] for i in range(2)]
    after = [max(0, reach[i]) * spec.dilation[i] for i in range(2)]
    inside = x.new_ones(1, 1, *x.shape[2:])
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    wide = [before[1], after[1], before[0], after[0]]
    x, inside = (F.pad(F.pad(t, (left, right, top, bottom), mode=mode), wide) for t in (x, inside))
    index = []
    for i in range(2):
        first = before[i] - window.first[i] * spec.dilation[i]
        reach_taps = torch.arange(window.size[i], device=at.device) * spec.dilation[i]
        index.append(at[:, 1 + i, None] * spec.stride[i] + first + reach_taps)  # (n, taps of the axis)
    rows, columns = index[0][:, :, None], index[1][:, None, :]
    seen = x[at[:, 0, None, None], :, rows, columns]  # (n, kh, kw, C)
    border = inside[0, :, rows, columns].movedim(0, -1)
    return torch.cat([seen, border], -1).movedim(-1, 1).flatten(2).double().cpu()


@dataclass
class Sums:
    """Running sums over patches phi (with the border channel) and the original's outputs y."""

    count: int
    phi: Tensor
    second: Tensor | None
    channel: Tensor
    spatial: Tensor
    joint: Tensor
    y: Tensor
    square: Tensor
    groups: int = 1
    within: Tensor | None = None

    @classmethod
    def empty(cls, outputs: int, channels: int, taps: int, *, full: bool, groups: int = 1) -> Sums:
        """Nothing yet. Without `full` the second moments within each of the convolution's groups, if there are any."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        size = (channels + 1) * taps
        second = zeros(size, size) if full else None
        joint = zeros(outputs, size) if full else zeros(outputs, 0)
        return cls(
            0, zeros(channels + 1, taps), second, zeros(channels, channels), zeros(taps, taps), joint,
            zeros(outputs), zeros(outputs), groups,
            None if full or groups == 1 else zeros(groups, channels // groups * taps, channels // groups * taps),
        )  # fmt: skip

    def add(self, phi: Tensor, y: Tensor) -> None:
        """phi (n, C + 1, T), y (n, O)."""
        flat, inner = phi.flatten(1), phi[:, :-1]
        self.count += len(phi)
        self.phi += phi.sum(0)
        if self.second is not None:
            self.second.addmm_(flat.t(), flat)
            self.joint.addmm_(y.t(), flat)
        if self.within is not None:
            own = inner.reshape(len(phi), self.groups, -1).transpose(0, 1)  # (G, n, C/G*T)
            self.within.baddbmm_(own.transpose(1, 2), own)
        across = inner.transpose(1, 2).flatten(0, 1)  # (n*T, C)
        self.channel.addmm_(across.t(), across)
        along = inner.flatten(0, 1)  # (n*C, T)
        self.spatial.addmm_(along.t(), along)
        self.y += y.sum(0)
        self.square += y.square().sum(0)

    def target(self, conv: nn.Conv2d, window: Window, scale: Tensor, ridge: float) -> Target:
        """What the block is to be fitted to: `conv`, corrected towards the outputs that were seen."""
        mean, mean_y = self.phi / self.count, self.y / self.count
        weight = window.place(dense_weight(conv.weight, conv.groups))
        channels, taps = weight.shape[1:]
        inner = mean[:-1]
        channel = self.channel / (self.count * taps) - (inner @ inner.t()) / taps
        spatial = self.spatial / (self.count * channels) - (inner.t() @ inner) / channels
        # Beside a large mean a small variance is rounding, and may be below 0.
        least = ROUNDING * float(self.channel.diagonal().mean()) / (self.count * taps)
        channel.diagonal().add_(least)
        spatial.diagonal().add_(least)
        level = float(spatial.diagonal().mean())
        spatial = spatial / level if level > 0 else torch.eye(taps, dtype=torch.float64)  # nothing but zeros was seen
        covariance = None
        if self.second is not None:
            covariance = self.second / self.count - mean.flatten()[:, None] * mean.flatten()
            covariance.diagonal()[: channels * taps].add_(least)
        variance = (self.square / self.count - mean_y.square()).clamp(min=0)
        target = Target(
            weight=weight,
            bias=mean_y - (weight * inner).sum((1, 2)),
            window=window,
            mean=mean,
            channel=channel,
            spatial=spatial,
            covariance=covariance,
            mean_out=mean_y,
            scale=scale,
            power=float((variance * scale.square()).sum()),
            groups=self.groups if covariance is None else 1,
            within=self._in_groups(inner, least),
        )
        if covariance is None:
            return target
        size = channels * taps
        cross = self.joint / self.count - mean_y[:, None] * mean.flatten()
        return target.anchored(cross - weight.flatten(1) @ covariance[:size], variance, ridge)

    def _in_groups(self, mean: Tensor, least: float) -> Tensor | None:
        """The covariance within each group, (G, C / G, T, C / G, T)."""
        if self.within is None:
            return None
        flat = mean.reshape(self.groups, -1)
        found = self.within / self.count - flat[:, :, None] * flat[:, None]
        found.diagonal(dim1=1, dim2=2).add_(least)
        each = len(mean) // self.groups
        return found.view(self.groups, each, mean.shape[1], each, mean.shape[1])


def scale_of(norm: nn.BatchNorm2d | None, outputs: int) -> Tensor:
    """|gamma| / sqrt(var + eps) of a batch norm, ones where there is none: (O,), float64."""
    if norm is None or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma = torch.ones(outputs) if norm.weight is None else norm.weight.detach().cpu()
    return gamma.double().abs() / (norm.running_var.detach().double().cpu() + norm.eps).sqrt()


def draw(shape: tuple[int, int, int], count: int, generator: torch.Generator) -> Tensor:
    """`count` places of (images, rows, columns), without repetition; all, in order, if there are no more: (n, 3)."""
    total = shape[0] * shape[1] * shape[2]
    flat = torch.arange(total) if count >= total else torch.randperm(total, generator=generator)[:count]
    image, place = flat // (shape[1] * shape[2]), flat % (shape[1] * shape[2])
    return torch.stack([image, place // shape[2], place % shape[2]], 1)
