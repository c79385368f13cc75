"""The whole block that a site lies in, taken as one place: what a block of span "block" replaces, and its cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.annotate import Graph
from convrewrite.plans import Edit
from convrewrite.sites import Cost, Place, Site
from convrewrite.stands import inserted_at


@dataclass(frozen=True)
class WholeBlock:
    """A module that is a whole residual block.

    Attributes:
        path: of the module. place: its input and output, and the convolution that the rule matched in it.
        sites: every convolution in it. before: what the module costs now, norms and projections included.
    """

    path: str
    place: Place
    sites: tuple[Site, ...]
    before: Cost


def whole_block(model: nn.Module, graph: Graph, site: Site) -> WholeBlock | tuple[str, str]:
    """The block that `site` lies in, or (clause, reason) where it cannot be exchanged as a whole."""
    path = site.block_entry
    if path is None or len(site.block_in_shape) != 4 or len(site.block_shape) != 4:
        return "block", "no module is its whole block"
    sites = tuple(s for s in graph.sites if _within(s.path, path))
    calls = max(s.calls for s in sites)
    if calls > 1:
        return "block", f"its block is called {calls} times"
    standing = next((s for s in sites if s.rewritten), None)
    if standing is not None:
        return "rewritten", f"{standing.id} in its block was rewritten by {standing.rewritten}"
    module = model.get_submodule(path)
    for inner in module.modules():
        rule = inserted_at(inner, "before") or inserted_at(inner, "after")
        if rule:
            return "rewritten", f"{rule} inserted a block into {path}"
    place = Place(site.block_in_shape, site.block_shape, site.conv)
    return WholeBlock(path, place, sites, _cost(graph, path, place, sites, module))


def clash(edit: Edit, others: Sequence[Edit]) -> str | None:
    """What is in the way of an edit: another one changes something inside a block that one of the two replaces."""
    for other in others:
        for outer, inner in ((edit, other), (other, edit)):
            same = inner.path == outer.path and inner.action == "replace"
            if outer.whole_block and (same or _inside(inner.path, outer.path)):
                if other.rule == edit.rule:
                    return f"{outer.path} is replaced as a whole for {other.site.id}"
                return f"{other.path} is claimed by rule {other.rule}"
    return None


def _within(path: str, block: str) -> bool:
    return path == block or _inside(path, block)


def _inside(path: str, block: str) -> bool:
    return path.startswith((f"{block}.", f"{block}:"))


def _cost(graph: Graph, path: str, place: Place, sites: tuple[Site, ...], module: nn.Module) -> Cost:
    """All parameters of the module; the work and activations of its convolutions, and the work of its linears."""
    cost = sum((s.cost for s in sites), Cost())
    params = sum(p.numel() for p in module.parameters())
    flops = cost.flops + _linear_flops(graph.captured.skeleton.get_submodule(path), place)
    return Cost(params, flops, cost.act_infer, cost.act_train)


def _linear_flops(skeleton: nn.Module, place: Place) -> int:
    """FLOPs of the linear layers in a block, counted in one run on the meta device."""
    if not any(isinstance(m, nn.Linear) for m in skeleton.modules()):
        return 0
    twin, counted = copy.deepcopy(skeleton), [0]

    def count(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(module, nn.Linear) and isinstance(out, Tensor):
            counted[0] += 2 * out.numel() * module.in_features

    for module in twin.modules():
        module.register_forward_hook(count)
    like = next(twin.parameters())
    with torch.no_grad():
        twin(torch.empty(place.in_shape, dtype=like.dtype, device=like.device))
    return counted[0]
