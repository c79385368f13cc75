"""Models of packages that need not be installed (transformers, segmentation-models-pytorch), torch.hub, and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convrewrite as cr
from convrewrite.errors import SourceError
from convrewrite.identity import identity
from convrewrite.sources import rebuild, recognise, resolve
from convrewrite.sources.base import SOURCES, require, split_options

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "depths": [1, 1],
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "num_labels": 3,
}
HUB = """
from torch import nn
dependencies = ["torch"]

def small(pretrained=True, width=4):
    assert not pretrained, "it would download"
    return nn.Sequential(nn.Conv2d(3, width, 3))

def number():
    return 3

def broken():
    raise ValueError("no such thing\\nsecond line")
"""


# --- options ---


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("resnet18", ("resnet18", {})),
        ("timm:resnet50?features_only=1", ("timm:resnet50", {"features_only": 1})),
        ("a?x=[1,2]&y=true&z=None&w=relu", ("a", {"x": [1, 2], "y": True, "z": None, "w": "relu"})),
        ("a?x=1.5&y=a=b", ("a", {"x": 1.5, "y": "a=b"})),
    ],
)
def test_options_follow_a_question_mark(spec: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert split_options(spec) == expected


@pytest.mark.parametrize("spec", ["a?", "a?x", "a?x=", "a?=1", "a?x=1&x=2", "a?x=1&", "a?no-name=1"])
def test_other_text_after_a_question_mark_is_refused_in_one_line(spec: str) -> None:
    with pytest.raises(SourceError, match="is no option of a model; write 'name") as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


def test_options_reach_the_builder_of_torchvision_and_are_part_of_the_recipe() -> None:
    source = resolve("torchvision:resnet18?num_classes=7&zero_init_residual=true", meta=True)
    assert source.name == "torchvision:resnet18?num_classes=7&zero_init_residual=true"
    assert source.recipe is not None
    assert source.recipe["options"] == {"num_classes": 7, "zero_init_residual": True}
    assert identity(rebuild(source.recipe, meta=True)) == identity(source.model)


def test_a_builder_that_does_not_know_an_option_says_so_in_one_line() -> None:
    with pytest.raises(SourceError, match=r"the model cannot be built: TypeError.*widht") as caught:
        resolve("torchvision:resnet18?widht=3", meta=True)
    assert "\n" not in str(caught.value)


def test_the_number_of_classes_is_given_once() -> None:
    with pytest.raises(SourceError, match="given twice; drop --num-classes"):
        resolve("resnet18?num_classes=3", num_classes=4)


def test_features_only_of_timm_gives_the_feature_maps_and_saves_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is missing: pip install 'convrewrite[timm]'")
    source = resolve("timm:resnet18?features_only=1&out_indices=[1,2]")
    x = torch.rand(2, 3, 64, 64)
    assert [tuple(t.shape[1:]) for t in source.model(x)] == [(64, 16, 16), (128, 8, 8)]
    new, report = cr.rewrite(source.model, "gpsa-late", example=(2, 3, 64, 64), name=source.name, source=source.recipe)
    assert report.ok and isinstance(new, type(source.model))
    cr.save(new, tmp_path / "saved", report=report)
    again = cr.load(tmp_path / "saved").eval()
    assert all(torch.equal(a, b) for a, b in zip(again(x), new.eval()(x), strict=True))


# --- packages that are missing ---


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    with pytest.raises(SourceError, match=r"Such Thing is not installed; pip install 'convrewrite\[such\]'"):
        require("no_such_package_at_all", "such", title="Such Thing")


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ("hf:resnet", "transformers"),
        ("smp:Unet", "segmentation_models_pytorch"),
        ("ultralytics:yolov8n", "ultralytics"),
    ],
)
def test_an_optional_source_without_its_package_is_one_line(
    spec: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(SourceError, match=r"is not installed; pip install 'convrewrite\[(hf|smp|ultralytics)\]'"):
        resolve(spec)


# --- transformers ---


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is missing: pip install 'convrewrite[hf]'")


@pytest.fixture
def folder(tmp_path: Path, transformers: Any) -> Path:
    """A small classifier, saved by transformers itself."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**SMALL)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "net", safe_serialization=True)
    return tmp_path / "net"


def test_a_folder_of_transformers_is_the_model_with_its_weights(folder: Path, transformers: Any) -> None:
    theirs = transformers.ResNetForImageClassification.from_pretrained(folder).eval()
    source = resolve(f"hf:{folder}")
    assert type(source.model) is type(theirs) and source.model.training
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(source.model.eval()(x).logits, theirs(x).logits)


def test_a_model_with_named_outputs_is_rewritten_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    source = resolve(f"hf:{folder}")
    new, report = cr.rewrite(source.model, "acmix", example=(2, 3, 64, 64), name=source.name, source=source.recipe)
    assert report.ok and {drift.mode: drift.max_relative for drift in report.drift}["eval"] <= 1e-5
    x = torch.rand(2, 3, 64, 64)
    assert type(new.eval()(x)).__name__ == type(source.model(x)).__name__
    cr.save(new, tmp_path / "saved", report=report)
    for file in folder.iterdir():
        file.unlink()  # the recipe holds the config: the folder is not needed any more
    assert torch.equal(cr.load(tmp_path / "saved").eval()(x).logits, new(x).logits)


def test_a_transformers_object_is_recognised(folder: Path, transformers: Any) -> None:
    model = transformers.ResNetForImageClassification.from_pretrained(folder)
    found = recognise(model, identity(model))
    assert found is not None and identity(rebuild(found)) == identity(model)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("hf:resnet?depths=[1,1,1,1]", "ResNetForImageClassification"),
        ("hf:ResNetBackbone?depths=[1,1,1,1]", "ResNetBackbone"),
        ("hf:resnet?class=ResNetModel", "ResNetModel"),
        ("hf:mobilenet_v2", "MobileNetV2ForImageClassification"),
        ("hf:detr", "DetrForObjectDetection"),
    ],
)
def test_a_model_type_or_class_of_transformers_is_built_from_its_default_config(spec: str, kind: str) -> None:
    assert type(resolve(spec, meta=True).model).__name__ == kind


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hf:resnt", "transformers has no vision model 'resnt'; did you mean 'resnet'"),
        ("hf:./nowhere", "there is no folder with a config.json"),
        ("hf:resnet?depth=[1]", "ResNetConfig has no 'depth'; did you mean 'depths'"),
        ("hf:resnet?class=ResNetModle", "transformers has no model class 'ResNetModle'; did you mean 'ResNetModel'"),
        ("hf:nobody/nothing", "cannot be built"),  # tests have no network
    ],
)
def test_wrong_names_of_transformers_are_one_line(spec: str, says: str) -> None:
    with pytest.raises(SourceError, match=says.replace("[", r"\[").replace(".", r"\.")) as caught:
        resolve(spec, meta=True)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a readable config"),
        ("[1]", "this is a list, not a config"),
        ('{"model_type": "resnt"}', "unknown model type 'resnt'; did you mean 'resnet'"),
        (
            json.dumps({**SMALL, "auto_map": {"AutoModel": "mine.Net"}}),
            "code that comes with the model, which is not run",
        ),
        (json.dumps({**SMALL, "depths": "many"}), "cannot be built"),
    ],
)
def test_a_broken_config_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=says) as caught:
        resolve(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_weights_of_another_class_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(SourceError, match="the weights lack classifier"):
        resolve(f"hf:{folder}", num_classes=5)


# --- segmentation-models-pytorch ---


@pytest.fixture
def smp() -> Any:
    reason = "segmentation-models-pytorch is missing: pip install 'convrewrite[smp]'"
    return pytest.importorskip("segmentation_models_pytorch", reason=reason)


def test_a_unet_is_built_without_a_download_and_every_convolution_is_a_site(smp: Any) -> None:
    source = resolve("smp:Unet?encoder_name=resnet18", num_classes=3, meta=True)
    theirs = smp.Unet(encoder_name="resnet18", encoder_weights=None, classes=3)
    assert list(source.model.state_dict()) == list(theirs.state_dict())
    sites = cr.inspect(source.model, example=(1, 3, 64, 64))
    assert len(sites) == sum(isinstance(module, nn.Conv2d) for module in theirs.modules())
    assert source.recipe is not None
    assert identity(rebuild(source.recipe, meta=True)) == identity(source.model)


@pytest.mark.usefixtures("smp")
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("smp:Unett", "has no architecture 'Unett'; did you mean 'Unet'"),
        ("smp:Unet?encoder_name=resnt18", "smp:Unet: there is no encoder 'resnt18'; did you mean 'resnet18'"),
    ],
)
def test_wrong_names_of_segmentation_models_are_one_line(spec: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        resolve(spec, meta=True)


# --- torch.hub ---


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "hubconf.py").write_text(HUB)
    return tmp_path


def test_an_entry_of_a_local_repository_is_called_without_pretrained_weights(repository: Path) -> None:
    source = resolve(f"hub:{repository}:small?width=7")
    assert source.model[0].out_channels == 7  # type: ignore[index]
    assert source.recipe is not None and identity(rebuild(source.recipe)) == identity(source.model)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("smal", "its hubconf.py has no 'smal'; did you mean 'small'"),
        ("number", "the entry returned a int, not an nn.Module"),
        ("broken", "the entry failed: ValueError: no such thing$"),
        ("small?widht=3", "the factory takes no 'widht'; did you mean 'width'"),
    ],
)
def test_an_entry_that_fails_is_one_line(repository: Path, entry: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        resolve(f"hub:{repository}:{entry}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hub:small", "names no entry; write 'hub:path/to/repository:entry'"),
        ("hub:./nowhere:small", "there is no such folder; or write 'hub:owner/name:entry'"),
        ("hub:nobody/nothing:small", "the entry failed"),  # tests have no network
    ],
)
def test_a_repository_that_is_not_there_is_one_line(
    spec: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SourceError, match=says) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_hubconf_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"this folder has no hubconf\.py"):
        resolve(f"hub:{tmp_path}:small")


def test_prefixed_kinds_suggest_nothing_where_they_were_not_asked() -> None:
    assert all(not SOURCES.get(kind).names() for kind in ("hf", "smp", "ultralytics", "hub"))
