"""Models that a user's own function builds: ``package.module:factory`` or ``path/file.py:factory``."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import ConvrewriteError, SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example, one_line


class Factory:
    """A function or class that returns an ``nn.Module`` when called without arguments, or a module object."""

    order = 90  # last: it takes any text with a colon

    def find(self, spec: str) -> str | None:
        home, colon, attribute = spec.rpartition(":")
        return spec if colon and home and attribute else None

    def names(self) -> Sequence[str]:
        return ()

    def recipe(self, name: str, request: Request) -> Recipe:
        if request.weights is not None:
            raise SourceError(
                f"a factory has no weights called '{request.weights}'", where=name, fix="give a file with --weights"
            )
        home, _, attribute = name.rpartition(":")
        if home.endswith(".py"):
            name = f"{Path(home).resolve()}:{attribute}"  # the folder may be loaded from elsewhere
        return {"name": name, "options": request.arguments()}

    def build(self, recipe: Recipe) -> nn.Module:
        spec, options = recipe["name"], dict(recipe.get("options") or {})
        home, _, attribute = spec.rpartition(":")
        made = _attribute(_import(home, spec), attribute, spec)
        if isinstance(made, nn.Module):
            return copy.deepcopy(made)
        if not callable(made):
            raise SourceError(f"'{attribute}' is a {type(made).__name__}, not a function", where=spec)
        check_options(made, options, spec)
        with one_line_errors(spec, "the factory failed"):
            made = made(**options)
        if not isinstance(made, nn.Module):
            raise SourceError(f"the factory returned a {type(made).__name__}, not an nn.Module", where=spec)
        return made

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return default_example(model)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        raise SourceError(f"a factory has no weights called '{weights}'", where=recipe["name"])

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        home, name = type(model).__module__, type(model).__qualname__
        loaded = sys.modules.get(home)
        # Only a class that a later run can import under the same name, and that asks for no arguments.
        if home == "__main__" or getattr(loaded, "__spec__", None) is None or not name.isidentifier():
            return
        if getattr(loaded, name, None) is type(model) and not _required(type(model)):
            yield {"name": f"{home}:{name}", "options": {}}


def _import(home: str, spec: str) -> ModuleType:
    if home.endswith(".py"):
        return import_file(Path(home), spec)
    with one_line_errors(spec, "the module cannot be imported"), importable_from(os.getcwd()):
        return importlib.import_module(home)


def import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_absolute():  # `recipe` made it so: this one came from a saved folder, and was edited
        raise SourceError("a recipe names its file by the whole path", where=spec)
    if not path.is_file():
        raise SourceError(f"there is no file '{path}'", where=spec)
    name = f"_convrewrite_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    location = importlib.util.spec_from_file_location(name, path)
    if location is None or location.loader is None:
        raise SourceError(f"'{path}' is not a Python file", where=spec)
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # dataclasses and copying look classes up by their module
    with one_line_errors(spec, "the file cannot be run"), importable_from(str(path.resolve().parent)):
        location.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, attribute: str, spec: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise SourceError(f"there is no '{part}' in it", where=spec, fix=closest(part, vars(value)))
        value = getattr(value, part)
    return value


def check_options(factory: Any, options: Mapping[str, Any], spec: str) -> None:
    """Say before the call what it asks for or cannot take; a factory without a signature is just called."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            fix = "drop --num-classes" if option == "num_classes" else closest(option, parameters) or "drop it"
            raise SourceError(f"the factory takes no '{option}'", where=spec, fix=fix)
    missing = [name for name in _required(factory) if name not in options]
    if missing:
        raise SourceError(
            f"the factory needs arguments: {', '.join(missing)}", where=spec, fix="name a function that needs none"
        )


def _required(factory: Any) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(factory).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


@contextmanager
def one_line_errors(spec: str, what: str) -> Iterator[None]:
    try:
        yield
    except ConvrewriteError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may exit on import
        raise SourceError(f"{what}: {one_line(error)}", where=spec) from error


@contextmanager
def importable_from(folder: str) -> Iterator[None]:
    """The console script, unlike ``python -m``, does not look for modules in the working directory."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


SOURCES.register("factory")(Factory())
