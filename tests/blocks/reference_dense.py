"""Slow, independent forms of the blocks that attend over the map: loops over positions, from the equations."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

State = dict[str, Tensor]
Position = tuple[int, int]


def positions(x: Tensor) -> list[Position]:
    """Every (row, column) of a map (B, C, H, W)."""
    return list(product(range(x.shape[2]), range(x.shape[3])))


def project(state: State, name: str, pixel: Tensor) -> Tensor:
    """A 1 x 1 convolution on one pixel (C,)."""
    return (state[f"{name}.weight"].flatten(1) * pixel[None]).sum(1) + state[f"{name}.bias"]


def softmax_sum(logits: list[Tensor], values: list[Tensor]) -> Tensor:
    """sum_j exp(logit_j) value_j / sum_j exp(logit_j)."""
    top = max(float(logit) for logit in logits)
    weights = [(logit - top).exp() for logit in logits]
    total = torch.stack(weights).sum()
    return torch.stack([weight / total * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def gather_softmax(state: State, x: Tensor, reached: dict[Position, list[Position]]) -> Tensor:
    """x + gamma softmax attention, where a position sees those in `reached`."""
    out = x.clone()
    for b, (i, j) in product(range(x.shape[0]), positions(x)):
        query = project(state, "query_conv", x[b, :, i, j])
        seen = [x[b, :, y, z] for y, z in reached[i, j]]
        logits = [(query * project(state, "key_conv", pixel)).sum() for pixel in seen]
        out[b, :, i, j] += state["gamma"] * softmax_sum(logits, [project(state, "value_conv", p) for p in seen])
    return out


def loop_position_attention(state: State, x: Tensor) -> Tensor:
    """Fu et al. 2019: every position from all."""
    return gather_softmax(state, x, {here: positions(x) for here in positions(x)})


def loop_criss_cross(state: State, x: Tensor, recurrence: int = 1) -> Tensor:
    """Huang et al. 2019: the set of positions in a row or column holds the position itself once."""
    cross = {(i, j): [(y, z) for y, z in positions(x) if y == i or z == j] for i, j in positions(x)}
    for _ in range(recurrence):
        x = gather_softmax(state, x, cross)
    return x


def loop_channel_attention(state: State, x: Tensor) -> Tensor:
    """Fu et al. 2019, with the authors' code's energies: the largest minus each."""
    out = x.clone()
    for b, c in product(range(x.shape[0]), range(x.shape[1])):
        energies = [(x[b, c] * other).sum() for other in x[b]]
        top = max(energies, key=float)
        out[b, c] += state["gamma"] * softmax_sum([top - energy for energy in energies], list(x[b]))
    return out


def pooled(pixels: dict[Position, Tensor]) -> list[Tensor]:
    """Largest value of every channel in each whole 2 x 2 cell; along an axis of one position, in cells of one."""
    height, width = max(i for i, _ in pixels) + 1, max(j for _, j in pixels) + 1
    tall, wide = min(2, height), min(2, width)
    cells = product(range(height // tall), range(width // wide))
    return [
        torch.stack([pixels[tall * i + y, wide * j + z] for y, z in product(range(tall), range(wide))]).amax(0)
        for i, j in cells
    ]


def loop_non_local(
    state: State, x: Tensor, *, pairwise: str, sub_sample: bool = False, scale: bool = False, norm: bool = True
) -> Tensor:
    """Wang et al. 2018, equations 1 to 6, with the running statistics of the batch norm."""
    out = x.clone()
    last = "W.0" if norm else "W"
    for b in range(x.shape[0]):
        pixels = {(i, j): x[b, :, i, j] for i, j in positions(x)}
        same = pairwise == "gaussian"
        theta = pixels if same else {at: project(state, "theta", pixel) for at, pixel in pixels.items()}
        phi = pixels if same else {at: project(state, "phi", pixel) for at, pixel in pixels.items()}
        g = {at: project(state, "g", pixel) for at, pixel in pixels.items()}
        keys = pooled(phi) if sub_sample else list(phi.values())
        values = pooled(g) if sub_sample else list(g.values())
        for (i, j), query in theta.items():
            y = gathered(state, query, keys, values, pairwise, scale=scale)
            z = project(state, last, y)
            if norm:
                deviation = (state["W.1.running_var"] + 1e-5).sqrt()
                z = (z - state["W.1.running_mean"]) / deviation * state["W.1.weight"] + state["W.1.bias"]
            out[b, :, i, j] += z
    return out


def gathered(
    state: State, query: Tensor, keys: list[Tensor], values: list[Tensor], pairwise: str, *, scale: bool
) -> Tensor:
    """y of one position."""
    dots = [(query * key).sum() for key in keys]
    if pairwise in ("embedded_gaussian", "gaussian"):
        return softmax_sum([dot / math.sqrt(len(query)) if scale else dot for dot in dots], values)
    if pairwise == "concatenation":
        weight = state["concat_project.0.weight"].flatten()
        dots = [(weight * torch.cat([query, key])).sum().clamp(min=0) for key in keys]
    return torch.stack([dot * value for dot, value in zip(dots, values, strict=True)]).sum(0) / len(keys)


def loop_convolution(state: State, name: str, x: Tensor) -> Tensor:
    """A 3 x 3 convolution with zero padding, batch norm by running statistics (eps 1e-5), and ReLU, by pixels."""
    weight, height, width = state[f"{name}.0.weight"], x.shape[2], x.shape[3]
    out = x.new_zeros(x.shape[0], weight.shape[0], height, width)
    for (i, j), (a, b) in product(positions(x), product((-1, 0, 1), repeat=2)):
        if 0 <= i + a < height and 0 <= j + b < width:
            out[:, :, i, j] += (weight[None, :, :, a + 1, b + 1] * x[:, None, :, i + a, j + b]).sum(2)
    shift, scale = state[f"{name}.1.bias"], state[f"{name}.1.weight"]
    mean, var = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
    normed = (out - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return (normed * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def loop_dual_attention(state: State, x: Tensor) -> Tensor:
    """Fu et al. 2019: both attentions side by side, summed; with a 1 x 1 after the sum, or alone."""
    sa, sc = ({k[3:]: v for k, v in state.items() if k.startswith(part)} for part in ("sa.", "sc."))
    if "conv8.weight" not in state:
        return loop_position_attention(sa, x) + loop_channel_attention(sc, x) - x
    both = loop_convolution(state, "conv51", loop_position_attention(sa, loop_convolution(state, "conv5a", x)))
    both = both + loop_convolution(state, "conv52", loop_channel_attention(sc, loop_convolution(state, "conv5c", x)))
    out = x.clone()
    for i, j in positions(x):
        for b in range(x.shape[0]):
            out[b, :, i, j] += project(state, "conv8", both[b, :, i, j])
    return out
