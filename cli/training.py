"""What `finetune` and `distill` share on the command line: options out of the settings, and what is printed."""

from __future__ import annotations

import typing
from collections.abc import Callable
from types import NoneType
from typing import Any

import click
from convrewrite.cli.common import Command

from convrewrite.training.settings import Settings


def data_options(function: Command) -> Command:
    """--data, --val, --out and how a run begins."""
    for option in (
        click.option("--download", is_flag=True, help="Let torchvision download the data."),
        click.option("--overwrite", is_flag=True, help="Replace DIR and its run if they exist."),
        click.option("--resume", is_flag=True, help="Go on with the run that was begun for DIR."),
        click.option("--teacher-weights", metavar="W", help="Weights of --teacher: DEFAULT, a name or a file."),
        click.option("--teacher", metavar="MODEL", help="The original; by default taken out of the untrained model."),
        click.option("--out", metavar="DIR", required=True, help="Folder for the result; logs go to DIR.training."),
        click.option("--val", metavar="DATA", help="Images to measure on."),
        click.option("--data", metavar="DATA", required=True, help="imagefolder:PATH, torchvision:NAME or hf:NAME."),
    ):
        function = option(function)
    return function


def setting_options(*, leave_out: tuple[str, ...]) -> Callable[[Command], Command]:
    """One option for each field of `Settings`, with its default, limits and description."""

    def add(function: Command) -> Command:
        for name, field in reversed(Settings.model_fields.items()):
            if name not in leave_out:
                function = _option(name, field)(function)
        return function

    return add


def _option(name: str, field: Any) -> Callable[[Command], Command]:
    flag = f"--{name.replace('_', '-')}"
    kind = field.annotation
    variants = [part for part in typing.get_args(kind) if part is not NoneType]
    if kind is bool:
        return click.option(flag, name, is_flag=True, help=field.description)
    if typing.get_origin(kind) is typing.Literal:
        chosen: Any = click.Choice(variants)
    else:
        chosen = variants[0] if variants else kind
    shown = field.default is not None
    return click.option(flag, name, type=chosen, default=field.default, show_default=shown, help=field.description)


def train(purpose: str, folder: str, options: dict[str, Any]) -> None:
    """Run `finetune` or `distill`, with a line for every measurement."""
    from convrewrite.training import run
    from convrewrite.training.history import measured_in

    function = run.finetune if purpose == "finetune" else run.distill
    trained = function(folder, watch=_Lines(), bar=True, say=_say, **options)
    last = next(row for row in reversed(trained.history) if "val_loss" in row)
    from accelerate import PartialState

    if PartialState().is_main_process:
        if last.get("anneal", 1.0) < 1.0:
            click.echo("the convolutions still take part: the blends were kept", err=True)
        if (step := measured_in(options["out"]).get("step")) is not None and step < last["step"]:
            click.echo(
                f"kept the weights of step {step:.0f}, which measured best; --keep last takes the last", err=True
            )
        click.echo(f"wrote {options['out']}", err=True)


def _say(line: str) -> None:
    from tqdm import tqdm

    with tqdm.external_write_mode():
        click.echo(line, err=True)


class _Lines:
    """Prints what was measured, a line for each time."""

    def __init__(self) -> None:
        self._loss = float("nan")

    def __call__(self, row: dict[str, Any]) -> None:
        from tqdm import tqdm

        self._loss = row.get("loss", self._loss)
        if "val_loss" not in row:
            return
        parts = [f"epoch {row['epoch']:g}", f"step {row['step']}", row["phase"]]
        parts += [f"loss {self._loss:.4g}"] if self._loss == self._loss else []
        parts += [f"validation loss {row['val_loss']:.4g}"]
        for name, title in (("val_accuracy", "accuracy"), ("agreement", "agreement")):
            parts += [f"{title} {100 * row[name]:.2f} %"] if name in row else []
        parts += [f"anneal {row['anneal']:.2f}"] if "anneal" in row else []
        with tqdm.external_write_mode():
            click.echo("  ".join(parts))
