"""What the blocks are measured against: a list that baselines add themselves to, and how a user's copies are loaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from torch import nn

from convrewrite.errors import ConvrewriteError

Build = Callable[[int, int, Path | None], nn.Module]
"""(channels, side of the map, folder of peers) -> a module from (B, channels, side, side) to the same."""

GIB = 2**30


@dataclass(frozen=True)
class Baseline:
    """One form to compare with.

    Attributes:
        subject: the contender it is compared with.
        name: "unfold", "whole logits", or owner/repository.
        kind: "plain": written here as textbooks have it; "peer": published code.
        folder: the folder under --peers that it needs; "" if none.
        needs: bytes it takes at (batch, channels, side), where that is too much for some sizes.
    """

    subject: str
    name: str
    kind: Literal["plain", "peer"]
    build: Build
    folder: str = ""
    needs: Callable[[int, int, int], int] | None = None

    def absent(self, peers: Path | None, batch: int, channels: int, side: int) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.folder and peers is None:
            return "--peers not given"
        if self.folder and peers is not None and not (peers / self.folder).is_dir():
            return f"no folder {self.folder} under --peers"
        if self.name == "timm" and importlib.util.find_spec("timm") is None:
            return "timm is not installed"
        needs = self.needs(batch, channels, side) if self.needs else 0
        return f"would need {needs / GIB:.0f} GiB" if needs > 8 * GIB else None


BASELINES: list[Baseline] = []


def whole_logits(heads: int) -> Callable[[int, int, int], int]:
    """What a forward and a backward pass take that hold the logits of all pairs in float32, six times at once."""
    return lambda batch, channels, side: 6 * 4 * batch * heads * side**4


def baseline(
    *subjects: str,
    name: str,
    kind: Literal["plain", "peer"] = "peer",
    folder: str = "",
    needs: Callable[[int, int, int], int] | None = None,
) -> Callable[[Build], Build]:
    """Decorator: compare `subjects` with what the function builds."""

    def add(build: Build) -> Build:
        BASELINES.extend(Baseline(subject, name, kind, build, folder, needs) for subject in subjects)
        return build

    return add


def load(path: Path) -> ModuleType:
    """A module from a file of a repository; imports of its neighbours are resolved beside it."""
    spec = importlib.util.spec_from_file_location(f"convrewrite_peer_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConvrewriteError("no such file", where=str(path), fix="give --peers the folder that holds the checkouts")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
