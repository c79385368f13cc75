"""The model in training, its outputs end to end or the error of each new block alone, and the original beside it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convrewrite import provenance
from convrewrite.blocks.blend import Blend
from convrewrite.editing import exchange
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.stands import stand_of
from convrewrite.training.groups import kinds_of
from convrewrite.training.losses import logits_of, relative_error


class Student(nn.Module):
    """A model and the sites at which it is compared with the original.

    Args:
        model: the model to train.
        pairs: site -> convolution of the original that stood there; not part of the student's parameters.
        apart: those of the sites whose blocks are trained block by block.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, nn.Module], apart: Collection[str]) -> None:
        super().__init__()
        self.model = model
        self._pairs = dict(pairs)
        self._apart = tuple(apart)

    def forward(self, images: Tensor, blockwise: bool, sites: bool) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: FBT001
        """(logits, outputs of the sites if `sites`); block by block, (mean relative error, {}).

        The flags are positional, as what wraps modules for several processes passes arguments on.
        """
        if blockwise:
            return self._blockwise(images), {}
        modules = {path: self.model.get_submodule(path) for path in self._pairs} if sites else {}
        with watched(modules) as seen:
            logits = logits_of(self.model(images))
        return logits, {path: output for path, (_, output) in seen.items()}

    def _blockwise(self, images: Tensor) -> Tensor:
        """Every new block against its convolution, both on what arrives at the site in this model."""
        modules = {path: self.model.get_submodule(path) for path in self._apart}
        with torch.no_grad(), watched(modules) as seen:
            self.model(images)
        errors = []
        for path, module in modules.items():
            arrived = seen[path][0].detach()
            block = module.block if isinstance(module, Blend) else module
            with torch.no_grad():
                target = self._pairs[path](arrived)
            errors.append(relative_error(block(arrived), target))
        return torch.stack(errors).mean()


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Fills a dict with (input, output) of each module while it is open; of a shared module the last call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str):  # type: ignore[no-untyped-def]
        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = (args[0], output)

        return note

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def teacher_of(model: nn.Module) -> nn.Module:
    """The original's function out of a rewritten, untrained `model`: each blend is its convolution again.

    Blocks that hold their convolution and insertions behind a zero gate compute what the original did, and stay.

    Raises:
        ConvrewriteError: the original is not in there any more.
    """
    note = provenance.of(model)
    fix = "name the original with --teacher MODEL and --teacher-weights FILE"
    if note is None:
        raise ConvrewriteError("the model was not rewritten by convrewrite", where=type(model).__name__)
    other = next((edit for edit in note.plan.edits if edit.start != "exact"), None)
    if other is not None:
        what = f"the original is not in this model: it starts {other.start}"
        raise ConvrewriteError(what, where=other.path, fix=fix)
    blends = blends_of(model)
    moved = next((p for p, b in blends.items() if float(b.anneal) or bool(b.gate.detach().count_nonzero())), None)
    if note.since.steps or note.since.finalized or note.since.head or moved is not None:
        what = "the original is not in this model any more: it was trained"
        raise ConvrewriteError(what, where=moved, fix=fix)
    teacher = copy.deepcopy(getattr(model, "_orig_mod", model))
    for blend in list(blends_of(teacher).values()):
        teacher = exchange(teacher, blend, blend.conv)
    return teacher.eval().requires_grad_(requires_grad=False)


def pairs_of(model: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
    """Sites of `model` at which `teacher` still has the convolution: path -> that convolution.

    A block that also stands for modules after the convolution has no counterpart, and is left out.
    """
    note = provenance.of(model)
    wide = {edit.id for edit in note.plan.edits if edit.absorbs} if note is not None else set()
    convolutions = {path: module for path, module in teacher.named_modules() if isinstance(module, nn.Conv2d)}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        stand = stand_of(module)
        if stand is not None and stand.edit not in wide and path in convolutions:
            found[path] = convolutions[path]
    return found


def apart_of(model: nn.Module, pairs: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The sites of `pairs` whose blocks have new parameters.

    A block that holds its convolution, or was solved from it, computes it (nearly) already: to train it towards the
    convolution with a rate that is made for new blocks only takes it away from there.
    """
    kinds, found = kinds_of(model), []
    for path in pairs:
        below = f"{path}.block." if isinstance(model.get_submodule(path), Blend) else f"{path}."
        if any(kind == "new" and name.startswith(below) for name, kind in kinds.items()):
            found.append(path)
    return tuple(found)
