"""`convrewrite migrate`: a checkpoint of the original for the rewritten model, and back."""

from __future__ import annotations

from pathlib import Path

import click
from convrewrite.cli.common import clean_errors

SUFFIXES = (".safetensors", ".pth", ".pt")


@click.command(name="migrate")
@click.argument("weights", metavar="WEIGHTS|MODEL")
@click.option("--plan", "plan", metavar="PLAN", help="File of a plan, or a saved folder, of which the plan is taken.")
@click.option("--reverse", is_flag=True, help="Back to the original, from a saved folder or a checkpoint of its model.")
@click.option("--model", "model", metavar="MODEL", help="The original, where the plan does not say how to build it.")
@click.option(
    "--num-classes", type=click.IntRange(1), help="Classes of the original, where its name gives another number."
)
@click.option("--out", metavar="DIR|FILE", required=True, help="Folder, or weights alone: .safetensors, .pth or .pt.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--force", is_flag=True, help="Go on although a law is broken; back: although the outputs change.")
@clean_errors
def command(
    weights: str,
    plan: str | None,
    reverse: bool,
    model: str | None,
    num_classes: int | None,
    out: str,
    overwrite: bool,
    force: bool,
) -> None:
    """Take a checkpoint of the original (.pth, .pt, .safetensors) over into the rewritten model of a plan.

    \b
    convrewrite migrate old.pth --plan plan.json --out DIR
    convrewrite migrate DIR --reverse --out old.safetensors

    The way back is open while nothing is lost on it: blends with gate and anneal at 0, blocks that still are their
    convolution, inserted blocks whose gate is 0. Whatever stands in the way is named.
    """
    is_file = Path(out).suffix.lower() in SUFFIXES
    if reverse and not is_file:
        raise click.UsageError(f"--reverse writes weights alone: --out FILE, of {', '.join(SUFFIXES)}")
    if not reverse and plan is None:
        raise click.UsageError("give the plan: --plan FILE (from 'plan --out'), or a saved folder; or --reverse")
    from convrewrite.migrating import check_file, migrate, revert, write_state
    from convrewrite.store import check_target, save

    (check_file if is_file else check_target)(out, overwrite=overwrite)
    if reverse:
        back = revert(weights, plan=plan, base=model, num_classes=num_classes, force=force)
        for line in back.lost:
            click.echo(f"lost: {line}", err=True)
        write_state(back.model, out, overwrite=overwrite)
    else:
        assert plan is not None
        done = migrate(weights, plan, model=model, num_classes=num_classes, force=force)
        if is_file:
            write_state(done.model, out, overwrite=overwrite)
        else:
            save(done.model, out, report=done.report, overwrite=overwrite)
        drift = max((d.max_relative for d in done.report.drift), default=0.0)
        click.echo(
            f"{len(done.report.plan.edits)} edits; the output differs from the original's by {drift:.2g}", err=True
        )
    click.echo(f"wrote {out}", err=True)
