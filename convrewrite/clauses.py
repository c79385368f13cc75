"""Compiles a `match` from plain data into clauses: small labelled tests that say why a site does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convrewrite.errors import closest
from convrewrite.selectors.base import SELECTORS, Context, WrongValueError
from convrewrite.selectors.wanted import show
from convrewrite.sites import Site
from convrewrite.yamlfile import KeyPath, Problems

MAX_CLAUSES = 500
MAX_NESTING = 20
WORDS = {
    "all": "Every one of these matches must fit.",
    "any": "At least one of these matches must fit.",
    "not": "This match must not fit; of a list none may.",
    "use": "Matches named under `selectors:`, by name; all must fit.",
}
"""The keys of a `match` that are no selectors."""


@dataclass(frozen=True)
class Clause:
    """One condition on a site.

    Attributes:
        key: the key it came from. label: as it stands in a funnel: "stage 3..4".
        test: (site, context) -> None, or the reason it does not fit.
    """

    key: str
    label: str
    test: Callable[[Site, Context], str | None]


Clauses = tuple[Clause, ...]


class Compiler:
    """Turns matches into clauses and notes what is wrong with them.

    Args:
        problems: where to note. selectors: named matches for `use`. variables: the file's `vars`.
    """

    def __init__(self, problems: Problems, selectors: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
        self.problems = problems
        self._loud = problems
        self._checked: str | None = None
        self.selectors = selectors
        self.variables = variables
        self.used: set[str] = set()
        self._open: list[str] = []
        self._clauses = 0

    def match(self, data: Any, path: KeyPath) -> Clauses:
        """The clauses of one match, in its order, all to be met; () if it is wrong."""
        if not isinstance(data, dict):
            self.problems.add(path, f"{show(data)} is no match, wanted keys and values")
            return ()
        if not data:
            self.problems.add(path, "an empty selector would match everything", "say what to look for")
            return ()
        if len(path) > MAX_NESTING * 2 or len(self._open) > MAX_NESTING:
            self.problems.add(path, f"nested deeper than {MAX_NESTING} levels")
            return ()
        found: list[Clause] = []
        for key, value in data.items():
            found += self._clause(str(key), value, (*path, str(key)))
        return tuple(found)

    def named(self, name: str) -> Clauses:
        """The clauses of a named selector itself, whose faults are told here and not wherever it is used."""
        self._checked, self._open = name, [name]
        found = self.match(self.selectors[name], ("selectors", name))
        self._checked, self._open = None, []
        return found

    def matches(self, data: Any, path: KeyPath) -> list[Clauses]:
        """The same for one match or a list of them."""
        if not isinstance(data, list):
            return [self.match(data, path)]
        if not data:
            self.problems.add(path, "an empty list", "give at least one match")
        return [self.match(item, (*path, index)) for index, item in enumerate(data)]

    def _clause(self, key: str, value: Any, path: KeyPath) -> Sequence[Clause]:
        self._clauses += 1
        if self._clauses > MAX_CLAUSES:
            if self._clauses == MAX_CLAUSES + 1:
                self._loud.add(path, f"more than {MAX_CLAUSES} clauses once every 'use' is expanded")
            return ()
        if key == "use":
            return self._use(value, path)
        if key in WORDS:
            parts = [part for part in self.matches(value, path) if part]
            return [c for part in parts for c in part] if key == "all" else [_nested(key, parts)] if parts else ()
        if key not in SELECTORS:
            known = (*SELECTORS.names(), *WORDS)
            self.problems.add(path, "unknown key", closest(key, known) or f"known: {', '.join(known)}")
            return ()
        return self._selector(key, value, path)

    def _selector(self, key: str, value: Any, path: KeyPath) -> Sequence[Clause]:
        selector = SELECTORS.get(key)
        try:
            wanted = selector.kind.read(value, self.variables)
        except WrongValueError as error:
            self.problems.add(path, str(error))
            return ()
        test = selector.test
        return [Clause(key, f"{key} {wanted.text}", lambda site, context: test(site, wanted, context))]

    def _use(self, value: Any, path: KeyPath) -> Sequence[Clause]:
        names = value if isinstance(value, list) else [value]
        if not names:
            self.problems.add(path, "an empty list", "give at least one name of 'selectors:'")
        found: list[Clause] = []
        for name in names:
            if not isinstance(name, str) or name not in self.selectors:
                hint = closest(name, self.selectors) if isinstance(name, str) else None
                self.problems.add(path, f"unknown selector {show(name)}", hint or "define it under 'selectors:'")
            elif name not in self._open:
                found += self._expanded(name, path)
            elif name == self._checked:
                self._loud.add(("selectors", name), f"uses itself: {' > '.join((*self._open, name))}")
        return found

    def _expanded(self, name: str, path: KeyPath) -> Clauses:
        self.used.add(name)
        self._open.append(name)
        problems, self.problems = self.problems, Problems("")
        found = self.match(self.selectors[name], path)
        self.problems = problems
        self._open.pop()
        return found


def first_reason(clauses: Clauses, site: Site, context: Context) -> str | None:
    """Why the site does not meet all clauses, or None."""
    return next((reason for c in clauses if (reason := c.test(site, context)) is not None), None)


def _nested(key: str, parts: list[Clauses]) -> Clause:
    shown = [", ".join(c.label for c in part) for part in parts]
    if key == "any":
        return Clause("any", f"any of ({' | '.join(shown)})", lambda site, context: _any(parts, site, context))
    return Clause("not", f"not {' or '.join(shown)}", lambda site, context: _none(parts, shown, site, context))


def _any(parts: list[Clauses], site: Site, context: Context) -> str | None:
    reasons = [first_reason(part, site, context) for part in parts]
    return None if None in reasons else " and ".join(reason for reason in reasons if reason)


def _none(parts: list[Clauses], shown: list[str], site: Site, context: Context) -> str | None:
    for part, label in zip(parts, shown, strict=True):
        if first_reason(part, site, context) is None:
            return f"is {label}, which is not wanted"
    return None
