"""What all tests share: seeded randomness, no network, one tolerance per dtype, and golden files."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest |actual - expected| / max |expected| by dtype. Where no arithmetic changed, compare bitwise instead."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in several processes; threads would only collide

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if "torch" in sys.modules:  # tests of what needs no torch stay without it
        import torch

        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A test that would download something fails, and says so."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network (tried {address})")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture
def close() -> Callable[[Any, Any], None]:
    """Assert that two tensors agree within the tolerance of the coarser of their dtypes."""
    import torch

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        allowed = max(TOLERANCE[str(t.dtype).removeprefix("torch.")] for t in (actual, expected))
        difference = (actual.double() - expected.double()).abs().max()
        assert difference <= allowed * expected.double().abs().max(), f"differs by {difference:.3g}"

    return check


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Assert that a text is the one in ``tests/golden/NAME``; ``--update-golden`` writes it, for review as a diff."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no golden file {name}: run with --update-golden and review it"
        assert text == path.read_text(encoding="utf-8")

    return check
