"""A checkpoint is loaded whole or refused in one line, and nothing in it is ever unpickled."""

from __future__ import annotations

import argparse
import copy
import re
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from convrewrite.errors import SourceError
from convrewrite.sources import Source, resolve
from convrewrite.weights import is_file, load_weights, read_state

from .nets import Residual


def _source(model: nn.Module, **options: Any) -> Source:
    return Source("test:net", model, (1, 3, 8, 8), {"kind": "torchvision", "name": "resnet18", "options": options})


def _filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def _load(state: Any, path: Path, **options: Any) -> nn.Module:
    torch.save(state, path)
    model = Residual()
    load_weights(model, str(path), _source(model, **options))
    return model


@pytest.fixture
def state() -> dict[str, Tensor]:
    return _filled(Residual(), 0.5).state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def _all_half(model: nn.Module) -> bool:
    return all(bool((t == (0 if t.dtype == torch.int64 else 0.5)).all()) for t in model.state_dict().values())


# --- what fits ---


@pytest.mark.parametrize("key", ["", "state_dict", "model", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_state_dicts_are_unwrapped(state: dict[str, Tensor], path: Path, key: str, prefix: str) -> None:
    wrapped: Any = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    assert _all_half(_load({"epoch": 3, key: wrapped} if key else wrapped, path))


def test_safetensors_are_read(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    model = Residual()
    load_weights(model, str(path), _source(model))
    assert _all_half(model)


def test_a_checkpoint_without_batch_counters_fits(state: dict[str, Tensor], path: Path) -> None:
    assert _all_half(_load({k: v for k, v in state.items() if "num_batches" not in k}, path))


def test_half_precision_is_widened(state: dict[str, Tensor], path: Path) -> None:
    model = _load({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    assert _all_half(model)
    assert model.stem.weight.dtype == torch.float32


def test_models_that_look_at_version_notes_load_without_them(path: Path) -> None:
    # MNASNet takes a state dict without notes for one of an older layout, and rebuilds its stem.
    torch.save(dict(_filled(torchvision.models.mnasnet0_5(), 0.5).state_dict()), path)
    model = torchvision.models.mnasnet0_5()
    load_weights(model, str(path), _source(model))
    assert _all_half(model)


def test_old_densenet_files_are_renamed(path: Path) -> None:
    model = torchvision.models.DenseNet(4, (2, 2), 4)
    state = _filled(copy.deepcopy(model), 0.5).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, path)
    load_weights(model, str(path), _source(model))
    assert _all_half(model)


def test_heads_that_the_model_was_built_without_are_left_out(path: Path) -> None:
    full = torchvision.models.GoogLeNet(num_classes=3, aux_logits=True, init_weights=False)
    torch.save(_filled(full, 0.5).state_dict(), path)
    model = torchvision.models.GoogLeNet(num_classes=3, aux_logits=False, init_weights=False)
    load_weights(model, str(path), _source(model))
    assert _all_half(model)


def test_on_the_meta_device_a_file_is_only_checked(state: dict[str, Tensor], path: Path, tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    assert next(resolve("squeezenet1_1", weights=str(path), meta=True).model.parameters()).is_meta
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(SourceError, match="do not fit torchvision:squeezenet1_1"):
        resolve("squeezenet1_1", weights=str(tmp_path / "other.pth"), meta=True)


def test_a_given_module_is_not_touched(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    assert _all_half(resolve(model, weights=str(path)).model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


# --- what does not ---


def test_a_misfit_names_missing_unexpected_and_reshaped_tensors_in_one_line(
    state: dict[str, Tensor], path: Path
) -> None:
    state.pop("stem.bias")
    state["extra.weight"] = torch.zeros(1)
    state["stem.weight"] = torch.zeros(8, 1, 3, 3)
    with pytest.raises(SourceError) as caught:
        _load(state, path)
    assert str(caught.value) == (
        f"{path}: the weights do not fit test:net: 1 missing (stem.bias); 1 unexpected (extra.weight); "
        "1 of another shape (stem.weight (8, 1, 3, 3), wanted (8, 3, 3, 3)); "
        "they are of another architecture, or of another build of this one"
    )


def test_a_long_misfit_is_cut_short_and_counted(path: Path) -> None:
    with pytest.raises(SourceError, match=r"12 unexpected \(k0, k1, k2, and 9 more\)") as caught:
        _load({f"k{i}": torch.zeros(1) for i in range(12)}, path)
    assert len(str(caught.value)) < 600


def test_a_misfit_leaves_the_model_as_it_was(state: dict[str, Tensor], path: Path) -> None:
    state["head.weight"] = torch.zeros(7, 8)
    torch.save(state, path)
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SourceError):
        load_weights(model, str(path), _source(model))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_another_head_says_which_number_of_classes_fits(state: dict[str, Tensor], path: Path) -> None:
    state |= {"head.weight": torch.zeros(7, 8), "head.bias": torch.zeros(7)}
    with pytest.raises(SourceError, match="build the head for these weights with --num-classes 7"):
        _load(state, path)
    with pytest.raises(SourceError, match="--num-classes 5 built the head: give 7, or weights of 5 classes"):
        _load(state, path, num_classes=5)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        (Residual(), r"holds a pickled \S*Residual, and pickles are not loaded; save only the tensors"),
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "holds a pickled argparse.Namespace"),
        ({"epoch": 3}, "these entries are not tensors: epoch"),
        ({}, "an empty dictionary, not a state dict"),
        (torch.zeros(3), "a Tensor, not a state dict"),
        ([torch.zeros(3)], "a list, not a state dict"),
        ({3: torch.zeros(3)}, "not tensors: 3"),
    ],
)
def test_anything_but_a_state_dict_is_refused_in_one_line(saved: Any, says: str, path: Path) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        _load(saved, path)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_does_not(path: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, path)
    with pytest.raises(SourceError):
        read_state(path)
    assert not (tmp_path / "ran").exists()


def test_torchscript_is_refused_with_advice(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what we refuse is deprecated, too
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(SourceError, match=r"a TorchScript program, not a state dict; save torch\.jit\.load"):
        read_state(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 9, 200, 0.5, 0.99])
def test_a_truncated_file_is_one_line(state: dict[str, Tensor], tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(SourceError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_foreign_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text("<html>not found</html>\n" * 100)
    with pytest.raises(SourceError) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SourceError, match=r"no/such\.pth: there is no such file"):
        resolve("squeezenet1_1", weights="no/such.pth", meta=True)


def test_onnx_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07")
    with pytest.raises(SourceError, match=r"model\.onnx: ONNX files are not read.*the model that it was exported from"):
        resolve("squeezenet1_1", weights=str(path), meta=True)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V1", "a1_in1k", "tv_in1k"])
def test_names_of_weights_are_not_files(name: str) -> None:
    assert not is_file(name)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "dir/a", "./a", "A.SAFETENSORS", "model.bin"])
def test_paths_are_files(name: str) -> None:
    assert is_file(name)


# --- weights of a zoo ---


def test_named_torchvision_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _filled(torchvision.models.squeezenet1_1(), 0.5).state_dict()
    asked: list[str] = []

    def fetch(self: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(self.url)
        return state

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", fetch)
    assert _all_half(resolve("squeezenet1_1", weights="IMAGENET1K_V1").model)
    assert asked == ["https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"]


def test_without_a_network_named_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SourceError, match=r"'DEFAULT' could not be fetched \(URLError.*give a local file") as caught:
        resolve("squeezenet1_1", weights="DEFAULT")
    assert "\n" not in str(caught.value)


def test_without_a_network_a_plan_can_still_be_made() -> None:
    source = resolve("squeezenet1_1", weights="DEFAULT", meta=True)
    assert (source.weights, source.model.num_classes) == ("DEFAULT", 1000)


# --- checkpoints of Lightning ---


def _lightning(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, prefix: str = "net.") -> dict[str, Any]:
    """What Lightning writes: the network below an attribute of its module, and settings in a class of its own."""
    parts = ["lightning", "fabric", "utilities", "data"]
    for number in range(len(parts)):  # not the real one: Lightning need not be installed
        home = types.ModuleType(".".join(parts[: number + 1]))
        home.__path__ = []
        monkeypatch.setitem(sys.modules, home.__name__, home)
    settings = type("AttributeDict", (dict,), {"__module__": home.__name__})
    monkeypatch.setattr(home, "AttributeDict", settings, raising=False)
    entries = {prefix + key: tensor for key, tensor in state.items()}
    return {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 1,
        "state_dict": {**entries, "metric.total": torch.zeros(2)},
        "hyper_parameters": settings(lr=0.1),
    }


@pytest.mark.parametrize("prefix", ["net.", "model."])
def test_a_lightning_checkpoint_gives_the_network_below_its_attribute(
    state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    assert _all_half(_load(_lightning(state, monkeypatch, prefix), path))


def test_a_lightning_checkpoint_of_another_network_says_which_keys_are_missing(
    state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.pop(next(iter(state)))
    with pytest.raises(SourceError, match=r"the weights do not fit test:net: \d+ missing \(") as caught:
        _load(_lightning(state, monkeypatch), path)
    assert "\n" not in str(caught.value)


def test_a_lightning_checkpoint_with_other_objects_is_refused(
    state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {**_lightning(state, monkeypatch), "callbacks": argparse.Namespace(patience=3)}
    with pytest.raises(SourceError, match=r"holds a pickled argparse\.Namespace, and pickles are not loaded"):
        _load(saved, path)


def test_such_settings_excuse_nothing_in_a_file_of_another_kind(
    state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _lightning(state, monkeypatch)
    del saved["pytorch-lightning_version"]
    with pytest.raises(SourceError, match=r"holds a pickled lightning\.\S*AttributeDict, and pickles are not loaded"):
        _load(saved, path)


# --- what is said about a choice, and checkpoints of training scripts ---


def _notes(saved: Any, path: Path) -> tuple[str, ...]:
    torch.save(saved, path)
    model = Residual()
    notes = load_weights(model, str(path), _source(model))
    assert _all_half(model)
    return notes


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_where_there_is_no_choice_nothing_is_said(state: dict[str, Tensor], path: Path, prefix: str) -> None:
    assert _notes({"state_dict": {prefix + key: value for key, value in state.items()}}, path) == ()


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "student.net.", "model.module."])
def test_the_prefix_that_was_taken_off_is_named(
    state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    said = f"{path}: the entries below '{prefix}' were taken, 1 other left out"
    assert _notes(_lightning(state, monkeypatch, prefix), path) == (said,)


def test_two_networks_in_one_file_are_both_named(state: dict[str, Tensor], path: Path) -> None:
    both = {f"model.{key}": value for key, value in state.items()}
    both |= {f"teacher.{key}": torch.zeros_like(value) for key, value in state.items()}
    said = f"{path}: the entries below 'model.' were taken; those below 'teacher.' would fit too"
    assert _notes({"state_dict": both}, path) == (said,)


def test_a_checkpoint_of_torchvisions_scripts_is_read_with_its_arguments(state: dict[str, Tensor], path: Path) -> None:
    average = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
    saved = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "model_ema": {"n_averaged": torch.tensor(3), **average},
        "args": argparse.Namespace(model="resnet18", epochs=3, lr=0.1),
    }
    said = f"{path}: the weights under 'model' were taken; 'model_ema' is there too"
    assert _notes(saved, path) == (said,)


def test_averaged_weights_alone_are_read_without_their_counter(state: dict[str, Tensor], path: Path) -> None:
    average = {f"module.{key}": value for key, value in state.items()}
    said = f"{path}: the entries below 'module.' were taken, 1 other left out"
    assert _notes({"model_ema": {"n_averaged": torch.tensor(3), **average}}, path) == (said,)


def test_a_namespace_anywhere_else_is_still_a_pickle(state: dict[str, Tensor], path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds a pickled argparse\.Namespace, and pickles are not loaded"):
        _load({"state_dict": state, "owner": argparse.Namespace(name="x")}, path)


def test_arguments_excuse_no_other_class(state: dict[str, Tensor], path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds a pickled \S*PosixPath, and pickles are not loaded"):
        _load({"model": state, "args": argparse.Namespace(output=path)}, path)
