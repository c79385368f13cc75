"""The command line: what it prints, how it exits; what goes wrong is one line and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from convrewrite.cli.main import COMMANDS, main

import convrewrite as cr
from convrewrite.blocks.base import BLOCKS

NETS = Path(__file__).parent / "nets.py"
NET = f"{NETS}:Residual"
OTHER = f"{NETS}:Plain"
SIZE = ("--input", "1x3x12x12")
RULES = ("--rules", "acmix", *SIZE)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def done(*args: object) -> Result:
    """A run that has to end well."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def process(*args: object, code: str = "from convrewrite.cli.main import main; main()") -> subprocess.Popen[str]:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also below a nohup
    command = [sys.executable, "-W", "error", "-c", heard + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network, rewritten by a plan and saved; the plan lies beside it."""
    folder = tmp_path_factory.mktemp("saved")
    done("plan", NET, *RULES, "--out", folder / "plan.json")
    done("apply", NET, "--plan", folder / "plan.json", "--out", folder / "model")
    return folder


# --- commands that end well


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    text = done(command, "--help").stdout
    assert text.startswith("Usage: ")
    assert "--help" in text


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\nfrom convrewrite.cli.main import main, COMMANDS\n"
        "calls = [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS), ['rules', 'schema']]\n"
        "for call in calls:\n"
        "    try: main(call)\n"
        "    except SystemExit as end: assert not end.code, call\n"
        "    assert not {'torch', 'torchvision', 'timm'} & set(sys.modules), call\n"
    )
    child = process(code=code)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


def test_inspect_lists_the_convolutions_of_the_network() -> None:
    text = done("inspect", NET, *SIZE).stdout
    # stem, 3 in each of 4 bottlenecks, and the projection of the strided one
    assert "14 convolutions" in text
    assert "layer2.0.skip" in text


def test_inspect_json_parses_and_the_selector_chooses() -> None:
    found = json.loads(done("inspect", NET, *SIZE, "--json", "--select", "role:bottleneck_spatial").stdout)
    text = json.dumps(found)
    assert all(f'"layer{s}.{b}.conv2"' in text for s in (1, 2) for b in (0, 1))
    assert '"stem"' not in text
    assert '"layer1.0.conv1"' not in text


@pytest.mark.parametrize("format_", ["json", "markdown", "html", "text"])
def test_every_format_names_the_edits(format_: str) -> None:
    text = done("plan", NET, *RULES, "--format", format_).stdout
    assert "layer1.0.conv2" in text
    if format_ == "json":
        json.loads(text)


def test_plan_exits_with_3_only_if_asked_and_only_if_there_is_something_to_do(saved: Path, tmp_path: Path) -> None:
    assert run("plan", NET, *RULES).exit_code == 0
    assert run("plan", NET, *RULES, "--exit-code").exit_code == 3
    idle = tmp_path / "idle.yaml"
    match = {"match": {"kernel": 9}, "replace": {"block": "acmix"}, "expect": {"sites": ">=0"}}
    idle.write_text(yaml.safe_dump({"version": 1, "name": "idle", "rules": [{"id": "none", **match}]}))
    assert run("plan", NET, "--rules", idle, *SIZE, "--exit-code").exit_code == 0


def test_why_tells_about_one_site() -> None:
    text = done("plan", NET, *RULES, "--why", "stem").stdout
    assert "stem" in text
    assert "bottleneck_spatial" in text


def test_a_set_option_reaches_the_blocks(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done("plan", NET, *RULES, "--set", "bottleneck-3x3.window=3", "--set", "heads=2", "--out", out)
    edits = cr.Plan.from_json(out.read_text()).edits
    assert {(e.options["window"], e.options["heads"]) for e in edits} == {(3, 2)}


def test_applying_a_saved_plan_is_applying_its_rules(saved: Path, tmp_path: Path) -> None:
    done("apply", NET, *RULES, "--out", tmp_path / "model")
    one, two = cr.load(tmp_path / "model").state_dict(), cr.load(saved / "model").state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
    assert (tmp_path / "model/plan.json").read_text() == (saved / "model/plan.json").read_text()


def test_a_saved_model_is_bitwise_what_rewrite_gives(saved: Path) -> None:
    from convrewrite.sources import resolve

    source = resolve(NET, input="1x3x12x12")  # seed 0, as the command's default
    expected, _ = cr.rewrite(source.model, "acmix", example=source.example)
    loaded = cr.load(saved / "model")
    x = torch.randn(2, 3, 12, 12)
    assert loaded.training == expected.training
    assert torch.equal(loaded.eval()(x), expected.eval()(x))


def test_a_saved_folder_is_a_model_to_inspect_and_to_compare(saved: Path) -> None:
    text = done("inspect", saved / "model", *SIZE).stdout
    assert "14 convolutions" in text
    compared = json.loads(done("diff", NET, saved / "model", *SIZE, "--format", "json").stdout)
    assert "layer1.0.conv2" in json.dumps(compared)


def test_out_holds_model_recipe_plan_and_all_reports(saved: Path) -> None:
    names = {"model.safetensors", "recipe.json", "plan.json", "report.txt", "report.md", "report.json", "report.html"}
    assert {p.name for p in (saved / "model").iterdir()} == names
    json.loads((saved / "model/report.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_is_that_of_the_saved_weights(dtype: str, tmp_path: Path) -> None:
    result = done("apply", NET, *RULES, "--dtype", dtype, "--out", tmp_path / "model")
    assert "7 laws held" in result.stdout
    assert {str(p.dtype) for p in cr.load(tmp_path / "model").parameters()} == {f"torch.{dtype}"}


def test_channels_last_holds_the_laws_and_gives_the_same_weights(saved: Path, tmp_path: Path) -> None:
    assert "7 laws held" in done("apply", NET, *RULES, "--channels-last", "--out", tmp_path / "model").stdout
    one, two = cr.load(tmp_path / "model").state_dict(), cr.load(saved / "model").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


def test_an_emitted_graph_is_written_and_may_be_overwritten_by_another_form(
    tmp_path: Path, close: Callable[[Any, Any], None]
) -> None:
    out = tmp_path / "model"
    done("apply", NET, *RULES, "--out", out, "--emit", "graph")
    assert "def forward(self" in (out / "graph.txt").read_text()
    done("apply", NET, *RULES, "--out", out, "--emit", "exported", "--overwrite")
    assert not (out / "graph.txt").exists()
    x = torch.randn(2, 3, 12, 12)
    program = torch.export.load(out / "model.pt2").module()
    with torch.no_grad():
        close(program(x), cr.load(out).eval()(x))


def test_overwrite_spares_a_file_of_the_users_own(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done("apply", NET, *RULES, "--out", out)
    (out / "notes.txt").write_text("mine")
    line = one_line(run("apply", NET, *RULES, "--out", out, "--overwrite"))
    assert "notes.txt" in line
    assert (out / "notes.txt").read_text() == "mine"


def test_emit_compiled_counts_graph_breaks(tmp_path: Path) -> None:
    result = done("apply", NET, *RULES, "--out", tmp_path / "model", "--emit", "compiled")
    assert "compile: 0 graph breaks, 0 before" in result.stderr


@pytest.mark.slow
def test_emit_onnx_runs_elsewhere_with_the_same_output(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model"
    done("apply", NET, *RULES, "--out", out, "--emit", "onnx")
    session = runtime.InferenceSession(out / "model.onnx")
    x = torch.randn(2, 3, 12, 12)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = cr.load(out).eval()(x)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_zoo_model_goes_the_same_way() -> None:
    assert "20 convolutions" in done("inspect", "resnet18", "--input", "1x3x32x32").stdout


# --- rules and blocks


def test_rules_lists_every_built_in_file_and_show_prints_one() -> None:
    text = done("rules").stdout
    assert text == done("rules", "list").stdout
    for path in (NETS.parents[1] / "rules").glob("*.yaml"):
        assert path.stem in text
    assert yaml.safe_load(done("rules", "show", "acmix").stdout)["name"] == "acmix"


def test_a_new_rule_file_passes_its_own_tests_and_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done("rules", "new", "mine")
    assert "of 0" not in done("rules", "test", "mine.yaml").stdout
    assert "the file exists" in one_line(run("rules", "new", "mine"))


def test_a_rule_test_that_expects_the_wrong_sites_fails_with_1(tmp_path: Path) -> None:
    rule = {"id": "r", "match": {"role": "bottleneck_spatial"}, "replace": {"block": "acmix"}}
    content = {"version": 1, "name": "t", "rules": [rule], "tests": [{"model": NET, "sites": {"r": 5}}]}
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(content))
    result = run("rules", "test", path)
    assert result.exit_code == 1
    assert "0 of 1 tests passed" in result.stdout


def test_the_schema_is_one_that_rule_files_can_be_checked_with() -> None:
    schema = json.loads(done("rules", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["type"] == "object" or "$ref" in schema
    resolved = list(_references(schema))
    assert resolved
    for reference in resolved:
        found: Any = schema
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]


def test_blocks_lists_them_with_costs_and_options() -> None:
    text = done("blocks").stdout
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isalpha()}
    # From the formulas of papers and authors' code, 256 channels: 3 * 257 * 256 + 3 * 64 + 3 * 4 * 9 + 256 * 81 + 2,
    # 3 * 256^2 + 7 * 32, 2 * 257 * 32 + 257 * 256 + 1; of the stem 6 * 3 * 64 + 12 * 16 + 2 * 64.
    params = {"acmix": "218K", "sasa": "197K", "position_attention": "82.2K", "sasa_stem": "1.47K"}
    assert {name: rows[name][2] for name in params} == params
    assert rows["sasa"][4:6] == ["heads", "window"]
    ours = {name for name, cls in BLOCKS.items() if cls.__module__.startswith("convrewrite.blocks.")}
    assert ours <= {*rows}
    assert not [name for name in ours if "-" in rows[name][2:4]]


def test_blocks_shows_formula_options_defaults_and_limits_of_one() -> None:
    text = done("blocks", "acmix").stdout
    assert "att_i  = sum_o softmax_o(" in text
    options = [line.split()[:5] for line in text.partition("Options:")[2].splitlines()]
    assert ["heads", "int", "4", ">=", "1"] in options and ["window", "int", "7", ">=", "1"] in options


# --- what goes wrong is one line


def one_line(result: Result) -> str:
    """The error of a run that failed: exit code 1, no traceback, nothing on standard error but one line."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("inspect", "resnet5"), "did you mean 'resnet50'"),
        (("inspect", f"{NETS}:Residul"), "did you mean 'Residual'"),
        (("inspect", "nowhere.py:net"), "nowhere.py"),
        (("inspect", NET, "--input", "1x4x12x12"), "1x4x12x12"),
        (("inspect", NET, *SIZE, "--select", "rol:stem"), "did you mean 'role'"),
        (("inspect", NET, *SIZE, "--select", "role:stm"), "did you mean 'stem'"),
        (("inspect", NET, *SIZE, "--weights", "no.pth"), "no.pth"),
        (("plan", NET, "--rules", "acmx"), "did you mean 'acmix'"),
        (("plan", NET, *RULES, "--set", "bottleneck-3x3.windw=3"), "did you mean 'window'"),
        (("plan", NET, *RULES, "--set", "nobody.window=3"), "nobody.window"),
        (("plan", NET, *RULES, "--set", "window=abc"), "abc"),
        (("plan", OTHER, *RULES), "bottleneck-3x3"),
        (("plan", NET, *RULES, "--why", "stm"), "stm"),
        (("apply", NET, *RULES, "--device", "nodevice"), "nodevice"),
        (("diff", NET, "resnet5", *SIZE), "resnet5"),
        (("rules", "show", "acmx"), "did you mean 'acmix'"),
        (("rules", "test", "acmx"), "did you mean 'acmix'"),
        (("blocks", "acmx"), "did you mean 'acmix'"),
        (("bench", "rewrite", "resnet5"), "resnet5"),
    ],
    ids=lambda value: " ".join(str(v).replace(str(NETS.parent), "") for v in value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_that_helps(args: tuple[str, ...], told: str) -> None:
    assert told in one_line(run(*args))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("aply",), "did you mean 'apply'"),
        (("apply", NET), "--rules"),
        (("plan", NET), "--rules"),
        (("apply", NET, *RULES, "--emit", "onnx"), "--out"),
        (("plan", NET, *RULES, "--set", "window"), "RULE.option=value"),
        (("inspect", NET, "--inptu", "1x3x4x4"), "--input"),
        (("apply", NET, *RULES, "--dtype", "int8"), "int8"),
        (("inspect",), "MODEL"),
    ],
    ids=lambda value: " ".join(str(v).replace(str(NETS.parent), "") for v in value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2(args: tuple[str, ...], told: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_plan_of_another_model_is_refused(saved: Path) -> None:
    assert "does not fit" in one_line(run("apply", OTHER, "--plan", saved / "plan.json"))


def test_a_plan_for_another_input_is_refused(saved: Path) -> None:
    line = one_line(run("apply", NET, "--plan", saved / "plan.json", "--input", "1x3x16x16"))
    assert "does not fit" in line


def test_a_plan_takes_no_settings_and_no_rules(saved: Path) -> None:
    for extra in (("--set", "window=3"), ("--start", "fresh"), ("--rules", "acmix")):
        assert run("apply", NET, "--plan", saved / "plan.json", *extra).exit_code == 2


@pytest.mark.parametrize("damage", ["cut", "edited", "empty", "binary", "other"])
def test_a_damaged_plan_is_refused(damage: str, saved: Path, tmp_path: Path) -> None:
    text = (saved / "plan.json").read_text()
    path = tmp_path / "bad.json"
    path.write_bytes(
        {
            "cut": text[: len(text) // 2].encode(),
            "edited": text.replace('"window": 7', '"window": 5').encode(),
            "empty": b"",
            "binary": b"\xff\xfe\x00\x01",
            "other": b"[1, 2]",
        }[damage]
    )
    assert "bad.json" in one_line(run("apply", NET, "--plan", path))


def test_weights_that_are_none_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pth"
    junk.write_text("junk")
    assert "junk.pth" in one_line(run("inspect", NET, *SIZE, "--weights", junk))
    foreign = tmp_path / "foreign.pth"
    torch.save({"stem.weight": torch.zeros(1)}, foreign)
    assert "stem.weight" in one_line(run("apply", NET, *RULES, "--weights", foreign))


def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert str(taken) in one_line(run("apply", NET, *RULES, "--out", taken))
    assert str(taken) in one_line(run("apply", NET, *RULES, "--out", taken / "below"))
    assert str(taken) in one_line(run("plan", NET, *RULES, "--out", taken / "plan.json"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert taken.read_text() == "mine"


def test_a_model_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "model"
    done("apply", NET, *RULES, "--out", out)
    before = (out / "model.safetensors").read_bytes()
    assert "saved there already" in one_line(run("apply", NET, *RULES, "--out", out, "--seed", 1))
    assert (out / "model.safetensors").read_bytes() == before
    done("apply", NET, *RULES, "--out", out, "--seed", 1, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before


# --- interruptions

SLOW = """
import sys, time
sys.path.insert(0, {parent!r})
def slow():
    print("building", flush=True)
    time.sleep(60)
"""
INTERRUPTED = """
import signal, {module} as home
original = home.{name}
def interrupted(*args, **kwargs):
    original(*args, **kwargs)
    signal.raise_signal(signal.SIGINT)
home.{name} = interrupted
from convrewrite.cli.main import main
main()
"""


def assert_clean_abort(child: subprocess.Popen[str], folder: Path, kept: set[str]) -> None:
    _, err = child.communicate(timeout=60)
    assert child.returncode not in (0, None)
    assert err.strip().splitlines() == ["Aborted!"]
    assert {p.name for p in folder.iterdir()} == kept


def test_ctrl_c_while_the_model_is_built_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(parent=str(NETS.parent)))
    child = process("apply", f"{tmp_path / 'slow.py'}:slow", *RULES, "--out", tmp_path / "model")
    assert child.stdout is not None
    assert child.stdout.readline() == "building\n"
    time.sleep(0.1)  # into the sleep
    child.send_signal(signal.SIGINT)
    assert_clean_abort(child, tmp_path, {"slow.py", "__pycache__"} & {p.name for p in tmp_path.iterdir()})


@pytest.mark.parametrize(
    ("module", "name"), [("convrewrite.pipeline", "check"), ("convrewrite.store", "write_tensors")]
)
def test_ctrl_c_while_checking_or_writing_leaves_nothing(module: str, name: str, tmp_path: Path) -> None:
    code = INTERRUPTED.format(module=module, name=name)
    assert_clean_abort(process("apply", NET, *RULES, "--out", tmp_path / "model", code=code), tmp_path, set())


def test_a_closed_pipe_is_no_traceback() -> None:
    child = process("rules", "schema")
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()
    child.wait(timeout=60)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [r for v in value.values() for r in _references(v)]
    return [r for v in value for r in _references(v)] if isinstance(value, list) else []
