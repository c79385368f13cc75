"""A model is found by any of its names, built once, and every wrong name is one clear line."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convrewrite.errors import ConvrewriteError, SourceError
from convrewrite.identity import identity
from convrewrite.sources import parse_input, rebuild, recognise, resolve
from convrewrite.sources.base import SOURCES, Request

from .nets import Residual

GOOD = """
import torch
from torch import nn
STARTED = []

class Net(nn.Module):
    def __init__(self, num_classes=4, width=2):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width, num_classes)

def plain():
    return nn.Sequential(nn.Conv2d(1, 2, 3))

def reads_weights():
    model = nn.Linear(2, 2)
    model.scale = float(model.weight.sum())
    return model

def needs(depth):
    return Net()

def broken():
    raise ValueError("no such width\\nsecond line")

def returns_a_pair():
    return Net(), 3

def leaves():
    raise SystemExit(2)

made = Net()
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    path = tmp_path / "my_nets.py"
    path.write_text(GOOD)
    return str(path)


# --- names ---


@pytest.mark.parametrize(
    ("spec", "name", "class_name"),
    [
        ("resnet18", "torchvision:resnet18", "torchvision.models.resnet"),  # both zoos have it: torchvision first
        ("torchvision:resnet18", "torchvision:resnet18", "torchvision.models.resnet"),
        ("timm:resnet18", "timm:resnet18", "timm.models.resnet"),
        ("resnet26", "timm:resnet26", "timm.models.resnet"),  # only timm has it
        ("resnet18.a1_in1k", "timm:resnet18.a1_in1k", "timm.models.resnet"),
    ],
)
def test_a_name_leads_to_the_zoo_that_has_it(spec: str, name: str, class_name: str) -> None:
    if "timm" in name:
        pytest.importorskip("timm")
    source = resolve(spec, meta=True)
    assert (source.name, type(source.model).__module__) == (name, class_name)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnt50", "did you mean 'resnet50'"),
        ("torchvision:resnet-18", "torchvision has no model 'resnet-18'; did you mean 'resnet18'"),
        ("timm:resnet_26", "timm has no model 'resnet_26'; did you mean 'resnet26"),
        ("timm:resnet18.a9_in1k", "timm:resnet18: there are no weights 'a9_in1k'; did you mean"),
        ("", "unknown model ''"),
        ("quantized_resnet50", "unknown model"),
        ("my_nets.py", "write 'my_nets.py:function'"),
        ("resnet50.pth", "a file of weights, not a model"),
        ("model.onnx", "model.onnx: ONNX files are not read"),
        ("no/such-folder", "no/such-folder: there is no such file or folder; name a saved folder"),
        ("no.such.module:f", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("nowhere.py:f", "there is no file"),
        ("math:pi", "'pi' is a float, not a function"),
        ("math:sinn", "there is no 'sinn' in it; did you mean 'sin'"),
    ],
)
def test_a_wrong_name_is_one_line_with_advice(spec: str, says: str) -> None:
    if "timm" in spec:
        pytest.importorskip("timm")
    with pytest.raises(SourceError) as caught:
        resolve(spec)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_recipe_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no saved model \(no recipe\.json\)"):
        resolve(str(tmp_path))


def test_a_saved_folder_with_a_name_of_the_zoo_has_to_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("resnet18", meta=True).name == "torchvision:resnet18"  # a folder of something else
    (tmp_path / "resnet18" / "recipe.json").write_text("{}")
    with pytest.raises(SourceError, match=r"write './resnet18' or 'torchvision:resnet18'"):
        resolve("resnet18", meta=True)


# --- the input ---


@pytest.mark.parametrize(
    ("name", "size"),  # from the torchvision model pages: "inference transforms ... crop_size"
    [
        ("resnet50", 224),
        ("inception_v3", 299),
        ("efficientnet_b1", 240),
        ("efficientnet_b7", 600),
        ("efficientnet_v2_s", 384),
        ("efficientnet_v2_m", 480),
        ("regnet_y_400mf", 224),
        ("fcn_resnet50", 520),
    ],
)
def test_the_input_is_of_the_size_the_model_was_made_for(name: str, size: int) -> None:
    assert resolve(name, meta=True).example == (1, 3, size, size)


def test_the_input_of_a_timm_model_is_that_of_its_configuration() -> None:
    pytest.importorskip("timm")
    assert resolve("timm:tf_efficientnet_b1", meta=True).example == (1, 3, 240, 240)


def test_named_weights_decide_the_input() -> None:
    assert resolve("vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1", meta=True).example == (1, 3, 384, 384)


def test_a_given_input_wins(factories: str) -> None:
    assert resolve("resnet18", input="2x3x64x96", meta=True).example == (2, 3, 64, 96)
    assert resolve(f"{factories}:plain", meta=True).example == (1, 1, 224, 224)  # its convolution takes one channel


@given(st.tuples(*[st.integers(1, 4096)] * 4))
def test_an_input_shape_reads_back(shape: tuple[int, ...]) -> None:
    assert parse_input("x".join(map(str, shape))) == parse_input(shape) == shape


@given(st.text(alphabet="0123x,-. ²", max_size=14) | st.text(max_size=14))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    parts = text.strip().replace("X", "x").replace(",", "x").split("x")
    if len(parts) == 4 and all(p.isascii() and p.isdigit() and 0 < int(p) < 2**31 for p in parts):
        return
    with pytest.raises(SourceError, match="is no input shape"):
        parse_input(text)


@pytest.mark.parametrize(
    "value", ["0x3x8x8", "3x224x224", "1x3x224x-1", (1, 3, 8), (1, 3, 8, 8.0), (1, 3, 8, True), ()]
)
def test_an_impossible_shape_is_refused(value: Any) -> None:
    with pytest.raises(SourceError, match="1x3x224x224"):
        parse_input(value)


# --- building ---


def test_the_seed_fixes_the_weights_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, same, other = (resolve("squeezenet1_1", seed=seed).model for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "regnet_x_400mf", "lraspp_mobilenet_v3_large"])
def test_meta_and_real_builds_are_the_same_architecture_and_what_torchvision_builds(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # GoogLeNet and Inception warn when they are not told how to start
        meta = resolve(name, meta=True).model
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    extra |= {"weights_backbone": None} if name.startswith("lraspp") else {}
    expected = torchvision.models.get_model(name, weights=None, **extra)
    assert identity(meta) == identity(resolve(name).model) == identity(expected)
    assert meta.training


def test_num_classes_reaches_the_head() -> None:
    assert resolve("resnet18", num_classes=7, meta=True).model.fc.out_features == 7


def test_a_module_is_taken_as_it_is() -> None:
    model = Residual().eval()
    source = resolve(model)
    assert source.model is model
    assert not model.training
    assert (source.name, source.recipe, source.example) == ("Residual", None, (1, 3, 224, 224))
    with pytest.raises(SourceError, match="leave num_classes out"):
        resolve(model, num_classes=3)
    with pytest.raises(SourceError, match="no weights called 'DEFAULT'; give a file"):
        resolve(model, weights="DEFAULT")


@pytest.mark.parametrize("spec", ["resnet18", "inception_v3", "timm:resnet18"])
def test_a_recipe_builds_the_same_architecture(spec: str) -> None:
    if "timm" in spec:
        pytest.importorskip("timm")
    source = resolve(spec, num_classes=11, meta=True)
    assert source.recipe is not None
    assert identity(rebuild(source.recipe, meta=True)) == identity(source.model)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"kind": "torchvision"},
        {"kind": "pickle", "name": "x"},
        {"kind": "torchvision", "name": "resnet1"},
        {"kind": "torchvision", "name": 3},
        {"kind": "torchvision", "name": "resnet18", "options": {"no_such": 1}},
        {"kind": "torchvision", "name": "resnet18", "options": 3},
        {"kind": "timm", "name": "resnet1"},
        {"kind": "factory", "name": "nowhere"},
        {"kind": "factory", "name": "relative.py:f"},
        {"kind": "rewritten", "name": "x"},
        {"kind": "rewritten", "name": "x", "base": {}, "identity": "", "plan": {}},
        [],
    ],
)
def test_a_damaged_recipe_is_one_line(recipe: Any) -> None:
    with pytest.raises(ConvrewriteError) as caught:
        rebuild(recipe)
    assert "\n" not in str(caught.value)


# --- factories ---


def test_a_factory_in_a_file_is_called(factories: str) -> None:
    source = resolve(f"{factories}:Net", num_classes=9)
    assert source.model.head.out_features == 9
    assert source.recipe is not None
    assert identity(rebuild(source.recipe)) == identity(source.model)
    assert type(copy.deepcopy(source.model)) is type(source.model)


def test_a_module_object_is_copied(factories: str) -> None:
    source = resolve(f"{factories}:made")
    assert type(source.model).__name__ == "Net"
    assert source.model is not inspect.getmodule(type(source.model)).made  # type: ignore[union-attr]


def test_a_constructor_that_reads_its_weights_is_built_for_real_first(factories: str) -> None:
    model = resolve(f"{factories}:reads_weights", meta=True).model
    assert model.weight.is_meta
    assert model.scale == resolve(f"{factories}:reads_weights").model.scale


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nets_{random.getrandbits(40)}"
    (tmp_path / f"{name}.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert type(resolve(f"{name}:plain").model) is nn.Sequential


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("broken", "the factory failed: ValueError: no such width"),
        ("leaves", "the factory failed: SystemExit: 2"),
        ("needs", "needs arguments: depth"),
        ("returns_a_pair", "returned a tuple, not an nn.Module"),
        ("number", "is a int, not a function"),
        ("plane", "there is no 'plane' in it; did you mean 'plain'"),
    ],
)
def test_a_factory_that_fails_is_one_line(factories: str, factory: str, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(f"{factories}:{factory}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_factory_that_takes_no_classes_says_so(factories: str) -> None:
    with pytest.raises(SourceError, match="takes no 'num_classes'; drop --num-classes"):
        resolve(f"{factories}:plain", num_classes=3)


def test_a_file_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(SourceError, match="the file cannot be run: SyntaxError"):
        resolve(f"{tmp_path}/bad.py:f")


# --- recognising ---


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("shufflenet_v2_x1_0", {"num_classes": 10}),
        ("squeezenet1_1", {"num_classes": 3}),  # its head is a convolution
        ("inception_v3", {"transform_input": True, "init_weights": False}),
        ("googlenet", {"aux_logits": False, "init_weights": False}),
        ("mobilenet_v3_small", {}),
    ],
)
def test_a_torchvision_model_is_recognised(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    recipe = recognise(model, identity(model))
    assert recipe is not None
    assert recipe["name"] == name
    assert identity(rebuild(recipe, meta=True)) == identity(model)


def test_a_timm_model_is_recognised() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet26", num_classes=5, in_chans=1)
    recipe = recognise(model, identity(model))
    assert recipe is not None
    assert identity(rebuild(recipe, meta=True)) == identity(model)


def test_an_importable_class_without_arguments_is_recognised() -> None:
    model = Residual()
    expected = {"kind": "factory", "name": f"{Residual.__module__}:Residual", "options": {}}
    assert recognise(model, identity(model)) == expected


def test_what_cannot_be_built_again_is_not_recognised() -> None:
    class Local(nn.Module):
        pass

    with torch.device("meta"):
        changed = torchvision.models.alexnet()
    changed.classifier = nn.Sequential(changed.classifier)
    for model in (Local(), Residual(classes=9), changed):
        assert recognise(model, identity(model)) is None


# --- zoo weights change what is built ---


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3", "densenet121", "vit_b_16", "fcn_resnet50"])
def test_the_architecture_for_named_weights_is_the_one_torchvision_builds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _same_as_torchvision_with_weights(name, monkeypatch)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in SOURCES.get("torchvision").names() if "rcnn" not in n])
def test_the_architecture_for_all_weights_is_the_one_torchvision_builds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "detection" in torchvision.models.get_model_builder(name).__module__:
        pytest.skip("detectors are refused")
    _same_as_torchvision_with_weights(name, monkeypatch)


def _same_as_torchvision_with_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own builder, kept from downloading, against our recipe."""
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    for member in torchvision.models.get_model_weights(name).__members__:
        ours = resolve(name, weights=member, meta=True)
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            theirs = torchvision.models.get_model(name, weights=member)
        assert identity(ours.model) == identity(theirs), member


@pytest.mark.parametrize(
    ("spec", "weights", "classes", "says"),
    [
        ("resnet18", "DEFALT", None, "torchvision:resnet18: there are no weights 'DEFALT'; did you mean 'DEFAULT'"),
        ("resnet18", "DEFAULT", 10, "classify 1000 classes, but --num-classes 10 was asked for; drop --num-classes"),
        ("timm:resnet18", "a9_in1k", None, "there are no weights 'a9_in1k'; did you mean"),
        ("timm:resnet18", "DEFAULT", 10, "classify 1000 classes"),
        ("retinanet_resnet50_fpn", "DEFAULT", None, "build it in a function of your own"),
        ("math:sin", "DEFAULT", None, "a factory has no weights called 'DEFAULT'"),
    ],
)
def test_impossible_weights_are_refused_before_anything_is_built(
    spec: str, weights: str, classes: int | None, says: str
) -> None:
    if "timm" in spec:
        pytest.importorskip("timm")
    with pytest.raises(SourceError) as caught:
        resolve(spec, weights=weights, num_classes=classes)
    assert says in str(caught.value)


def test_the_default_weights_of_timm_fix_the_tag_in_the_recipe() -> None:
    pytest.importorskip("timm")
    source = resolve("timm:resnet18", weights="DEFAULT", meta=True)
    assert source.recipe == {"kind": "timm", "name": "resnet18.a1_in1k", "options": {}}


def test_every_kind_answers_every_question() -> None:
    class Net(nn.Module):
        pass

    for name in SOURCES.names():
        kind = SOURCES.get(name)
        assert isinstance(kind.order, int)
        assert kind.find("certainly no model") is None
        assert list(kind.recognise(Net())) == []
        assert all(isinstance(name, str) for name in kind.names())
    assert Request().weights is None
