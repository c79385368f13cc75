"""What the commands share: options, how errors end, progress, and where the output goes."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convrewrite.atomic import write_text
from convrewrite.errors import ConvrewriteError

if TYPE_CHECKING:
    from convrewrite.sources import Source

FORMATS = ("text", "markdown", "json", "html")
STARTS = ("exact", "fitted", "fresh")

Command = Callable[..., Any]


def _input_shape(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """What cannot be a shape is told before torch is imported."""
    if value is not None and not re.fullmatch(r"\s*\d+(?:[xX,]\d+){3}\s*", value, re.ASCII):
        what = f"'{value}' is not batch x channels x height x width, as in 1x3x224x224"
        raise click.BadParameter(what, context, parameter)
    return value


def input_option(function: Command) -> Command:
    """--input."""
    return click.option(
        "--input",
        "input_shape",
        metavar="NxCxHxW",
        callback=_input_shape,
        help="Input shape; the model's own by default.",
    )(function)


def model_options(function: Command) -> Command:
    """--weights, --input, --num-classes, --seed."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of random initialisation."),
        click.option("--num-classes", type=click.IntRange(1), help="Classes of the model that is built."),
        input_option,
        click.option("--weights", metavar="W", help="DEFAULT, a weight name, or a .pth, .pt or .safetensors file."),
    ):
        function = option(function)
    return function


def rule_options(function: Command) -> Command:
    """--rules, --start, --set."""
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="RULE.OPTION=VALUE", help="Override a block's option."
        ),
        click.option("--start", type=click.Choice(STARTS), help="How the edits start; the rules' own by default."),
        click.option("--rules", "-r", multiple=True, metavar="FILE", help="Rule file, or the name of a built-in one."),
    ):
        function = option(function)
    return function


def format_option(function: Command) -> Command:
    """--format."""
    return click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="Form of what is printed.",
    )(function)


def clean_errors(function: Command) -> Command:
    """Errors raised on purpose end in one line and exit code 1."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConvrewriteError as error:
            raise CleanError(str(error)) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except MemoryError:
            raise CleanError("out of memory; give a smaller --input") from None

    return run


class CleanError(click.ClickException):
    """One line per problem, exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True)


def source_of(
    model: str, weights: str | None, input_shape: str | None, num_classes: int | None, seed: int, *, meta: bool
) -> Source:
    """The model and its example shape."""
    from convrewrite.sources import resolve

    source = resolve(model, weights=weights, input=input_shape, num_classes=num_classes, seed=seed, meta=meta)
    for note in source.notes:
        click.echo(f"note: {note}", err=True)
    return source


def settings_of(settings: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    """``RULE.option=value`` as (rule, option) -> value; ``option=value`` is for all rules."""
    import yaml

    found: dict[tuple[str, str], Any] = {}
    for setting in settings:
        left, equals, right = setting.partition("=")
        rule, _, option = left.strip().rpartition(".")
        if not equals or not option:
            raise click.BadParameter(f"'{setting}' is not RULE.option=value", param_hint="--set")
        try:
            value = yaml.safe_load(right)
        except yaml.YAMLError:
            value = right
        found[rule or "*", option] = value
    return found


def check_rules(rules: tuple[str, ...]) -> None:
    """Read the rule files before torch is imported and a model built, so that a misspelt name is told at once."""
    from convrewrite.rulefile import load_rules

    for name in rules:
        load_rules(name)


def check_writable(place: str | None) -> None:
    """Refuse an --out that cannot be written before the work is done and not after it.

    Raises:
        ConvrewriteError: neither the file or folder nor the folders above it can be made.
    """
    if not place:
        return
    nearest = next(above for above in Path(os.path.abspath(place)).parents if above.exists())
    try:
        handle, name = tempfile.mkstemp(dir=nearest, prefix=".convrewrite.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise ConvrewriteError(
            f"cannot be written: {error.strerror or error}", where=place, fix="name another place"
        ) from None


def hint(text: str) -> None:
    """Advice for a reader at a terminal; scripts do not see it."""
    if sys.stderr.isatty():
        click.echo(f"hint: {text}", err=True)


def hint_rules(model: str, error: ConvrewriteError) -> None:
    """Where a rule matched nothing: how to find rule files that do."""
    if ": 0 sites, expected" in str(error):
        hint(f"'convrewrite rules --for {shlex.quote(model)}' lists the built-in rule files that fit")


class Progress:
    """A bar on standard error, on a terminal only."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, disable=None, leave=False, bar_format="{desc:<12} {bar} {n_fmt}/{total_fmt}")
        self._begun = False

    def __call__(self, name: str) -> None:
        """The pass called `name` begins."""
        if self._begun:
            self._bar.update()
        self._begun = True
        self._bar.set_description_str(name)

    def close(self) -> None:
        self._bar.close()


def put(text: str, out: str | None) -> None:
    """To a file, or to standard output."""
    if out:
        write_text(out, text)
        click.echo(f"wrote {out}", err=True)
    else:
        click.echo(text.rstrip("\n"))
