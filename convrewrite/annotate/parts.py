"""Tell backbone, neck and head apart: where a region's encoder ends, and what fuses scales after it.

The encoder ends at its *bottom*: the map of lowest resolution that is enlarged again and joined with a larger one (an
FPN's top, a U-Net's lowest level), or that a pooled and enlarged copy of itself is joined with (ASPP).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from convrewrite.annotate.flow import Flow
from convrewrite.annotate.kinds import is_feature, is_pool, kind
from convrewrite.sites import ConvSpec

_RESIZE = "interpolate"


@dataclass(frozen=True)
class Layout:
    """The encoder's end in one region.

    Attributes:
        bottom: the encoder's last node; None if the region is all encoder, or has none.
        pyramid: True if the region gives feature maps of several resolutions.
        merges: nodes that join an enlarged map with a larger one, as bits of the flow.
        towers: where results are made from maps of several resolutions, the lines of nodes that make them, as bits.
    """

    flow: Flow
    convs: Mapping[fx.Node, ConvSpec] = field(default_factory=dict)
    bottom: fx.Node | None = None
    pyramid: bool = False
    merges: int = 0
    towers: int = 0

    def part(self, node: fx.Node) -> str:
        """ "backbone", "neck" or "head"; in a region without a neck everything is backbone, whatever its role says."""
        if self.bottom is None or node not in self.flow.index:
            return "backbone"
        if (self.flow.raw[self.bottom] | 1 << self.flow.index[self.bottom]) >> self.flow.index[node] & 1:
            return "backbone"
        if self.pyramid:
            return "neck"
        bit = 1 << self.flow.index[node]
        if self.towers & bit:
            return "head"
        followed = any(self.flow.raw[c] & bit for c in self.convs if c in self.flow.index)
        return "neck" if self.merges and followed else "head"


def layout(flow: Flow, convs: Mapping[fx.Node, ConvSpec]) -> Layout:
    """Where the encoder of one region ends."""
    areas = {area(flow, o) for o in flow.outputs}
    pyramid = len(areas) > 1 and all(areas)
    candidates: list[tuple[int, int, fx.Node, fx.Node, bool]] = []
    for node in flow.nodes:
        if _enlarges(flow, node) and _joined_with_larger(flow, node):
            bottom, pooled = _bottom(flow, convs, node)
            size = area(flow, bottom)
            higher = any(area(flow, o) >= size for o in flow.outputs if _above(flow, node, o))
            if size and higher and not _goes_lower(flow, convs, node, size):
                candidates.append((size, flow.index[node], node, bottom, pooled))
    if not candidates:
        return Layout(flow, convs, None, pyramid)
    _, _, _, bottom, _ = min(candidates, key=lambda c: c[:2])
    merges = 0
    for _, _, node, _, pooled in candidates:
        if not pooled:
            merges |= flow.bits(_joins(flow, node))
    return Layout(flow, convs, bottom, pyramid, merges, _towers(flow, convs))


def _towers(flow: Flow, convs: Mapping[fx.Node, ConvSpec]) -> int:
    """From every last map that is flattened into a result up to the map that something else reads too (YOLO's heads).

    Nothing where all results come from one resolution. A convolution over the flattened results (YOLO's ``dfl``)
    works on no map: its resolution is none of the others'.
    """
    known = [c for c in convs if c in flow.index and area(flow, c)]
    often = Counter(area(flow, c) for c in known)
    ends = []
    for conv in known:
        after = [c for c in known if _above(flow, conv, c)]
        if often[area(flow, conv)] > 1 and all(often[area(flow, c)] == 1 for c in after) and _flattened(flow, conv):
            ends.append(conv)
    if len({area(flow, c) for c in ends}) < 2:
        return 0
    readers = Counter(source for sources in flow.sources.values() for source in sources)
    towers = 0
    for node in ends:
        towers |= 1 << flow.index[node]
        while len(flow.sources[node]) == 1 and readers[flow.sources[node][0]] == 1:
            node = flow.sources[node][0]
            towers |= 1 << flow.index[node]
    return towers


def _flattened(flow: Flow, conv: fx.Node) -> bool:
    """True if something below gives tensors that are no feature maps."""
    return any(not area(flow, node) for node in flow.nodes if _above(flow, conv, node))


def area(flow: Flow, node: fx.Node | None) -> int:
    """Pixels of the node's feature map, 0 if it gives none."""
    shape: Any = flow.region.shapes.get(node) if node is not None else None
    return shape[2] * shape[3] if is_feature(shape) else 0


def _enlarges(flow: Flow, node: fx.Node) -> bool:
    sources = flow.sources[node]
    if len(sources) != 1 or not area(flow, sources[0]):
        return False
    resized = _RESIZE in kind(flow.region, node)  # to the size of another map, which may by chance be its own
    return area(flow, node) > area(flow, sources[0]) - resized


def _joined_with_larger(flow: Flow, node: fx.Node) -> bool:
    return next(iter(_joins(flow, node)), None) is not None


def _joins(flow: Flow, up: fx.Node) -> list[fx.Node]:
    """The nodes in which what comes from `up` meets a feature map that does not."""
    found = []
    for node in flow.nodes[flow.index[up] + 1 :]:
        sources = flow.sources[node]
        if len(sources) < 2 or not all(area(flow, s) for s in sources):
            continue
        below = [s is up or _above(flow, up, s) for s in sources]
        if any(below) and not all(below):
            found.append(node)
    return found


def _above(flow: Flow, upper: fx.Node, node: fx.Node) -> bool:
    """True if `upper` is an ancestor of the node."""
    return bool(flow.raw[node] >> flow.index[upper] & 1)


def _goes_lower(flow: Flow, convs: Mapping[fx.Node, ConvSpec], up: fx.Node, size: int) -> bool:
    """True if a convolution below `up` works at a resolution under the bottom's: the encoder is not over (HRNet)."""
    return any(0 < area(flow, c) < size and _above(flow, up, c) for c in convs if c in flow.index)


def _bottom(flow: Flow, convs: Mapping[fx.Node, ConvSpec], up: fx.Node) -> tuple[fx.Node, bool]:
    """What is enlarged, less one 1x1 that only narrows it and less a pooling; and whether there was a pooling."""
    bottom = node = flow.sources[up][0]
    narrowed = pooled = False
    while len(flow.inputs.get(node, ())) == 1:
        above = flow.inputs[node][0]
        if node in convs:
            conv = convs[node]
            if narrowed or conv.kernel != (1, 1) or conv.out_channels >= conv.in_channels:
                break
            narrowed, bottom = True, above
        elif is_pool(flow.region, node) and (narrowed or pooled or area(flow, node) == 1):
            pooled, bottom = True, above
        elif narrowed or pooled or area(flow, above) != area(flow, node):
            break
        node = above
    return bottom, pooled
