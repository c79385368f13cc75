"""Turn captured graphs into sites: every call of every convolution, with all the facts that rules can ask for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from convrewrite.annotate.kinds import is_feature, is_pool, kind, node_module, stood_for, window_of
from convrewrite.annotate.regions import assign_all
from convrewrite.annotate.roles import Assigned, Facts
from convrewrite.annotate.segments import BlockSpan, Segments
from convrewrite.blocks.base import Block, conv_spec
from convrewrite.blocks.blend import Blend, blend_cost
from convrewrite.capture import CONVS, FUNCTIONAL_CONVS, Captured, Region
from convrewrite.sites import ConvSpec, Cost, Pair, Place, Shape, Site
from convrewrite.stands import stand_of

_CHAIN = 6
_FLOAT = 4


@dataclass
class Graph:
    """The annotated model: what every later step looks at.

    Attributes:
        captured: regions with shapes. sites: in forward order.
        nodes: site id -> (region, node) it was read from.
    """

    captured: Captured
    sites: tuple[Site, ...]
    nodes: dict[str, tuple[Region, fx.Node]]


def annotate(captured: Captured) -> Graph:
    """Sites of all regions. A convolution seen in an outer region is not counted again in an inner one."""
    sites: list[Site] = []
    nodes: list[tuple[Region, fx.Node]] = []
    specs = [{n: c for n in r.graph.nodes if (c := _spec(r, n)) is not None} for r in captured.regions]
    planar = [{n: c for n, c in s.items() if _planar(r, n)} for r, s in zip(captured.regions, specs, strict=True)]
    assigned = assign_all(captured.regions, planar)
    for region, convs, facts in zip(captured.regions, specs, assigned, strict=True):
        found = _region_sites(region, captured.skeleton, convs, facts) * region.repeats
        sites.extend(s for s, _ in found)
        nodes.extend((region, n) for _, n in found)
    calls = Counter(s.path for s in sites)
    seen: Counter[str] = Counter()
    last_stage = max((s.stage or 0 for s in sites), default=0)
    numbered: list[Site] = []
    for index, site in enumerate(sites):
        from_end = last_stage - site.stage + 1 if site.stage else None
        numbered.append(
            replace(site, index=index, call=seen[site.path], calls=calls[site.path], stage_from_end=from_end)
        )
        seen[site.path] += 1
    numbered.extend(_unreached(captured, {s.path for s in numbered}, len(numbered)))
    return Graph(captured, tuple(numbered), {s.id: n for s, n in zip(numbered, nodes, strict=False)})


def _planar(region: Region, node: fx.Node) -> bool:
    return kind(region, node) == "conv2d" and is_feature(region.shapes.get(node))


def _region_sites(
    region: Region, skeleton: nn.Module, all_convs: dict[fx.Node, ConvSpec], assigned: Assigned
) -> list[tuple[Site, fx.Node]]:
    segments, facts = assigned.segments, assigned.facts
    fields = _receptive_fields(region)
    users = _real_users(region)
    ends = _stage_ends(region, segments, facts)
    counts = Counter((f.stage, f.block) for f in facts.values() if f.span is not None)
    blocks_in = Counter(stage for stage, _ in counts)
    found: list[tuple[Site, fx.Node]] = []
    for node, spec in all_convs.items():
        fact = facts.get(node) or Facts(part=assigned.part(node))
        replaced = stood_for(region, node)
        if replaced:
            found.extend((site, node) for site in _replaced_sites(region, node, replaced))
            continue
        site = _site(region, skeleton, node, spec, fact)
        found.append((_with_surroundings(site, region, node, fact, ends, blocks_in, fields, users), node))
    return found


def _replaced_sites(region: Region, node: fx.Node, sites: tuple[Site, ...]) -> list[Site]:
    """The convolutions of a block that was replaced as a whole, as they were; the first has the new block's cost."""
    module = node_module(region, node)
    stand = stand_of(module) if module is not None else None
    source = next((i for i in node.all_input_nodes if region.shapes.get(i) is not None), None)
    in_shape: Shape = region.shapes.get(source, ()) if source is not None else ()
    assert stand is not None
    cost = _cost(module, stand.conv, in_shape, region.shapes[node] or ())
    return [replace(site, rewritten=stand.rule, cost=Cost() if i else cost) for i, site in enumerate(sites)]


def _site(region: Region, skeleton: nn.Module, node: fx.Node, spec: ConvSpec, fact: Facts) -> Site:
    """The facts that the node itself and its role give."""
    module = node_module(region, node)
    stand = stand_of(module) if module is not None else None
    source = next((i for i in node.all_input_nodes if region.shapes.get(i) is not None), None)
    in_shape: Shape = region.shapes.get(source, ()) if source is not None else ()
    out_shape: Shape = region.shapes[node] or ()
    stack = node.meta.get("nn_module_stack") or {}
    inside = tuple((region.path(str(path)), _class_name(kind_)) for path, kind_ in stack.values())
    inside = (*_around(skeleton, region), *inside)
    if module is not None:
        path, inside = region.path(str(node.target)), tuple(i for i in inside if i[0] != region.path(str(node.target)))
        class_name = stand.module_class if stand else type(module).__name__
        path = stand.path if stand and stand.path else path
    else:
        path, class_name = _functional_path(region, node, inside), kind(region, node)
    return Site(
        path=path,
        index=0,
        conv=spec,
        in_shape=in_shape,
        out_shape=out_shape,
        kind="module" if module is not None else "functional",
        op=kind(region, node),
        module_class=class_name,
        role=fact.role,
        part=fact.part,
        stage=fact.stage,
        block=fact.block,
        position=fact.position,
        inside=inside,
        rewritten=stand.rule if stand else "",
        cost=_cost(module, spec, in_shape, out_shape),
    )


def _around(skeleton: nn.Module, region: Region) -> tuple[tuple[str, str], ...]:
    """The modules around the root of a region that was captured on its own, that root included."""
    parts = region.prefix.split(".") if region.prefix else []
    paths = [".".join(parts[:i]) for i in range(1, len(parts) + (not region.single))]
    return tuple((path, type(skeleton.get_submodule(path)).__name__) for path in paths)


def _cost(module: nn.Module | None, spec: ConvSpec, in_shape: Shape, out_shape: Shape) -> Cost:
    """Cost of what stands at the site now: the convolution, a block, or both under a blend."""
    block = module.block if isinstance(module, Blend) else module
    if not isinstance(block, Block) or not (is_feature(in_shape) and is_feature(out_shape)):
        cost = conv_cost(spec, in_shape, out_shape)
        if module is None or isinstance(block, Block):
            return cost
        return replace(cost, params=sum(p.numel() for p in module.parameters()))  # weight norm has more than the weight
    place = Place(in_shape, out_shape, spec)
    cost = block.cost(place, block.options)
    return blend_cost(spec, place, cost) if isinstance(module, Blend) else cost


def _functional_path(region: Region, node: fx.Node, inside: tuple[tuple[str, str], ...]) -> str:
    """``owner:weight`` where the owner holds the weight, else ``owner:node``."""
    owner = inside[-1][0] if inside else region.prefix
    weight = functional_arguments(node).get("weight")
    if isinstance(weight, fx.Node) and weight.op == "get_attr":
        full = region.path(str(weight.target))
        if not owner or full.startswith(f"{owner}."):
            return f"{owner}:{full[len(owner) + 1 :] if owner else full}"
    return f"{owner}:{node.name}"


def _with_surroundings(
    site: Site,
    region: Region,
    node: fx.Node,
    fact: Facts,
    ends: dict[int, BlockSpan],
    blocks_in: Counter[int | None],
    fields: dict[fx.Node, Pair],
    users: dict[fx.Node, list[fx.Node]],
) -> Site:
    """The facts that the graph around the node gives."""
    nowhere: tuple[str | None, Shape, Shape] = (None, (), ())
    path, in_shape, out_shape = _border(region, fact.span) if fact.span else nowhere
    stage_path, _, stage_shape = nowhere
    if fact.stage in ends:
        end = ends[fact.stage]
        stage_path, _, stage_shape = _border(region, replace(end, exit=end.stage_exit or end.exit))
    from_end = blocks_in[fact.stage] - fact.block if fact.block is not None else None
    pool_tail, pool_shape = _to_pool(region, node, users)
    return replace(
        site,
        pool_tail=pool_tail,
        pool_shape=pool_shape,
        follows=_chain_up(region, node, users),
        precedes=_chain_down(region, node, users),
        block_from_end=from_end,
        block_path=path,
        block_entry=path if in_shape else None,
        block_in_shape=in_shape,
        block_shape=out_shape,
        stage_path=stage_path,
        stage_shape=stage_shape,
        receptive_field=fields.get(node, (0, 0)),
    )


def conv_cost(spec: ConvSpec, in_shape: Shape, out_shape: Shape) -> Cost:
    """Cost of a convolution: activation bytes in fp32; training keeps the input."""
    if not (is_feature(in_shape) and is_feature(out_shape)):
        return Cost(params=spec.params)
    n, c, h, w = out_shape
    inner = in_shape[0] * in_shape[1] * in_shape[2] * in_shape[3] * _FLOAT
    return Cost(spec.params, spec.flops(n, h, w), inner + n * c * h * w * _FLOAT, inner)


def _spec(region: Region, node: fx.Node) -> ConvSpec | None:
    """The convolution's numbers; of one that is not 2-D only channels and groups are meaningful."""
    module = node_module(region, node)
    if module is not None:
        stand = stand_of(module)
        if stand is not None:
            return stand.conv
        if isinstance(module, nn.Conv2d):
            return conv_spec(module)
        if isinstance(module, CONVS):
            return ConvSpec(module.in_channels, module.out_channels, (1, 1), groups=module.groups)
        return None
    return _functional_spec(region, node) if node.target in FUNCTIONAL_CONVS else None


def functional_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a functional convolution by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _functional_spec(region: Region, node: fx.Node) -> ConvSpec | None:
    values = functional_arguments(node)
    weight = values.get("weight")
    shape = region.shapes.get(weight) if isinstance(weight, fx.Node) else None
    if shape is None and isinstance(weight, Tensor):
        shape = tuple(weight.shape)
    if shape is None:
        return None
    groups = values.get("groups", 1)
    if len(shape) != 4:
        return ConvSpec(shape[1] * groups, shape[0], (1, 1), groups=groups)
    fake = nn.Conv2d(
        shape[1] * groups,
        shape[0],
        (shape[2], shape[3]),
        stride=values.get("stride", 1),
        padding=values.get("padding", 0),
        dilation=values.get("dilation", 1),
        groups=groups,
        bias=values.get("bias") is not None,
        device="meta",
    )
    return conv_spec(fake)


def _border(region: Region, span: BlockSpan) -> tuple[str | None, Shape, Shape]:
    """(path, input shape, output shape) of the innermost module that is this block; ('', ...) never."""
    if len(span.body) == 1 and span.exit is span.body[0] and stood_for(region, span.exit):
        source: Any = region.shapes.get(span.exit.all_input_nodes[0])
        return region.path(str(span.exit.target)), source, region.shapes.get(span.exit) or ()
    names = [str(n.target) for n in span.body if n.op == "call_module"]
    if not names or len(names) != len(span.body) or span.exit is None:
        return None, (), ()
    parts = names[0].split(".")
    for name in names[1:]:
        other = name.split(".")
        parts = [a for i, a in enumerate(parts) if parts[: i + 1] == other[: i + 1]]
    tails = _tails(region, span.exit)
    for length in range(len(parts) - (len(names) == 1), 0, -1):
        path = region.path(".".join(parts[:length]))
        for call in region.calls:
            if call.path == path and call.output in tails:
                shape: Any = region.shapes.get(call.inputs[0]) if len(call.inputs) == 1 else ()
                return path, shape if is_feature(shape) else (), region.shapes.get(call.output) or ()
    return None, (), ()


def _tails(region: Region, exit_: fx.Node) -> set[fx.Node]:
    """The block's exit and the single-input, shape-keeping nodes after it."""
    tails, node = {exit_}, exit_
    while len(node.users) == 1:
        node = next(iter(node.users))
        if region.shapes.get(node) != region.shapes.get(exit_) or kind(region, node) == "conv2d":
            break
        if len(node.all_input_nodes) != 1:
            break
        tails.add(node)
    return tails


def _stage_ends(region: Region, segments: Segments, facts: dict[fx.Node, Facts]) -> dict[int, BlockSpan]:
    """The last block of every stage."""
    ends: dict[int, BlockSpan] = {}
    for span in segments.blocks:
        stage = facts[(span.body or span.skip)[0]].stage
        if stage is not None:
            ends[stage] = span
    return ends


def _real_users(region: Region) -> dict[fx.Node, list[fx.Node]]:
    """Users that take the tensor itself, not its size."""
    return {n: [u for u in n.users if u.op == "output" or region.shapes.get(u) is not None] for n in region.graph.nodes}


def _chain_up(region: Region, node: fx.Node, users: dict[fx.Node, list[fx.Node]]) -> tuple[str, ...]:
    found: list[str] = []
    while len(found) < _CHAIN:
        sources = [i for i in node.all_input_nodes if i.op != "get_attr" and region.shapes.get(i) is not None]
        if len(sources) != 1 or sources[0].op == "placeholder":
            break
        node = sources[0]
        found.append(kind(region, node))
    return tuple(found)


def _chain_down(region: Region, node: fx.Node, users: dict[fx.Node, list[fx.Node]]) -> tuple[str, ...]:
    found: list[str] = []
    while len(found) < _CHAIN and len(users[node]) == 1 and users[node][0].op != "output":
        node = users[node][0]
        found.append(kind(region, node))
    return tuple(found)


def _to_pool(region: Region, node: fx.Node, users: dict[fx.Node, list[fx.Node]]) -> tuple[tuple[str, ...], Shape]:
    """Modules, each called once, from the convolution to the next pooling, and the shape that comes out there."""
    if region.single:
        return (), ()
    found: list[str] = []
    while len(users[node]) == 1 and users[node][0].op == "call_module":
        node = users[node][0]
        if kind(region, node) == "conv2d" or sum(n.target == node.target for n in region.graph.nodes) > 1:
            break
        found.append(region.path(str(node.target)))
        if is_pool(region, node):
            shape: Any = region.shapes.get(node)
            return (tuple(found), shape) if is_feature(shape) else ((), ())
    return (), ()


def _receptive_fields(region: Region) -> dict[fx.Node, Pair]:
    """(height, width) in input pixels; a global pooling or anything that mixes all pixels is not followed."""
    state: dict[fx.Node, tuple[Pair, Pair]] = {}
    for node in region.graph.nodes:
        sources = [state[i] for i in node.all_input_nodes if i in state]
        size = (max((s[0][0] for s in sources), default=1), max((s[0][1] for s in sources), default=1))
        jump = (max((s[1][0] for s in sources), default=1), max((s[1][1] for s in sources), default=1))
        window = window_of(region, node)
        if window is not None:
            kernel, stride = window
            size = (size[0] + (kernel[0] - 1) * jump[0], size[1] + (kernel[1] - 1) * jump[1])
            jump = (jump[0] * stride[0], jump[1] * stride[1])
        state[node] = (size, jump)
    return {n: s[0] for n, s in state.items()}


def _unreached(captured: Captured, known: set[str], index: int) -> list[Site]:
    """Convolutions that no traced forward calls: listed, so that nothing is silently missing."""
    sites = []
    for path, module in captured.skeleton.named_modules():
        if isinstance(module, nn.Conv2d) and path not in known and not _inside_stand(captured.skeleton, path):
            spec = conv_spec(module)
            cost = Cost(params=spec.params)
            sites.append(Site(path, index, spec, (), (), calls=0, module_class=type(module).__name__, cost=cost))
            index += 1
    return sites


def _inside_stand(root: nn.Module, path: str) -> bool:
    parts = path.split(".")
    above = (root.get_submodule(".".join(parts[:i])) for i in range(1, len(parts) + 1))
    return any(isinstance(m, Block) or stand_of(m) is not None for m in above)


def _class_name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).rsplit(".", 1)[-1]
