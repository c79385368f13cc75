"""Builds the native kernel for these tests where the checkout has none, or one older than its source."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from convrewrite.kernels.native import library

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, **environment: str) -> Path | None:
    """Where the package's own build puts the library when told to build into `folder`; None if it made none."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment or None, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.rglob(f"{library.NAME}*.so"), None)


@pytest.fixture(scope="session", autouse=True)
def _native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = library._file()
    sources = library.FOLDER.glob("local_attention*.[ch]")
    fresh = file.is_file() and file.stat().st_mtime >= max(source.stat().st_mtime for source in sources)
    with pytest.MonkeyPatch.context() as patch:
        if not fresh:
            built = build(tmp_path_factory.mktemp("native"))
            if built is not None:
                patch.setattr(library, "_file", lambda: built)
        library.library.cache_clear()
        yield
    library.library.cache_clear()


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVREWRITE_BACKEND", raising=False)


@pytest.fixture
def native() -> None:
    """Skips where no library could be built."""
    if library.library() is None:
        pytest.skip("no C compiler")
