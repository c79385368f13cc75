"""What may be done to a rewritten model afterwards: drop convolutions that take no part any more, exchange the head."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from convrewrite import provenance
from convrewrite.blocks.blend import Blend
from convrewrite.editing import exchange, move_hooks
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.identity import check_module
from convrewrite.provenance import Since
from convrewrite.stands import mark, stand_of


def blends_of(model: nn.Module) -> dict[str, Blend]:
    """Every `Blend` of `model` by its module path."""
    check_module(model)
    return {path: module for path, module in model.named_modules() if isinstance(module, Blend)}


def finalize(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every `Blend` is its block alone; the output is the same, bit for bit.

    Hooks, train and eval flags and frozen parameters stay. `save` and `load` know finalized models.

    Raises:
        ConvrewriteError: a blend's ``anneal`` is below 1, so that its convolution still takes part.
    """
    for path, blend in blends_of(model).items():
        try:
            blend.finalize()
        except ConvrewriteError as error:
            raise ConvrewriteError(error.what, where=path, fix=error.fix) from None
    final = copy.deepcopy(getattr(model, "_orig_mod", model))
    return drop_convolutions(final, blends_of(final))


def drop_convolutions(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Exchange the blends at `paths` for their blocks, in place, whatever their ``anneal``; returns the root."""
    paths = tuple(paths)
    root = model
    for path in paths:
        try:
            blend = model.get_submodule(path)
        except AttributeError:
            raise StoreError("there is no such module to finalize", where=path) from None
        if not isinstance(blend, Blend):
            raise StoreError(f"{type(blend).__name__} is not a blend of convolution and block", where=path)
        block = blend.block
        stand = stand_of(blend)
        if stand is not None:
            mark(block, stand)
        move_hooks(blend, block)
        root = exchange(root, blend, block)
    note = provenance.of(model)
    if note is not None:
        if root is not model:  # the network was nothing but the blend
            provenance.attach(root, plan=note.plan, identity=note.identity, source=note.source, since=note.since)
        provenance.note_since(root, replace(note.since, finalized=(*note.since.finalized, *paths)))
    return root


def put_head(model: nn.Module, path: str, classes: int, *, seed: int = 0) -> None:
    """Exchange the classifier at `path` for a new one of `classes` outputs, in place, initialised from `seed`.

    Attributes of the model that hold the old number of classes (``num_classes``) follow.

    Raises:
        StoreError: there is no linear layer or convolution at `path`.
    """
    try:
        old = model.get_submodule(path)
    except AttributeError:
        raise StoreError("there is no such module to put a new head into", where=path) from None
    device = next((p.device for p in old.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)
        new: nn.Linear | nn.Conv2d
        if isinstance(old, nn.Linear):
            number, new = old.out_features, nn.Linear(old.in_features, classes, bias=old.bias is not None)
        elif isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1) and old.groups == 1:
            number, new = old.out_channels, nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
        else:
            raise StoreError(f"{type(old).__name__} is no classifier that can be exchanged", where=path)
    move_hooks(old, new)
    exchange(model, old, new.to(device=device, dtype=old.weight.dtype).train(old.training))
    if getattr(model, "num_classes", None) == number:
        model.num_classes = classes  # type: ignore[assignment]
    note = provenance.of(model)
    if note is not None:
        provenance.note_since(model, replace(note.since, head=(path, classes)))


def redo(model: nn.Module, since: Since) -> nn.Module:
    """Do to a freshly rewritten `model` what `since` says was done to the saved one; tensors keep fresh values."""
    model = drop_convolutions(model, since.finalized)
    if since.head is not None:
        put_head(model, *since.head)
    return model
