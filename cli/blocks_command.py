"""`convrewrite blocks`: what can be put into a network."""

from __future__ import annotations

import inspect
from typing import Any

import click
from convrewrite.cli.common import clean_errors

_WHERE = """
params, FLOPs (2 per multiply-add): with default options in place of a 3x3 convolution, 256>256 on 14x14, which has
590K and 231M; of a block that takes only a stem, in place of ResNet-50's."""


@click.command(name="blocks")
@click.argument("name", required=False)
@clean_errors
def command(name: str | None) -> None:
    """List the blocks with costs and options, or show formula, options, defaults and limits of one."""
    from tabulate import tabulate

    from convrewrite.blocks.base import BLOCKS

    if name is None:
        listed = [_line(n, cls) for n, cls in BLOCKS.items()]
        headers = ("block", "can", "params", "FLOPs", "options", "paper", "what it is")
        click.echo(tabulate(listed, headers=headers, maxcolwidths=[None, None, None, None, 26, 26, 44]))
        click.echo(_WHERE)
        return
    cls = BLOCKS.get(name)
    click.echo(f"{name}   ({cls.paper})\n")
    click.echo((inspect.getdoc(cls) or "").rstrip("\n"))
    rows = [(key, *_option(info)) for key, info in cls.Options.model_fields.items()]
    click.echo("\nOptions:\n" + tabulate(rows, headers=("option", "type", "default", "limits", "what it does")))


def _line(name: str, cls: Any) -> tuple[str, ...]:
    """What the list says of one block."""
    from convrewrite.blocks.base import summary
    from convrewrite.report import figures

    options = cls.Options()
    place = next((p for p in _places(cls) if cls.refuse(p, options) is None), None)
    costs = ("-", "-")
    if place is not None:
        cost = cls.cost(place, options)
        costs = figures.count(cost.params), figures.count(cost.flops)
    return name, "/".join(cls.actions), *costs, " ".join(cls.Options.model_fields), cls.paper, summary(cls)


def _places(cls: Any) -> tuple[Any, ...]:
    """Where the list states what a block costs: a place in ResNet-50's third stage, and its stem."""
    from convrewrite.sites import ConvSpec, Place

    shape = (1, 256, 14, 14)
    conv = ConvSpec(256, 256, (3, 3), padding=(1, 1, 1, 1))
    stem = ConvSpec(3, 64, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3))
    inside = Place(shape, shape, conv if "replace" in cls.actions else None)
    return inside, Place((1, 3, 224, 224), (1, 64, 56, 56), stem)


def _option(info: Any) -> tuple[str, str, str, str]:
    kind = getattr(info.annotation, "__name__", None) or str(info.annotation)
    if kind == "Literal" or "Literal[" in str(info.annotation):
        kind = str(info.annotation).replace("typing.Literal", "").strip("[]")
    limits = ", ".join(
        f"{sign} {getattr(m, attribute)}"
        for m in info.metadata
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "multiple of"))
        if getattr(m, attribute, None) is not None
    )
    return kind, str(info.default), limits, info.description or ""
