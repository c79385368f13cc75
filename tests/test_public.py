"""The public names: sorted, all there, lazy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import time

import pytest

import convrewrite


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_public_names_are_sorted_and_complete() -> None:
    assert convrewrite.__all__ == sorted(convrewrite.__all__)
    assert set(convrewrite.__all__) == {*convrewrite._HOME, "__version__"}


@pytest.mark.parametrize("name", sorted(convrewrite._HOME))
def test_every_public_name_leads_to_something_of_that_name(name: str) -> None:
    found = getattr(convrewrite, name)
    assert getattr(found, "__name__", name) == name
    assert name in dir(convrewrite)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rewrit'"):
        convrewrite.rewrit  # noqa: B018


def test_no_submodule_takes_the_place_of_a_public_function() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(convrewrite.__path__)}
    assert submodules & {*convrewrite._HOME} == set()


def test_importing_it_takes_no_torch_and_no_time() -> None:
    code = (
        "import time, sys; start = time.perf_counter(); import convrewrite;"
        "print(time.perf_counter() - start, [m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    )
    seconds, loaded = zip(*(_python(code).split(" ", 1) for _ in range(3)), strict=True)
    assert set(loaded) == {"[]"}
    assert min(float(s) for s in seconds) < 0.05


def test_the_help_of_the_command_needs_no_torch() -> None:
    code = (
        "import sys\nfrom convrewrite.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    start = time.perf_counter()
    assert "Usage" in _python(code)
    assert time.perf_counter() - start < 2  # 0.3 s on an idle machine; a torch import alone takes longer than this
