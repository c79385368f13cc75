"""Whole outputs kept as files, compared byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"
UPDATE = "CONVREWRITE_UPDATE_GOLDEN"


def check_golden(name: str, text: str) -> None:
    """`text` must equal the file; with CONVREWRITE_UPDATE_GOLDEN=1 in the environment it becomes the file."""
    path = FOLDER / name
    if os.environ.get(UPDATE) == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    assert path.exists(), f"{path.name} is missing: run once with {UPDATE}=1 and review the file"
    assert text.encode() == path.read_bytes(), f"{path.name} differs: run with {UPDATE}=1 and review the diff"
