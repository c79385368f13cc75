"""`convrewrite inspect`: the table of sites."""

from __future__ import annotations

import shlex

import click
from convrewrite.cli.common import check_writable, clean_errors, format_option, hint, model_options, put, source_of


@click.command(name="inspect")
@click.argument("model")
@click.option("--select", "-s", metavar="SELECTOR", help='Only these, e.g. "role:stem,not name:layer3.*".')
@model_options
@format_option
@click.option("--cross-check", is_flag=True, help="Compare with what torch.export sees.")
@click.option("--json", "as_json", is_flag=True, help="Same as --format json.")
@click.option("--out", metavar="FILE", help="Write to a file.")
@clean_errors
def command(
    model: str,
    select: str | None,
    weights: str | None,
    input_shape: str | None,
    num_classes: int | None,
    seed: int,
    cross_check: bool,
    format_: str,
    as_json: bool,
    out: str | None,
) -> None:
    """Show every convolution of MODEL with its role, stage, block, shapes and cost.

    MODEL is resnet50, torchvision:NAME, timm:NAME, hf:NAME, smp:NAME, ultralytics:NAME, hub:REPOSITORY:ENTRY,
    package.module:factory, path/file.py:factory, model.pt2, or a folder written by apply; "NAME?key=value" gives it
    an option.
    --cross-check says whether torch.export, a second analyser, sees the same convolutions
    with the same shapes, or why it refuses the model.
    """
    check_writable(out)
    from convrewrite.pipeline import inspect
    from convrewrite.report import render_sites

    source = source_of(model, weights, input_shape, num_classes, seed, meta=weights is None)
    every = sites = inspect(source.model, example=source.example)
    if select:
        from convrewrite.match import select as choose
        from convrewrite.selectline import parse

        sites = tuple(choose(sites, parse(select))[0])
    kind = "json" if as_json else format_
    put(render_sites(sites, kind), out)
    if kind == "text" and not select:
        hint(f"'convrewrite rules --for {shlex.quote(model)}' lists the built-in rule files that fit")
    if cross_check:
        from convrewrite import crosscheck
        from convrewrite.pipeline import example_of

        found = crosscheck.cross_check(source.model, example_of(source.model, source.example), every)
        for line in found.lines():
            click.echo(line, err=kind != "text")
