"""Ultralytics' networks from the package's own YAML files: ``ultralytics:yolo11n``; nothing is downloaded."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convrewrite.errors import SourceError, closest
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, require

_PREFIX = "ultralytics:"
_SCALED = re.compile(r"^(yolo(?:e-)?v?\d+|rtdetr)([nslmxtce])(?=$|-)")
_STANDARD = {
    "detect": "yolo11n",
    "segment": "yolo11n-seg",
    "classify": "yolo11n-cls",
    "pose": "yolo11n-pose",
    "obb": "yolo11n-obb",
}
"""A YAML for each task, from which the package's table of trainers is read."""


class Ultralytics:
    """A YOLO by the name of its YAML file, with the size letter (``yolov8n``, ``yolo11s-seg.yaml``), or a YAML's path.

    The model is the package's own ``DetectionModel`` (or ``SegmentationModel``, ...), as in ``YOLO(name).model``.
    """

    order = 50

    def find(self, spec: str) -> str | None:
        if not spec.startswith(_PREFIX):
            return None
        require("ultralytics", "ultralytics")
        name = spec.removeprefix(_PREFIX)
        if name.endswith(".pt"):
            raise SourceError(
                "an Ultralytics .pt file is a pickled model, which is not loaded",
                where=name,
                fix="save YOLO(file).model.state_dict(), name its YAML as the model, and give the file as --weights",
            )
        if Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
            return str(Path(name).resolve())
        name = name.removesuffix(".yaml")
        if _file_of(name) not in _files():
            hint = closest(name, [*_files(), *(f"{stem}n" for stem in _files())]) or "a name such as 'yolo11n'"
            raise SourceError(f"ultralytics has no model '{name}'", fix=hint)
        return name

    def names(self) -> Sequence[str]:
        return ()  # they are known by their prefix

    def recipe(self, name: str, request: Request) -> Recipe:
        if request.weights is not None:
            raise SourceError(
                f"'{request.weights}' would be a pickled model, which is not loaded",
                where=_PREFIX + name,
                fix="save YOLO(file).model.state_dict() and give that file as --weights",
            )
        options = dict(request.options)
        if request.num_classes is not None:
            options["nc"] = request.num_classes
        return {"name": name, "options": options}

    def build(self, recipe: Recipe) -> nn.Module:
        require("ultralytics", "ultralytics")
        with _quiet():
            tasks: Any = importlib.import_module("ultralytics.nn.tasks")
            kind = _class_for(recipe["name"], tasks)
            name = recipe["name"]
            config = tasks.yaml_model_load(name if name.startswith("/") else f"{name}.yaml")
            model: nn.Module = kind(config, verbose=False, **(recipe.get("options") or {}))
        return model.train()

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        side = 224 if type(model).__name__ == "ClassificationModel" else 640
        return (1, int(getattr(model, "yaml", {}).get("channels", 3)), side, side)

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        raise SourceError(f"'{weights}' would be a pickled model, which is not loaded", where=recipe["name"])

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        config = getattr(model, "yaml", None)
        if not type(model).__module__.startswith("ultralytics.") or not isinstance(config, Mapping):
            return
        stem, scale = Path(str(config.get("yaml_file", ""))).stem, str(config.get("scale", ""))
        name = stem if _SCALED.match(stem) or not scale else re.sub(r"^(yolo(?:e-)?v?\d+)", rf"\1{scale}", stem)
        if _file_of(name) in _files():
            options = {key: config[key] for key in ("nc",) if isinstance(config.get(key), int)}
            yield {"name": name, "options": {}}
            yield {"name": name, "options": options}


def trainer_for(model: nn.Module) -> type[Any]:
    """The trainer of Ultralytics for a rewritten model: ``YOLO(name).train(trainer=trainer_for(model), ...)``.

    Its own trainers build the network from the YAML once more, and so lose the rewrite. The model must have been
    built with the number of classes of the data (``ultralytics:yolo11n?nc=3``).
    """
    package: Any = importlib.import_module("ultralytics")
    tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    ready = keep_blocks(model)
    task = tasks.guess_model_task(model)
    base = package.YOLO(f"{_STANDARD[task]}.yaml").task_map[task]["trainer"]

    def get_model(self: Any, cfg: Any = None, weights: Any = None, verbose: Any = None) -> nn.Module:
        return ready

    return type(f"Rewritten{base.__name__}", (base,), {"get_model": get_model})


def keep_blocks(model: nn.Module) -> nn.Module:
    """Let Ultralytics fold batch norms into the convolutions that are left, and leave the blocks alone.

    Prediction and validation call ``model.fuse()``, which takes whatever stands before a norm for a convolution.
    Done in place on the rewritten model, which is returned.
    """
    model.fuse = _Fuse(model)  # type: ignore[assignment]
    return model


class _Fuse:
    """``fuse`` of one model; an object and not a closure, because Ultralytics pickles and copies models."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        norms = {}
        for module in self.model.modules():
            held = module._modules.get("conv")
            if "bn" in module._modules and held is not None and not isinstance(held, nn.Conv2d):
                norms[module] = module._modules.pop("bn")  # without a norm of its own, a module is not folded
        try:
            type(self.model).fuse(self.model, *args, **kwargs)
        finally:
            for module, norm in norms.items():
                module._modules["bn"] = norm
        fused: nn.Module = self.model
        return fused


def _class_for(name: str, tasks: Any) -> Any:
    """The model class for the task that the name ends in."""
    endings = {
        "seg": tasks.SegmentationModel,
        "cls": tasks.ClassificationModel,
        "pose": tasks.PoseModel,
        "obb": tasks.OBBModel,
    }
    stem = Path(name).stem
    if stem.startswith("rtdetr"):
        return tasks.RTDETRDetectionModel
    return next((kind for end, kind in endings.items() if f"-{end}" in stem), tasks.DetectionModel)


def _file_of(name: str) -> str:
    """Stem of the YAML: ``yolov8`` for ``yolov8n``; the letter is the scale in it."""
    return name if name in _files() else _SCALED.sub(r"\1", name)


@cache
def _files() -> tuple[str, ...]:
    with _quiet():
        package: Any = importlib.import_module("ultralytics")
    folder = Path(package.__file__).parent / "cfg" / "models"
    return tuple(sorted(path.stem for path in folder.rglob("*.yaml")))


@contextmanager
def _quiet() -> Iterator[None]:
    """No banner, and no installing of packages at run time, which the package does by default."""
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


SOURCES.register("ultralytics")(Ultralytics())
