"""Carry a plan out on a copy of the model: the only code that edits a model.

The copy is the user's own object deep-copied, with modules exchanged in place: class, methods, attributes,
hooks and state-dict keys of everything untouched stay.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite import graphs
from convrewrite.blocks.base import BLOCKS, Block, conv_spec
from convrewrite.blocks.blend import Blend
from convrewrite.errors import ConvrewriteError, EditError
from convrewrite.fits.base import FITS
from convrewrite.fits.target import Target, prior
from convrewrite.inserting import insert
from convrewrite.plans import FITTED, Edit, Plan
from convrewrite.sites import ConvSpec, Place
from convrewrite.stands import Stand, mark, stand_of


@dataclass(frozen=True)
class Edited:
    """What came of a plan.

    Attributes:
        model: the rewritten copy.
        moved: key of the original -> its keys in the copy; () if it is not there any more.
        touched: module path in the copy -> id of the edit that owns what is below it.
        absorbing: ids of the edits whose blocks took the convolution's weights into their own.
        solved: id of a fitted edit -> the NMSE that its fit without images expects, see `fits.target.Target`.
    """

    model: nn.Module
    moved: dict[str, tuple[str, ...]]
    touched: dict[str, str]
    absorbing: frozenset[str] = frozenset()
    solved: dict[str, float] = field(default_factory=dict)


def apply_plan(model: nn.Module, plan: Plan, *, fit: bool = True) -> nn.Module:
    """A rewritten copy of `model`; `model` itself is untouched.

    Args:
        fit: solve the blocks of fitted edits; False where their tensors are loaded afterwards.

    Raises:
        EditError: an edit does not fit; nothing was changed.
    """
    return edit_model(model, plan, fit=fit).model


def edit_model(model: nn.Module, plan: Plan, *, fit: bool = True) -> Edited:
    """`apply_plan`, with the way of every tensor."""
    memo: dict[int, object] = {id(t): t.detach().clone() for t in _computed(model)}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise EditError(f"the model cannot be deep-copied: {error}", where=type(model).__name__) from error
    originals = {key: memo.get(id(t), t) for key, t in _tensors(model)}
    functional = {}
    solved: dict[str, float] | None = {} if fit else None
    # An insertion before or after a block that is replaced goes onto what takes its place.
    for edit in sorted(plan.edits, key=lambda e: not e.whole_block):
        if ":" in edit.path:
            functional.update(dict.fromkeys(graphs.parameter_keys(twin, edit.path), edit.id))
        twin = _apply_whole(twin, edit, plan) if edit.whole_block else _apply(twin, edit, plan.seed, solved)
    absorbing = frozenset(e.id for e in plan.edits if e.how in ("holds the conv", FITTED))
    return Edited(twin, _moves(originals, twin), _touched(twin, plan) | functional, absorbing, solved or {})


def _apply(model: nn.Module, edit: Edit, seed: int, solved: dict[str, float] | None) -> nn.Module:
    try:
        if edit.action == "insert":
            target = model.get_submodule(edit.path)
            block = _build(edit, None, seed, target)
            insert(target, block, at=edit.at, rule=edit.rule, path=edit.path)
            return model
        if ":" in edit.path:
            conv = graphs.convolution(model, edit.path)
            emitted = graphs.with_module(model, edit.path, _replacement(conv, edit, seed, solved))
            return exchange(model, model.get_submodule(edit.path.rpartition(":")[0]), emitted)
        old = model.get_submodule(edit.path)
        if not isinstance(old, nn.Conv2d):
            raise EditError(f"{type(old).__name__} is not a convolution", where=edit.path)
        new = _replacement(old, edit, seed, solved)
        move_hooks(old, new)
        model = exchange(model, old, new)
        for path in edit.absorbs:
            gone = model.get_submodule(path)
            model = exchange(model, gone, nn.Identity().train(gone.training))
        return model
    except ConvrewriteError:
        raise
    except Exception as error:
        raise EditError(f"{edit.block}: {type(error).__name__}: {error}", where=edit.path) from error


def _apply_whole(model: nn.Module, edit: Edit, plan: Plan) -> nn.Module:
    """Exchange the residual block around a site; the new module remembers the convolutions that were in it."""
    known = {s.id: s for s in (*(e.site for e in plan.edits), *(r.site for r in plan.refused))}
    others = (known[i] for i in edit.calls if i in known and i != edit.site.id)
    try:
        old = model.get_submodule(edit.path)
        new = _build(edit, edit.site.conv, plan.seed, old)
        site = edit.site
        stand = Stand(edit.id, edit.rule, edit.block, site.conv, site.module_class, sites=(site, *others))
        mark(new, stand)
        move_hooks(old, new)
        return exchange(model, old, new)
    except Exception as error:
        raise EditError(f"{edit.block}: {type(error).__name__}: {error}", where=edit.path) from error


def _replacement(conv: nn.Conv2d, edit: Edit, seed: int, solved: dict[str, float] | None) -> nn.Module:
    """What takes the convolution's place, marked with what stood there; a fit's NMSE is noted in `solved`."""
    spec = conv_spec(conv)
    if spec != edit.site.conv:
        raise EditError(f"the convolution is {spec}, the plan was made for {edit.site.conv}", where=edit.path)
    block = _build(edit, spec, seed, conv)
    if edit.how == "holds the conv":
        block.load_conv(conv)
    if edit.how == FITTED and solved is not None and not conv.weight.is_meta:
        solved[edit.id] = _fit(block, conv, edit, seed)
    new: nn.Module = Blend(conv, block) if edit.how == "blend" else block
    new.training = conv.training
    path = edit.path if ":" in edit.path else ""
    mark(new, Stand(edit.id, edit.rule, edit.block, spec, edit.site.module_class, path))
    return new


def _fit(block: Block, conv: nn.Conv2d, edit: Edit, seed: int) -> float:
    """Solve the block from the convolution's weights, without images; the NMSE that this expects."""
    window = FITS.get(edit.block).window(edit.site.conv, block.options)
    return solve_block(block, edit, prior(conv.weight, conv.bias, edit.site.conv, window), seed)


def solve_block(block: Block, edit: Edit, target: Target, seed: int) -> float:
    """Fit the block of `edit` in place, with the options that the target asks for; the NMSE that this expects.

    Where the plan leaves an option to the fit (`nmse` of full-width heads), the block gets other parameters.
    """
    fit, spec = FITS.get(edit.block), edit.site.conv
    planned = type(block).Options(**edit.options)
    if block.options != planned:  # an earlier fit, on another target, settled on these
        _become(block, _build(edit, spec, seed, block))
    settled = fit.settle(block, spec, target)
    if settled != planned:
        _become(block, _build(replace(edit, options=settled.model_dump(mode="json")), spec, seed, block))
    return fit.solve(block, spec, target)


def _become(block: Block, other: Block) -> None:
    """Give `block` all that `other`, of the same class, was built with; hooks and marks stay."""
    for name, value in vars(other).items():
        if not name.startswith("_") or name in ("_parameters", "_buffers", "_modules"):
            setattr(block, name, value)


def settled_options(model: nn.Module, plan: Plan) -> dict[str, Mapping[str, Any]]:
    """Id of each fitted edit whose block has other options than planned -> those."""
    planned = {e.id: e.options for e in plan.edits if e.how == FITTED}
    found: dict[str, Mapping[str, Any]] = {}
    for module in model.modules():
        stand = stand_of(module)
        if stand is not None and stand.edit in planned and isinstance(module, Block):
            options = module.options.model_dump(mode="json")
            if options != dict(planned[stand.edit]):
                found[stand.edit] = options
    return found


def _build(edit: Edit, conv: ConvSpec | None, seed: int, beside: nn.Module) -> Block:
    """The block, initialised from the plan's seed and the edit's id alone, on the device and dtype of its neighbour."""
    cls = BLOCKS.get(edit.block)
    options = cls.Options(**edit.options)
    place = Place(tuple(edit.in_shape), tuple(edit.out_shape), conv)
    like = next((t for t in beside.parameters() if t.is_floating_point()), None)
    number = int.from_bytes(hashlib.sha256(f"{seed}:{edit.id}".encode()).digest()[:8], "big") >> 1
    if like is not None and like.is_meta:
        with torch.device("meta"):
            block = cls(place, options)
    else:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(number)
            block = cls(place, options)
        if like is not None:
            block = block.to(device=like.device, dtype=like.dtype)
    return block.train(beside.training)


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` at every place where `old` is registered; returns the root, which may be `new` itself."""
    if model is old:
        return new
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that hooks left on modules (weight norm's weight): torch does not deep-copy them."""
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Forward and backward hooks watch the site, so they go with it; those that compute its weight stay."""
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    ):
        hooks = getattr(old, name, None) or {}
        moving = [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]
        for key in moving:
            getattr(new, name)[key] = hooks.pop(key)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(state-dict key, tensor object) of every persistent entry, aliases included."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        stem = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield stem + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield stem + name, buffer


def _moves(originals: dict[str, object], twin: nn.Module) -> dict[str, tuple[str, ...]]:
    """By identity of the copied tensor: old key -> new keys (the same key first where it is kept)."""
    keys: dict[int, list[str]] = {}
    for key, tensor in _tensors(twin):
        keys.setdefault(id(tensor), []).append(key)
    moved = {}
    for key, copied in originals.items():
        found = keys.get(id(copied), [])
        moved[key] = (key,) if key in found else tuple(found[:1])
    return moved


def _touched(twin: nn.Module, plan: Plan) -> dict[str, str]:
    """Module path prefix in the rewritten model -> id of the edit that owns what is below it."""
    from convrewrite.inserting import NAMES

    owners = {}
    for edit in plan.edits:
        owner, colon, weight = edit.path.rpartition(":")
        if edit.action == "insert":
            owners[f"{edit.path}.{NAMES[edit.at]}"] = edit.id
        elif colon:
            name = "convrewrite_" + weight.replace(".", "_")
            owners[f"{owner}.{name}" if owner else name] = edit.id
        else:
            owners.update(dict.fromkeys((edit.path, *edit.absorbs), edit.id))
    stands = {id(m): s.edit for m in twin.modules() if (s := stand_of(m)) is not None}
    for name, module in twin.named_modules(remove_duplicate=False):
        if id(module) in stands:  # also where it is registered under another name
            owners.setdefault(name, stands[id(module)])
    return owners
