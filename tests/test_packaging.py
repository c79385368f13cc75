"""What is installed: every package, the rule files, the command."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import convrewrite

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages_on_disk() -> Iterator[str]:
    for folder, package in (("convrewrite", "convrewrite"), ("cli", "convrewrite.cli"), ("rules", "convrewrite.rules")):
        for init in (ROOT / folder).rglob("__init__.py"):
            yield ".".join([package, *init.parent.relative_to(ROOT / folder).parts])


def test_every_package_on_disk_is_listed_and_none_else(project: dict[str, Any]) -> None:
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(_packages_on_disk())


def test_no_folder_of_modules_lacks_its_init() -> None:
    for folder in ("convrewrite", "cli", "rules"):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert convrewrite.__version__ == project["project"]["version"]


def test_every_test_marker_in_use_is_declared(project: dict[str, Any]) -> None:
    declared = {line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    builtin = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"}
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert set(re.findall(r"pytest\.mark\.(\w+)", text)) - builtin <= declared


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_checkout_offers_its_subpackages_under_their_installed_names() -> None:
    try:
        importlib.metadata.version("convrewrite")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed here")
    code = (
        "import importlib.resources as r; import convrewrite.cli, convrewrite.rules;"
        "print(sum(p.name.endswith('.yaml') for p in r.files('convrewrite.rules').iterdir()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(list((ROOT / "rules").glob("*.yaml"))) > 0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is made from that sdist."""
    tree = tmp_path_factory.mktemp("tree") / "convrewrite"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tree, ignore=skip)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def _data_files() -> set[str]:
    """Everything but Python that lies inside the packages, under its installed name."""
    found = set()
    for folder, prefix in (("convrewrite", ""), ("cli", "convrewrite/"), ("rules", "convrewrite/")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                found.add(prefix + path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.slow
def test_the_wheel_carries_every_module_rule_file_and_the_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "convrewrite = convrewrite.cli.main:main" in archive.read(entry_points).decode()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "convrewrite").rglob("*.py")}
    modules |= {
        f"convrewrite/{p.relative_to(ROOT).as_posix()}" for f in ("cli", "rules") for p in (ROOT / f).rglob("*.py")
    }
    assert modules <= names
    assert _data_files() <= names
    assert any(n.startswith("convrewrite/rules/") and n.endswith(".yaml") for n in names)
    assert not any(n.startswith(("tests/", "cli/", "rules/")) for n in names)


@pytest.mark.slow
def test_the_sdist_carries_the_rule_files_in_their_place(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "rules").glob("*.yaml")} <= names
    assert {"pyproject.toml", "LICENSE", "cli/__init__.py", "convrewrite/py.typed"} <= names


@pytest.mark.slow
def test_the_installed_wheel_runs_the_command_from_any_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop()); sys.meta_path[:] = [f for f in sys.meta_path "
        "if 'editable' not in getattr(f, '__module__', '') and 'Editable' not in getattr(f, '__name__', '')];"
        "import convrewrite; print(convrewrite.__file__);"
        "from convrewrite.cli.main import main; main(['rules'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    assert "acmix" in done.stdout
