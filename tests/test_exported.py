"""Exported programs as models: the same sites, outputs and roles as the network they were exported from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import convrewrite as cr
from convrewrite.errors import SourceError
from convrewrite.pipeline import inspect
from convrewrite.sources import resolve
from convrewrite.sources.exported import from_program

RULES = """
version: 1
name: late
rules:
  - id: late
    match: {role: basic_spatial, kernel: 3, stage: 4}
    replace: {block: acmix, window: 3}
    start: exact
"""


class Small(nn.Module):
    """A residual block between a stem and a classifier, with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = Residual(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x)).mean((2, 3))
        out: Tensor = self.head(self.drop(x))
        return out


class Residual(nn.Module):
    """conv, norm, relu, conv, norm; plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norms[0](self.one(x)))
        return torch.relu(self.norms[1](self.two(y)) + x)


class Pair(nn.Module):
    """Two inputs, one of which is scaled by a constant, and a dictionary of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.loose = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        left, right = self.conv(x + y * torch.tensor(2.0)).chunk(2, 1)
        whole = nn.functional.conv2d(torch.cat([right, left], 1), self.loose, stride=2)
        return {"left": left, "whole": whole}


def export(model: nn.Module, *shapes: tuple[int, ...], **options: Any) -> torch.export.ExportedProgram:
    torch.manual_seed(1)
    return torch.export.export(model, tuple(torch.randn(shape) for shape in shapes), **options)


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with batch statistics that are not those of a fresh network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return settled(torchvision.models.resnet18(num_classes=10))


@pytest.fixture(scope="module")
def file(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "resnet18.pt2"
    torch.export.save(export(resnet, (1, 3, 64, 64)), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    torch.export.save(export(settled(Small()), (1, 3, 8, 8)), path)
    return path


def facts(model: nn.Module, *example: Tensor) -> list[tuple[Any, ...]]:
    keys = ("path", "role", "part", "stage", "block", "position", "block_path", "stage_path", "conv", "out_shape")
    return [tuple(getattr(site, key) for key in keys) for site in inspect(model, example=example)]


def same(model: nn.Module, other: nn.Module, *inputs: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model(*inputs), other(*inputs))


def test_a_file_gives_the_sites_and_the_output_of_its_network(resnet: nn.Module, file: Path) -> None:
    source = resolve(str(file))
    x = torch.randn(2, 3, 64, 64)
    assert source.example == (1, 3, 64, 64)
    assert facts(source.model, x) == facts(resnet, x)
    assert same(source.model, resnet, x)
    assert list(source.model.state_dict().keys() ^ resnet.state_dict().keys()) == []


def test_modules_keep_the_names_of_their_classes_for_rules(file: Path) -> None:
    sites = inspect(resolve(str(file), meta=True).model, example=(1, 3, 64, 64))
    site = next(s for s in sites if s.path == "layer2.0.conv1")
    assert site.inside == (("layer2", "Sequential"), ("layer2.0", "BasicBlock"))


@pytest.mark.zoo
def test_a_rewritten_resnet_starts_exact_and_is_built_again_without_its_file(
    resnet: nn.Module, file: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "late.yaml"
    rules.write_text(RULES, encoding="utf-8")
    source = resolve(str(file))
    model, report = cr.rewrite(source.model, str(rules), example=source.example, source=source.recipe)
    x = torch.randn(1, 3, 64, 64)
    assert [edit.path for edit in report.plan.edits] == [f"layer4.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert {law.status for law in report.laws} == {"held"}
    assert same(model.eval(), resnet, x)
    cr.save(model, tmp_path / "saved")
    content = (tmp_path / "saved/recipe.json").read_text(encoding="utf-8").replace(str(file), "elsewhere.pt2")
    (tmp_path / "saved/recipe.json").write_text(content, encoding="utf-8")
    again = cr.load(tmp_path / "saved")
    assert type(again).__name__ == "ResNet"
    assert same(again, model, x)


@pytest.mark.parametrize("given", ["file", "object"])
def test_a_rewritten_program_is_built_again_without_its_file(given: str, tmp_path: Path) -> None:
    original, path = settled(Small()), tmp_path / "small.pt2"
    program = export(original, (1, 3, 8, 8))
    torch.export.save(program, path)
    source = resolve(str(path)) if given == "file" else None
    model, recipe = (from_program(program), None) if source is None else (source.model, source.recipe)
    rules = tmp_path / "late.yaml"
    rules.write_text(RULES.replace("stage: 4", "stage: 1"), encoding="utf-8")
    rewritten, report = cr.rewrite(model, str(rules), example=(1, 3, 8, 8), source=recipe)
    assert [edit.path for edit in report.plan.edits] == ["block.one", "block.two"]
    assert {law.status for law in report.laws} == {"held"}
    x = torch.randn(2, 3, 8, 8)
    assert same(rewritten, original, x)
    cr.save(rewritten, tmp_path / "saved")
    path.unlink()
    assert same(cr.load(tmp_path / "saved"), rewritten, x)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1"])
def test_channel_shuffles_gates_and_fire_modules_come_back_as_they_were(name: str) -> None:
    model = settled(getattr(torchvision.models, name)())
    x = torch.randn(1, 3, 64, 64)
    made = from_program(export(model, tuple(x.shape)))
    assert facts(made, x) == facts(model, x)
    assert same(made, model, x)


def test_the_core_set_of_operators_gives_the_same_roles() -> None:
    model, x = settled(Small()), torch.randn(1, 3, 8, 8)
    program = export(model, (1, 3, 8, 8)).run_decompositions()
    assert "convolution" in str(program.graph)
    made = from_program(program)
    assert facts(made, x) == facts(model, x)
    assert same(made, model, x)


def test_batch_norm_and_dropout_stay_in_the_mode_of_the_export() -> None:
    torch.manual_seed(0)
    model = settled(Small())
    x = torch.randn(4, 3, 8, 8)
    made = from_program(export(model, (4, 3, 8, 8))).train()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    assert same(made, model, x)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    trained = from_program(export(model.train(), (4, 3, 8, 8))).eval()
    trained(x)
    assert not torch.equal(trained.state_dict()["stem.1.running_mean"], before["stem.1.running_mean"])


def test_a_batch_that_varies_and_one_that_is_written_into_a_shape() -> None:
    model = settled(Small())
    free = from_program(export(model, (2, 3, 8, 8), dynamic_shapes=({0: torch.export.Dim("batch")},)))
    assert same(free, model, torch.randn(5, 3, 8, 8))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x).reshape(x.shape[0], -1)
            return out

    assert from_program(export(Fixed(), (1, 3, 8, 8))).fixed_batch
    assert not from_program(export(settled(Small()), (1, 3, 8, 8))).fixed_batch


def test_several_inputs_constants_and_a_dictionary_of_outputs() -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    made = from_program(export(model, (1, 3, 6, 6), (1, 3, 6, 6)))
    x, y = torch.randn(2, 1, 3, 6, 6)
    with torch.no_grad():
        wanted, found = model(x, y), made(x, y)
    assert list(found) == ["left", "whole"]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    sites = inspect(made, example=(1, 3, 6, 6))
    assert [(site.path, site.kind) for site in sites] == [("conv", "module"), (":loose", "functional")]


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False))
    model[1].weight = model[0].weight
    made = from_program(export(model, (1, 3, 6, 6)))
    assert sum(1 for _ in made.parameters()) == 1
    assert same(made, model, torch.randn(1, 3, 6, 6))


def test_a_file_gives_its_weights_to_the_network_itself(resnet: nn.Module, file: Path) -> None:
    made = resolve("torchvision:resnet18", weights=str(file), num_classes=10).model.eval()
    assert same(made, resnet, torch.randn(1, 3, 64, 64))


def test_a_program_takes_other_weights_of_its_own_names(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = settled(Small())
    torch.save(other.state_dict(), tmp_path / "other.pth")
    made = resolve(str(small), weights=str(tmp_path / "other.pth")).model
    assert same(made, other, torch.randn(1, 3, 8, 8))


def changed(path: Path, change: Callable[[str, Any], Any], to: Path) -> str:
    """A copy of an exported file, its JSON parts changed by `change`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(".json"):
                content = json.dumps(change(name.partition("/")[2], json.loads(content))).encode()
            new.writestr(name, content)
    return str(to)


def retarget(target: str, **arguments: Any) -> Callable[[str, Any], Any]:
    def change(name: str, content: Any) -> Any:
        if name == "models/model.json":
            node = content["graph_module"]["graph"]["nodes"][2]
            node["target"] = target
            node["inputs"] = [{"name": k, "arg": v, "kind": 1} for k, v in arguments.items()] or node["inputs"]
        return content

    return change


def test_a_pickled_tensor_is_not_unpickled(small: Path, tmp_path: Path) -> None:
    def change(name: str, content: Any) -> Any:
        if name.startswith("data/weights"):
            content["config"]["head.bias"] |= {"use_pickle": True}
        return content

    with pytest.raises(SourceError, match=r"'head\.bias' is stored as a pickle, and pickles are not loaded"):
        resolve(changed(small, change, tmp_path / "bad.pt2"), meta=True)


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("torch.os.system", {"command": {"as_string": "touch found"}}, "it calls 'torch.os.system'"),
        ("torch.ops.higher_order.cond", {}, "it calls 'higher_order.cond'"),
        ("torch.ops.aten.from_file.default", {"filename": {"as_string": "found"}}, "the text 'found'"),
        ("torch.ops.aten.save.default", {"filename": {"as_strings": ["found"]}}, "it holds strings"),
        ("torch.ops.aten.__class__.default", {}, "which torch here does not know"),
        ("torch.ops.aten.relu.__init__", {}, "which torch here does not know"),
        ("_operator.attrgetter", {}, "which torch here does not know"),
    ],
)
def test_only_operators_that_compute_are_looked_up(
    target: str, arguments: dict[str, Any], said: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as raised:
        resolve(changed(small, retarget(target, **arguments), tmp_path / "bad.pt2"))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "found").exists()


def test_a_saved_folder_cannot_smuggle_in_what_a_file_cannot(small: Path) -> None:
    recipe = resolve(str(small), meta=True).recipe
    assert recipe is not None
    for step, said in (
        ({"does": "aten.from_file.default", "with": {"filename": "found"}}, "the text 'found'"),
        ({"does": "call:__class__", "with": {}}, "damaged"),
        ({"does": "operator.getitem", "with": {"0": {"own": "__dict__"}, "1": 0}}, "damaged"),
    ):
        evil = json.loads(json.dumps(recipe))
        evil["program"]["steps"][0] |= step
        with pytest.raises(SourceError, match=said):
            cr.sources.rebuild(evil)


def test_what_is_no_program_is_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as empty:
        empty.writestr("a/b.txt", "text")

    def older(name: str, content: Any) -> Any:
        return content | {"schema_version": {"major": 7, "minor": 1}} if "schema_version" in content else content

    changed(small, older, tmp_path / "old.pt2")
    for name, said in (
        ("cut", "not a readable exported program"),
        ("zip", "this is no exported program"),
        ("old", "it is written in the schema"),
        ("none", "there is no such file"),
    ):
        with pytest.raises(SourceError, match=said) as raised:
            resolve(str(tmp_path / f"{name}.pt2"))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("extra", [{"num_classes": 3}, {"weights": "IMAGENET1K_V1"}])
def test_a_program_takes_no_options(extra: dict[str, Any], small: Path) -> None:
    with pytest.raises(SourceError, match="an exported program"):
        resolve(str(small), **extra)


def test_a_result_of_a_class_is_refused_by_its_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Any:
            return torch.max(self.conv(x), 1)

    with pytest.raises(SourceError, match=r"it returns a collections\.namedtuple|it returns a .*max"):
        from_program(export(Named(), (1, 3, 6, 6)))


@pytest.mark.parametrize("given", ["program", "module"])
def test_a_program_that_is_given_as_it_is_names_the_function_that_reads_it(given: str) -> None:
    program = export(Small().eval(), (1, 3, 8, 8))
    model: Any = program if given == "program" else program.module()
    with pytest.raises(cr.ConvrewriteError, match=r"convrewrite\.sources\.exported\.from_program\(program\)$"):
        cr.rewrite(model, "sasa-exact", example=(1, 3, 8, 8))
