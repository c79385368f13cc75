"""Checkpoints of a run: whole folders or nothing, refused where they are of another run, and never unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrewrite.atomic import new_folder, sha256
from convrewrite.errors import ConvrewriteError, StoreError
from convrewrite.tensorfile import put_tensors, read_tensors, write_tensors

FORMAT = 1
_MODEL, _AVERAGE, _OPTIMIZER, _STATE = "model.safetensors", "average.safetensors", "optimizer.pt", "state.json"


@dataclass
class Standing:
    """Where a run stands, beside its tensors.

    Attributes:
        step: finished optimizer steps. history: rows of the log so far.
        best: (anneal, measure) of the best epoch, and its step; () before the first measurement.
        waited: measurements since the agreement last rose. stopped: whether that ended the run.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, ...] = ()
    waited: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class Parts:
    """The tensors of a run: what `write` stores and `read` fills."""

    model: nn.Module
    average: nn.Module | None
    optimizer: Any
    scaler: Any = None


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all values of a model."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def write(folder: Path, parts: Parts, standing: Standing, run: Mapping[str, Any]) -> None:
    """Exchange the checkpoint in `folder` for a new one, in one step.

    Args:
        run: what makes the run this one; `read` compares it.

    Raises:
        StoreError: it cannot be written; the old one is as it was.
    """
    with _writing(folder) as filling:
        write_tensors(parts.model, filling / _MODEL)
        if parts.average is not None:
            write_tensors(parts.average, filling / _AVERAGE)
        state = {"optimizer": parts.optimizer.state_dict()}
        if parts.scaler is not None:
            state["scaler"] = parts.scaler.state_dict()
        torch.save(state, filling / _OPTIMIZER)
        files = {path.name: sha256(path) for path in sorted(filling.iterdir())}
        document = {"format": FORMAT, "run": dict(run), "files": files, **vars(standing)}
        (filling / _STATE).write_text(json.dumps(document), encoding="utf-8")


def read(folder: Path, parts: Parts, run: Mapping[str, Any]) -> Standing:
    """Fill `parts` with the checkpoint in `folder`.

    Raises:
        StoreError: there is none, it is damaged, or it is of another run: another plan, other weights at the
            start, other images or another setting.
    """
    document = _document(folder)
    check_same(document["run"], run, str(folder))
    for name, wanted in document["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != wanted:
            raise StoreError("the checkpoint is damaged", where=str(folder / name), fix="begin without --resume")
    put_tensors(parts.model, read_tensors(folder / _MODEL)[0])
    if parts.average is not None:
        put_tensors(parts.average, read_tensors(folder / _AVERAGE)[0])
    state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    parts.optimizer.load_state_dict(state["optimizer"])
    if parts.scaler is not None and "scaler" in state:
        parts.scaler.load_state_dict(state["scaler"])
    names = ("step", "history", "waited", "stopped")
    return Standing(best=tuple(document["best"]), **{name: document[name] for name in names})


def write_best(folder: Path, model: nn.Module) -> None:
    """The weights of the best epoch alone."""
    with _writing(folder) as filling:
        write_tensors(model, filling / _MODEL)


def read_best(folder: Path, model: nn.Module) -> None:
    """Put what `write_best` wrote into `model`."""
    put_tensors(model, read_tensors(folder / _MODEL)[0])


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint."""
    return (folder / _STATE).is_file()


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left half written in `folder` for a folder or file called `name`."""
    for path in folder.glob(f".{name}.saving-*"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True) if path.is_file() else None


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        StoreError: naming the first difference.
    """
    words = {
        "purpose": "the checkpoint is of another command",
        "plan": "the checkpoint is of another plan",
        "model": "the checkpoint is of another model",
        "weights": "the run began with other weights",
        "data": "the run began with other images",
        "teacher": "the run began with another original to imitate",
        "processes": "the run began with another number of processes",
    }
    for key, text in words.items():
        if then.get(key) != now[key]:
            detail = f" ({then.get(key)}, now {now[key]})" if key in ("data", "processes", "purpose") else ""
            raise StoreError(text + detail, where=where, fix="begin without --resume")
    old, new = then.get("settings", {}), now["settings"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            what = f"the run began with {name} {old.get(name)}, now {new.get(name)}"
            raise StoreError(what, where=where, fix="give the same settings, or begin without --resume")


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A new folder in place of `folder`; whatever the disk answers is one line."""
    from safetensors import SafetensorError

    try:
        with new_folder(folder) as filling:
            yield filling
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(folder)) from error
    except StoreError as error:
        raise StoreError(f"cannot write: {error.what}", where=str(folder)) from error
    except (SafetensorError, RuntimeError) as error:  # a full disk, told by the writer of the tensors
        line = str(error).strip().splitlines()[0][:120]
        raise StoreError(f"cannot write: {line}", where=str(folder), fix="is the disk full?") from error


def _document(folder: Path) -> dict[str, Any]:
    if not exists(folder):
        raise StoreError("there is no checkpoint to go on from", where=str(folder), fix="begin without --resume")
    try:
        found: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise StoreError(f"format {found['format']!r}, this version reads {FORMAT}", where=str(folder))
        missing = {"run", "files", "step", "history", "best", "waited", "stopped"} - set(found)
    except (ValueError, KeyError, TypeError):
        missing = {"format"}
    if missing:
        raise StoreError("the checkpoint is damaged", where=str(folder / _STATE), fix="begin without --resume")
    return found


def refuse_begun(folder: Path) -> None:
    """Refuse to begin a run where another left a checkpoint."""
    if exists(folder):
        fix = "--resume to go on, --overwrite to begin again, or another --out"
        raise ConvrewriteError("a run was begun here already", where=str(folder.parent), fix=fix)
