"""Every example runs, quickly, and prints what it promises."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.main import main as command_line

from convrewrite.blocks.base import BLOCKS

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SECONDS = 10.0  # of CPU time, since a busy machine must not fail a test

# file: what must stand in its output. A new example needs a line here: an example that claims nothing teaches nothing.
PROMISES: dict[str, list[str]] = {
    "compare": [
        r"^modules that changed: layer1.0.conv2 layer2.0.conv2 layer3.0.conv2 layer4.0.conv2$",
        r"^Diff: .* convolutions \+0 -0 ~4",
    ],
    "finetune": [
        r"^drift at start: 0\.0$",
        r"^step 6: anneal 1\.00, loss \d",
        r"^finalized: params 3,606,304 => 3,410,224$",
        r"^same output, bit for bit: True$",
    ],
    "finetune_folder": [
        r"^blocks: anneal 0\.00, agreement 1\.00$",
        r"^all: anneal 1\.00, agreement \d\.\d\d$",
        r"^files: curves\.png history\.csv model\.safetensors plan\.json recipe\.json training\.json$",
        r"^same output, bit for bit: True$",
    ],
    "hf_trainer": [
        r"^class: ResNetForImageClassification$",
        r"^after 6 steps: anneal 1\.00$",
        r"^same output, bit for bit: True$",
    ],
    "lightning_finetune": [r"^after 6 steps: anneal 1\.00$", r"^same output, bit for bit: True$"],
    "own_block": [
        r"^1 after: context_gate, 82 parameters, start exact \(zero gate\)$",
        r"^laws held: True$",
        r"^same output, bit for bit: True$",
    ],
    "own_pass": [
        r"^passes: capture plan edit calibrate transfer freeze verify$",
        r"^trainable: ",
        r"^original still trainable: True$",
    ],
    "own_rules": [
        r"^layer3.1.conv2: acmix with 8 heads, start exact \(blend\)$",
        r"^layer4.1.conv2: acmix with 16 heads, start exact \(blend\)$",
        r"^budget: params \+4\.\d %$",
        r"^as an object: \['layer4.0.conv2', 'layer4.1.conv2', 'layer4.2.conv2'\]$",
        r"^refused: .*unknown key; did you mean 'role'\?$",
    ],
    "picture": [r"^wrote .*picture\.svg$"],
    "rewrite_resnet": [
        r"^17 convolutions, roles ",
        r"^Plan: 4 to replace, 0 to insert",
        r"does not match: role pointwise, wanted bottleneck_spatial",
        r"^laws held: True$",
        r"^same output, bit for bit: True$",
    ],
    "save_and_load": [r"^files: model.safetensors plan.json recipe.json ", r"^same output, bit for bit: True$"],
    "timm_train": [
        r"^decay: carried 0\.05, carried, no decay 0\.0, new 0\.05, new, no decay 0\.0$",
        r"^same output, bit for bit: True$",
    ],
}
NEEDS = {"hf_trainer": "transformers", "lightning_finetune": "lightning", "timm_train": "timm"}
ARGUMENTS = {"picture": ["resnet18", str(FOLDER / "late_stages.yaml"), "picture.svg"]}


@pytest.fixture(autouse=True)
def _blocks_as_they_were() -> Iterator[None]:
    """An example may register a block; other tests must not see it."""
    before = set(BLOCKS.names())
    yield
    for name in set(BLOCKS.names()) - before:
        del BLOCKS._entries[name]


def test_every_example_has_a_promise() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(PROMISES)


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_example_does_what_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FOLDER / f"{name}.py"
    if name in NEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that are not ours, while they are imported
            pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), *ARGUMENTS.get(name, [])])
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)
    begun = time.process_time()
    with torch.random.fork_rng():
        spec.loader.exec_module(example)
        example.main()
    seconds = time.process_time() - begun
    printed = capsys.readouterr().out
    for promise in PROMISES[name]:
        assert re.search(promise, printed, re.MULTILINE), f"{promise} is not in:\n{printed}"
    assert seconds < SECONDS


@pytest.mark.parametrize("name", ["late_stages.yaml", "within_budget.yaml"])
def test_the_tests_of_example_rules_pass(name: str) -> None:
    done = CliRunner().invoke(command_line, ["rules", "test", str(FOLDER / name)])
    assert done.exit_code == 0, done.output


def test_every_example_rule_file_is_used_by_an_example_or_a_test() -> None:
    text = "".join(path.read_text("utf-8") for path in FOLDER.glob("*.py")) + Path(__file__).read_text("utf-8")
    unused = [p.name for p in FOLDER.glob("*.yaml") if p.name not in text and f"{p.stem}.py" not in text]
    assert unused == []
