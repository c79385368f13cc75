"""Where models come from: a name, a factory, a saved folder or a module becomes a model with an example input."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrewrite import provenance
from convrewrite.errors import ConvrewriteError, SourceError, closest
from convrewrite.identity import identity
from convrewrite.sites import Shape
from convrewrite.sources.base import (
    SOURCES,
    OwnWeights,
    Recipe,
    Request,
    SourceKind,
    build,
    default_example,
    one_line,
    split_options,
)
from convrewrite.weights import ONNX, is_file, load_weights, refuse_onnx

__all__ = ["SOURCES", "Source", "SourceKind", "known", "parse_input", "rebuild", "recognise", "resolve"]


@dataclass(frozen=True)
class Source:
    """A model and all that is known about where it came from.

    Attributes:
        name: canonical name ("torchvision:resnet50"); the class name of a module given as an object.
        model: in the mode its constructor leaves it in (train), on the CPU or the meta device.
        example: (N, C, H, W) of the input it was made for.
        recipe: plain data to build the architecture again; None for a module given as an object.
        weights: what the weights were asked for as; None if they are random or the user's own.
        notes: what was chosen among the contents of a file of weights, a line each.
    """

    name: str
    model: nn.Module
    example: Shape
    recipe: Recipe | None = None
    weights: str | None = None
    notes: tuple[str, ...] = ()


def resolve(
    spec: str | nn.Module,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    input: str | tuple[int, ...] | None = None,
    seed: int = 0,
    meta: bool = False,
) -> Source:
    """Get a model by what a user calls it.

    Args:
        spec: ``resnet50`` (torchvision's, else timm's), ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME``,
            ``smp:NAME``, ``ultralytics:NAME``, ``hub:REPOSITORY:ENTRY``, ``package.module:factory``,
            ``path/file.py:factory``, ``model.pt2``, a saved folder, or a module, which is used as it is (with
            `weights`, a copy of it). ``NAME?key=value&key=value`` passes options to the builder.
        weights: ``DEFAULT`` or the name of weights of the zoo (downloaded), or a local ``.pth``, ``.pt``
            or ``.safetensors`` file.
        num_classes: passed to the model's builder.
        input: (N, C, H, W), or ``1x3x224x224``; by default the size the model was made for.
        seed: fixes the random weights; the global random state is left alone.
        meta: build on the meta device: nothing is downloaded and no weights are allocated; a local file
            of weights is still checked against the model. A module given as an object stays as it is.

    Raises:
        SourceError: nothing has that name, the factory failed, or the weights do not fit.
    """
    shape = None if input is None else parse_input(input)
    if isinstance(spec, nn.Module):
        return _from_module(spec, weights, num_classes, shape)
    plain, options = split_options(spec)
    kind_name, kind, name = _find(plain)
    if num_classes is not None and "num_classes" in options:
        raise SourceError("the number of classes is given twice", where=spec, fix="drop --num-classes")
    if weights is None and not meta and isinstance(kind, OwnWeights):
        weights = kind.own_weights(name)
    of_zoo = weights if weights is not None and not is_file(weights) else None
    recipe = {"kind": kind_name, **kind.recipe(name, Request(num_classes, of_zoo, options))}
    if kind_name == "rewritten":
        from convrewrite.store import load

        model = load(spec).to("meta") if meta else load(spec)
        canonical = spec
    else:
        model = rebuild(recipe, seed=seed, meta=meta)
        canonical = spec if kind_name == "factory" else f"{kind_name}:{recipe['name']}{spec[len(plain) :]}"
    source = Source(canonical, model, shape or kind.example(recipe, model, of_zoo), recipe, weights)
    if weights is not None and not (meta and of_zoo):
        source = replace(source, notes=load_weights(model, weights, source))
    return source


def rebuild(recipe: Mapping[str, Any], *, seed: int = 0, meta: bool = False) -> nn.Module:
    """The architecture that `recipe` describes, with fresh weights. Nothing is downloaded.

    Raises:
        SourceError: this version of the zoo, or this machine, has no such model.
    """
    if not isinstance(recipe, Mapping) or recipe.get("kind") not in SOURCES or not recipe.get("name"):
        raise SourceError(f"this is no recipe for a model: {str(recipe)[:80]}")
    kind = SOURCES.get(recipe["kind"])
    try:
        return build(lambda: kind.build(dict(recipe)), seed=seed, meta=meta)
    except ConvrewriteError:
        raise
    except Exception as error:  # whatever a zoo's constructor raises
        raise SourceError(f"the model cannot be built: {one_line(error)}", where=_title(recipe)) from error


def recognise(model: nn.Module, wanted: str) -> Recipe | None:
    """A recipe for the architecture whose `identity` is `wanted`, guessed from the class of `model`, or None.

    Args:
        model: the model, or what a rewrite made of it (a rewrite keeps the class).
        wanted: identity of the architecture before it was rewritten.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)  # converted before the rewrite
    for name, kind in sorted(SOURCES.items(), key=lambda item: item[1].order):
        for candidate in kind.recognise(model):
            recipe = {"kind": name, **candidate}
            made = _identities.__wrapped__ if name == "factory" else _identities  # a user's class may change meanwhile
            if wanted in made(json.dumps(recipe, sort_keys=True), dtype):
                return recipe
    return None


@lru_cache(maxsize=256)
def _identities(recipe: str, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Of what a recipe builds, as built and in `dtype`; none if it builds nothing. Training saves often: built once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = rebuild(json.loads(recipe), meta=True)
    except SourceError:
        return ()  # options that this builder does not take
    plain = identity(built)
    return (plain, identity(built.to(dtype))) if dtype else (plain,)


def parse_input(value: str | tuple[int, ...]) -> Shape:
    """(N, C, H, W) from ``1x3x224x224`` or a tuple of four positive numbers."""
    if isinstance(value, str):
        numbers = re.fullmatch(r"\s*(\d+)[xX,](\d+)[xX,](\d+)[xX,](\d+)\s*", value, re.ASCII)
        shape = tuple(int(n) for n in numbers.groups()) if numbers else ()
    else:
        shape = tuple(value)
    if len(shape) != 4 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise SourceError(
            f"'{value}' is no input shape", fix="give batch x channels x height x width, as in 1x3x224x224"
        )
    return shape


def _from_module(model: nn.Module, weights: str | None, num_classes: int | None, shape: Shape | None) -> Source:
    name = type(model).__name__
    if num_classes is not None:
        raise SourceError("a module has its number of classes already", where=name, fix="leave num_classes out")
    recipe = provenance.recipe_of(model)
    if weights is not None:
        if not is_file(weights):
            raise SourceError(f"a module has no weights called '{weights}'", where=name, fix="give a file")
        model = copy.deepcopy(model)  # nothing is done in place on a user's model
    source = Source(name, model, shape or default_example(model), recipe, weights)
    if weights is not None:
        source = replace(source, notes=load_weights(model, weights, source))
    return source


def known(spec: str) -> bool:
    """True if some kind of source knows the name; whether it can be built is not tried."""
    try:
        return bool(_find(split_options(spec)[0]))
    except SourceError:
        return False


def _find(spec: str) -> tuple[str, SourceKind, str]:
    """The kind that knows `spec`, and the name it knows it by."""
    kinds = sorted(SOURCES.items(), key=lambda item: item[1].order)
    found = [(kind_name, kind, name) for kind_name, kind in kinds if (name := kind.find(spec)) is not None]
    zoo = next((entry for entry in found if entry[0] not in ("rewritten", "factory")), None)
    if found and found[0][0] == "rewritten" and zoo is not None:
        fix = f"write './{spec}' or '{zoo[0]}:{zoo[2]}'"
        raise SourceError(f"'{spec}' is a saved folder here and a model of {zoo[0]}", fix=fix)
    if found:
        return found[0]
    raise _unknown(spec, [name for _, kind in kinds for name in kind.names()])


def _unknown(spec: str, known: list[str]) -> SourceError:
    path = Path(spec)
    if spec and path.is_dir():
        return SourceError("this folder holds no saved model (no recipe.json)", where=spec)
    if path.suffix.lower() == ONNX:
        return refuse_onnx(spec)
    if path.suffix == ".py":
        return SourceError("a file needs the name of a factory", where=spec, fix=f"write '{spec}:function'")
    if os.sep in spec and not path.suffix and not path.exists():
        fix = "name a saved folder, 'path/file.py:function', or a repository of the hub as 'hf:owner/name'"
        return SourceError("there is no such file or folder", where=spec, fix=fix)
    if is_file(spec):
        return SourceError(
            "this is a file of weights, not a model", where=spec, fix="name the model, and give it as --weights"
        )
    hint = closest(spec, known) or "give a name of torchvision or timm, 'package.module:factory', or a saved folder"
    return SourceError(f"unknown model '{spec}'", fix=hint)


def _title(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['kind']}:{recipe['name']}"
