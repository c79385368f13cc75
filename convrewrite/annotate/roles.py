"""Give every convolution its role, stage, block and position, from the graph and its shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

from torch import fx

from convrewrite.annotate.flow import Flow
from convrewrite.annotate.kinds import is_feature
from convrewrite.annotate.parts import Layout, layout
from convrewrite.annotate.segments import BlockSpan, Segments, is_depthwise, nested_residual, segment
from convrewrite.capture import Region
from convrewrite.sites import ConvSpec

Convs = dict[fx.Node, ConvSpec]


@dataclass
class Facts:
    """What the structure says about one convolution node; `area` is that of its block's output, or of its own."""

    role: str = "other"
    part: str = "backbone"
    stage: int | None = None
    block: int | None = None
    position: int | None = None
    span: BlockSpan | None = None
    area: int = 0


@dataclass
class Assigned:
    """One region with the facts of its convolutions."""

    region: Region
    convs: Convs
    segments: Segments
    facts: dict[fx.Node, Facts]
    layout: Layout
    all_head: bool = False

    def part(self, node: fx.Node) -> str:
        """Part of any node of the region."""
        return "head" if self.all_head else self.layout.part(node)

    def stage_at(self, area: int) -> int | None:
        """The backbone's stage of the nearest resolution; 0 if the area is twice that of its first stage or more."""
        known: dict[int, int] = {}
        for fact in self.facts.values():
            if fact.part == "backbone" and fact.stage and fact.area:
                known[fact.area] = max(fact.stage, known.get(fact.area, 0))
        if not known or not area:
            return max(known.values(), default=None)
        if area >= 2 * max(known):
            return 0
        return known[min(known, key=lambda a: abs(log(a / area)))]


def assign(region: Region, convs: Convs, kind: str = "whole") -> Assigned:
    """Facts of every convolution node of one region (stages counted within the region).

    Args:
        kind: "whole" if the region is the whole model; of any other the last convolution is no classifier.
    """
    flow = Flow(region, list(convs))
    found = layout(flow, convs)
    encoder = flow if found.bottom is None else Flow(region, list(convs), found.bottom)
    segments = segment(encoder, convs)
    facts = {n: Facts() for n in convs}
    live = set(encoder.live)
    for node in convs:
        if node in encoder.gates or node in flow.gates:
            facts[node].role = "se"
        elif node not in live:
            facts[node].role = "head"
    whole = kind == "whole" and found.bottom is None
    if segments.blocks:
        _roles_of_blocks(encoder, segments, convs, facts)
        _roles_of_loose(encoder, segments, convs, facts, after="head" if whole else "transition")
    else:
        _roles_of_chain(segments, convs, facts, first="stem" if kind in ("whole", "backbone") else "")
    for node, fact in facts.items():
        fact.area = _area(region, fact.span.exit if fact.span is not None else node)
    _stages(region, segments, convs, facts)
    _gates_join_blocks(encoder, segments, facts)
    assigned = Assigned(region, convs, segments, facts, found)
    if found.bottom is None:
        for fact in facts.values():
            fact.part = "head" if fact.role == "head" else "backbone"
    else:
        _after_the_encoder(flow, assigned)
    return assigned


def plain_role(conv: ConvSpec) -> str:
    """The role that a convolution outside blocks has by its numbers alone."""
    if is_depthwise(conv):
        return "depthwise"
    if max(conv.stride) > 1:
        return "downsample"
    return "pointwise" if conv.kernel == (1, 1) else "basic_spatial"


def _after_the_encoder(flow: Flow, assigned: Assigned) -> None:
    """Facts of neck and head: residual blocks of the neck, everything else by its numbers."""
    facts, convs = assigned.facts, assigned.convs
    for node, fact in facts.items():
        fact.part = assigned.layout.part(node)
    last = max((f.stage or 0 for f in facts.values() if f.part == "backbone"), default=0) or None
    outside = {n for n, f in facts.items() if f.part != "backbone"}
    spans = _neck_blocks(flow, assigned, {n for n in outside if facts[n].part == "neck" and facts[n].role != "se"})
    counts = _block_counts(facts, outside)
    for node in outside:
        role, part = facts[node].role, facts[node].part
        own = _area(assigned.region, node)
        if role == "se" or part == "head":
            facts[node] = Facts("se" if role == "se" else "head", part, last, area=own)
        else:
            facts[node] = Facts(plain_role(convs[node]), part, assigned.stage_at(own), area=own)
    _roles_of_blocks(flow, Segments(list(spans)), convs, facts)
    for span in spans:
        stage = assigned.stage_at(_area(assigned.region, span.exit))
        block = counts[stage] = counts.get(stage, 0)
        counts[stage] += 1
        for node in (*span.body, *span.skip):
            facts[node].part, facts[node].stage, facts[node].block = "neck", stage, block
            facts[node].area = _area(assigned.region, span.exit)


def _block_counts(facts: dict[fx.Node, Facts], outside: set[fx.Node]) -> dict[int | None, int]:
    """Stage -> number of blocks of the backbone."""
    known = {(f.stage, f.block) for n, f in facts.items() if n not in outside and f.block is not None}
    return {stage: sum(1 for s, _ in known if s == stage) for stage, _ in known}


def _neck_blocks(flow: Flow, assigned: Assigned, neck: set[fx.Node]) -> list[BlockSpan]:
    """Residual blocks of the neck; a sum that joins two scales is none."""
    left = flow.bits(neck)
    spans = []
    for node in flow.nodes:
        several = len(flow.inputs.get(node, ())) > 1 and _area(assigned.region, node)
        if several and not assigned.layout.merges >> flow.index[node] & 1:
            span = nested_residual(flow, node, None, left)
            if span is not None:
                spans.append(span)
                left &= ~flow.bits([*span.body, *span.skip])
    return spans


def _roles_of_blocks(flow: Flow, segments: Segments, convs: Convs, facts: dict[fx.Node, Facts]) -> None:
    for span in segments.blocks:
        skip = flow.bits(span.skip)
        for node in span.skip:
            role = "downsample" if max(convs[node].stride) > 1 else "shortcut"
            facts[node] = Facts(role, position=(flow.ancestors[node] & skip).bit_count() + 1, span=span)
        body = flow.bits(span.body)
        for node in span.body:
            depth = (flow.ancestors[node] & body).bit_count()
            facts[node] = Facts(_body_role(flow, node, span, convs), position=depth + 1, span=span)


def _body_role(flow: Flow, node: fx.Node, span: BlockSpan, convs: Convs) -> str:
    conv = convs[node]
    if is_depthwise(conv):
        return "depthwise"
    if conv.kernel == (1, 1):
        return "pointwise"
    points = [n for n in span.body if convs[n].kernel == (1, 1)]
    before = any(flow.ancestors[node] >> flow.index[p] & 1 for p in points)
    after = any(flow.ancestors[p] >> flow.index[node] & 1 for p in points)
    return "bottleneck_spatial" if before and after else "basic_spatial"


def _roles_of_loose(flow: Flow, segments: Segments, convs: Convs, facts: dict[fx.Node, Facts], *, after: str) -> None:
    """Convolutions on the trunk: stem before the first block, head after the last, the rest between.

    Args:
        after: "head", or "transition" where another part of the network follows the last block.
    """
    places = [i for i, item in enumerate(segments.items) if isinstance(item, BlockSpan)]
    first, last = places[0], places[-1]
    end = segments.blocks[-1].exit
    below = {n for n in facts if n in flow.index and end is not None and flow.ancestors[n] >> flow.index[end] & 1}
    for i, item in enumerate(segments.items):
        if isinstance(item, BlockSpan):
            continue
        if i < first:
            facts[item].role = "stem"
        elif i > last and item in below:  # not beside it (HRNet's last downsampling)
            facts[item].role = after
        elif max(convs[item].stride) > 1:
            facts[item].role = "downsample"
        else:
            facts[item].role = "transition"


def _roles_of_chain(segments: Segments, convs: Convs, facts: dict[fx.Node, Facts], *, first: str) -> None:
    """A plain chain (VGG, AlexNet): the first convolution is the stem, the others are the body.

    Args:
        first: "stem", or "" where the chain does not begin at the image.
    """
    for i, node in enumerate(n for n in segments.items if isinstance(n, fx.Node)):
        conv = convs[node]
        if i == 0 and first:
            facts[node].role = first
        elif is_depthwise(conv):
            facts[node].role = "depthwise"
        else:
            facts[node].role = "pointwise" if conv.kernel == (1, 1) else "basic_spatial"


def _stages(region: Region, segments: Segments, convs: Convs, facts: dict[fx.Node, Facts]) -> None:
    """Rank the blocks by the resolution of their output; a dilated network's stages by their projections."""
    if not segments.blocks:
        _chain_stages(region, segments, facts)
        return
    stage_of: dict[int, int] = {}
    ranks = _ranks(area for span in segments.blocks if (area := _area(region, span.exit)))
    shift, previous_area, channels, count = 0, 0, 0, {0: 0}
    for span in segments.blocks:
        area, width = _area(region, span.exit), _channels(region, span.exit)
        grown = bool(span.skip) and channels and width >= 2 * channels
        if grown and area == previous_area:
            shift += 1  # same resolution, projection, twice the channels: stride was traded for dilation
        stage = ranks.get(area, 1) + shift
        stage_of[id(span)] = stage
        index = count.get(stage, 0)
        count[stage] = index + 1
        for node in (*span.body, *span.skip):
            facts[node].stage, facts[node].block = stage, index
        previous_area, channels = area, width
    last = max(stage_of.values())
    _loose_stages(region, segments, facts, stage_of, last)
    for fact in facts.values():
        if fact.role == "head":
            fact.stage = last


def _loose_stages(
    region: Region, segments: Segments, facts: dict[fx.Node, Facts], stage_of: dict[int, int], last: int
) -> None:
    for i, item in enumerate(segments.items):
        if isinstance(item, BlockSpan):
            continue
        role = facts[item].role
        if role == "stem":
            facts[item].stage = 0
        elif role == "downsample":
            nearest = [s for s in segments.items[i:] if isinstance(s, BlockSpan)]
            facts[item].stage = _stage_of_size(region, item, nearest, segments, stage_of, last)
        elif role == "transition":
            nearest = [s for s in reversed(segments.items[:i]) if isinstance(s, BlockSpan)]
            facts[item].stage = _stage_of_size(region, item, nearest, segments, stage_of, 1)


def _stage_of_size(
    region: Region,
    node: fx.Node,
    nearest: list[BlockSpan],
    segments: Segments,
    stage_of: dict[int, int],
    otherwise: int,
) -> int:
    """The stage of the nearest block that ends at the node's resolution; where none does, of the nearest at all."""
    own = _area(region, node)
    same = (span for span in (*nearest, *segments.blocks) if _area(region, span.exit) == own)
    found = next(same, nearest[0] if nearest else None)
    return stage_of[id(found)] if found is not None else otherwise


def _chain_stages(region: Region, segments: Segments, facts: dict[fx.Node, Facts]) -> None:
    nodes = [n for n in segments.items if isinstance(n, fx.Node)]
    ranks = _ranks(_area(region, n) for n in nodes[1:])
    for i, node in enumerate(nodes):
        facts[node].stage = 0 if i == 0 else ranks[_area(region, node)]
    for fact in facts.values():
        if fact.role == "head":
            fact.stage = max(ranks.values(), default=0)


def _gates_join_blocks(flow: Flow, segments: Segments, facts: dict[fx.Node, Facts]) -> None:
    """A gate's convolutions belong to the block of the nearest body convolution upstream."""
    bodies = {node: span for span in segments.blocks for node in span.body}
    for node, fact in facts.items():
        if fact.role != "se":
            continue
        above = [n for n in flow.members(flow.ancestors[node] & flow.conv_bits) if n in bodies]
        if above:
            source = facts[above[-1]]
            fact.stage, fact.block, fact.span = source.stage, source.block, source.span


def _ranks(areas: Iterator[int]) -> dict[int, int]:
    return {area: i + 1 for i, area in enumerate(sorted(set(areas), reverse=True))}


def _area(region: Region, node: fx.Node | None) -> int:
    shape: Any = region.shapes.get(node) if node is not None else None
    return shape[2] * shape[3] if is_feature(shape) else 0


def _channels(region: Region, node: fx.Node | None) -> int:
    shape: Any = region.shapes.get(node) if node is not None else None
    return shape[1] if is_feature(shape) else 0
