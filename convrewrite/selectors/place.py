"""Selectors on where a convolution lies: role, stage, block, position, module path and class."""

from __future__ import annotations

from convrewrite.selectors.base import Context, Wanted, differs, selector
from convrewrite.selectors.wanted import Names, Numbers, OneOf
from convrewrite.sites import PARTS, ROLES, Site


@selector("role", OneOf(ROLES, "role"))
def role(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Role in the network: bottleneck_spatial, [stem, head], ..."""
    return differs("role", site.role, wanted)


@selector("part", OneOf(PARTS, "part"))
def part(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Part of the network: backbone, neck (FPN, decoder) or head; a list means any of them."""
    return differs("part", site.part, wanted)


@selector("stage", Numbers(minimum=0, from_end=True))
def stage(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Stage: 0 for the stem, then 1, 2, ... by resolution; "3..4", ">=2", {from_end: [1, 2]}."""
    value = None if site.stage is None else (site.stage, site.stage_from_end)
    return differs("stage", value, wanted, str(site.stage))


@selector("stage_from_end", Numbers())
def stage_from_end(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Stage counted from the last, which is 1."""
    return differs("stage_from_end", site.stage_from_end, wanted)


@selector("block", Numbers(minimum=0, from_end=True))
def block(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Block in its stage, from 0; {from_end: 1} is the last."""
    value = None if site.block is None else (site.block, site.block_from_end)
    return differs("block", value, wanted, str(site.block))


@selector("block_from_end", Numbers())
def block_from_end(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Block counted from the last of its stage, which is 1."""
    return differs("block_from_end", site.block_from_end, wanted)


@selector("position", Numbers(words=("first", "middle", "last")))
def position(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Place on its block's branch: 1, 2, ..., first, middle (neither first nor last) or last."""
    if site.position is None:
        return differs("position", None, wanted)
    last = context.last_position(site)
    is_first, is_last = site.position == 1, site.position == last
    words = {"first": is_first, "last": is_last, "middle": not is_first and not is_last}
    true = {word for word, holds in words.items() if holds}
    return differs("position", (site.position, true), wanted, f"{site.position} of {last}")


@selector("name", Names())
def name(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Module path: exact, a glob ("layer3.*"), or "re:" and a regular expression for the whole path."""
    return differs("name", {site.path, site.id}, wanted, site.id)


@selector("module", Names())
def module(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Class name of the module: Conv2d, "*SameConv*"."""
    return differs("module", (site.module_class,), wanted, site.module_class)


@selector("inside", Names())
def inside(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Class name or path of any module around it: Bottleneck, "layer[34]"."""
    names = [part for path_and_class in site.inside for part in path_and_class if part]
    nearest = " in ".join(class_name for _, class_name in reversed(site.inside)) or "no module"
    return differs("inside", names, wanted, nearest)
