"""A saved folder as a model: what ``convrewrite.save`` wrote, ready to be inspected or rewritten once more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from convrewrite.errors import SourceError
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request


class Folder:
    """A folder with a ``recipe.json`` in it."""

    order = 0  # an existing folder is what the user sees

    def find(self, spec: str) -> str | None:
        return spec if (Path(spec) / "recipe.json").is_file() else None

    def names(self) -> Sequence[str]:
        return ()

    def recipe(self, name: str, request: Request) -> Recipe:
        from convrewrite.store import rewritten_recipe

        if request.options:
            fix = f"drop '?{next(iter(request.options))}=...'"
            raise SourceError("a saved model takes no options", where=name, fix=fix)
        if request.num_classes is not None:
            raise SourceError("a saved model has its number of classes", where=name, fix="drop --num-classes")
        if request.weights is not None:
            raise SourceError(
                f"a saved model has its own weights, none called '{request.weights}'",
                where=name,
                fix="drop --weights, or give a file",
            )
        return rewritten_recipe(name)

    def build(self, recipe: Recipe) -> nn.Module:
        from convrewrite.store import replay

        return replay(recipe)

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return tuple(recipe["plan"]["input_shape"])

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        raise SourceError(f"a rewritten model has no weights called '{weights}'", where=str(recipe.get("name")))

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        return iter(())


SOURCES.register("rewritten")(Folder())
