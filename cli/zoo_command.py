"""`convrewrite zoo`: the whole pipeline tried on many models."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from convrewrite.cli.common import check_writable, clean_errors, put

from convrewrite.errors import ConvrewriteError, closest

if TYPE_CHECKING:
    from convrewrite.zoo import Entry

EXTRAS = {"hf": "hf", "smp": "smp", "ultralytics": "ultralytics"}
_NAMES = "torchvision, timm, patches, features, hf, smp, ultralytics"


@click.command(name="zoo")
@click.argument("names", nargs=-1)
@click.option("--rows", metavar="FILE", help="Rows as JSON lines; models that are in it are not tried.")
@click.option("--table-only", is_flag=True, help="Try nothing: the table of what is in --rows.")
@click.option("--again", multiple=True, metavar="MODEL", help="Try this model although it is in --rows.")
@click.option("--timeout", type=click.IntRange(1), default=900, show_default=True, help="Seconds for one model.")
@click.option("--format", "format_", type=click.Choice(("markdown", "json")), default="markdown", show_default=True)
@click.option("--out", metavar="FILE", help="Write the table to a file.")
@clean_errors
def command(
    names: tuple[str, ...],
    rows: str | None,
    table_only: bool,
    again: tuple[str, ...],
    timeout: int,
    format_: str,
    out: str | None,
) -> None:
    """Try models: capture, equal copies of all convolutions, every built-in rule file, the laws.

    NAMES are groups (torchvision, timm, patches, features, hf, smp, ultralytics; all that are installed by default) or
    models as for the other commands. Each runs in a process of its own. Exit code 1 if one is not good.
    """
    check_writable(out)
    check_writable(rows)
    from tqdm import tqdm

    from convrewrite.zoo import markdown, read, run

    entries = _entries(names)
    bar = tqdm(total=len(entries), disable=None, leave=False)

    def watch(entry: Entry) -> None:
        bar.update(entries.index(entry) - bar.n)
        bar.set_description_str(entry.spec)

    if table_only and not rows:
        raise click.UsageError("--table-only needs --rows")
    place = Path(rows) if rows else None
    tried = {row.spec: row for row in read(place)} if table_only and place else {}
    chosen = [entry for entry in entries if entry.spec in tried] if table_only else entries
    found = run(chosen, place, timeout=timeout, again=() if table_only else again, watch=watch)
    bar.close()
    untried = [entry for entry in entries if entry not in chosen]
    put(
        markdown(found, untried) if format_ == "markdown" else json.dumps([asdict(row) for row in found], indent=1), out
    )
    if not all(row.good for row in found):
        raise SystemExit(1)


def _entries(names: tuple[str, ...]) -> list[Entry]:
    """The models of the groups, and the single models, each once."""
    import importlib.util

    from convrewrite.sources import known
    from convrewrite.zoo import GROUPS, Entry

    found: list[Entry] = []
    for name in names or GROUPS:
        if name not in GROUPS:
            if ":" not in name and closest(name, GROUPS):
                raise ConvrewriteError(f"'{name}' is no group", fix=f"groups: {_NAMES}; or write SOURCE:{name}")
            if not known(name):
                raise click.UsageError(f"'{name}' is neither a group ({_NAMES}) nor a model")
            found.append(Entry("models", "", name))
        elif importlib.util.find_spec(GROUPS[name][0]) is not None:
            found += GROUPS[name][1]()
        elif name in names:
            fix = f"pip install 'convrewrite[{EXTRAS.get(name, 'timm')}]'"
            raise ConvrewriteError(f"the group '{name}' needs {GROUPS[name][0]}, which is not installed", fix=fix)
    return list({entry.spec: entry for entry in found}.values())
