"""`convrewrite diff`: two models side by side."""

from __future__ import annotations

import click
from convrewrite.cli.common import clean_errors, format_option, put, source_of


@click.command(name="diff")
@click.argument("before")
@click.argument("after")
@click.option("--input", "input_shape", metavar="NxCxHxW", help="Input shape; the models' own by default.")
@format_option
@click.option("--out", metavar="FILE", help="Write to a file.")
@click.option("--verbose", "-v", is_flag=True, help="Every module and tensor.")
@clean_errors
def command(before: str, after: str, input_shape: str | None, format_: str, out: str | None, verbose: bool) -> None:
    """Compare two models: modules, sites, tensors and costs. Each is named as for inspect.

    Of folders that 'finetune' or 'distill' wrote, also what they measured last.
    """
    from convrewrite.diffing import diff, view_of
    from convrewrite.pipeline import inspect
    from convrewrite.report import render_diff
    from convrewrite.training.history import measured_in

    views, inputs = [], []
    for spec in (before, after):
        source = source_of(spec, None, input_shape, None, 0, meta=True)
        views.append(
            view_of(source.model, inspect(source.model, example=source.example), source.name, measured_in(spec))
        )
        inputs.append(source.example)
    if all(isinstance(shape, tuple) for shape in inputs) and inputs[0] != inputs[1]:
        shapes = " and ".join("x".join(map(str, shape)) for shape in inputs)
        click.echo(f"note: inputs {shapes}: sizes and FLOPs do not compare; --input sets one for both", err=True)
    put(render_diff(diff(*views), format_, verbose=verbose), out)
