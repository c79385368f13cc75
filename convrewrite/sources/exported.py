"""Models that `torch.export.save` wrote: ``model.pt2`` as MODEL, rewritten as the program that it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.errors import SourceError
from convrewrite.exportedfile import SUFFIX, ExportedFile
from convrewrite.sites import Shape
from convrewrite.sources.base import SOURCES, Recipe, Request, default_example
from convrewrite.sources.exportedgraph import Document, document_of
from convrewrite.sources.program import Program
from convrewrite.sources.programbuilder import module_of


class Exported:
    """A ``.pt2`` file. The recipe holds the whole program but its tensors, so that the file is not needed again."""

    order = 5

    def find(self, spec: str) -> str | None:
        return spec if Path(spec).suffix.lower() == SUFFIX else None

    def names(self) -> Sequence[str]:
        return ()

    def recipe(self, name: str, request: Request) -> Recipe:
        if request.options or request.num_classes is not None:
            given = next(iter(request.options), "--num-classes")
            raise SourceError("an exported program takes no options", where=name, fix=f"drop '{given}'")
        if request.weights not in (None, "DEFAULT"):
            what = f"an exported program has no weights called '{request.weights}'"
            raise SourceError(what, where=name, fix="drop --weights, or give a file")
        return {"name": name, "options": {}, "program": document_of(ExportedFile(Path(name)), name)}

    def own_weights(self, name: str) -> str | None:
        """The file's own tensors."""
        return "DEFAULT"

    def build(self, recipe: Recipe) -> nn.Module:
        return module_of(recipe["program"], where=str(recipe["name"])).train()

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        return next((tuple(shape) for shape in recipe["program"]["inputs"].values()), default_example(model))

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        return _tensors(ExportedFile(Path(recipe["name"])), recipe["program"])

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        if isinstance(model, Program) and model.document is not None:
            yield {"name": model.document["class"], "options": {}, "program": model.document}


SOURCES.register("exported")(Exported())


def from_program(program: torch.export.ExportedProgram) -> nn.Module:
    """An exported program at hand as a module that can be rewritten, with its tensors copied.

    Raises:
        SourceError: the program does what cannot be read; the message says what.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program{SUFFIX}"
        torch.export.save(program, str(path))
        file = ExportedFile(path)
        document = document_of(file, "ExportedProgram")
        model = module_of(document, where="ExportedProgram").train()
        model.load_state_dict(_tensors(file, document))
    return model


def _tensors(file: ExportedFile, document: Document) -> dict[str, Tensor]:
    """Those that the program uses; a file may hold more."""
    return {name: tensor for name, tensor in file.tensors().items() if name in document["tensors"]}
