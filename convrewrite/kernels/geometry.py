"""Where the windows of local attention lie: one axis of it, and the whole of what a kernel has to know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Pair = tuple[int, int]
Border = Literal["reflect", "zero", "mask"]
BORDERS: tuple[Border, ...] = get_args(Border)

EXCLUDED = -3e4
"""Logit of a key outside the window: finite in every dtype, so that no row is ever all -inf (NaN)."""


@dataclass(frozen=True)
class LocalSpec:
    """Everything about a local attention that is not a tensor.

    Attributes:
        window: taps (kh, kw), `dilation` apart. stride: between queries, in keys.
        start: the key that query (0, 0) is centred on.
        border: keys outside the map are mirrored ones, zeros that take part in the softmax, or absent.
        scale: factor of q . (k + r), not of the bias.
    """

    window: Pair
    stride: Pair
    dilation: Pair
    start: Pair
    border: Border
    scale: float

    def axes(self, queries: torch.Size | Pair, keys: torch.Size | Pair) -> tuple[Axis, Axis]:
        """The vertical and the horizontal axis for a map of (Ho, Wo) queries and (H, W) keys."""
        y, x = (
            Axis(keys[i], queries[i], self.window[i], self.stride[i], self.dilation[i], self.start[i]) for i in range(2)
        )
        return y, x


@dataclass(frozen=True)
class Axis:
    """Windows and tiles along one axis: query i is centred on input position ``start + i * stride``.

    Attributes:
        size: number of input positions. count: number of queries. tile: queries of one tile.
    """

    size: int
    count: int
    kernel: int
    stride: int
    dilation: int
    start: int
    tile: int = 0

    @property
    def span(self) -> int:
        """Positions from the first to the last tap of a window."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def first(self) -> int:
        """Position of the first query's first tap; an even span has its extra tap at the end, as in `query_grid`."""
        return self.start - (self.span - 1) // 2

    @property
    def padding(self) -> Pair:
        """Positions that windows reach (before, after) the map; negative where they end inside it."""
        return -self.first, self.first + (self.count - 1) * self.stride + self.span - self.size

    @property
    def extent(self) -> int:
        """Keys that one tile sees."""
        return (self.tile - 1) * self.stride + self.span

    @property
    def tiles(self) -> int:
        return -(-self.count // self.tile)

    def tiled(self) -> Axis:
        """This axis with the tile that costs least: few wasted keys, few padded queries, few small products."""

        def cost(tile: int) -> int:
            return -(-self.count // tile) * (tile + 8) * ((tile - 1) * self.stride + self.span + 2)

        best = 1
        for tile in range(2, min(self.count, 16) + 1):  # torch 2.11 cannot compile min() with a key
            if cost(tile) < cost(best):
                best = tile
        return replace(self, tile=best)

    def queries(self, device: torch.device) -> Tensor:
        """Query of every place in every tile, the last one repeated where tiles overhang: (tiles, tile)."""
        return torch.arange(self.tiles * self.tile, device=device).clamp(max=self.count - 1).view(-1, self.tile)

    def keys(self, device: torch.device) -> Tensor:
        """Input position, possibly outside the map, of every key of every tile: (tiles, extent)."""
        begin = torch.arange(self.tiles, device=device) * (self.tile * self.stride) + self.first
        return begin[:, None] + torch.arange(self.extent, device=device)

    def taps(self, device: torch.device) -> Tensor:
        """Which tap of query i is key j of its tile, `kernel` where none is: (tile, extent)."""
        reach = torch.arange(self.extent, device=device)
        offset = reach - torch.arange(self.tile, device=device)[:, None] * self.stride
        hit = (offset >= 0) & (offset < self.span) & (offset % self.dilation == 0)
        return torch.where(hit, offset // self.dilation, self.kernel)

    def multiplicity(self, border: Border, device: torch.device) -> Tensor:
        """How many taps of query i land on input position j: (count, size)."""
        tap = torch.arange(self.kernel, device=device) * self.dilation
        at = torch.arange(self.count, device=device)[:, None] * self.stride + self.first + tap  # (count, kernel)
        at = reflect_index(at, self.size) if border == "reflect" else at
        return (at[..., None] == torch.arange(self.size, device=device)).sum(1)


def reflect_index(position: Tensor, size: int) -> Tensor:
    """Positions on an endless axis folded into 0..size-1 by mirrors at both ends (a triangle wave)."""
    if size == 1:
        return torch.zeros_like(position)
    folded = position.remainder(2 * (size - 1))
    return torch.minimum(folded, 2 * (size - 1) - folded)
