"""Text files are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convrewrite import atomic
from convrewrite.errors import StoreError


def test_a_file_and_its_folders_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    place = tmp_path / "new" / "report.txt"
    for text in ("one\n", "two, é\n"):
        atomic.write_text(place, text)
        assert place.read_bytes() == text.encode()
    assert os.listdir(place.parent) == ["report.txt"]


def test_what_stood_there_stands_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "report.txt"
    atomic.write_text(place, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"report\.txt: cannot write: No space left on device$"):
        atomic.write_text(place, "new")
    assert place.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_killed_process_leaves_the_old_file_and_the_next_clears_up(tmp_path: Path) -> None:
    place = tmp_path / "report.txt"
    atomic.write_text(place, "old")
    code = (
        "import os, signal, sys; from convrewrite import atomic; "
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL); atomic.write_text(sys.argv[1], 'new')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(place)], check=False).returncode == -9
    assert place.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    atomic.write_text(place, "newer")
    assert place.read_text() == "newer"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"
