"""Attention with heads of full width, with loops over pixels, heads and taps, written from the equations."""

from __future__ import annotations

from itertools import product

import torch.nn.functional as F
from torch import Tensor

from convrewrite.sites import ConvSpec

Pair = tuple[int, int]


def as_padded(x: Tensor, conv: ConvSpec) -> Tensor:
    """What the convolution sees: windows then lie wholly on the map."""
    return F.pad(x, conv.padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def _pixel(x: Tensor, row: int, column: int) -> Tensor:
    """x (B, C, H, W) at a position, zero outside: (B, C)."""
    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
        return x[:, :, row, column]
    return x.new_zeros(x.shape[:2])


def _mixed(state: dict[str, Tensor], sums: list[Tensor], groups: int) -> Tensor:
    """sum_h P_h z_h, an output reads the channels of its group alone; z (B, C) each -> (B, O)."""
    mix = state["mix"]
    outputs, width, heads = mix.shape
    y = sums[0].new_zeros(sums[0].shape[0], outputs)
    for o, c, h in product(range(outputs), range(width), range(heads)):
        y[:, o] += mix[o, c, h] * sums[h][:, o // (outputs // groups) * width + c]
    return y + state["bias"] if "bias" in state else y


def loop_sasa_wide(state: dict[str, Tensor], x: Tensor, conv: ConvSpec, *, window: Pair, key_dim: int) -> Tensor:
    """y_i = sum_h P_h sum_o softmax_o( D^-.5 q_ih . (k_{i+o} + r_o) + beta_ho ) x_{i+o} + b."""
    count = conv.out_size(x.shape[2], x.shape[3])
    x = as_padded(x, conv)
    heads = state["offset_bias"].shape[0]
    out = x.new_zeros(x.shape[0], conv.out_channels, *count)
    centre = [(conv.kernel[axis] - 1) // 2 for axis in (0, 1)]
    before = [(window[axis] - conv.kernel[axis]) // 2 for axis in (0, 1)]
    for i, j in product(range(count[0]), range(count[1])):
        top, left = i * conv.stride[0], j * conv.stride[1]  # of the convolution's window
        query = _pixel(x, top + centre[0] * conv.dilation[0], left + centre[1] * conv.dilation[1])
        values = [
            _pixel(x, top + (row - before[0]) * conv.dilation[0], left + (column - before[1]) * conv.dilation[1])
            for row, column in product(range(window[0]), range(window[1]))
        ]
        sums = []
        for h in range(heads):
            q = query @ state["query.weight"][h * key_dim : (h + 1) * key_dim].T
            logits = x.new_empty(x.shape[0], len(values))
            for tap, value in enumerate(values):
                key = value @ state["key.weight"].T + state["relative"][tap]
                logits[:, tap] = (q * key).sum(1) / key_dim**0.5 + state["offset_bias"][h, tap]
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            sums.append(sum((weights[:, tap, None] * value for tap, value in enumerate(values)), x.new_zeros(())))
        out[:, :, i, j] = _mixed(state, sums, conv.groups)
    return out


def loop_outlook_wide(state: dict[str, Tensor], x: Tensor, conv: ConvSpec) -> Tensor:
    """y_i = sum_h P_h sum_c sum_p softmax_p( a_ch[m, p] ) x_{c+p} + b, c over the window around i."""
    count = conv.out_size(x.shape[2], x.shape[3])
    x = as_padded(x, conv)
    rows, columns = conv.kernel
    taps = list(product(range(rows), range(columns)))
    heads = state["mix"].shape[2]
    out = x.new_zeros(x.shape[0], conv.out_channels, *count)
    for i, j in product(range(count[0]), range(count[1])):
        sums = [x.new_zeros(x.shape[:2]) for _ in range(heads)]
        for h, (m, (down, right)) in product(range(heads), enumerate(taps)):
            c = i * conv.stride[0] + down * conv.dilation[0], j * conv.stride[1] + right * conv.dilation[1]
            first = (h * len(taps) + m) * len(taps)
            part = slice(first, first + len(taps))
            logits = _pixel(x, *c) @ state["attn.weight"][part].T + state["attn.bias"][part]
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            for p, (row, column) in enumerate(taps):
                at = (row - (rows - 1) // 2) * conv.dilation[0], (column - (columns - 1) // 2) * conv.dilation[1]
                sums[h] = sums[h] + weights[:, p, None] * _pixel(x, c[0] + at[0], c[1] + at[1])
        out[:, :, i, j] = _mixed(state, sums, conv.groups)
    return out
