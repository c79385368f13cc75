"""Rewritten models on disk: a folder with the tensors and the recipe to build the rest again. Nothing is unpickled."""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from typing_extensions import TypedDict  # pydantic takes that of typing only from Python 3.12 on

from convrewrite import provenance
from convrewrite.atomic import new_folder, sha256
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.finalizing import redo
from convrewrite.identity import check_module, identity
from convrewrite.plans import Plan
from convrewrite.provenance import Since, since_from
from convrewrite.reports import Report
from convrewrite.sources import Source, rebuild, recognise
from convrewrite.tensorfile import put_tensors, read_tensors, shared_tensors, write_tensors

FORMAT = 1
_TENSORS, _RECIPE, _PLAN = "model.safetensors", "recipe.json", "plan.json"
_REPORTS = {"report.txt": "text", "report.md": "markdown", "report.json": "json", "report.html": "html"}
_PACKAGES = ("convrewrite", "torch", "torchvision", "timm", "safetensors")


class _Since(TypedDict):
    finalized: list[str]
    head: list[Any] | None
    steps: int


class _Recipe(TypedDict):
    """What recipe.json holds.

    `source`, `identity` and the plan build the architecture; the flags put every module and parameter back
    in its state; the hashes tie the files to each other. `since` is there if the model was trained or
    finalized after its rewrite.
    """

    format: int
    model: str
    source: dict[str, Any] | None
    identity: str
    plan_hash: str
    tensors_sha256: str
    versions: dict[str, str]
    files: list[str]
    training: bool
    training_except: list[str]
    frozen: list[str]
    derived: dict[str, str]
    since: NotRequired[_Since]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: Source | Mapping[str, Any] | None = None,
    report: Report | None = None,
    overwrite: bool = False,
    extras: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write a rewritten model to `folder`: all of it, or, on any error and on ctrl-C, nothing.

    Args:
        source: where the model came from before the rewrite, if it does not know; if nobody does, it is
            recognised where it can be, and otherwise `load` has to be given the original as `base`.
        report: written too, as text, Markdown, JSON and HTML.
        overwrite: replace a model that was saved there before; the exchange is atomic.
        extras: other forms of the model, file name -> function that writes that path.

    Raises:
        StoreError: the model was not rewritten, the folder is in use, or a tensor cannot be written.
    """
    check_module(model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    note = provenance.of(model)
    if provenance.is_fused(model):
        fix = "save the model before fuse(), and fuse what load() returns; or export it"
        raise StoreError("a fused model is not saved", where=type(model).__name__, fix=fix)
    if note is None:
        name = type(model).__name__
        raise StoreError("the model was not rewritten by convrewrite", where=name, fix="save what rewrite() returned")
    _check_standing(model, note.plan)
    place = Path(folder)
    check_target(place, overwrite=overwrite)
    recipe = _completed(note.source or _recipe_of(source), model, note.identity)
    try:
        with new_folder(place) as filling:
            write_tensors(model, filling / _TENSORS)
            (filling / _PLAN).write_text(note.plan.to_json() + "\n", encoding="utf-8")
            _write_reports(report, filling)
            for name, write in (extras or {}).items():
                write(filling / name)
            document = {
                "format": FORMAT,
                "model": note.plan.model,
                "source": recipe,
                "identity": note.identity,
                "plan_hash": note.plan.hash,
                "tensors_sha256": sha256(filling / _TENSORS),
                "versions": _versions(),
                "files": sorted([_RECIPE, *(path.name for path in filling.iterdir())]),
                **_flags(model),
                **({"since": note.since.to_dict()} if note.since != Since() else {}),
            }
            (filling / _RECIPE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(folder)) from error


def load(
    folder: str | Path,
    *,
    base: nn.Module | Callable[[], nn.Module] | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Build a saved model again: the original from its recipe, the plan replayed on it, the tensors put in.

    Outputs are bitwise those of the saved model. A recipe that names a factory imports and calls it, so
    load a stranger's folder with `base`.

    Args:
        base: the original model, or a function that builds it (any weights); instead of the recipe.
        device: where the model is moved at the end.

    Raises:
        StoreError: the folder is not a saved model, is damaged, or its original cannot be built.
    """
    place = Path(folder)
    recipe, plan = _read(place)
    if sha256(place / _TENSORS) != recipe["tensors_sha256"]:
        raise StoreError("the file is damaged (its SHA-256 is not the recipe's)", where=str(place / _TENSORS))
    original = original_of(recipe, base, str(place))
    since = _since(recipe, str(place))
    model = _edited(original, plan, since)
    tensors, aliases = read_tensors(place / _TENSORS)
    if shared_tensors(model) != aliases:
        raise StoreError("the rebuilt model shares other tensors than the saved one", where=str(place))
    try:
        put_tensors(model, tensors)
    except StoreError as error:
        raise StoreError(error.what, where=str(place), fix=_other_versions(recipe)) from None
    _set_flags(model, recipe)
    provenance.attach(model, plan=plan, identity=recipe["identity"], source=recipe["source"], since=since)
    return model if device is None else model.to(device)


def rewritten_recipe(folder: str | Path) -> dict[str, Any]:
    """The recipe for the architecture saved in `folder`, complete in itself: it holds the plan."""
    recipe, plan = _read(Path(folder))
    since = {"since": recipe["since"]} if "since" in recipe else {}
    return {
        **since,
        "kind": "rewritten",
        "name": recipe["model"],
        "base": recipe["source"],
        "identity": recipe["identity"],
        "plan": plan.to_dict(),
    }


def replay(recipe: Mapping[str, Any]) -> nn.Module:
    """Build what a `rewritten_recipe` describes, with fresh weights."""
    plan = Plan.from_json(json.dumps(recipe["plan"]), where="the recipe's plan")
    saved = {"source": recipe["base"], "identity": recipe["identity"], "versions": {}}
    since = _since(recipe, str(recipe["name"]))
    model = _edited(original_of(saved, None, str(recipe["name"])), plan, since)
    provenance.attach(model, plan=plan, identity=recipe["identity"], source=recipe["base"], since=since)
    return model


def _edited(model: nn.Module, plan: Plan, since: Since) -> nn.Module:
    from convrewrite.editing import apply_plan

    edited: nn.Module = apply_plan(model, plan, fit=False)  # the tensors are put in afterwards
    return redo(edited, since)


def _since(recipe: Mapping[str, Any], where: str) -> Since:
    try:
        return since_from(recipe.get("since"))
    except (KeyError, TypeError, ValueError, IndexError):
        raise StoreError("the recipe is damaged ('since')", where=where, fix="save the model again") from None


def original_of(recipe: Mapping[str, Any], base: nn.Module | Callable[[], nn.Module] | None, where: str) -> nn.Module:
    """The model before the rewrite, checked to be the one that was rewritten."""
    if isinstance(base, nn.Module):
        original = base
    elif base is not None:
        original = base()
        if not isinstance(original, nn.Module):
            raise StoreError(f"base returned a {type(original).__name__}, not an nn.Module", where=where)
    elif recipe["source"] is None:
        fix = "give the original model: convrewrite.load(folder, base=model)"
        raise StoreError("the folder does not say how to build the original model", where=where, fix=fix)
    else:
        try:
            original = rebuild(recipe["source"])
        except ConvrewriteError as error:
            raise StoreError(f"the original cannot be built: {error}", where=where) from error
    if identity(original) == recipe["identity"]:
        return original
    for dtype in (torch.float16, torch.bfloat16, torch.float64):  # it may have been converted before the rewrite
        if base is None and identity(converted := copy.deepcopy(original).to(dtype)) == recipe["identity"]:
            return converted
    fix = _other_versions(recipe) or "give the original model as base"
    raise StoreError("the model before the rewrite was another one than is built now", where=where, fix=fix)


def _read(place: Path) -> tuple[dict[str, Any], Plan]:
    """Recipe and plan of a saved folder, checked against each other."""
    if not (place / _RECIPE).is_file():
        fix = "save one with 'convrewrite apply MODEL --rules R --out DIR'"
        raise StoreError(f"this is no saved model (no {_RECIPE})", where=str(place), fix=fix)
    for name in (_PLAN, _TENSORS):
        if not (place / name).is_file():
            raise StoreError(f"{name} is missing", where=str(place), fix="save the model again")
    recipe = _read_recipe(place / _RECIPE)
    try:
        plan = Plan.from_json((place / _PLAN).read_text(encoding="utf-8"), where=str(place / _PLAN))
    except (ConvrewriteError, ValueError) as error:
        raise StoreError(str(error) if isinstance(error, ConvrewriteError) else "not text", where=str(place)) from None
    if plan.hash != recipe["plan_hash"]:
        raise StoreError("the plan is not the one the model was saved with", where=str(place / _PLAN))
    return recipe, plan


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreError("the file is damaged (not JSON)", where=str(path), fix="save the model again") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise StoreError(f"format {version!r}, this version reads {FORMAT}", where=str(path))
    try:
        return dict(TypeAdapter(_Recipe).validate_python(found, strict=True))
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StoreError(f"the file is damaged ('{key}')", where=str(path), fix="save the model again") from None


def _check_standing(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose blocks were exchanged after the rewrite: replaying its plan would not give it again."""
    from convrewrite.stands import stand_of

    for edit in plan.edits:
        if edit.action == "replace" and ":" not in edit.path:
            stands = stand_of(model.get_submodule(edit.path))
            if stands is None or stands.edit != edit.id:
                fix = "finalize with convrewrite.finalize(model), or save before"
                raise StoreError("this is no longer what the plan put here", where=edit.path, fix=fix)


def check_target(folder: str | Path, *, overwrite: bool) -> None:
    """Refuse all but an absent or empty folder, or with `overwrite` one that holds a saved model and nothing else."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise StoreError("this is a file", where=str(place), fix="name a folder")
    names = {path.name for path in place.iterdir()} if place.exists() else set()
    nearest = next((above for above in Path(os.path.abspath(place)).parents if above.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreError(f"no folder can be made in {nearest}", where=str(place), fix="name another")
    if not names:
        return
    foreign = sorted(names - {_TENSORS, _RECIPE, _PLAN, *_REPORTS} - _written(place))
    if foreign or _RECIPE not in names:
        held = f"holds '{foreign[0]}'" if foreign else "is not empty"
        raise StoreError(f"the folder {held}, which convrewrite did not write", where=str(place), fix="name another")
    if not overwrite:
        raise StoreError("a model is saved there already", where=str(place), fix="name another folder, or --overwrite")


def _written(place: Path) -> set[str]:
    """Names that the recipe in `place` lists; none if there is no readable one."""
    try:
        return set(_read_recipe(place / _RECIPE)["files"])
    except (StoreError, OSError):
        return set()


def _recipe_of(source: Source | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return source.recipe if isinstance(source, Source) else source


def _completed(recipe: Mapping[str, Any] | None, model: nn.Module, wanted: str) -> dict[str, Any] | None:
    """`recipe`, or the recognised one; also of the original underneath several rewrites."""
    if recipe is None:
        return recognise(model, wanted)
    if recipe.get("kind") == "rewritten":
        return {**recipe, "base": _completed(recipe["base"], model, recipe["identity"])}
    return dict(recipe)


def _flags(model: nn.Module) -> dict[str, Any]:
    """Train or eval of every module and the frozen parameters, written as exceptions to keep it short.

    Buffers outside the state dict are derived again by the constructors; a later ``half()`` is in their dtype.
    """
    modules = model.named_modules()
    return {
        "training": model.training,
        "training_except": [path for path, module in modules if module.training != model.training],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "derived": {name: str(b.dtype).removeprefix("torch.") for name, b in _derived_buffers(model).items()},
    }


def _set_flags(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    others, frozen = set(recipe["training_except"]), set(recipe["frozen"])
    for path, module in model.named_modules():  # not train(): models override it
        module.training = recipe["training"] != (path in others)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)
    for name, buffer in _derived_buffers(model).items():
        dtype = getattr(torch, recipe["derived"].get(name, ""), None)
        if isinstance(dtype, torch.dtype):
            buffer.data = buffer.data.to(dtype)


def _derived_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name not in kept and b.is_floating_point()}


def _write_reports(report: Report | None, folder: Path) -> None:
    if report is None:
        return
    from convrewrite.report import render

    for name, format in _REPORTS.items():
        (folder / name).write_text(render(report, format), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # timm is optional
            continue
    return found


def _other_versions(recipe: Mapping[str, Any]) -> str | None:
    """What may explain a difference: packages that were of another version at the time of saving."""
    now = _versions()
    then = {name: version for name, version in recipe["versions"].items() if now.get(name) != version}
    if not then:
        return None
    return "it was saved with " + ", ".join(f"{name} {version}" for name, version in sorted(then.items()))
