"""Which modules tracing has to go into: those in which convolutions live, or what replaced one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from convrewrite.blocks.base import Block
from convrewrite.stands import stand_of
from convrewrite.tracing.regions import CONVS


def parts_of(modules: set[nn.Module], functional: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost callable modules that are or hold convolutions or what replaced one (lists are looked through)."""
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield from parts_of(set(module.children()), functional)
        elif isinstance(module, CONVS) or stand_of(module) is not None or holds_convs(module, functional):
            yield module


def holds_convs(module: nn.Module, functional: set[nn.Module]) -> bool:
    """True if tracing has to go inside `module` to see its convolutions."""
    if isinstance(module, (*CONVS, Block)) or stand_of(module) is not None:
        return False
    for inner in module.modules():
        if inner in functional or stand_of(inner) is not None or isinstance(inner, (*CONVS, Block)):
            return True
    return False


def within(module: nn.Module, holders: set[nn.Module]) -> bool:
    return any(module in holder.modules() for holder in holders if not isinstance(holder, CONVS))
