"""The Triton kernels, in Triton's interpreter against nested loops in float64, and compiled without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TOLERANCE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_module(name: str, *arguments: str, **environment: str) -> Any:
    """What ``python -m tests.kernels.NAME`` prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", f"tests.kernels.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@cache
def errors() -> dict[str, dict[str, Any]]:
    """Of all cases, from one process: Triton reads TRITON_INTERPRET when it is imported."""
    found: dict[str, dict[str, Any]] = run_module("triton_cases", TRITON_INTERPRET="1")
    return found


def dtype_of(case: str) -> str:
    return case if case in TOLERANCE else "float64"


def test_every_case_equals_nested_loops_in_values_and_gradients() -> None:
    wrong = {
        (case, name): error
        for case, found in errors().items()
        for name, error in found.items()
        if name != "guards" and not error <= TOLERANCE[dtype_of(case)]
    }
    assert not wrong


def test_nothing_is_written_outside_outputs_and_gradients() -> None:
    assert [case for case, found in errors().items() if case != "empty batch" and not found["guards"]] == []


def test_nothing_outside_the_inputs_is_read() -> None:
    """Of the case whose inputs lie in memory full of NaN: one NaN read and used makes an error infinite."""
    found = errors()["strided slices"]
    assert all(found[name] <= TOLERANCE["float64"] for name in ("out", "q", "k", "v"))


def test_gradients_come_for_the_tables_that_are_given_and_for_no_others() -> None:
    assert {"rows", "columns", "bias"} <= errors()["all tables, shared"].keys()
    assert not {"columns", "bias"} & errors()["rows alone"].keys()
    assert not {"rows", "columns", "bias"} & errors()["plain"].keys()


def test_the_check_itself_sees_a_wrong_result() -> None:
    """With the scale changed on one side only, no case but those that do not depend on it may pass."""
    found = run_module("triton_cases", "masked border", "--scale", "0.71", TRITON_INTERPRET="1")
    assert found["masked border"]["out"] > TOLERANCE["float64"]
    assert found["masked border"]["q"] > TOLERANCE["float64"]


@pytest.mark.slow
def test_compiles_for_sm_90_without_spilling_registers() -> None:
    """Window 7 with row and column terms; ptxas says what each kernel takes. No GPU is needed."""
    found = run_module("triton_offline", TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")
    assert len(found) == 3 * 2 * 6
    spilling = {name: numbers for name, numbers in found.items() if numbers["spilled"] > 32}
    assert not spilling
    assert all(0 < numbers["registers"] <= 168 for numbers in found.values())
