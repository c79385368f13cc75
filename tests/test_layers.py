"""The picture in ARCHITECTURE.md is the truth: who imports whom, and who imports torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOOP = {("sources", "store"), ("sources.folder", "store")}
"""Imports inside functions that go down the picture, which ARCHITECTURE.md owns up to."""

OF_OURS_IN_BLOCKS = {"registry", "sites", "errors"}


class Import(NamedTuple):
    """One import of one of our modules: who, whom, and whether it happens when the module is loaded."""

    importer: str
    imported: str
    at_load: bool


class Layer(NamedTuple):
    name: str
    torch: bool
    units: tuple[str, ...]


def layers_of(text: str) -> list[Layer]:
    """The picture: one layer a line."""
    picture = re.search(r"^```layers\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert picture, "ARCHITECTURE.md has no ```layers block"
    found = []
    for line in picture[1].splitlines():
        parts = re.fullmatch(r"(\w+)\s+(no torch|torch)\s+(\S.*)", line)
        assert parts, f"cannot read the line {line!r}"
        found.append(Layer(parts[1], parts[2] == "torch", tuple(parts[3].split())))
    return found


def order_of(layers: list[Layer]) -> list[str]:
    """All units from the top left to the bottom right."""
    return [unit for layer in layers for unit in layer.units]


def unit_of(module: str, units: list[str]) -> str | None:
    """The unit that a module belongs to: the longest name that it is or lies in."""
    around = [unit for unit in units if module == unit or module.startswith(f"{unit}.")]
    return max(around, key=len, default=None)


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its name below ``convrewrite``; the package itself is left out."""
    found = {}
    for folder, prefix in ((ROOT / "convrewrite", ""), (ROOT / "cli", "cli.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = (prefix + ".".join(parts)).removesuffix("__init__").rstrip(".")
            if name:
                found[name] = path
    return found


def imports_in(name: str, source: str, known: set[str]) -> list[Import]:
    """Imports of ours and of torch ("torch") in one file; what only type checkers see is left out."""
    found: list[Import] = []

    def visit(node: ast.AST, *, at_load: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                targets = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}: relative import"
                base = child.module or ""
                # `from package import module` names a module; `from module import name` does not.
                deeper = [f"{base}.{alias.name}" for alias in child.names]
                targets = [d if d.removeprefix("convrewrite.") in known else base for d in deeper]
            else:
                visit(child, at_load=at_load and not inside)
                continue
            for target in dict.fromkeys(targets):
                if target.split(".")[0] in ("torch", "torchvision", "timm"):
                    found.append(Import(name, "torch", at_load))
                elif target.startswith("convrewrite."):
                    found.append(Import(name, target.removeprefix("convrewrite."), at_load))

    visit(ast.parse(source), at_load=True)
    return found


@cache
def imports() -> tuple[Import, ...]:
    known = set(modules())
    return tuple(i for name, path in modules().items() for i in imports_in(name, path.read_text("utf-8"), known))


def upward_faults(layers: list[Layer], found: tuple[Import, ...]) -> list[str]:
    """Imports that go down or to the right in the picture."""
    order = order_of(layers)
    faults = []
    for one in found:
        if one.imported == "torch":
            continue
        own, other = unit_of(one.importer, order), unit_of(one.imported, order)
        if own is None or other is None:
            faults.append(f"{one.importer} imports {one.imported}: not in the picture")
            continue
        # sources.base stands before sources, but is of one package with it
        same = own == other or own.split(".")[0] == other.split(".")[0]
        allowed = same or order.index(other) < order.index(own)
        if not allowed and not (not one.at_load and (one.importer, one.imported) in LOOP):
            faults.append(f"{one.importer} imports {one.imported}, which stands below it")
    return faults


def loads_torch(found: tuple[Import, ...]) -> set[str]:
    """Modules that import torch when loaded, themselves or through others, parents included."""
    packages = {m.rpartition(".")[0] for m in modules()} - {""}
    edges: dict[str, set[str]] = {m: set() for m in modules()}
    for one in found:
        if one.at_load:
            edges[one.importer].add(one.imported)
    for module in modules():  # importing a module loads its packages first
        parts = module.split(".")
        edges[module] |= {p for n in range(1, len(parts)) if (p := ".".join(parts[:n])) in packages and p in modules()}
    tainted = {"torch"}
    while new := {m for m, to in edges.items() if m not in tainted and to & tainted}:
        tainted |= new
    return tainted - {"torch"}


PICTURE = layers_of((ROOT / "ARCHITECTURE.md").read_text("utf-8"))


def test_every_module_stands_in_the_picture_and_nothing_else_does() -> None:
    order = order_of(PICTURE)
    assert len(order) == len(set(order))
    assert [m for m in modules() if unit_of(m, order) is None] == []
    assert [unit for unit in order if unit not in modules()] == []


def test_modules_import_only_what_stands_above_them() -> None:
    assert upward_faults(PICTURE, imports()) == []


def test_the_loop_that_the_architecture_owns_up_to_is_still_there() -> None:
    assert {(i.importer, i.imported) for i in imports()} >= LOOP


@pytest.mark.parametrize("layer", PICTURE, ids=lambda layer: layer.name)
def test_the_picture_says_truly_which_lines_load_torch(layer: Layer) -> None:
    order = order_of(PICTURE)
    members = {m for m in modules() if unit_of(m, order) in layer.units}
    with_torch = members & loads_torch(imports())
    assert bool(with_torch) == layer.torch, sorted(with_torch)


def test_lines_without_torch_do_not_import_it_inside_functions_either_but_for_commands() -> None:
    order = order_of(PICTURE)
    free = {unit for layer in PICTURE if not layer.torch and layer.name != "commands" for unit in layer.units}
    assert [i.importer for i in imports() if i.imported == "torch" and unit_of(i.importer, order) in free] == []


def test_blocks_import_nothing_of_ours_but_registry_sites_errors_and_kernels() -> None:
    of_blocks = [i for i in imports() if i.importer.split(".")[0] == "blocks" and i.imported != "torch"]
    assert of_blocks
    others = {i.imported for i in of_blocks if i.imported.split(".")[0] not in ("blocks", "kernels")}
    assert others <= OF_OURS_IN_BLOCKS


def test_loading_everything_without_torch_leaves_torch_alone() -> None:
    order = order_of(PICTURE)
    free = [m for layer in PICTURE if not layer.torch for m in modules() if unit_of(m, order) in layer.units]
    code = "import sys\n" + "".join(f"import convrewrite.{m}\n" for m in sorted(free))
    code += "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules), 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "source", "is_fault"),
    [
        ("sites", "from convrewrite.planning import make_plan", True),
        ("sites", "def f():\n    from convrewrite import planning", True),
        ("picking", "import convrewrite.match", True),  # to the right on its own line
        ("sources.torchvision", "from convrewrite.store import load", True),  # another than the loop's two
        ("sources", "from convrewrite.store import load", True),  # at load, not inside a function
        ("planning", "import convrewrite.unheard_of", True),
        ("sources", "def f():\n    from convrewrite.store import load", False),
        ("planning", "from convrewrite.match import match\nfrom convrewrite import sites", False),
        ("sites", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from convrewrite.store import load", False),
        ("report.text", "from convrewrite.report import content", False),
    ],
)
def test_a_planted_import_is_judged_rightly(name: str, source: str, is_fault: bool) -> None:
    found = tuple(imports_in(name, source, set(modules())))
    assert bool(upward_faults(PICTURE, found)) == is_fault


def test_a_planted_torch_is_seen_through_other_modules() -> None:
    planted = (*imports(), Import("errors", "torch", at_load=True))
    assert {"errors", "rulefile", "match", "report.text"} <= loads_torch(planted)
    assert not {"errors", "rulefile", "match", "report.text"} & loads_torch(imports())
