"""Checkpoints both ways: of the original into the rewritten model, and back where that is exact."""

from __future__ import annotations

import copy
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convrewrite import graphs, provenance
from convrewrite.annotate import annotate
from convrewrite.blocks.base import Block
from convrewrite.blocks.blend import Blend
from convrewrite.capture import capture
from convrewrite.editing import edit_model
from convrewrite.errors import ConvrewriteError, PlanError, SourceError, StoreError
from convrewrite.finalizing import blends_of, drop_convolutions, put_head
from convrewrite.identity import identity
from convrewrite.inserting import NAMES
from convrewrite.pipeline import Rewritten, example_of, rewrite
from convrewrite.planning import check_fits
from convrewrite.plans import Edit, Plan
from convrewrite.provenance import Provenance
from convrewrite.sources import Source, rebuild, recognise, resolve
from convrewrite.store import load, original_of, rewritten_recipe
from convrewrite.tensorfile import put_tensors
from convrewrite.weights import load_state, load_weights, read_state

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Of files of weights that `write_state` writes."""

_SHOWN = 3

Weights = str | Path | Mapping[str, Tensor]


class Reverted(NamedTuple):
    """What `revert` returns.

    Attributes:
        model: the original's architecture with the rewritten model's weights.
        lost: what `force` left out, a line each; empty if the outputs are the same.
    """

    model: nn.Module
    lost: tuple[str, ...]


def migrate(
    weights: Weights,
    plan: Plan | str | Path,
    *,
    model: nn.Module | str | None = None,
    num_classes: int | None = None,
    force: bool = False,
) -> Rewritten:
    """The rewritten model of a plan, with a checkpoint of the original: carried, and absorbed into the blocks.

    It is what `rewrite` makes of the original with these weights: the blocks start as the plan says, and the laws are
    checked.

    Args:
        weights: a file (.pth, .pt, .safetensors; never unpickled beyond tensors) or a state dict of the original.
        plan: a `Plan`, its file, or a saved folder, whose plan is taken and whose tensors are not.
        model: the original, as a module or by name, where the plan or the folder does not say how to build it.
        num_classes: of the original, where its name alone gives another number.
        force: return the model even if a law is broken.

    Raises:
        SourceError: the checkpoint cannot be read or does not fit the original. PlanError: the plan does not fit.
    """
    source, steps = _original(plan, model, num_classes)
    prefixes = tuple(f"{_standing(edit)}." for edit in steps.edits)
    originals = set(source.model.state_dict())
    _put(source.model, weights, source, lambda keys: _REVERSE if _new(keys, prefixes) - originals else None)
    return rewrite(source.model, steps, name=source.name, source=source.recipe, force=force)


def revert(
    model: nn.Module | Weights,
    *,
    plan: Plan | str | Path | None = None,
    base: nn.Module | str | None = None,
    num_classes: int | None = None,
    force: bool = False,
) -> Reverted:
    """The original's architecture with the weights of a rewritten model, where nothing is lost by it.

    Carried tensors stay as they are, bit for bit. A blend gives its convolution while gate and anneal are 0; a block
    that is a convolution exactly (full-width heads without content) gives that one; an inserted block has to be the
    identity. A new head stays.

    Args:
        model: what `rewrite` or `load` returned, a saved folder, or with `plan` a state dict or a file of one.
        plan: of the rewrite; known already but for a state dict. A saved folder may stand for its plan.
        base: the original, as a module or by name, where nobody says how to build it; its weights do not count.
        num_classes: as for `migrate`.
        force: take the convolutions of all blends and leave inserted blocks out, whatever they have learned.

    Raises:
        ConvrewriteError: a site is no convolution any more; the message names sites and the largest weight in the way.
    """
    built = _rewritten(model, plan, base, num_classes)
    note = provenance.of(built)
    name = type(built).__name__
    if note is None or provenance.is_fused(built):
        what = "the model was fused" if provenance.is_fused(built) else "the model was not rewritten by convrewrite"
        raise ConvrewriteError(what, where=name, fix="give what rewrite() or load() returned")
    result = copy.deepcopy(_base_of(note, built, base, num_classes))
    moved = edit_model(result, note.plan, fit=False).moved
    convs, lost = _sites(built, note.plan, force=force)
    if note.since.head is not None:
        put_head(result, *note.since.head)
    _take_over(result, built, moved, convs)
    return Reverted(result.train(built.training), lost)


def write_state(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> None:
    """The state dict of `model` as a file that any code reads: .safetensors, .pth or .pt. All of it, or nothing.

    Tensors that the model shares are written under each of their names.

    Raises:
        StoreError: the file is there already, cannot be written, or has another suffix.
    """
    check_file(path, overwrite=overwrite)
    place = Path(path)
    state = model.state_dict()  # with its notes of versions, which some modules ask for
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise StoreError(f"the extra state '{key}' is no tensor, and objects are not saved", where=str(path))
        state[key] = value.detach().cpu().contiguous().clone()
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix.lower() == ".safetensors":
            from safetensors.torch import save_file

            save_file(dict(state), temporary)
            temporary.chmod(0o644)  # safetensors makes its files private
        else:
            torch.save(state, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
    except (OSError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise StoreError(f"cannot be written: {first}", where=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: str | Path, *, overwrite: bool) -> None:
    """Refuse what `write_state` would refuse, before anything is computed."""
    place = Path(path)
    if place.suffix.lower() not in SUFFIXES:
        raise StoreError("this is no file of weights", where=str(path), fix=f"name one of {', '.join(SUFFIXES)}")
    if place.is_dir():
        raise StoreError("this is a folder", where=str(path), fix="name a file")
    if place.exists() and not overwrite:
        raise StoreError("the file is there already", where=str(path), fix="name another, or --overwrite")


def _original(plan: Plan | str | Path, model: nn.Module | str | None, num_classes: int | None) -> tuple[Source, Plan]:
    """The original, with fresh weights, and the plan."""
    steps, recipe = _plan_of(plan)
    if isinstance(model, nn.Module):
        return resolve(copy.deepcopy(model), input=steps.input_shape), steps
    if model is None and num_classes is None and recipe is not None:
        return Source(steps.model, rebuild(recipe), steps.input_shape, dict(recipe)), steps
    try:
        return resolve(model or steps.model, num_classes=num_classes), steps
    except SourceError as error:
        if model is not None:
            raise
        what = f"the plan does not say how to build its model, '{steps.model}'"
        raise SourceError(what, fix="name it: --model NAME, or as a module in Python") from error


def _plan_of(plan: Plan | str | Path) -> tuple[Plan, Mapping[str, Any] | None]:
    """The plan, and the recipe of its original where it lies in a saved folder."""
    if isinstance(plan, Plan):
        return plan, None
    place = Path(plan)
    recipe = rewritten_recipe(place)["base"] if place.is_dir() else None
    place = place / "plan.json" if place.is_dir() else place
    try:
        return Plan.from_json(place.read_text(encoding="utf-8"), where=str(place)), recipe
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror or error}", where=str(place)) from None
    except UnicodeDecodeError:
        raise PlanError("not a plan: no UTF-8 text", where=str(place), fix="write one with plan --out") from None


def _put(model: nn.Module, weights: Weights, source: Source, other: Callable[[Iterable[str]], str | None]) -> None:
    """Load a state dict or a file of one; `other` gives the advice where its keys are of the rewrite's other side."""
    try:
        if isinstance(weights, Mapping):
            load_state(model, weights, _name(weights), source)
        elif not Path(weights).is_file():
            raise SourceError("there is no such file", where=str(weights))
        else:
            load_weights(model, str(weights), source)
    except SourceError as error:
        fix = other(weights if isinstance(weights, Mapping) else _keys(Path(weights)))
        raise SourceError(error.what, where=error.where, fix=fix or error.fix) from None


def _keys(path: Path) -> list[str]:
    try:
        return list(read_state(path))
    except SourceError:
        return []


_REVERSE = "this is a checkpoint of the rewritten model: --reverse goes back from it"


def _new(keys: Iterable[str], prefixes: tuple[str, ...]) -> set[str]:
    """Keys below the modules that a plan puts in."""
    return {key for key in keys if key.startswith(prefixes)}


def _name(weights: object) -> str:
    return "the state dict" if isinstance(weights, Mapping) else str(weights)


def _rewritten(
    model: nn.Module | Weights, plan: Plan | str | Path | None, base: nn.Module | str | None, num_classes: int | None
) -> nn.Module:
    """The rewritten model with its weights, however it was given."""
    if isinstance(model, nn.Module):
        return getattr(model, "_orig_mod", model)
    if not isinstance(model, Mapping) and Path(model).is_dir():
        built = load(model, base=None if base is None else resolve(base, num_classes=num_classes).model)
        note = provenance.of(built)
        if plan is not None and note is not None and _plan_of(plan)[0].hash != note.plan.hash:
            raise PlanError("the folder was made by another plan", where=str(model), fix="leave the plan out")
        return built
    if plan is None:
        raise PlanError("a state dict alone does not say what was rewritten", where=_name(model), fix="give its plan")
    source, steps = _original(plan, base, num_classes)
    built = _replayed(source, steps)
    state = model if isinstance(model, Mapping) else read_state(Path(model))
    gone = [path for path in blends_of(built) if f"{path}.gate" not in state and f"{path}.weight" not in state]
    built = drop_convolutions(built, gone)  # of a finalized model
    originals = set(source.model.state_dict())
    fits = "this is a checkpoint of the original: leave --reverse out" if originals == set(state) else None
    _put(built, model, Source(steps.model, built, steps.input_shape), lambda keys: fits)
    return built


def _replayed(source: Source, plan: Plan) -> nn.Module:
    """The plan carried out once more, for a state dict to be loaded."""
    check_fits(plan, source.model, annotate(capture(source.model, example_of(source.model, plan.input_shape))))
    built = edit_model(source.model, plan, fit=False).model
    provenance.attach(built, plan=plan, identity=identity(source.model), source=source.recipe)
    return built


def _base_of(note: Provenance, built: nn.Module, base: nn.Module | str | None, num_classes: int | None) -> nn.Module:
    """The architecture before the rewrite."""
    given = base if base is None or isinstance(base, nn.Module) else resolve(base, num_classes=num_classes).model
    recipe = note.source or recognise(built, note.identity)
    if given is None and recipe is None:
        fix = "give it: revert(model, base=original), or --model NAME"
        raise ConvrewriteError("nobody knows how to build the original", where=type(built).__name__, fix=fix)
    saved = {"source": recipe, "identity": note.identity, "versions": {}}
    return original_of(saved, given, type(built).__name__)


def _sites(model: nn.Module, plan: Plan, *, force: bool) -> tuple[dict[str, nn.Conv2d], tuple[str, ...]]:
    """Convolutions that blocks are, by the path of their edit; and with `force` what is lost.

    Raises:
        ConvrewriteError: there are sites that are neither a convolution nor, where one was inserted, the identity.
    """
    convs: dict[str, nn.Conv2d] = {}
    lost: list[str] = []
    stuck: dict[str, str] = {}
    forcible = False
    for edit in plan.edits:
        module = model.get_submodule(_standing(edit))
        conv, reason, can_be_forced = _way_back(edit, module)
        if conv is not None:
            convs[edit.path] = conv
        elif reason and can_be_forced and force:
            lost.append(f"{edit.id}: {reason}")
        elif reason:
            stuck[edit.id] = reason
            forcible = forcible or can_be_forced
    if stuck:
        shown = "; ".join(f"{site}: {why}" for site, why in list(stuck.items())[:_SHOWN])
        more = f"; and {len(stuck) - _SHOWN} more" if len(stuck) > _SHOWN else ""
        what = f"{len(stuck)} of {len(plan.edits)} edits cannot be undone exactly ({shown}{more})"
        forced = any(
            _way_back(edit, model.get_submodule(_standing(edit)))[2] for edit in plan.edits if edit.id in stuck
        )
        raise ConvrewriteError(what, where=type(model).__name__, fix=_FORCE if forced and not force else None)
    return convs, tuple(lost)


_FORCE = "--force takes the convolutions of blends and leaves inserted blocks out, which changes the outputs"


def _standing(edit: Edit) -> str:
    """Path in the rewritten model of what the edit put there."""
    if edit.action == "insert":
        return f"{edit.path}.{NAMES[edit.at]}"
    owner, colon, weight = edit.path.rpartition(":")
    if not colon:
        return edit.path
    name = "convrewrite_" + weight.replace(".", "_")
    return f"{owner}.{name}" if owner else name


def _way_back(edit: Edit, module: nn.Module) -> tuple[nn.Conv2d | None, str, bool]:
    """(the convolution that a block is, why there is no way back or "", whether `force` goes it all the same)."""
    if edit.whole_block or edit.absorbs:
        return None, f"{edit.block} stands for more than the convolution", False
    if isinstance(module, Blend):
        share = max(float(module.gate.detach().abs().max()), abs(float(module.anneal)))
        moved = f"gate up to {float(module.gate.detach().abs().max()):.3g}, anneal {float(module.anneal):.3g}"
        return None, f"{edit.block} takes part ({moved})" if share else "", True
    assert isinstance(module, Block)
    plain, content = module.plain(), module.content()
    if edit.action == "insert":
        return None, "" if plain is not None else f"{edit.block} {_opened(content)}", True
    if isinstance(plain, nn.Conv2d):
        return plain, "", False
    if content is None:
        return None, f"{edit.block} took the convolution's place and is none", False
    return None, f"{edit.block} is no convolution any more, {_opened(content)}", False


def _opened(content: float | None) -> str:
    if not content:
        return "has weights of a position of its own" if content == 0 else "is not the identity"
    return f"has learned (largest weight in the way {content:.3g})"


def _take_over(
    result: nn.Module, built: nn.Module, moved: Mapping[str, tuple[str, ...]], convs: Mapping[str, nn.Conv2d]
) -> None:
    """Fill `result` with what is carried in `built`, and with the convolutions by the path of their edit."""
    names: dict[int, list[str]] = {}
    for key, tensor in result.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(key)
    values: dict[str, Tensor] = {}
    for path, conv in convs.items():
        old = graphs.convolution(result, path) if ":" in path else result.get_submodule(path)
        for name in ("weight", "bias"):
            own, new = getattr(old, name), getattr(conv, name)
            values.update(dict.fromkeys(names[id(own)] if own is not None else (), new))
    state = built.state_dict()
    for key in result.state_dict():
        if key not in values:
            values[key] = state[key if not moved.get(key) else moved[key][0]]
    device = next((t.device for t in result.state_dict().values()), torch.device("cpu"))
    put_tensors(result, {key: value.detach().to(device) for key, value in values.items()})
