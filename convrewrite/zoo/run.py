"""Run the zoo: each model in a worker process with a time limit, each row written as soon as it is there."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from convrewrite.errors import ConvrewriteError
from convrewrite.zoo.models import Entry
from convrewrite.zoo.rows import Row


def run(
    entries: Sequence[Entry],
    out: Path | None = None,
    *,
    timeout: float = 900.0,
    again: Iterable[str] = (),
    watch: Callable[[Entry], None] | None = None,
) -> list[Row]:
    """The row of every entry, in order.

    Args:
        out: rows are appended to this file as JSON lines, and models that have a row there are not tried again.
        timeout: seconds for one model.
        again: specs to try although they have a row.
        watch: called with each entry before it is tried.
    """
    known = {row.spec: row for row in read(out) if row.spec not in set(again)} if out else {}
    with _Worker(timeout) as worker:
        for entry in entries:
            if entry.spec in known:
                continue
            if watch is not None:
                watch(entry)
            row = known[entry.spec] = worker.ask(entry)
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(row.to_json() + "\n")
    return [known[entry.spec] for entry in entries]


def read(path: Path) -> list[Row]:
    """The rows of a file, the last one of each model; none if there is no such file."""
    if not path.exists():
        return []
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = Row.from_json(line)
        except ConvrewriteError as error:
            raise ConvrewriteError(error.what, where=f"{path}:{number}", fix=error.fix) from None
        rows.pop(row.spec, None)
        rows[row.spec] = row
    return list(rows.values())


class _Worker:
    """One process at a time; a new one where the last has ended."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener: threading.Thread | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def ask(self, entry: Entry) -> Row:
        """The row of one entry; of a process that died or took too long, a row that says so."""
        try:
            line, code = self._answer(entry)
            if code == 0:  # it had ended with full memory after its last answer
                line, code = self._answer(entry)
        except queue.Empty:
            return self._failed(entry, f"not done after {self._timeout:.0f} seconds")
        return Row.from_json(line) if line else self._failed(entry, f"the process ended with status {code}")

    def _answer(self, entry: Entry) -> tuple[str, int | None]:
        """The line, or "" and the status with which the process ended."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(entry)) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return "", process.wait()
        line = self._lines.get(timeout=self._timeout)
        return (line, None) if line else ("", process.wait())

    def _failed(self, entry: Entry, why: str) -> Row:
        self._stop()
        return replace(Row(entry.spec, entry.group, entry.family), error=why)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "convrewrite.zoo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process, self._lines), daemon=True)
        self._listener.start()
        return self._process

    @staticmethod
    def _listen(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._listener is not None:
            self._listener.join()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
