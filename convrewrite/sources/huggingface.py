"""Vision models of transformers: ``hf:resnet``, ``hf:ResNetBackbone``, ``hf:path/to/folder``, ``hf:owner/name``.

The trap: ``from_pretrained`` may run code that comes with a model and unpickle its weights. Here only classes of the
installed transformers are built, from a config that is data, and only safetensors are read.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example, one_line, require
from convrewrite.sources.factory import one_line_errors

_PREFIX = "hf:"
_TASKS = (
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "BACKBONE",
)
"""Which head a model type gets when none is named: the first of these that transformers has for it."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class HuggingFace:
    """Every vision model of transformers, if transformers is installed.

    A name is a model type (``resnet``: its default config and its classification head, or the first other vision
    head it has), a class (``ResNetBackbone``), a folder with ``config.json``, or a repository of the hub. The
    config becomes part of the recipe, so that a saved model needs neither folder nor network.
    """

    order = 30

    def find(self, spec: str) -> str | None:
        return spec.removeprefix(_PREFIX) or None if spec.startswith(_PREFIX) else None

    def names(self) -> Sequence[str]:
        return ()  # they are known by their prefix, and listing them imports transformers

    def recipe(self, name: str, request: Request) -> Recipe:
        require("transformers", "hf")
        with one_line_errors(_PREFIX + name, "the model cannot be built"):
            kind, config = _of_name(name)
        options = dict(request.options)
        if request.num_classes is not None:
            options["num_labels"] = request.num_classes
        return {"name": name, "class": options.pop("class", kind), "config": config, "options": options}

    def build(self, recipe: Recipe) -> nn.Module:
        require("transformers", "hf")
        with one_line_errors(_PREFIX + recipe["name"], "the model cannot be built"):
            kind = _class(recipe["class"])
            config = _config(recipe, kind)
            with _quiet():
                model: nn.Module = kind(config)
        return model.train()

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        size = getattr(getattr(model, "config", None), "image_size", None)
        size = (size, size) if isinstance(size, int) else size
        usual = default_example(model)
        return (*usual[:2], *size) if isinstance(size, tuple | list) and len(size) == 2 else usual

    def own_weights(self, name: str) -> str | None:
        """The safetensors of a local folder belong to it: they are loaded unless others are asked for."""
        return "DEFAULT" if any((Path(name) / file).is_file() for file in _WEIGHTS) else None

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        name, kind = recipe["name"], _class(recipe["class"])
        if weights != "DEFAULT":
            raise SourceError(f"there are no weights '{weights}'", where=_PREFIX + name, fix="DEFAULT, or a file")
        if not _is_folder(name) and "/" not in name:
            raise SourceError("a model built from a default config has no weights", where=_PREFIX + name)
        with _quiet():
            model, found = kind.from_pretrained(
                name,
                config=_config(recipe, kind),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
            )
        lacking = [*found["missing_keys"], *(str(key[0]) for key in found.get("mismatched_keys", ()))]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            fix = f"its files are of another class than {kind.__name__}, or of another number of classes"
            raise SourceError(f"the weights lack {lacking[0]}{more}", where=_PREFIX + name, fix=fix)
        state: Mapping[str, Tensor] = model.state_dict()
        return state

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        config: Any = getattr(model, "config", None)
        home = type(model).__module__
        if not home.startswith("transformers.models.") or not hasattr(config, "to_dict"):
            return
        with _quiet():
            kept = json.loads(config.to_json_string(use_diff=False))
        name = type(model).__name__
        yield {"name": name, "class": name, "config": kept, "options": {}}


def _of_name(name: str) -> tuple[str, dict[str, Any]]:
    """(class, config as plain data) for what a user calls the model."""
    if _is_folder(name):
        return _of_config(_read(Path(name) / "config.json"), name)
    if "/" in name or name.startswith("."):
        if Path(name).exists() or name.startswith((".", "/")):
            raise SourceError("there is no folder with a config.json", where=name)
        with _quiet():
            return _of_config(_package().PretrainedConfig.get_config_dict(name)[0], name)
    if name in _types():
        with _quiet():
            return _head(name), {"model_type": name}
    kind: Any = getattr(_package(), name, None) if name.isidentifier() else None
    config = getattr(kind, "config_class", None)
    if config is not None and issubclass(kind, nn.Module):
        return name, {"model_type": config.model_type}
    known = [n for n in _types() if _head(n)]
    hint = closest(name, known) or "give a model type such as 'resnet', a folder, or owner/name of the hub"
    raise SourceError(f"transformers has no vision model '{name}'", fix=hint)


def _of_config(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The class that a config was written for."""
    if config.get("auto_map"):
        raise SourceError(
            "its config asks for code that comes with the model, which is not run",
            where=where,
            fix="build it in a function of your own and give 'file.py:function' as the model",
        )
    kind = config.get("model_type")
    if kind not in _types():
        raise SourceError(f"its config.json has the unknown model type {kind!r}", where=where, fix=_near(kind))
    written = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    return (written[0] if written else _head(str(kind))), config


def _near(kind: object) -> str | None:
    return closest(kind, _types()) if isinstance(kind, str) else None


def _config(recipe: Recipe, kind: Any) -> Any:
    """The config object; options override it, and nothing pretrained is fetched for a backbone."""
    factory = _package().AutoConfig
    data = json.loads(json.dumps(recipe["config"]))
    options = dict(recipe.get("options") or {})
    with _quiet():
        config = factory.for_model(data.pop("model_type"), **data)
        unknown = next((key for key in options if not hasattr(config, key)), None)
        if unknown is not None:
            hint = closest(unknown, config.to_dict()) or "see the model's config class"
            raise SourceError(f"{type(config).__name__} has no '{unknown}'", where=_PREFIX + recipe["name"], fix=hint)
        if options:  # through the constructor: configs derive some of their values from others
            config = factory.for_model(recipe["config"]["model_type"], **{**data, **options})
    parts: tuple[Any, ...] = (config, getattr(config, "backbone_config", None))
    for part in parts:
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False
    return config


def _class(name: str) -> Any:
    transformers = _package()
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained")):
        hint = closest(str(name), [n for n in dir(transformers) if n[0].isupper()])
        raise SourceError(f"transformers has no model class '{name}'", fix=hint)
    return kind


def _package() -> Any:
    return importlib.import_module("transformers")


@cache
def _types() -> frozenset[str]:
    auto: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    return frozenset(auto.CONFIG_MAPPING_NAMES)


def _head(model_type: str) -> str:
    """The class for a model type that was given without one; "" if it is no vision model."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for task in _TASKS:
        found = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).get(model_type)
        if found:
            return str(found[0] if isinstance(found, tuple | list) else found)
    return ""


def _is_folder(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"not a readable config ({one_line(error)})", where=str(path)) from None
    if not isinstance(found, dict):
        raise SourceError(f"this is a {type(found).__name__}, not a config", where=str(path))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports on standard error what a caller can read in the result."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


SOURCES.register("hf")(HuggingFace())
