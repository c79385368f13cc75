"""One registry for everything that comes in kinds: blocks, selectors, sources, report formats, laws.

A kind is added by one decorated function or class in a file of its own; the files of a registry's
package are imported on first use, so no central list has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from convrewrite.errors import ConvrewriteError, closest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind.

    Args:
        kind: what an entry is called in error messages ("block").
        package: a package whose modules are imported before the first look-up.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = package is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: file the entry under `name`. A name is taken once."""

        def add(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ConvrewriteError(f"{self.kind} '{name}' is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; an unknown name is an error with the closest one."""
        self._load()
        if name not in self._entries:
            hint = closest(name, self._entries) or f"known: {', '.join(self.names())}"
            raise ConvrewriteError(f"unknown {self.kind} '{name}'", fix=hint)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, entry) sorted by name."""
        self._load()
        return iter(sorted(self._entries.items()))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def _load(self) -> None:
        if self._loaded or self._package is None:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
