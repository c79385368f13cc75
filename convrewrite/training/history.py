"""The log of a run: rows of numbers, as CSV, for TensorBoard, and as a picture of the curves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convrewrite.atomic import write_text
from convrewrite.errors import StoreError

COLUMNS = (
    *("step", "epoch", "phase", "loss", "lr", "anneal", "gate"),
    *("val_loss", "val_accuracy", "agreement"),
)
MEASURED = ("step", "val_loss", "val_accuracy", "agreement")
SUMMARY = "training.json"
Row = dict[str, Any]


def csv_text(history: Sequence[Row]) -> str:
    """The rows with a header; what a row does not have is empty. Numbers come back bit for bit."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(history)
    return out.getvalue()


def measured_in(folder: str) -> dict[str, float]:
    """What was measured of the weights in a folder that training wrote; {} of any other model."""
    try:
        kept = json.loads((Path(folder) / SUMMARY).read_text(encoding="utf-8"))["kept"]
        return {name: float(value) for name, value in kept.items() if name in MEASURED}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_csv(history: Sequence[Row], path: Path) -> None:
    """Write the rows, whole or not at all."""
    write_text(path, csv_text(history))


class Board:
    """Rows for TensorBoard; rows after the step at which a run goes on are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "phase"):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def write_curves(history: Sequence[Row], path: Path) -> None:
    """A picture (PNG) of loss, accuracy, agreement, gates and learning rate against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    panels: tuple[tuple[str, dict[str, str]], ...] = (
        ("loss", {"loss": "training", "val_loss": "measured"}),
        ("share", {"val_accuracy": "accuracy", "agreement": "agreement with the original"}),
        ("gates", {"anneal": "anneal", "gate": "mean |gate|"}),
    )
    for place, (title, lines) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.set_title(title)
        axes.set_xlabel("step")
        for name, label in lines.items():
            rows = [row for row in history if row.get(name) is not None]
            if rows:
                style = "o-" if name in ("val_loss", "val_accuracy", "agreement") else "-"
                axes.plot([r["step"] for r in rows], [r[name] for r in rows], style, markersize=3, label=label)
        if axes.lines:
            axes.legend()
        if title != "loss":
            axes.set_ylim(-0.02, 1.02)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(path)) from error
