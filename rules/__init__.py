"""The rule files that come with convrewrite."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of all built-in rule files, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Where the built-in rule file `name` lies; it need not exist."""
    return _FOLDER / f"{name}.yaml"
