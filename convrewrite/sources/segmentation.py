"""Segmentation networks of segmentation-models-pytorch: ``smp:Unet?encoder_name=resnet18&classes=3``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example, require

_PREFIX = "smp:"
_PACKAGE = "segmentation_models_pytorch"


class SegmentationModels:
    """Every architecture of the package with every encoder, by the name of its class."""

    order = 40

    def find(self, spec: str) -> str | None:
        if not spec.startswith(_PREFIX):
            return None
        require(_PACKAGE, "smp", title="segmentation-models-pytorch")
        name = spec.removeprefix(_PREFIX)
        if name not in _architectures():
            known = f"architectures: {', '.join(_architectures())}"
            hint = closest(name, _architectures()) or known
            raise SourceError(f"segmentation-models-pytorch has no architecture '{name}'", fix=hint)
        return name

    def names(self) -> Sequence[str]:
        return ()  # they are known by their prefix

    def recipe(self, name: str, request: Request) -> Recipe:
        options = dict(request.options)
        if request.num_classes is not None:
            options["classes"] = request.num_classes
        if request.weights not in (None, "DEFAULT", "imagenet"):
            fix = "DEFAULT is a trained encoder; or give a file"
            raise SourceError(f"there are no weights '{request.weights}'", where=_PREFIX + name, fix=fix)
        return {"name": name, "options": options}

    def build(self, recipe: Recipe) -> nn.Module:
        require(_PACKAGE, "smp", title="segmentation-models-pytorch")
        return _made(recipe, None)

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return default_example(model)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        state: Mapping[str, Tensor] = _made(recipe, "imagenet").state_dict()
        return state

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        return iter(())  # an encoder's name is not kept by the model


def _made(recipe: Recipe, encoder_weights: str | None) -> nn.Module:
    """The network; the package's own default would download an encoder."""
    options = {"encoder_weights": encoder_weights, **(recipe.get("options") or {})}
    encoder = options.get("encoder_name")
    package: Any = importlib.import_module(_PACKAGE)
    if isinstance(encoder, str) and not encoder.startswith("tu-") and encoder not in package.encoders.encoders:
        hint = closest(encoder, package.encoders.encoders) or "tu-NAME is any model of timm"
        raise SourceError(f"there is no encoder '{encoder}'", where=_PREFIX + recipe["name"], fix=hint)
    model: nn.Module = _architectures()[recipe["name"]](**options)
    return model


def _architectures() -> dict[str, Any]:
    package = importlib.import_module(_PACKAGE)
    base = package.base.SegmentationModel
    found = {name: value for name, value in vars(package).items() if isinstance(value, type)}
    return {name: value for name, value in sorted(found.items()) if issubclass(value, base) and value is not base}


SOURCES.register("smp")(SegmentationModels())
