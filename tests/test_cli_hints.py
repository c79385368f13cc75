"""What the command line says early, and in a way that a newcomer can act on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.main import main
from torch import nn

import convrewrite as cr
from convrewrite.plans import Plan
from convrewrite.report import render_plan
from convrewrite.rulefile import load_rules


def test_a_misspelt_rule_file_is_told_without_importing_torch() -> None:
    code = (
        "import sys; from convrewrite.cli.main import main\n"
        "try: main(['plan', 'resnet18', '--rules', 'acmx'], prog_name='convrewrite')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert done.stderr == "error: no rule file 'acmx'; did you mean 'acmix'?\n"


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_wrong_setting_is_wrong_usage_before_the_model_is_looked_for(command: str) -> None:
    done = CliRunner().invoke(main, [command, "no_such_model", "--rules", "acmix", "--set", "window"])
    assert done.exit_code == 2 and "'window' is not RULE.option=value" in done.output


def test_a_block_given_as_rule_file_names_the_files_that_use_it() -> None:
    with pytest.raises(cr.ConvrewriteError) as told:
        load_rules("mhsa")
    assert str(told.value) == "no rule file 'mhsa'; that is a block, used by the rule files botnet, hybrid"


def test_a_block_that_no_rule_file_uses_is_a_misspelt_name_like_any_other() -> None:
    with pytest.raises(cr.ConvrewriteError, match=r"no rule file 'channel_attention'; (give a path|did you mean)"):
        load_rules("channel_attention")


def test_a_file_that_is_no_plan_says_how_one_is_made(tmp_path: Path) -> None:
    place = tmp_path / "x.json"
    place.write_text("not JSON")
    done = CliRunner().invoke(main, ["apply", "resnet18", "--plan", str(place)])
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert done.output.endswith("make it with 'convrewrite plan --out'\n")


def test_a_missing_plan_is_told_without_an_error_number(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["apply", "resnet18", "--plan", str(tmp_path / "no.json")])
    assert done.output == f"error: {tmp_path / 'no.json'}: cannot be read: No such file or directory\n"


def _resnet_plan() -> Plan:
    import torch
    import torchvision

    with torch.device("meta"):
        return cr.plan(torchvision.models.resnet50(), "acmix")


def test_a_plan_of_one_kind_of_block_fits_a_hundred_columns_and_names_the_block_once() -> None:
    text = render_plan(_resnet_plan(), "text")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("=> acmix") == 1 and text.count("  ~  layer") == 16


def test_edits_of_one_rule_that_differ_keep_their_options_on_their_own_rows() -> None:
    import torch
    import torchvision

    rule = cr.Rule(
        id="r",
        match={"role": "bottleneck_spatial", "stage": {"from_end": [1, 2]}},
        replace={"block": "acmix", "heads": "out_channels // 64"},
    )
    with torch.device("meta"):
        plan = cr.plan(torchvision.models.resnet50(), rule)
    text = render_plan(plan, "text")
    assert text.count("=> acmix") == len(plan.edits) == 9
    assert text.count("heads=4 ") == 6 and text.count("heads=8 ") == 3


def test_diff_at_two_inputs_says_that_costs_do_not_compare(tmp_path: Path) -> None:
    small = str(tmp_path / "small")
    run = CliRunner().invoke
    made = run(main, ["apply", "resnet18", "--rules", "danet", "--input", "1x3x64x64", "--out", small])
    assert made.exit_code == 0, made.output
    differing = run(main, ["diff", "resnet18", small, "--format", "json"])
    assert "note: inputs 1x3x224x224 and 1x3x64x64: sizes and FLOPs do not compare" in differing.stderr
    same = run(main, ["diff", "resnet18", small, "--input", "1x3x64x64", "--format", "json"])
    assert same.stderr == "" and json.loads(same.stdout)


def test_a_wrong_input_is_wrong_usage_without_importing_torch() -> None:
    code = (
        "import sys; from convrewrite.cli.main import main\n"
        "try: main(['inspect', 'resnet18', '--input', '3x12x12'], prog_name='convrewrite')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "'3x12x12' is not batch x channels x height x width, as in 1x3x224x224" in done.stderr


@pytest.mark.parametrize("command", [["inspect"], ["plan", "--rules", "acmix"], ["apply", "--rules", "acmix"], ["zoo"]])
def test_an_out_that_cannot_be_written_is_told_before_the_model_is_looked_for(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, [*command, "no_such_model", "--out", str(tmp_path / "file" / "x")])
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert "no_such_model" not in done.output


def test_what_can_be_written_leaves_no_trace_of_the_trial(tmp_path: Path) -> None:
    CliRunner().invoke(main, ["inspect", "no_such_model", "--out", str(tmp_path / "deep" / "x.txt")])
    assert list(tmp_path.iterdir()) == []


def test_the_zoo_refuses_a_name_that_nothing_knows_as_wrong_usage() -> None:
    done = CliRunner().invoke(main, ["zoo", "nope"])
    assert done.exit_code == 2
    assert "'nope' is neither a group (torchvision, timm," in done.output
    assert "|" not in done.output.partition("Error")[2]


@pytest.mark.parametrize("device", ["foo", "cuda:77", "mps"])
def test_a_device_that_is_not_here_names_those_that_are(device: str, tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n")
    done = CliRunner().invoke(main, ["apply", f"{net}:make", "--rules", "sasa-exact", "--device", device])
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert f"device '{device}' cannot be used" in done.output
    if not torch.cuda.is_available():
        assert "this machine has cpu" in done.output


def test_rules_for_a_model_name_the_files_that_fit_and_those_that_do_not() -> None:
    """ResNet-18 has 16 3x3 in its blocks (2 x 2 per stage, four stages) and no bottleneck."""
    done = CliRunner().invoke(main, ["rules", "--for", "resnet18", "--input", "1x3x64x64"])
    assert done.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.strip()}
    assert rows["sasa-exact"] == ["16", "layer1.0.conv1"]
    assert rows["outlooker-stage3"] == ["1", "layer3.1.conv2"]
    unfit = done.output.splitlines()[-1]
    assert unfit.startswith("No site: ") and "acmix" in unfit and "sasa-exact" not in unfit


def test_rules_for_a_model_is_no_option_of_a_command_below() -> None:
    done = CliRunner().invoke(main, ["rules", "--for", "resnet18", "list"])
    assert done.exit_code == 2 and "not of 'rules list'" in done.output


def test_a_kernel_that_cannot_run_where_the_model_is_is_refused_when_it_is_set() -> None:
    from convrewrite.blocks.base import BLOCKS
    from convrewrite.sites import ConvSpec, Place

    spec = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
    block = BLOCKS.get("acmix")(Place((1, 8, 6, 6), (1, 8, 6, 6), spec), BLOCKS.get("acmix").Options(heads=2))
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        with pytest.raises(cr.ConvrewriteError, match="'triton' cannot do this: it runs on cuda, the tensors are on"):
            cr.set_backend(block, "triton")
    assert cr.set_backend(block, "aten") == 1


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        (["--out", "a.md", "--rounds", "1"], "--out FILE --rounds 1"),
        (["--peers", "p", "--out", "a.md"], "--peers PEERS --out FILE"),
        (["--out=a.md", "--peers=p"], "--out=FILE --peers=PEERS"),
        (["--rounds", "1"], "--rounds 1"),
    ],
)
def test_the_recorded_command_names_places_and_does_not_spell_them_out(
    typed: list[str], recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convrewrite.cli.bench_command import _typed

    monkeypatch.setattr(sys, "argv", ["x", "bench", "blocks", *typed])
    assert _typed() == f"convrewrite bench blocks {recorded}"


def test_the_notes_of_a_file_of_weights_are_said_once(tmp_path: Path) -> None:
    net = tmp_path / "net.py"
    net.write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n")
    state = {f"model.0.{key}": value for key, value in torch.nn.Conv2d(3, 4, 3).state_dict().items()}
    torch.save({"state_dict": {**state, "metric": torch.zeros(1)}}, tmp_path / "last.ckpt")
    done = CliRunner().invoke(main, ["inspect", f"{net}:make", "--weights", str(tmp_path / "last.ckpt")])
    assert done.exit_code == 0
    assert done.stderr == f"note: {tmp_path / 'last.ckpt'}: the entries below 'model.' were taken, 1 other left out\n"


def test_a_wrong_option_is_told_where_the_rule_finds_no_site_too() -> None:
    rules = {
        "version": 1,
        "name": "t",
        "rules": [{"id": "r", "match": {"kernel": 11}, "replace": {"block": "acmix", "headz": 4}}],
    }
    with pytest.raises(cr.ConvrewriteError, match=r"^rules: acmix has no option 'headz'; did you mean 'heads'\?$"):
        cr.plan(nn.Sequential(nn.Conv2d(3, 4, 3)), rules, example=(1, 3, 8, 8))
