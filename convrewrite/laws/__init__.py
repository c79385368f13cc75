"""The laws that hold after every rewrite, each a function in a file of its own that says held, broken or skipped."""

from __future__ import annotations

from collections.abc import Callable

from convrewrite.laws.case import Case
from convrewrite.registry import Registry
from convrewrite.reports import LawResult

LAWS: Registry[Callable[[Case], LawResult]] = Registry("law", package="convrewrite.laws")
ORDER = ("shape", "start", "kept", "alive", "modes", "stable", "portable")


def check(case: Case) -> tuple[LawResult, ...]:
    """All laws on one rewrite: the seven in their order, then any that were registered besides."""
    names = [n for n in ORDER if n in LAWS] + [n for n in LAWS.names() if n not in ORDER]
    return tuple(_one(name, case) for name in names)


def _one(name: str, case: Case) -> LawResult:
    try:
        return LAWS.get(name)(case)
    except Exception as error:
        first = (str(error) or repr(error)).strip().splitlines()[0]
        return LawResult(name, "broken", f"{type(error).__name__}: {first}")
