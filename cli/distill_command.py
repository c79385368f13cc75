"""`convrewrite distill`: train a saved rewritten model to give the original's outputs."""

from __future__ import annotations

from typing import Any

import click
from convrewrite.cli.common import clean_errors
from convrewrite.cli.training import data_options, setting_options, train


@click.command(name="distill")
@click.argument("folder", metavar="MODEL")
@data_options
@setting_options(leave_out=("smoothing", "imitate", "num_classes"))
@clean_errors
def command(folder: str, **options: Any) -> None:
    """Train the saved MODEL to give the original's outputs on any images; labels are not needed.

    First each block imitates the convolution whose place it takes, then the whole network the original's logits,
    while the blends go from convolution to block. It stops early when the agreement no longer rises. An untrained
    model of exact starts holds its original; for others name it with --teacher.

    Several processes: torchrun --nproc-per-node 2 -m convrewrite.cli.main distill ..., or accelerate launch.
    """
    train("distill", folder, options)
