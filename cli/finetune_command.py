"""`convrewrite finetune`: train a saved rewritten model on labelled images."""

from __future__ import annotations

from typing import Any

import click
from convrewrite.cli.common import clean_errors
from convrewrite.cli.training import data_options, setting_options, train


@click.command(name="finetune")
@click.argument("folder", metavar="MODEL")
@data_options
@click.option("--original", is_flag=True, help="Train the original instead, with the same settings: the control.")
@setting_options(leave_out=("blocks_first", "patience"))
@clean_errors
def command(folder: str, **options: Any) -> None:
    """Train the saved MODEL on labelled images, and save the result.

    While it trains, the blends go from their convolutions to their blocks; at the end the convolutions are dropped.
    The result is a folder as 'apply' writes it, with history.csv, curves.png and training.json.

    Whether the blocks help is known only beside the same training without them: run it a second time with --original
    and another --out, then 'convrewrite diff' the two results.

    Several processes: torchrun --nproc-per-node 2 -m convrewrite.cli.main finetune ..., or accelerate launch.
    """
    train("finetune", folder, options)
