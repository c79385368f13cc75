"""`convrewrite plan`: what would change."""

from __future__ import annotations

import click
from convrewrite.cli.common import (
    check_rules,
    check_writable,
    clean_errors,
    format_option,
    hint_rules,
    model_options,
    put,
    rule_options,
    settings_of,
    source_of,
)

from convrewrite.atomic import write_text
from convrewrite.errors import RuleError

SOMETHING_TO_DO = 3


@click.command(name="plan")
@click.argument("model")
@rule_options
@model_options
@format_option
@click.option("--why", metavar="PATH", help="Tell all about one site instead.")
@click.option("--out", metavar="FILE", help="Also write the plan as JSON, for apply --plan.")
@click.option("--exit-code", is_flag=True, help=f"Exit with {SOMETHING_TO_DO} if there is something to do.")
@click.option("--verbose", "-v", is_flag=True, help="All near misses, refusals, hashes.")
@clean_errors
def command(
    model: str,
    rules: tuple[str, ...],
    start: str | None,
    settings: tuple[str, ...],
    weights: str | None,
    input_shape: str | None,
    num_classes: int | None,
    seed: int,
    format_: str,
    why: str | None,
    out: str | None,
    exit_code: bool,
    verbose: bool,
) -> None:
    """Show what RULES would change in MODEL, the cost of it, and why other sites are left alone. Changes nothing."""
    if not rules:
        raise click.UsageError("give at least one --rules FILE (see 'convrewrite rules')")
    overrides = settings_of(settings)
    check_rules(rules)
    check_writable(out)
    from convrewrite.pipeline import inspect, plan
    from convrewrite.report import render_plan
    from convrewrite.report import why as explain

    source = source_of(model, weights, input_shape, num_classes, seed, meta=weights is None)
    try:
        found = plan(
            source.model,
            list(rules),
            start=start,
            example=source.example,
            seed=seed,
            overrides=overrides,
            name=source.name,
        )
    except RuleError as error:
        hint_rules(model, error)
        raise
    if why:
        click.echo(explain(found, inspect(source.model, example=source.example), why).rstrip("\n"))
    else:
        put(render_plan(found, format_, verbose=verbose), None)
    if out:
        write_text(out, found.to_json())
        click.echo(f"wrote {out}", err=True)
    if exit_code and found.edits:
        raise SystemExit(SOMETHING_TO_DO)
