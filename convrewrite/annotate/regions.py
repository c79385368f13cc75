"""Roles, stages and parts over all regions: which region is the network, which a piece of it, which a head.

Regions of a detector: the backbone reads the image; the heads read its feature maps, level by level or box by box. A
piece of a traced network that stayed opaque takes part and stage from where it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from convrewrite.annotate.kinds import is_feature
from convrewrite.annotate.roles import Assigned, Convs, assign, plain_role
from convrewrite.capture import Region

Outer = tuple[int, fx.Node]


def assign_all(regions: Sequence[Region], convs: Sequence[Convs]) -> list[Assigned]:
    """Facts of every convolution of every region, stages counted over the whole network."""
    outers = [_outer(regions, i) for i in range(len(regions))]
    kinds = _kinds(regions, outers)
    found = [assign(r, c, kind) for r, c, kind in zip(regions, convs, kinds, strict=True)]
    _rank_together([f for f, kind in zip(found, kinds, strict=True) if kind in ("whole", "backbone", "more")])
    trunk = [f.stage or 0 for a, k in zip(found, kinds, strict=True) if k != "head" for f in a.facts.values()]
    last = max(trunk, default=0)
    blocks: Counter[int | None] = Counter()
    for assigned, outer, kind in zip(found, outers, kinds, strict=True):
        if kind == "inner" and outer is not None:
            _take_from(assigned, found[outer[0]], outer[1], blocks)
        elif kind == "head":
            assigned.all_head = True
            for fact in assigned.facts.values():
                fact.part, fact.stage, fact.block, fact.position, fact.span = "head", last or None, None, None, None
                fact.role = fact.role if fact.role == "se" else "head"
        blocks.update(_blocks(assigned))
    return found


def _outer(regions: Sequence[Region], index: int) -> Outer | None:
    """The region, and the node in it, inside which the region at `index` lies."""
    prefix = regions[index].prefix
    for i in range(index - 1, -1, -1):
        for node in regions[i].graph.nodes:
            if node.op == "call_module":
                path = regions[i].path(str(node.target))
                if path and not regions[i].single and (prefix == path or prefix.startswith(f"{path}.")):
                    return i, node
    return None


def _kinds(regions: Sequence[Region], outers: Sequence[Outer | None]) -> list[str]:
    """ "whole" (the model itself), "backbone" (reads the image), "more" (goes on from there), "inner" or "head"."""
    kinds: list[str] = []
    image = _inputs(regions[0])[:1] if regions else []
    often = Counter(r.prefix for r in regions)
    many = False
    for region, outer in zip(regions, outers, strict=True):
        reads = _inputs(region)
        if not region.prefix:
            kind = "whole"
        elif outer is not None:
            kind = "head" if kinds[outer[0]] == "head" else "inner"
        elif not kinds or (reads and image and reads[0][1:] == image[0][1:]):
            kind = "backbone"
        elif many or region.repeats > 1 or often[region.prefix] > 1 or _other_batch(reads, image):
            kind = "head"
        else:
            kind = "more"
        kinds.append(kind)
        many = many or (kind in ("backbone", "more") and _several(region))
    return kinds


def _inputs(region: Region) -> list[Any]:
    """Shapes of the feature maps that go into the region."""
    return [region.shapes[n] for n in region.graph.find_nodes(op="placeholder") if is_feature(region.shapes.get(n))]


def _other_batch(reads: Sequence[Any], image: Sequence[Any]) -> bool:
    return bool(reads and image and reads[0][0] != image[0][0])


def _several(region: Region) -> bool:
    """True if the region gives several feature maps."""
    output = next(n for n in region.graph.nodes if n.op == "output")
    return sum(is_feature(region.shapes.get(n)) for n in output.all_input_nodes) > 1


def _rank_together(found: Sequence[Assigned]) -> None:
    """Stages of a network that was captured in several pieces, one after the other, are counted through."""
    if len(found) < 2:
        return
    facts = [f for a in found for f in a.facts.values() if f.stage and f.area]
    ranks = {size: i + 1 for i, size in enumerate(sorted({f.area for f in facts}, reverse=True))}
    counts: Counter[int] = Counter()
    for assigned in found:
        mine = [f for f in assigned.facts.values() if f.stage and f.area]
        for fact in mine:
            fact.stage = ranks[fact.area]
        spans: dict[int, int] = {}
        for fact in mine:
            if fact.span is not None and fact.stage is not None:
                if id(fact.span) not in spans:
                    spans[id(fact.span)] = counts[fact.stage]
                    counts[fact.stage] += 1
                fact.block = spans[id(fact.span)]


def _take_from(assigned: Assigned, outer: Assigned, node: fx.Node, blocks: Counter[int | None]) -> None:
    """Part and stage from the node that the region stands behind."""
    part = outer.part(node)
    for conv, fact in assigned.facts.items():
        fact.part = part
        if fact.role in ("stem", "head", "transition") and fact.span is None:
            fact.role = plain_role(assigned.convs[conv])
        fact.stage = outer.stage_at(fact.area or _own_area(assigned, conv))
        if fact.block is not None:
            fact.block += blocks[fact.stage]


def _own_area(assigned: Assigned, conv: fx.Node) -> int:
    shape: Any = assigned.region.shapes.get(conv)
    return shape[2] * shape[3] if is_feature(shape) else 0


def _blocks(assigned: Assigned) -> Counter[int | None]:
    """Stage -> number of blocks."""
    return Counter(stage for stage, _ in {(f.stage, f.block) for f in assigned.facts.values() if f.block is not None})
