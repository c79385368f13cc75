"""What the command line says early, and in a way that a newcomer can act on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from convrewrite.cli.main import main

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
