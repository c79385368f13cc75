"""`convrewrite rules`: list, show, schema, new, test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from convrewrite.cli.common import clean_errors, input_option, put

from convrewrite.atomic import write_text
from convrewrite.errors import ConvrewriteError

if TYPE_CHECKING:
    from convrewrite.rulefile import RuleFile


@click.group(name="rules", invoke_without_command=True)
@click.option("--for", "model", metavar="MODEL", help="Say for each file what it would change in MODEL.")
@input_option
@click.pass_context
@clean_errors
def command(ctx: click.Context, model: str | None, input_shape: str | None) -> None:
    """List the built-in rule files; show, scaffold or test one."""
    if model is None and input_shape is not None:
        raise click.UsageError("--input goes with --for MODEL")
    if ctx.invoked_subcommand is not None and model is not None:
        raise click.UsageError(f"--for is an option of 'rules' alone, not of 'rules {ctx.invoked_subcommand}'")
    if model is not None:
        click.echo(_fitting(model, input_shape))
    elif ctx.invoked_subcommand is None:
        ctx.invoke(list_rules)


def _fitting(model: str, input_shape: str | None) -> str:
    """A line for each built-in file: how many convolutions of the model it would change. The model is read once."""
    from convrewrite.cli.common import source_of
    from tabulate import tabulate

    from convrewrite.annotate import annotate
    from convrewrite.capture import capture
    from convrewrite.pipeline import example_of
    from convrewrite.planning import trial
    from convrewrite.rulefile import builtin_names, load_rules

    source = source_of(model, None, input_shape, None, 0, meta=True)
    graph = annotate(capture(source.model, example_of(source.model, source.example)))
    rows, refused = [], []
    for name in builtin_names():
        file = load_rules(name)
        try:
            found = trial(source.model, graph, file)
        except ConvrewriteError as error:
            refused.append(f"Refused: {error}")
            continue
        first = next((ids[0] for ids in found.values() if ids), "")
        rows.append((name, sum(map(len, found.values())), sum(not ids for ids in found.values()), first))
    rows.sort(key=lambda row: (row[1] == 0, row[2] > 0))
    fit = [row for row in rows if row[1]]
    table = tabulate(
        [(name, sites, rules or "", first) for name, sites, rules, first in fit],
        headers=("name", "sites", "rules without a site", "first site"),
        disable_numparse=True,
        colalign=("left", "right", "right", "left"),
    )
    rest = ", ".join(row[0] for row in rows if not row[1])
    lines = [f"Built-in rule files on {source.name}, {len(graph.sites)} convolutions"]
    lines += [table if fit else "none fits"] + ([f"No site: {rest}"] if rest else [])
    return "\n\n".join([*lines, *refused])


@command.command(name="list")
@clean_errors
def list_rules() -> None:
    """List the built-in rule files."""
    from tabulate import tabulate

    from convrewrite.rulefile import builtin_names, load_rules

    rows = []
    for name in builtin_names():
        file = load_rules(name)
        rows.append((name, len(file.rules), file.summary, file.reference))
    headers = ("name", "rules", "summary", "reference")
    click.echo(tabulate(rows, headers=headers, tablefmt="simple", maxcolwidths=[None, None, 38, None]))


@command.command()
@click.argument("name")
@clean_errors
def show(name: str) -> None:
    """Print a rule file."""
    from convrewrite.rulefile import path_of

    click.echo(path_of(name).read_text(encoding="utf-8").rstrip("\n"))


@command.command()
@click.option("--out", metavar="FILE", help="Write to a file.")
@clean_errors
def schema(out: str | None) -> None:
    """Print the JSON Schema of rule files, for editors."""
    from convrewrite.rulefile import json_schema

    put(json.dumps(json_schema(), indent=2) + "\n", out)


@command.command()
@click.argument("name")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@clean_errors
def new(name: str, overwrite: bool) -> None:
    """Write NAME.yaml, a rule file to start from."""
    from convrewrite.rulefile import template

    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if path.exists() and not overwrite:
        raise ConvrewriteError("the file exists", where=str(path), fix="use --overwrite")
    write_text(path, template(path.stem))
    click.echo(f"wrote {path}")


@command.command()
@click.argument("names", nargs=-1)
@click.option("--verbose", "-v", is_flag=True, help="Also the tests that pass.")
@clean_errors
def test(names: tuple[str, ...], verbose: bool) -> None:
    """Run the tests that rule files carry: matched, missing, noisy sites per model. All built-in files by default."""
    from tqdm import tqdm

    from convrewrite.rulefile import builtin_names, load_rules

    failed = ran = 0
    for name in names or builtin_names():
        file = load_rules(name)
        for one in tqdm(file.tests, desc=file.name, disable=None, leave=False):
            ran += 1
            lines = _run(file, one)
            failed += bool(lines)
            if lines or verbose:
                click.echo(f"{'FAIL' if lines else 'ok  '} {file.name}  {one.model}")
            for line in lines:
                click.echo(f"     {line}")
    click.echo(f"{ran - failed} of {ran} tests passed")
    if failed or not ran:
        raise SystemExit(1)


def _run(file: RuleFile, one: Any) -> list[str]:
    """What is wrong, a line each."""
    from convrewrite.annotate import annotate
    from convrewrite.capture import capture
    from convrewrite.expectations import judge
    from convrewrite.pipeline import example_of
    from convrewrite.planning import trial
    from convrewrite.sources import resolve

    source = resolve(one.model, meta=True)
    graph = annotate(capture(source.model, example_of(source.model, source.example)))
    found = trial(source.model, graph, file, start=one.start)
    lines = []
    for rule in file.rules:
        wish = one.sites.rule(rule.id)
        if wish is None:
            continue
        verdict = judge(found[rule.id], wish)
        if not verdict.passed:
            lines.append(f"{rule.id}: {verdict}")
    return lines
