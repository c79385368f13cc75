"""What `bench blocks` measures: every registered block that can stand at the shape, some of them in variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from convrewrite.blocks.base import BLOCKS, Block
from convrewrite.errors import ConvrewriteError, closest
from convrewrite.sites import ConvSpec, Place

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "criss_cross": {"": {"recurrence": 1}},
    "non_local": {
        f"/{pairwise}": {"pairwise": pairwise, "sub_sample": False}
        for pairwise in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
    },
}
"""Options other than the defaults, by block and suffix of the name: what published code computes."""


@dataclass(frozen=True)
class Shape:
    """Channels and side of a square map, written "64@56"."""

    channels: int
    side: int

    def __str__(self) -> str:
        return f"{self.channels}@{self.side}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of "64@56"; anything else is an error."""
        channels, at, side = text.strip().partition("@")
        if not at or not channels.isdigit() or not side.isdigit() or not int(channels) or not int(side):
            raise ConvrewriteError(f"'{text}' is not a shape", fix="write channels@side, as in 64@56")
        return cls(int(channels), int(side))


@dataclass(frozen=True)
class Contender:
    """A block with options, under one name."""

    name: str
    block: type[Block]
    options: dict[str, Any] = field(default_factory=dict)

    def place(self, shape: Shape, batch: int) -> Place:
        """Of a 3 x 3 convolution that keeps channels and size; without one where the block can only be inserted."""
        full = (batch, shape.channels, shape.side, shape.side)
        conv = ConvSpec(shape.channels, shape.channels, (3, 3), padding=(1, 1, 1, 1))
        return Place(full, full, conv if "replace" in self.block.actions else None)

    def refuses(self, shape: Shape, batch: int) -> str | None:
        """Why it cannot stand there, or None."""
        if self.block.span != "conv":
            return "it replaces more than a convolution"
        return self.block.refuse(self.place(shape, batch), self.block.Options(**self.options))

    def build(self, shape: Shape, batch: int) -> Block:
        return self.block(self.place(shape, batch), self.block.Options(**self.options))


def contenders(names: Sequence[str] = ()) -> list[Contender]:
    """Those called so, or whose block is called so; all if no name is given."""
    known = [
        Contender(name + suffix, block, options)
        for name, block in BLOCKS.items()
        for suffix, options in VARIANTS.get(name, {"": {}}).items()
    ]
    labels = {c.name for c in known} | {c.block.name for c in known}
    for name in names:
        if name not in labels:
            raise ConvrewriteError(f"no block '{name}'", fix=closest(name, labels) or "see convrewrite blocks")
    return [c for c in known if not names or c.name in names or c.block.name in names]
