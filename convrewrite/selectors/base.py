"""What a selector is, the registry of all of them, and what they may ask about the whole network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from convrewrite.registry import Registry
from convrewrite.sites import Site


class WrongValueError(ValueError):
    """A value of a rule file that can never be right: "what; what to write instead"."""


@dataclass(frozen=True)
class Wanted:
    """A wanted value, read and checked.

    Attributes:
        text: as it stands in reasons: "3 or 5", "3..4".
        fits: whether a site's value (never None) is the wanted one.
    """

    text: str
    fits: Callable[[Any], bool]


class Kind(Protocol):
    """How the value of a key is written.

    Attributes:
        textual: True if a bare ``3`` on the command line is meant as text.
        separator: what stands between the items of a list on the command line.
    """

    textual: bool
    separator: str

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """Check plain data from the rule file; raises WrongValueError."""

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the plain data."""


@dataclass(frozen=True)
class Context:
    """The network around a site.

    Attributes:
        sites: every site of the network. variables: the rule file's `vars`.
    """

    sites: Sequence[Site] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def n_stages(self) -> int:
        """Number of the last stage."""
        return max((site.stage for site in self.sites if site.stage is not None), default=0)

    def last_position(self, site: Site) -> int:
        """The highest position on the site's branch of its block."""
        return self._last.get(_branch(site), site.position or 0)

    @cached_property
    def _last(self) -> dict[tuple[Any, ...], int]:
        last: dict[tuple[Any, ...], int] = {}
        for site in self.sites:
            last[_branch(site)] = max(last.get(_branch(site), 0), site.position or 0)
        return last


def _branch(site: Site) -> tuple[Any, ...]:
    """The shortcut of a block is a branch of its own."""
    return site.stage, site.block, site.block_path, site.role in ("shortcut", "downsample")


Test = Callable[[Site, Wanted, Context], str | None]


@dataclass(frozen=True)
class Selector:
    """One key of a `match`: how its value is written, and the function that says why a site does not fit."""

    name: str
    kind: Kind
    test: Test

    @property
    def summary(self) -> str:
        """One line for the schema and the documentation."""
        return (inspect.getdoc(self.test) or "").split("\n")[0]


SELECTORS: Registry[Selector] = Registry("selector", package="convrewrite.selectors")


def selector(name: str, kind: Kind) -> Callable[[Test], Test]:
    """Decorator: make ``function(site, wanted, context) -> None | reason`` the selector called `name`."""

    def add(test: Test) -> Test:
        SELECTORS.register(name)(Selector(name, kind, test))
        return test

    return add


def differs(name: str, value: Any, wanted: Wanted, shown: str | None = None) -> str | None:
    """The usual reason, ``kernel 1x1, wanted 3``, unless `value` fits; a value of None never fits."""
    if value is None:
        return f"no {name} known, wanted {wanted.text}"
    return None if wanted.fits(value) else f"{name} {value if shown is None else shown}, wanted {wanted.text}"


def by(pair: Sequence[int]) -> str:
    """``3x3``."""
    return "x".join(map(str, pair))
