"""Heads of reduced width behind given patterns: values and output projection by reduced-rank regression.

    W[o, c, u] ~ sum_h sum_j mix[o, h, j] values[h, j, c] s[h, u]

One head after another is regressed on what the others leave, and cut to its width by singular vectors; in the end the
mix is solved for all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convrewrite.fits.target import Target, solve

ROUNDS = 3


def reduced_heads(
    target: Target, patterns: Tensor, rows: Tensor, width: int, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """Values and mix for some output channels.

    Args:
        patterns: (N, T). rows: output channels, (R,). width: of a head. centred: the bias is free.

    Returns:
        values (N width, C) and mix (R, N width).
    """
    count = len(patterns)
    system, joint = target.seen_through(patterns, centred=centred)
    system = system.permute(1, 3, 0, 2).contiguous()  # (N, N, C, C)
    joint = (joint[rows] * target.scale[rows][:, None, None]).permute(2, 0, 1).contiguous()  # (N, R, C)
    parts = torch.zeros_like(joint)  # each head's map at this moment
    values = joint.new_zeros(count, width, target.channels)
    for _ in range(ROUNDS):
        for h in range(count):
            others = sum(parts[k] @ system[k, h] for k in range(count) if k != h)
            best = solve(system[h, h], (joint[h] - others).t()).t()  # (R, C)
            vectors = torch.linalg.eigh(best @ system[h, h] @ best.t())[1]
            top = vectors[:, -width:]  # (R, width), or all there are
            parts[h], values[h, : top.shape[1]] = top @ (top.t() @ best), top.t() @ best
    seen = torch.einsum("njc,nkcd->njkd", values, system)
    gram = torch.einsum("njkd,kld->njkl", seen, values).reshape(count * width, -1)
    right = torch.einsum("nrc,njc->njr", joint, values).flatten(0, 1)
    return values.flatten(0, 1), solve(gram, right).t() / target.scale[rows][:, None].clamp(min=1e-12)


def reduced_kernel(values: Tensor, mix: Tensor, patterns: Tensor) -> Tensor:
    """The kernel that `reduced_heads` stand for: (R, C, T)."""
    by_head = values.view(len(patterns), -1, values.shape[1])
    return torch.einsum("onj,njc,nu->ocu", mix.view(len(mix), len(patterns), -1), by_head, patterns)


def busiest_taps(target: Target, rows: Tensor, usable: list[int], count: int, width: int) -> Tensor:
    """The tap of each of `count` heads: those with the most energy, several heads on one where it pays; sorted."""
    weight = target.weight[rows] * target.scale[rows][:, None, None]
    gains = []
    for tap in usable:
        part = weight[:, :, tap]
        levels = torch.linalg.eigvalsh(part @ target.channel @ part.t()).clamp(min=0).flip(0)
        gains += [(float(levels[i * width : (i + 1) * width].sum()), tap) for i in range(count)]
    return torch.tensor(sorted(tap for _, tap in sorted(gains, reverse=True)[:count]))
