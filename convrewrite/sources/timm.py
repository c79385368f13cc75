"""timm's models by name, with or without a tag: ``timm:resnet50.a1_in1k``, ``timm:resnet50?features_only=1``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example, head_mismatch, require
from convrewrite.weights import is_file

_PREFIX = "timm:"


class Timm:
    """Every model of timm, if timm is installed."""

    order = 20

    def find(self, spec: str) -> str | None:
        asked_for = spec.startswith(_PREFIX)
        name = spec.removeprefix(_PREFIX)
        architecture, _, tag = name.partition(".")
        if not asked_for and (is_file(spec) or not architecture.isidentifier() or architecture not in self.names()):
            return None
        _require()
        if architecture not in self.names():
            raise SourceError(
                f"timm has no model '{architecture}'",
                fix=closest(architecture, self.names()) or "timm.list_models() names all",
            )
        if tag:
            _check_tag(architecture, tag)
        return name

    def names(self) -> Sequence[str]:
        return _names() if importlib.util.find_spec("timm") else ()

    def recipe(self, name: str, request: Request) -> Recipe:
        options = request.arguments()
        if request.weights is not None:
            name = _with_tag(name, request.weights)
            classes = _config(name).num_classes
            if request.num_classes not in (None, classes):
                raise head_mismatch(_PREFIX + name, classes, request.num_classes or 0)
        return {"name": name, "options": options}

    def build(self, recipe: Recipe) -> nn.Module:
        _require()
        import timm

        model: nn.Module = timm.create_model(recipe["name"], pretrained=False, **(recipe.get("options") or {}))
        return model

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return default_example(model)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        import timm

        model = timm.create_model(_with_tag(recipe["name"], weights), pretrained=True)
        state: Mapping[str, Tensor] = model.state_dict()
        return state

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        config = getattr(model, "pretrained_cfg", None)
        if not isinstance(config, Mapping) or config.get("architecture") not in self.names():
            return
        name = ".".join(part for part in (config["architecture"], config.get("tag")) if part)
        yield {"name": name, "options": {}}
        arguments = dict(getattr(model, "_model_args", {}))  # what timm itself keeps to build it again
        if all(isinstance(value, int | float | str | bool) for value in arguments.values()):
            yield {"name": name, "options": arguments}
        if isinstance(getattr(model, "num_classes", None), int):
            yield {"name": name, "options": {"num_classes": model.num_classes}}


def _require() -> None:
    require("timm", "timm")


@cache
def _names() -> tuple[str, ...]:
    import timm

    return tuple(timm.list_models())


def _tags(architecture: str) -> list[str]:
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


def _check_tag(architecture: str, tag: str) -> None:
    tags = _tags(architecture)
    if tag not in tags:
        known = f"there are {', '.join(tags)}" if tags else "it has no pretrained weights"
        raise SourceError(
            f"there are no weights '{tag}'", where=_PREFIX + architecture, fix=closest(tag, tags) or known
        )


def _with_tag(name: str, weights: str) -> str:
    """`name` with the tag of the named weights; ``DEFAULT`` is the tag it has, else timm's choice."""
    architecture, _, tag = name.partition(".")
    if weights != "DEFAULT":
        tag = weights.removeprefix(f"{architecture}.")
    elif not tag:
        tag = getattr(_config(architecture), "tag", "") or ""
    _check_tag(architecture, tag)
    return f"{architecture}.{tag}" if tag else architecture


def _config(name: str) -> Any:
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(name)


SOURCES.register("timm")(Timm())
