"""Cut the trunk into blocks: residual, concat, dense, and separable bottlenecks without a skip.

A block's body is what rules call its branch; its skip arm holds projections. Convolutions on the trunk
that belong to no block stay loose: they are the stem, transitions, downsampling and the head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from convrewrite.annotate.flow import Flow
from convrewrite.annotate.kinds import is_add, is_feature, is_pool, kind, stood_for
from convrewrite.sites import ConvSpec


@dataclass
class BlockSpan:
    """One block: convolutions of its body and of its skip arm, and the node that is its output."""

    body: list[fx.Node]
    skip: list[fx.Node] = field(default_factory=list)
    entry: fx.Node | None = None
    exit: fx.Node | None = None
    joins: str = ""  # "add", "cat", or "" for a straight line
    stage_exit: fx.Node | None = None  # where the whole dense block ends


@dataclass
class Segments:
    """The trunk in order: blocks and loose convolutions."""

    items: list[BlockSpan | fx.Node]

    @property
    def blocks(self) -> list[BlockSpan]:
        return [i for i in self.items if isinstance(i, BlockSpan)]


def segment(flow: Flow, convs: dict[fx.Node, ConvSpec]) -> Segments:
    """Blocks and loose convolutions of one region, in forward order."""
    items: list[BlockSpan | fx.Node] = []
    live = flow.bits(flow.live)
    previous: fx.Node | None = None
    for cut in flow.cuts:
        if previous is not None:
            between = flow.ancestors[cut] & ~flow.upto(previous) & live
            if between & flow.conv_bits or len(flow.inputs[cut]) > 1:
                items.extend(_region_blocks(flow, previous, cut, between, convs))
        if cut in convs:
            items.append(BlockSpan([cut], [], previous, cut) if stood_for(flow.region, cut) else cut)
        previous = cut
    items = _attach_squeeze(flow, items, convs)
    return Segments(_straight_blocks(flow, items, convs))


def _region_blocks(
    flow: Flow, entry: fx.Node, exit_: fx.Node, between: int, convs: dict[fx.Node, ConvSpec]
) -> list[BlockSpan | fx.Node]:
    """The blocks between two neighbouring cuts."""
    if not between & flow.conv_bits:
        return []
    region = flow.region
    inner = [n for n in flow.members(between) if len(flow.inputs[n]) > 1]
    cats = [n for n in (*inner, exit_) if kind(region, n) == "cat"]
    if len(cats) > 1 and all(entry in flow.inputs[c] for c in cats):
        return _dense_layers(flow, cats, between)
    blocks: list[BlockSpan | fx.Node] = []
    left = between & flow.conv_bits
    for join in inner:
        nested = nested_residual(flow, join, entry, left)
        if nested is not None:
            blocks.append(nested)
            left &= ~flow.bits([*nested.body, *nested.skip])
    rest = list(flow.members(left))
    plain = not any(is_depthwise(convs[c]) for c in rest)
    if blocks and plain and len({_pixels(flow, c) for c in rest}) > 1 and _enlarged(flow, between):
        blocks += rest  # they carry maps between branches of several resolutions (HRNet)
    elif left:
        blocks.append(_block(flow, entry, exit_, left))
    return sorted(blocks, key=lambda b: flow.index[(b.exit or entry) if isinstance(b, BlockSpan) else b])


def _enlarged(flow: Flow, between: int) -> bool:
    """True if a node puts out a larger feature map than it takes."""
    pairs = ((n, s) for n in flow.members(between) for s in flow.inputs.get(n, ()) if len(flow.inputs[n]) == 1)
    return any(_pixels(flow, n) > _pixels(flow, s) > 0 for n, s in pairs)


def _pixels(flow: Flow, node: fx.Node) -> int:
    shape: Any = flow.region.shapes.get(node)
    return shape[2] * shape[3] if is_feature(shape) else 0


def nested_residual(flow: Flow, join: fx.Node, entry: fx.Node | None, left: int) -> BlockSpan | None:
    """A residual block inside a larger region (HRNet, DLA), unless it is an arm of a split or of the same sum."""
    if not is_add(flow.region, join):
        return None
    common = flow.upto(flow.inputs[join][0])
    for source in flow.inputs[join][1:]:
        common &= flow.upto(source)
    if not common:
        return None
    start = flow.nodes[common.bit_length() - 1]
    arm = kind(flow.region, start) == "getitem" and start not in flow.inputs[join]
    if start is entry or arm or kind(flow.region, start) in ("chunk", "split"):
        return None
    inside = flow.ancestors[join] & ~flow.upto(start)
    body = inside & left
    if not body & flow.conv_bits or not _one_entry(flow, start, inside):
        return None
    block = _block(flow, start, join, body)
    plain = any(not flow.upto(s) & ~flow.upto(start) & flow.conv_bits for s in flow.inputs[join])
    return block if block.body and (plain or block.skip) else None


def _one_entry(flow: Flow, start: fx.Node, inside: int) -> bool:
    """True if nothing but `start` leads in: a sum of maps that came different ways is no block (HRNet's fusions)."""
    return all(s is start or inside >> flow.index[s] & 1 for n in flow.members(inside) for s in flow.inputs.get(n, ()))


def _block(flow: Flow, entry: fx.Node, exit_: fx.Node, between: int) -> BlockSpan:
    """One block with its skip arm told from its body: of a sum, the arm with fewer convolutions is the skip."""
    convs = list(flow.members(between & flow.conv_bits))
    if not is_add(flow.region, exit_):
        return BlockSpan(convs, [], entry, exit_, kind(flow.region, exit_))
    arms = _arms(flow, exit_, entry)
    masks = [flow.upto(a) & ~flow.upto(entry) & between & flow.conv_bits for a in arms]
    most = max((m.bit_count() for m in masks), default=0)
    skip = 0
    for i, mask in enumerate(masks):
        shared = 0
        for j, other in enumerate(masks):
            shared |= other if i != j else 0
        if mask.bit_count() < most and not mask & shared:
            skip |= mask
    body = [c for c in convs if not skip >> flow.index[c] & 1]
    return BlockSpan(body, list(flow.members(skip)), entry, exit_, "add")


def _arms(flow: Flow, join: fx.Node, entry: fx.Node) -> list[fx.Node]:
    """The summands; sums of sums over the same input are one sum (RepVGG's three branches)."""
    arms: list[fx.Node] = []
    for source in flow.inputs[join]:
        if source is not entry and is_add(flow.region, source) and _same_entry(flow, source, entry):
            arms.extend(_arms(flow, source, entry))
        else:
            arms.append(source)
    return arms


def _same_entry(flow: Flow, join: fx.Node, entry: fx.Node) -> bool:
    sources = flow.inputs[join]
    common = flow.upto(entry)
    own = [flow.upto(s) & ~common for s in sources]
    return len(sources) > 1 and not any(a & b for i, a in enumerate(own) for b in own[i + 1 :])


def _dense_layers(flow: Flow, cats: list[fx.Node], between: int) -> list[BlockSpan | fx.Node]:
    """Dense block: every summand of the last cat that brings convolutions of its own is a layer."""
    blocks: list[BlockSpan | fx.Node] = []
    seen = 0
    for arm in flow.inputs[cats[-1]]:
        own = flow.upto(arm) & between & ~seen
        seen |= own
        body = list(flow.members(own & flow.conv_bits))
        if body:
            blocks.append(BlockSpan(body, [], None, arm, "cat", cats[-1]))
    return blocks


def _attach_squeeze(
    flow: Flow, items: list[BlockSpan | fx.Node], convs: dict[fx.Node, ConvSpec]
) -> list[BlockSpan | fx.Node]:
    """A loose 1x1 directly before a concat block is the block's own squeeze (SqueezeNet's fire)."""
    result: list[BlockSpan | fx.Node] = []
    for item in items:
        before = result[-1] if result else None
        if isinstance(item, BlockSpan) and item.joins == "cat" and item.entry is not None:
            squeezes = isinstance(before, fx.Node) and convs[before].kernel == (1, 1)
            if squeezes and isinstance(before, fx.Node) and _adjacent(flow, before, item.entry):
                result.pop()
                item.body.insert(0, before)
                item.entry = flow.inputs[before][0] if flow.inputs[before] else None
        result.append(item)
    return result


def _adjacent(flow: Flow, conv: fx.Node, node: fx.Node) -> bool:
    """True if only norms and activations lie between the convolution and the node."""
    between = flow.upto(node) & ~flow.upto(conv)
    own = flow.region.shapes.get(conv)
    return all(
        flow.region.shapes.get(n) == own and not is_pool(flow.region, n) and not flow.conv_bits >> flow.index[n] & 1
        for n in flow.members(between)
    )


def _straight_blocks(
    flow: Flow, items: list[BlockSpan | fx.Node], convs: dict[fx.Node, ConvSpec]
) -> list[BlockSpan | fx.Node]:
    """Templates on runs of loose convolutions: [1x1] depthwise 1x1, and spatial 1x1 after the first block."""
    result: list[BlockSpan | fx.Node] = []
    trunk = set(flow.cuts)
    i, begun = 0, False
    while i < len(items):
        run: list[fx.Node] = []
        for item in items[i : i + 3]:
            if isinstance(item, BlockSpan) or item not in trunk or (run and not _joined(flow, run[-1], item)):
                break
            run.append(item)
        size = _template([convs[n] for n in run], after_block=begun and not _predicts(flow, run))
        if size:
            body = run[:size]
            entry = flow.inputs[body[0]][0] if flow.inputs[body[0]] else None
            result.append(BlockSpan(body, [], entry, _tail(flow, body[-1]), ""))
            i, begun = i + size, True
        else:
            begun = begun or isinstance(items[i], BlockSpan)
            result.append(items[i])
            i += 1
    return result


def _predicts(flow: Flow, run: list[fx.Node]) -> bool:
    """True if the second convolution gives the result: none follows it, and no norm (a dense classifier's 3x3, 1x1)."""
    if len(run) < 2:
        return False
    last = any(flow.ancestors[n] >> flow.index[run[1]] & 1 for n in flow.members(flow.conv_bits))
    return not last and not any("norm" in kind(flow.region, user) for user in run[1].users)


def _template(run: list[ConvSpec], *, after_block: bool) -> int:
    """Length of the block that starts here, 0 if none does."""
    shapes = ["d" if is_depthwise(c) else "p" if c.kernel == (1, 1) else "s" for c in run]
    word = "".join(shapes)
    for pattern in ("pdp", "dp", "pd"):
        if word.startswith(pattern):
            return len(pattern)
    return 2 if after_block and word.startswith("sp") and run[1].out_channels < run[0].out_channels else 0


def _joined(flow: Flow, before: fx.Node, after: fx.Node) -> bool:
    """True if no pooling lies between two neighbouring convolutions of the trunk."""
    between = flow.ancestors[after] & ~flow.upto(before)
    return not any(is_pool(flow.region, n) for n in flow.members(between))


def _tail(flow: Flow, conv: fx.Node) -> fx.Node:
    """The last norm, activation or gate after the convolution on the trunk."""
    node = conv
    for cut in flow.cuts[flow.cuts.index(conv) + 1 :]:
        shape = flow.region.shapes.get(cut)
        if len(flow.inputs[cut]) != 1 or shape != flow.region.shapes.get(conv) or flow.conv_bits >> flow.index[cut] & 1:
            break
        if is_pool(flow.region, cut):
            break
        node = cut
    return node


def is_depthwise(conv: ConvSpec) -> bool:
    """One filter (or a few) per input channel, over more than one pixel."""
    return conv.groups == conv.in_channels > 1 and conv.kernel != (1, 1)
