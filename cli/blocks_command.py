"""`convrewrite blocks`: what can be put into a network."""

from __future__ import annotations

import inspect
from typing import Any

import click
from convrewrite.cli.common import clean_errors


@click.command(name="blocks")
@click.argument("name", required=False)
@clean_errors
def command(name: str | None) -> None:
    """List the blocks, or show formula, options, defaults and limits of one."""
    from tabulate import tabulate

    from convrewrite.blocks.base import BLOCKS, summary

    if name is None:
        listed = [(n, "/".join(cls.actions), cls.paper, summary(cls)) for n, cls in BLOCKS.items()]
        click.echo(tabulate(listed, headers=("block", "can", "paper", "what it is"), maxcolwidths=[None, None, 34, 60]))
        return
    cls = BLOCKS.get(name)
    click.echo(f"{name}   ({cls.paper})\n")
    click.echo((inspect.getdoc(cls) or "").rstrip("\n"))
    rows = [(key, *_option(info)) for key, info in cls.Options.model_fields.items()]
    click.echo("\nOptions:\n" + tabulate(rows, headers=("option", "type", "default", "limits", "what it does")))


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
