"""Give every convolution its role, stage, block and position, from the graph and its shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from convrewrite.annotate.flow import Flow
from convrewrite.annotate.kinds import is_feature
from convrewrite.annotate.segments import BlockSpan, Segments, is_depthwise, segment
from convrewrite.capture import Region
from convrewrite.sites import ConvSpec


@dataclass
class Facts:
    """What the structure says about one convolution node."""

    role: str = "other"
    stage: int | None = None
    block: int | None = None
    position: int | None = None
    span: BlockSpan | None = None


def assign(region: Region, convs: dict[fx.Node, ConvSpec]) -> tuple[Segments, dict[fx.Node, Facts]]:
    """Facts of every convolution node of one region (stages counted within the region)."""
    flow = Flow(region, list(convs))
    segments = segment(flow, convs)
    facts = {n: Facts() for n in convs}
    live = set(flow.live)
    for node in convs:
        if node in flow.gates:
            facts[node].role = "se"
        elif node not in live:
            facts[node].role = "head"
    if segments.blocks:
        _roles_of_blocks(flow, segments, convs, facts)
        _roles_of_loose(segments, convs, facts)
    else:
        _roles_of_chain(segments, convs, facts)
    _stages(region, segments, convs, facts)
    _gates_join_blocks(flow, segments, facts)
    return segments, facts


def _roles_of_blocks(
    flow: Flow, segments: Segments, convs: dict[fx.Node, ConvSpec], facts: dict[fx.Node, Facts]
) -> None:
    for span in segments.blocks:
        skip = flow.bits(span.skip)
        for node in span.skip:
            role = "downsample" if max(convs[node].stride) > 1 else "shortcut"
            facts[node] = Facts(role, position=(flow.ancestors[node] & skip).bit_count() + 1, span=span)
        body = flow.bits(span.body)
        for node in span.body:
            depth = (flow.ancestors[node] & body).bit_count()
            facts[node] = Facts(_body_role(flow, node, span, convs), position=depth + 1, span=span)


def _body_role(flow: Flow, node: fx.Node, span: BlockSpan, convs: dict[fx.Node, ConvSpec]) -> str:
    conv = convs[node]
    if is_depthwise(conv):
        return "depthwise"
    if conv.kernel == (1, 1):
        return "pointwise"
    points = [n for n in span.body if convs[n].kernel == (1, 1)]
    before = any(flow.ancestors[node] >> flow.index[p] & 1 for p in points)
    after = any(flow.ancestors[p] >> flow.index[node] & 1 for p in points)
    return "bottleneck_spatial" if before and after else "basic_spatial"


def _roles_of_loose(segments: Segments, convs: dict[fx.Node, ConvSpec], facts: dict[fx.Node, Facts]) -> None:
    """Convolutions on the trunk: stem before the first block, head after the last, the rest between."""
    places = [i for i, item in enumerate(segments.items) if isinstance(item, BlockSpan)]
    first, last = places[0], places[-1]
    for i, item in enumerate(segments.items):
        if isinstance(item, BlockSpan):
            continue
        if i < first:
            facts[item].role = "stem"
        elif i > last:
            facts[item].role = "head"
        elif max(convs[item].stride) > 1:
            facts[item].role = "downsample"
        else:
            facts[item].role = "transition"


def _roles_of_chain(segments: Segments, convs: dict[fx.Node, ConvSpec], facts: dict[fx.Node, Facts]) -> None:
    """A plain chain (VGG, AlexNet): the first convolution is the stem, the others are the body."""
    for i, node in enumerate(n for n in segments.items if isinstance(n, fx.Node)):
        conv = convs[node]
        if i == 0:
            facts[node].role = "stem"
        elif is_depthwise(conv):
            facts[node].role = "depthwise"
        else:
            facts[node].role = "pointwise" if conv.kernel == (1, 1) else "basic_spatial"


def _stages(region: Region, segments: Segments, convs: dict[fx.Node, ConvSpec], facts: dict[fx.Node, Facts]) -> None:
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
            after = next((s for s in segments.items[i:] if isinstance(s, BlockSpan)), None)
            facts[item].stage = stage_of[id(after)] if after is not None else last
        elif role == "transition":
            before = next((s for s in reversed(segments.items[:i]) if isinstance(s, BlockSpan)), None)
            facts[item].stage = stage_of[id(before)] if before is not None else 1


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
