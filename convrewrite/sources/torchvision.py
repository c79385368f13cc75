"""torchvision's models by name: ``torchvision:resnet50``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example, head_mismatch

_PREFIX = "torchvision:"
_QUANTIZED = "quantized_"  # built without ``quantize``, they are float models and take the float models' weights
_CLASSES = 1000  # what its classifiers are built with when not told


class Torchvision:
    """Every torchvision model; ``quantized_*`` under its full name and in its float form, the one that trains."""

    order = 10

    def find(self, spec: str) -> str | None:
        if spec.startswith(_PREFIX):
            name = spec.removeprefix(_PREFIX)
            if name not in _builders():
                raise _unknown(name, self.names())
            return name
        return spec if spec.isidentifier() and spec in self.names() else None

    def names(self) -> Sequence[str]:
        return _names()

    def recipe(self, name: str, request: Request) -> Recipe:
        options = request.arguments()
        if request.weights is not None:
            weights = _weights(name, request.weights)
            classes = len(weights.meta.get("categories") or ()) or None
            if classes is not None and request.num_classes not in (None, classes):
                raise head_mismatch(_PREFIX + name, classes, request.num_classes or 0)
            options |= _options_of_weights(name, weights)
        return {"name": name, "options": options}

    def build(self, recipe: Recipe) -> nn.Module:
        builder = _builder(recipe["name"])
        options = dict(recipe.get("options") or {})
        if "weights_backbone" in inspect.signature(builder).parameters:
            options["weights_backbone"] = None  # their default downloads a backbone
        if builder.__name__ in ("googlenet", "inception_v3"):
            options.setdefault("init_weights", True)  # what they do when not told, less a FutureWarning
        model: nn.Module = builder(weights=None, **options)
        return model

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        fixed = getattr(model, "image_size", None)  # vision transformers take no other, and some weights' is not theirs
        if isinstance(fixed, int):
            return (1, 3, fixed, fixed)
        member = _weights(recipe["name"], weights or "DEFAULT")
        keywords = getattr(member.transforms, "keywords", {})  # detection transforms have none
        size = keywords.get("crop_size") or keywords.get("resize_size")
        size = size[0] if isinstance(size, list | tuple) and len(size) == 1 else size
        return (1, 3, size, size) if isinstance(size, int) else default_example(model)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        # Through torchvision's own builder, which renames DenseNet's keys and drops GoogLeNet's extra heads.
        model = _builder(recipe["name"])(weights=_weights(recipe["name"], weights), progress=True)
        state: Mapping[str, Tensor] = model.state_dict()
        return state

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        options = {key: getattr(model, key) for key in ("transform_input", "aux_logits") if hasattr(model, key)}
        classes = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        if not classes:  # a convolution is the head, unless the rewrite took it
            classes = [*[m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][-1:], _CLASSES]
        for name in _builders():
            if _builder(name).__module__ == type(model).__module__:
                for number in classes:
                    head = {} if number == _CLASSES else {"num_classes": number}
                    yield {"name": name, "options": options | head}


@cache
def _builders() -> tuple[str, ...]:
    import torchvision

    return tuple(torchvision.models.list_models())


def _names() -> tuple[str, ...]:
    return tuple(name for name in _builders() if not name.startswith(_QUANTIZED))


def _builder(name: str) -> Any:
    import torchvision

    if name not in _builders():
        raise _unknown(name, _names())
    return torchvision.models.get_model_builder(name)


def _weights(name: str, weights: str) -> Any:
    """The member of the model's weights enumeration; ``ResNet50_Weights.IMAGENET1K_V2`` is understood too."""
    import torchvision

    members = torchvision.models.get_model_weights(name.removeprefix(_QUANTIZED))
    wanted = weights.removeprefix(f"{members.__name__}.")
    if wanted not in members.__members__:
        raise SourceError(
            f"there are no weights '{weights}'",
            where=_PREFIX + name,
            fix=closest(wanted, members.__members__) or f"there are {', '.join(members.__members__)}",
        )
    return members[wanted]


def _options_of_weights(name: str, weights: Any) -> dict[str, Any]:
    """What torchvision's builders change in the architecture when they are given weights."""
    builder, name = _builder(name), name.removeprefix(_QUANTIZED)
    if "detection" in builder.__module__:
        raise SourceError(
            "torchvision builds its pretrained detectors from other layers than the untrained ones",
            where=_PREFIX + name,
            fix="build it in a function of your own and give 'file.py:function' as the model",
        )
    if name == "googlenet":
        return {"transform_input": True, "aux_logits": False}
    if name == "inception_v3":
        return {"transform_input": True}
    if name.startswith("vit_"):
        return {"image_size": weights.meta["min_size"][0]}
    return {"aux_loss": True} if "aux_loss" in inspect.signature(builder).parameters else {}


def _unknown(name: str, names: Sequence[str]) -> SourceError:
    return SourceError(
        f"torchvision has no model '{name}'", fix=closest(name, names) or "torchvision.models.list_models() names all"
    )


SOURCES.register("torchvision")(Torchvision())
