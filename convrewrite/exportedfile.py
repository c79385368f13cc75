"""The file that `torch.export.save` writes, read as what it is: a zip of JSON and raw tensors. Nothing is unpickled.

torch's own loader unpickles parts of it, gives its shape expressions to `sympify`, which evaluates text, and looks the
operators up below `torch` by any name. Here a pickled part is refused, and shape expressions are not needed.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convrewrite.errors import SourceError

SUFFIX = ".pt2"
SCHEMA = 8
"""Major version of the schema that is read: that of torch 2.11 to 2.15."""
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""The schema's numbers of the types that a network's tensors have."""
_AGAIN = "export the model again with torch.export.save of torch 2.11 or newer"


@dataclass(frozen=True)
class TensorNote:
    """Where a tensor lies in the file, and what it is; of two that share their memory, `entry` and `offset` agree."""

    entry: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class ExportedFile:
    """One open file.

    Attributes:
        program: what `models/model.json` holds.
        weights: of the state dict. constants: of buffers outside it and of tensors that the forward made.

    Raises:
        SourceError: there is no such file, it is no exported program, or parts of it are pickled.
    """

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        if not path.is_file():
            raise SourceError("there is no such file", where=self._where)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise self._unreadable(error) from error
        names = self._zip.namelist()
        found = [name for name in names if name.endswith("/models/model.json")]
        if len(found) != 1 or len(names) != len(set(names)):
            what = "this is no exported program (no models/model.json)"
            raise SourceError(what, where=self._where, fix=_AGAIN)
        self._root = found[0].removesuffix("models/model.json")
        self.program = self._json("models/model.json")
        version = self.program.get("schema_version") if isinstance(self.program, Mapping) else None
        if not isinstance(version, Mapping) or version.get("major") != SCHEMA:
            what = f"it is written in the schema {version}, and {SCHEMA} is read"
            raise SourceError(what, where=self._where, fix=_AGAIN)
        self.weights = self._notes("weights")
        self.constants = self._notes("constants")

    def tensors(self) -> dict[str, Tensor]:
        """Weights and constants by name, on the CPU, each with memory of its own."""
        return {name: self._tensor(note) for name, note in {**self.constants, **self.weights}.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights alone."""
        return {name: self._tensor(note) for name, note in self.weights.items()}

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._read(name))
        except ValueError as error:
            raise self._unreadable(error) from error

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(self._root + name)
        except (KeyError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise self._unreadable(error) from error

    def _notes(self, kind: str) -> dict[str, TensorNote]:
        config = self._json(f"data/{kind}/model_{kind}_config.json")
        try:
            return {name: self._note(kind, name, entry) for name, entry in config["config"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unreadable(error) from error

    def _note(self, kind: str, name: str, entry: Mapping[str, Any]) -> TensorNote:
        meta = entry["tensor_meta"]
        if entry["use_pickle"] or meta is None:
            what = f"'{name}' is stored as a pickle, and pickles are not loaded"
            raise SourceError(what, where=self._where, fix="export a model of plain tensors")
        if meta["dtype"] not in DTYPES:
            raise SourceError(f"'{name}' has a type of tensor that is not read", where=self._where)
        shape, strides = (tuple(int(n["as_int"]) for n in meta[key]) for key in ("sizes", "strides"))
        if len(shape) != len(strides) or any(n < 0 for n in (*shape, *strides)):
            raise ValueError(f"the shape of '{name}'")
        offset = int(meta["storage_offset"]["as_int"])
        return TensorNote(f"data/{kind}/{entry['path_name']}", offset, shape, strides, DTYPES[meta["dtype"]])

    def _tensor(self, note: TensorNote) -> Tensor:
        raw = self._read(note.entry)
        if not math.prod(note.shape):
            return torch.empty(note.shape, dtype=note.dtype)
        flat = torch.frombuffer(bytearray(raw), dtype=note.dtype)
        needed = note.offset + sum((n - 1) * s for n, s in zip(note.shape, note.strides, strict=True)) + 1
        if note.offset < 0 or needed > flat.numel():
            raise self._unreadable(ValueError(f"{note.entry} is too short"))
        return flat.as_strided(note.shape, note.strides, note.offset).clone()

    def _unreadable(self, error: Exception) -> SourceError:
        first = (str(error) or type(error).__name__).splitlines()[0][:120]
        return SourceError(f"not a readable exported program ({first})", where=self._where, fix=_AGAIN)
