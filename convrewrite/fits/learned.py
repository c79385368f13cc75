"""Patterns of heads whose spatial shape is restricted: learned by turns with what the heads carry.

    W[o, c, u] ~ sum_h A_h[o, c] s_h[u](theta),    E || D (W - W^)(patch - mean) ||^2

With the maps A given, the error is a quadratic form in the patterns, of N T numbers whatever the channels; theta goes
down on that. With the patterns given, the maps are a regression. The error of the best round is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.fits.reduced import reduced_heads, reduced_kernel
from convrewrite.fits.target import Target

BOUND = 4.0
"""Logits are kept within this of their mean, so that the softmax stays alive."""

ROUNDS = 4
STEPS = 25
"""Steps of L-BFGS in each round."""


@dataclass(frozen=True)
class Regressed:
    """What heads carry, for given patterns.

    Attributes:
        patterns: (N, T). maps: (N, O, C). values: (rows, C).
        mix: (O, rows), or None where there is no output projection.
        kernel: (O, C, T) that all this stands for. bias: (O,).
    """

    patterns: Tensor
    maps: Tensor
    values: Tensor
    mix: Tensor | None
    kernel: Tensor
    bias: Tensor


Regress = Callable[[Tensor], Regressed]
Patterns = Callable[[Sequence[Tensor]], Tensor]


def bounded(logits: Tensor) -> Tensor:
    """Logits centred along the last axis, scaled down where they are beyond `BOUND`; a product keeps its rank."""
    return bound(logits)[..., None] * (logits - logits.mean(-1, keepdim=True))


def bound(logits: Tensor) -> Tensor:
    """By what `bounded` multiplies the centred logits; the last axis is gone."""
    highest = (logits - logits.mean(-1, keepdim=True)).abs().amax(-1)
    return BOUND / highest.clamp(min=BOUND)


def projected(target: Target, patterns: Tensor, width: int) -> Regressed:
    """Values and projection for heads of `width` channels with given patterns (N, T), by reduced-rank regression."""
    values, mix = reduced_heads(target, patterns, torch.arange(len(target.weight)), width, centred=True)
    maps = torch.einsum("onj,njc->noc", mix.view(len(mix), len(patterns), -1), values.view(len(patterns), width, -1))
    kernel = reduced_kernel(values, mix, patterns)
    return Regressed(patterns, maps, values, mix, kernel, target.best_bias(kernel))


def learn(
    target: Target, starts: Sequence[Sequence[Tensor]], patterns: Patterns, regress: Regress, *, centred: bool
) -> tuple[list[Tensor], Regressed]:
    """The parameters of the best patterns found, and what goes with them.

    Args:
        starts: each a list of parameters to begin at. patterns: parameters -> (N, T). centred: the bias is free.
    """
    tried = [_descend(target, list(start), patterns, regress, centred=centred) for start in starts]
    _, parameters, found = min(tried, key=lambda one: one[0])
    return parameters, found


def _descend(
    target: Target, parameters: list[Tensor], patterns: Patterns, regress: Regress, *, centred: bool
) -> tuple[float, list[Tensor], Regressed]:
    found = regress(patterns(parameters))
    best = (target.nmse(found.kernel, found.bias), parameters, found)
    for _ in range(ROUNDS if parameters else 0):
        system, right = pattern_system(target, found.maps, centred=centred)
        parameters = _shaped(parameters, patterns, system, right, target.power)
        found = regress(patterns(parameters))
        error = target.nmse(found.kernel, found.bias)
        if not error < best[0] * (1 - 1e-3):
            break
        best = (error, parameters, found)
    return best


def _shaped(parameters: list[Tensor], patterns: Patterns, system: Tensor, right: Tensor, power: float) -> list[Tensor]:
    """Go down the quadratic ``s . system s - 2 right . s``; each head may be scaled on the way."""
    free = [p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for p in parameters]
    gain = torch.ones(len(right), 1, dtype=right.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([*free, gain], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        shaped = (gain * patterns(free)).flatten()
        loss: Tensor = (shaped @ system @ shaped - 2 * right.flatten() @ shaped) / max(power, 1e-300)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    moved = [p.detach() for p in free]
    return moved if all(bool(torch.isfinite(p).all()) for p in moved) else parameters


def pattern_system(target: Target, maps: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """The error as a quadratic form of the patterns: (N T, N T) and (N, T), for maps (N, O, C)."""
    count, taps = len(maps), target.taps
    weighed = maps * target.scale.square()[None, :, None]
    joint = target.times(target.weight)  # (O, C, T)
    right = torch.einsum("noc,ocu->nu", weighed, joint)
    if target.covariance is None:
        across = torch.einsum("noc,cd,kod->nk", weighed, target.channel, maps)
        system = torch.einsum("nk,uv->nukv", across, target.spatial)
    else:
        system = maps.new_zeros(count, count, taps, taps)
        size = target.channels * taps
        part = target.covariance[:size, :size].view(target.channels, taps, target.channels, taps)
        for c in range(target.channels):  # a matrix of all channels' pairs would be the largest of all
            pairs = torch.einsum("no,kod->nkd", weighed[:, :, c], maps)
            system += torch.einsum("nkd,udv->nkuv", pairs, part[c])
        system = system.permute(0, 2, 1, 3)
    if not centred:
        mean = torch.einsum("noc,cu->nou", maps, target.mean[:-1])  # what a head gives on average
        system = system + torch.einsum("nou,kov->nukv", mean * target.scale.square()[None, :, None], mean)
        right = right + torch.einsum("nou,o->nu", mean, target.mean_out * target.scale.square())
    return system.reshape(count * taps, count * taps), right
