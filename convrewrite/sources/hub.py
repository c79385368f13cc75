"""torch.hub repositories: ``hub:path/to/repository:entry``, ``hub:owner/name[:tag]:entry``.

It runs the repository's ``hubconf.py``: name only repositories that you trust, as for any factory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example
from convrewrite.sources.factory import check_options, import_file, importable_from, one_line_errors

_PREFIX = "hub:"


class Hub:
    """An entry of a ``hubconf.py``, in a local folder or, where there is a network, on GitHub."""

    order = 60

    def find(self, spec: str) -> str | None:
        if not spec.startswith(_PREFIX):
            return None
        name = spec.removeprefix(_PREFIX)
        home, colon, entry = name.rpartition(":")
        if not colon or not home or not entry:
            raise SourceError(f"'{spec}' names no entry", fix="write 'hub:path/to/repository:entry'")
        folder = Path(home)
        if folder.is_dir():
            if not (folder / "hubconf.py").is_file():
                raise SourceError("this folder has no hubconf.py", where=home)
            return f"{folder.resolve()}:{entry}"  # a saved model may be loaded from elsewhere
        if home.startswith((".", "/", "~")) or home.count("/") != 1:
            raise SourceError("there is no such folder", where=home, fix="or write 'hub:owner/name:entry'")
        return name

    def names(self) -> Sequence[str]:
        return ()

    def recipe(self, name: str, request: Request) -> Recipe:
        if request.weights not in (None, "DEFAULT"):
            fix = "DEFAULT calls the entry with pretrained=True; or give a file"
            raise SourceError(f"there are no weights '{request.weights}'", where=_PREFIX + name, fix=fix)
        return {"name": name, "options": request.arguments()}

    def build(self, recipe: Recipe) -> nn.Module:
        return _load(recipe, pretrained=False)

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return default_example(model)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        state: Mapping[str, Tensor] = _load(recipe, pretrained=True).state_dict()
        return state

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        return iter(())


def _load(recipe: Recipe, *, pretrained: bool) -> nn.Module:
    home, _, entry = recipe["name"].rpartition(":")
    where = _PREFIX + recipe["name"]
    options = dict(recipe.get("options") or {})
    with one_line_errors(where, "the entry failed"):
        if Path(home).is_absolute():
            made = _local(Path(home), entry, options, pretrained=pretrained)
        else:
            options |= {"pretrained": True} if pretrained else {}
            load: Callable[..., Any] = torch.hub.load
            made = load(home, entry, trust_repo=True, verbose=False, **options)
    if not isinstance(made, nn.Module):
        raise SourceError(f"the entry returned a {type(made).__name__}, not an nn.Module", where=where)
    return made


def _local(folder: Path, entry: str, options: dict[str, Any], *, pretrained: bool) -> Any:
    """Call the entry; ``pretrained`` is given to those that know the word, for their default may be to download."""
    where = f"{_PREFIX}{folder}:{entry}"
    module = import_file(folder / "hubconf.py", where)
    entries = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    if entry not in entries:
        raise SourceError(f"its hubconf.py has no '{entry}'", where=where, fix=closest(entry, entries))
    function = getattr(module, entry)
    known = inspect.signature(function).parameters
    if "pretrained" in known:
        options.setdefault("pretrained", pretrained)
    elif pretrained:
        raise SourceError("the entry knows no 'pretrained'", where=where, fix="give a file of weights")
    check_options(function, options, where)
    with importable_from(str(folder)):
        return function(**options)


SOURCES.register("hub")(Hub())
