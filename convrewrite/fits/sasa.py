"""Stand-alone attention: learned patterns, values by least squares; with a projection, by reduced-rank regression.

As its paper has it there is no output projection, so each output channel is one pattern times one vector: rank one in
space, the wall of this block. The option `projection` takes it down.

Patterns stand on the option `offset_bias` where it is on: any positive pattern for each head. Where it is off the
queries have nothing but content to stand on, and no bias. Patterns are then separable (rows times columns), stand on a
nearly constant function of the pixel (`fits.constant`), and few channels in a head with shared embeddings restrict them
more; without images there is no such function, and every pattern is even over the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.fits.base import fit_of
from convrewrite.fits.constant import STEADY, nearly_one
from convrewrite.fits.learned import Regressed, bound, bounded, learn, projected
from convrewrite.fits.pooling import pooled_patterns, pooled_window, refuse_pooling
from convrewrite.fits.reduced import busiest_taps
from convrewrite.fits.target import Target, Window, solve
from convrewrite.fits.wide import best_patterns
from convrewrite.sites import ConvSpec, Place

FLOOR = 0.01
"""Least weight of a tap in a start, relative to the largest."""

PEAK = 0.9
"""Share of a head that starts on one tap; the rest is even."""


def _window(spec: ConvSpec, options: BlockOptions) -> Window:
    assert isinstance(options, SASAOptions)
    return pooled_window(spec, options.window) or Window.of_kernel(spec)


def _refuse(place: Place, options: BlockOptions) -> str | None:
    assert isinstance(options, SASAOptions) and place.conv is not None
    if options.position != "relative" and not options.offset_bias:
        return (
            f"position {options.position} cannot tell offsets apart without content (wanted: relative, or offset_bias)"
        )
    if Window.over(place.conv, (options.window, options.window)) is None:
        return f"the taps of window {options.window} fall between those of the kernel"
    return refuse_pooling(place.conv)


@dataclass(frozen=True)
class _Form:
    """How patterns are made of parameters.

    Attributes:
        kind: "free", a logit for each tap; "each", for each row and column of each head; "shared", the same as
            products of few tables with coefficients; "even".
        side, stride: of the block. ranks: tables for rows and for columns that heads share.
    """

    kind: Literal["free", "each", "shared", "even"]
    side: int
    stride: tuple[int, int]
    heads: int
    ranks: tuple[int, int]

    def patterns(self, parameters: Sequence[Tensor]) -> Tensor:
        """(N, T), after pooling."""
        if self.kind == "free":
            weights = bounded(parameters[0]).softmax(1)
        elif self.kind == "even":
            weights = torch.full((self.heads, self.side**2), 1 / self.side**2, dtype=torch.float64)
        else:
            rows, columns = self.lines(parameters)
            weights = (bounded(rows).softmax(1)[:, :, None] * bounded(columns).softmax(1)[:, None]).flatten(1)
        return pooled_patterns(weights, (self.side, self.side), self.stride)

    def lines(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Row and column logits (N, K), not bounded yet."""
        if self.kind == "each":
            return parameters[0], parameters[1]
        return parameters[0] @ parameters[1], parameters[2] @ parameters[3]

    def parameters(self, weights: Tensor) -> list[Tensor]:
        """Those nearest to given patterns (N, K^2), that are positive or nearly so."""
        weights = weights.clamp(min=0)
        if self.kind == "even":
            return []
        if self.kind == "free":
            return [_log(weights)]
        square = weights.view(-1, self.side, self.side)
        rows, columns = (_log(square.square().sum(axis).sqrt()) for axis in (2, 1))
        if self.kind == "each":
            return [rows, columns]
        return [part for line, rank in zip((rows, columns), self.ranks, strict=True) for part in _factors(line, rank)]

    def inside(self, patterns: Tensor) -> Tensor:
        """Patterns over the target's window -> over the block's own, that lie in its middle: (N, K^2)."""
        tall, wide = self.side + self.stride[0] - 1, self.side + self.stride[1] - 1
        top, left = (stride // 2 for stride in self.stride)
        top, left = min(top, tall - self.side), min(left, wide - self.side)
        square = patterns.view(-1, tall, wide)[:, top : top + self.side, left : left + self.side]
        return square.flatten(1)


def _log(weights: Tensor) -> Tensor:
    return weights.clamp(min=FLOOR * weights.amax(-1, keepdim=True) + 1e-300).log()


def _factors(lines: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(N, r) and (r, K) whose product is nearest to the centred lines (N, K)."""
    left, levels, right = torch.linalg.svd(lines - lines.mean(1, keepdim=True), full_matrices=False)
    some = 1e-3 * float(levels[0]) + 1e-3  # a table of zeros and zero coefficients would stay so
    return left[:, :rank] * (levels[:rank] + some).sqrt(), right[:rank] * (levels[:rank] + some).sqrt()[:, None]


def _form_of(block: SASA, share: float) -> _Form:
    heads, side, dim = block.options.heads, block.options.window, block.head_dim
    ranks = min(dim // 2, heads, side), min(dim - dim // 2, heads, side)
    kind: Literal["free", "each", "shared", "even"] = "even"
    if block.offset_bias is not None:
        kind = "free"
    elif share >= STEADY and block.row_embedding is not None:
        kind = "each" if len(block.row_embedding) > 1 or heads == 1 else "shared"
    return _Form(kind, side, block.spec.stride, heads, ranks)


@fit_of("sasa", refuse=_refuse, window=_window)
def fit(block: nn.Module, spec: ConvSpec, target: Target) -> float:
    """Set patterns, values and projection; content starts without effect, with a gradient that is not zero."""
    assert isinstance(block, SASA)
    one, share = nearly_one(target)
    form, centred = _form_of(block, share), block.projection is not None

    def regress(patterns: Tensor) -> Regressed:
        return projected(target, patterns, block.head_dim) if centred else _values(target, patterns)

    starts = [form.parameters(weights) for weights in _starts(form, target, block)]
    parameters, found = learn(target, starts, form.patterns, regress, centred=centred)
    _write(block, form, parameters, found, one)
    return target.nmse(found.kernel, found.bias)


def _starts(form: _Form, target: Target, block: SASA) -> list[Tensor]:
    """Patterns (N, K^2) to begin with."""
    if form.kind == "even":
        return [torch.zeros(form.heads, form.side**2, dtype=torch.float64)]
    parts = (target.weight * target.scale[:, None, None]).view(form.heads, -1, target.channels, target.taps)
    alone = form.inside(_directions(parts, target))
    if block.projection is None:
        together = form.inside(_directions(parts.flatten(0, 1)[None], target)).expand_as(alone)
        return [alone, together]
    usable = form.inside(torch.arange(target.taps)[None]).flatten().tolist()
    rows = torch.arange(block.out_channels)
    taps = busiest_taps(target, rows, usable, form.heads, block.head_dim)
    peaks = torch.full((form.heads, target.taps), (1 - PEAK) / target.taps, dtype=torch.float64)
    peaks[torch.arange(form.heads), taps] += PEAK
    few = best_patterns(target, min(form.heads, target.taps), 1, centred=True)
    few = few.repeat(-(-form.heads // len(few)), 1)[: form.heads]
    return [alone, form.inside(peaks), form.inside(few)]


def _directions(parts: Tensor, target: Target) -> Tensor:
    """The best direction for each part of the outputs (N, o, C, T), its larger half up, no less than 0: (N, T)."""
    gram = torch.einsum("nocu,cd,nodv->nuv", parts, target.channel, parts)
    levels, vectors = torch.linalg.eigh(target.spatial)
    root = levels.clamp(min=1e-3 * float(levels.max())).sqrt()
    half, inverse = (vectors * root) @ vectors.t(), (vectors / root) @ vectors.t()
    best = torch.linalg.eigh(half @ gram @ half)[1][:, :, -1] @ inverse
    up = best.clamp(min=0).sum(1) >= (-best).clamp(min=0).sum(1)
    return torch.where(up[:, None], best, -best).clamp(min=0)


def _values(target: Target, patterns: Tensor) -> Regressed:
    """Values for given patterns (N, T), a regression for each head on its own outputs."""
    maps = target.weight.new_zeros(len(patterns), *target.weight.shape[:2])
    width = len(target.weight) // len(patterns)
    for h, pattern in enumerate(patterns):
        own = slice(h * width, (h + 1) * width)
        system, joint = target.seen_through(pattern[None], centred=False)
        maps[h, own] = solve(system[:, 0, :, 0], joint[own, :, 0].t()).t()
    values = maps.sum(0)
    kernel = values[:, :, None] * patterns.repeat_interleave(width, 0)[:, None]
    return Regressed(patterns, maps, values, None, kernel, torch.zeros_like(target.bias))


def _write(block: SASA, form: _Form, parameters: Sequence[Tensor], found: Regressed, one: Tensor) -> None:
    channels = block.out_channels
    with torch.no_grad():
        block.qkv.weight[2 * channels :].copy_(found.values[:, :, None, None])
        block.qkv.weight[:channels].zero_()
        if form.kind == "free":
            assert block.offset_bias is not None
            block.offset_bias.copy_(bounded(parameters[0]))
        elif form.kind != "even":
            block.qkv.weight[channels : 2 * channels].zero_()  # queries are not zero, so that these learn
            block.qkv.weight[:channels].copy_(_queries(block, form, parameters, one)[:, :, None, None])
        if block.projection is not None:
            assert found.mix is not None and block.projection.bias is not None
            block.projection.weight.copy_(found.mix[:, :, None, None])
            block.projection.bias.copy_(found.bias)


def _queries(block: SASA, form: _Form, parameters: Sequence[Tensor], one: Tensor) -> Tensor:
    """Set the embeddings; returns the queries (N d, C) that make the wanted logits of them."""
    assert block.row_embedding is not None and block.column_embedding is not None
    half, query = block.row_embedding.shape[1], one.new_zeros(form.heads, block.head_dim, len(one))
    tables = (block.row_embedding, block.column_embedding)
    for axis, (table, lines, first) in enumerate(zip(tables, form.lines(parameters), (0, half), strict=True)):
        if form.kind == "each":
            table[:, 0] = bounded(lines).to(table)
            query[:, first] = one
            continue
        factors, shared = parameters[2 * axis], parameters[2 * axis + 1]
        table[0, : len(shared)] = (shared - shared.mean(1, keepdim=True)).to(table)
        query[:, first : first + len(shared)] = (factors * bound(lines)[:, None])[:, :, None] * one
    return query.flatten(0, 1)
