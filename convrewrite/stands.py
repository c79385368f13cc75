"""The mark on a module that stands where a convolution stood: which edit put it there, and what stood there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from convrewrite.sites import ConvSpec, Site

_ATTRIBUTE = "_convrewrite_stand"
_INSERTED = "_convrewrite_inserted"


@dataclass(frozen=True)
class Stand:
    """What a rewritten site was.

    Attributes:
        edit: id of the edit. rule: "file/rule". block: registry name of what stands there now.
        conv: the convolution that stood here. module_class: its class name.
        path: of its site, where that is not the module's own path (a functional convolution).
        sites: of a module that stands for a whole residual block, the convolutions that were in it, the one that the
            rule matched first.
    """

    edit: str
    rule: str
    block: str
    conv: ConvSpec
    module_class: str
    path: str = ""
    sites: tuple[Site, ...] = ()


def mark(module: nn.Module, stand: Stand) -> None:
    """Note on `module` that it stands for a convolution."""
    setattr(module, _ATTRIBUTE, stand)


def stand_of(module: nn.Module) -> Stand | None:
    """The mark on `module`, or None."""
    found = vars(module).get(_ATTRIBUTE)
    return found if isinstance(found, Stand) else None


def computed_weight(model: nn.Module, path: str) -> str | None:
    """Class name of the convolution at `path` if it does not convolve with its parameter `weight` as it is, else None.

    So it is with subclasses of their own forward (weight standardisation), parametrizations and weight norm.
    """
    conv = model.get_submodule(path.partition(":")[0])
    if ":" in path or not isinstance(conv, nn.Conv2d):
        return None
    plain = type(conv).forward is nn.Conv2d.forward and type(conv)._conv_forward is nn.Conv2d._conv_forward
    return None if plain and isinstance(conv._parameters.get("weight"), nn.Parameter) else type(conv).__name__


def mark_inserted(module: nn.Module, at: str, rule: str) -> None:
    """Note on `module` that `rule` inserted a block before or after it."""
    inserted: dict[str, str] = vars(module).setdefault(_INSERTED, {})
    inserted[at] = rule


def inserted_at(module: nn.Module, at: str) -> str | None:
    """The rule that inserted a block `at` ("before" or "after") the module, or None."""
    found: dict[str, str] = vars(module).get(_INSERTED, {})
    return found.get(at)
