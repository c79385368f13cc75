"""Stand-alone attention as its paper has it: one separable pattern a head, values by least squares.

There is no output projection, so each output channel is one pattern times one vector: rank one in space, the wall
of this block. The queries have no bias, so patterns stand on a nearly constant function of the pixel
(`fits.constant`); without images there is none, and every pattern is even over the window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.constant import STEADY, nearly_one
from convrewrite.fits.target import Target, Window, solve
from convrewrite.sites import ConvSpec, Place

FLOOR = 0.01
"""Least weight of a row or column, relative to the largest: logits stay within 5 of each other."""


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    assert isinstance(options, SASAOptions)
    return Window.over(spec, (options.window, options.window)) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, SASAOptions) and place.conv is not None
    if max(place.conv.stride) > 1:
        return f"stride {max(place.conv.stride)} is made by pooling, which no weights undo (wanted: 1)"
    if options.position != "relative":
        return f"position {options.position} cannot tell offsets apart without content (wanted: relative)"
    if Window.over(place.conv, (options.window, options.window)) is None:
        return f"the taps of window {options.window} fall between those of the kernel"
    return None


@fit_of("sasa", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set embeddings, queries and values; keys are zero, with a gradient that is not where queries are not zero."""
    assert isinstance(block, SASA) and block.row_embedding is not None and block.column_embedding is not None
    heads, size = block.options.heads, block.options.window
    one, share = nearly_one(target)
    alone = block.row_embedding.shape[0] > 1 or block.row_embedding.shape[1] >= heads  # a pattern for each head
    groups = target.weight * target.scale[:, None, None]
    parts = groups.view(heads if alone else 1, -1, target.channels, target.taps)
    rows, columns = torch.zeros(2, len(parts), size, dtype=torch.float64).unbind(0)
    if share >= STEADY:
        rows, columns = _logits(parts, target, size)
    patterns = (rows.softmax(1)[:, :, None] * columns.softmax(1)[:, None]).flatten(1).expand(heads, -1)  # (N, T)
    kernel = _values(target, patterns)
    values = kernel[:, :, 0] / patterns.repeat_interleave(block.head_dim, 0)[:, :1]
    _write(block, values, rows, columns, one if share >= STEADY else torch.zeros_like(one))
    return target.nmse(kernel, torch.zeros_like(target.bias))


def _logits(parts: Tensor, target: Target, size: int) -> tuple[Tensor, Tensor]:
    """Row and column logits (N, K) of the separable pattern nearest to each head's best direction."""
    gram = torch.einsum("nocu,cd,nodv->nuv", parts, target.channel, parts)
    levels, vectors = torch.linalg.eigh(target.spatial)
    root = levels.clamp(min=1e-3 * float(levels.max())).sqrt()
    half, inverse = (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
    best = torch.linalg.eigh(half @ gram @ half)[1][:, :, -1] @ inverse  # (N, T)
    up = best.clamp(min=0).sum(1) >= (-best).clamp(min=0).sum(1)
    best = torch.where(up[:, None], best, -best).clamp(min=0).view(-1, size, size)
    found = []
    for axis in (2, 1):
        line = best.square().sum(axis).sqrt()
        found.append(line.clamp(min=FLOOR * float(line.amax())).log())
    return found[0], found[1]


def _values(target: Target, patterns: Tensor) -> Tensor:
    """The kernel (O, C, T) of the best values for given patterns (N, T), a regression for each head."""
    kernel = torch.zeros_like(target.weight)
    width = len(kernel) // len(patterns)
    for h, pattern in enumerate(patterns):
        own = slice(h * width, (h + 1) * width)
        system, joint = target.seen_through(pattern[None], centred=False)
        kernel[own] = solve(system[:, 0, :, 0], joint[own, :, 0].t()).t()[:, :, None] * pattern
    return kernel


def _write(block: SASA, values: Tensor, rows: Tensor, columns: Tensor, one: Tensor) -> None:
    heads, dim, channels = block.options.heads, block.head_dim, block.out_channels
    assert block.row_embedding is not None and block.column_embedding is not None
    tables, half, _ = block.row_embedding.shape
    query = one.new_zeros(heads, dim, len(one))
    with torch.no_grad():
        for h in range(heads):
            table, pattern = (h, h) if tables > 1 else (0, h if len(rows) > 1 else 0)
            place = 0 if tables > 1 else pattern
            if bool(one.any()):
                block.row_embedding[table, place] = rows[pattern].to(block.row_embedding)
                block.column_embedding[table, place] = columns[pattern].to(block.column_embedding)
            query[h, place] = query[h, half + place] = one
        parts = torch.cat([query.flatten(0, 1), torch.zeros_like(values), values])
        block.qkv.weight.copy_(parts[:, :, None, None])
        if not bool(one.any()):  # else keys and queries would both have no gradient
            nn.init.kaiming_uniform_(block.qkv.weight[channels : 2 * channels], a=5**0.5)
