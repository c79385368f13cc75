"""Data sets of torchvision by name, with their own division into images to train and to measure on."""

from __future__ import annotations

import inspect
from typing import Any
from urllib.parse import parse_qsl

from convrewrite.data import DATA, DataError, Images, classes_of
from convrewrite.errors import closest


@DATA.register("torchvision")
def torchvision(spec: str, download: bool) -> Images:  # noqa: FBT001 - the form of all kinds
    """``NAME``, ``NAME:ROOT`` (default ``data``), ``NAME?size=64`` with options of the class's constructor."""
    from torchvision import datasets

    path, _, query = spec.partition("?")
    name, _, root = path.partition(":")
    if name not in datasets.__all__:
        raise DataError(f"torchvision has no data set '{name}'", fix=closest(name, datasets.__all__))
    cls = getattr(datasets, name)
    known = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {key: _number(value) for key, value in parse_qsl(query)}
    for key in options:
        if key not in known:
            raise DataError(f"torchvision's {name} has no option '{key}'", fix=closest(key, known))
    if "root" in known:
        options["root"] = root or "data"
    if "download" in known:
        options["download"] = download
    where = f"torchvision:{name}"
    first, second = _parts(known)
    train = _build(cls, options | first, where, download=download)
    val = None if second is None else _build(cls, options | second, where, download=download)
    return Images(train, val, classes_of(train), where)


def _parts(known: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Options that select the images to train and to measure on."""
    if "train" in known:
        return {"train": True}, {"train": False}
    split = known.get("split")
    if split is not None and split.default in ("train", "trainval"):
        return {"split": split.default}, {"split": "test"}
    return {}, None


def _build(cls: Any, options: dict[str, Any], where: str, *, download: bool) -> Any:
    try:
        return cls(**options)
    except Exception as error:  # a dozen kinds, from a missing file to a broken download
        missing = isinstance(error, FileNotFoundError) or "not found" in str(error).lower()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = "name the folder, as torchvision:NAME:FOLDER, or add --download" if missing and not download else None
        what = f"not found in '{options.get('root', '')}'" if missing else lines[0][:150]
        raise DataError(what, where=where, fix=fix) from None


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text
