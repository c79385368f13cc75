"""Whole folders and files or nothing: each is filled beside its place and moved there in one step."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convrewrite.errors import StoreError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of `folder` when the block ends well.

    What stood there is gone only after the new one is complete and on disk. If the block raises, also
    by ctrl-C, the temporary folder is removed and `folder` is as it was. A process that is killed may
    leave the temporary folder (``.NAME.saving-...``) beside an untouched `folder`; the next to write there removes it.
    """
    place = Path(os.path.realpath(folder))  # a link keeps pointing where it did
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear(place)
    temporary = _beside(place)
    try:
        temporary.mkdir()  # not mkdtemp: a saved model is as readable as any other file of the user
        yield temporary
        for path in sorted(temporary.iterdir()):
            _sync(path)
        _sync(temporary)
        _move(temporary, place)
        _sync(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half written, or the old folder after the exchange


def write_text(path: str | Path, text: str) -> None:
    """Write a file and the folders that it lies in; until it is complete and on disk, what stood there stands.

    Raises:
        StoreError: it cannot be written.
    """
    place = Path(os.path.realpath(path))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear(place)
        temporary = _beside(place)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write: {error.strerror or error}", where=str(path)) from error


def _beside(place: Path) -> Path:
    """A name of this process's own, by which `_clear` finds what it leaves behind if it is killed."""
    return place.with_name(f".{place.name}.saving-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _clear(place: Path) -> None:
    """Remove what processes of this machine that are no more had begun to write for `place`."""
    if os.name == "nt":
        return  # signal 0 would end the process there
    begin = f".{place.name}.saving-{_host()}-"
    for path in place.parent.iterdir():
        process = path.name.removeprefix(begin).partition("-")[0]
        if path.name.startswith(begin) and process.isdigit():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue  # another user's, and alive


def _host() -> str:
    """Folders may be seen by several machines, whose process numbers mean nothing to each other."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(temporary: Path, place: Path) -> None:
    if not place.exists() or not any(place.iterdir()):
        os.rename(temporary, place)  # POSIX lets a folder replace an empty one
    elif not _exchange(temporary, place):
        # No atomic exchange on this system: the old folder is out of place for the moment between two renames.
        old = place.with_name(f"{temporary.name}.old")
        os.rename(place, old)
        try:
            os.rename(temporary, place)
        except BaseException:
            os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one atomic step (Linux renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    status: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
