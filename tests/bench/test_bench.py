"""The benchmark measures what it says and marks what it finds; how long anything takes is not asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from convrewrite.cli.bench_command import command
from torch import Tensor, nn

from convrewrite.bench.blocks import Request, run
from convrewrite.bench.calls import BOTH, FORWARD, VARIABLE, calls_of, forced
from convrewrite.bench.contenders import Shape, contenders
from convrewrite.bench.memory import highest, peak_bytes
from convrewrite.bench.networks import NETWORKS
from convrewrite.bench.plain import UnfoldACmix, UnfoldOutlook, UnfoldSASA, WholeLogits
from convrewrite.bench.results import Comparison, Result
from convrewrite.bench.tables import markdown, ratio_text
from convrewrite.bench.targets import TARGETS, Target, judge
from convrewrite.bench.timing import Spread, alternate, ratios
from convrewrite.blocks.acmix import ACmix, ACmixOptions
from convrewrite.errors import ConvrewriteError

CPU = torch.device("cpu")
TINY = Request(names=("outlook", "criss_cross"), shapes=(Shape(8, 5),), batch=2, rounds=2, command="told")


@pytest.fixture(scope="module")
def tiny() -> Result:
    return run(TINY)


def found(ratio: float, **other: Any) -> Comparison:
    """A comparison of outlook with a convolution, unless told otherwise."""
    given = Comparison(
        "outlook", "64@56", "eager", "auto", FORWARD, "conv3x3", "conv3x3", 0.0, 0.0, Spread(ratio, 0.0, 9.0)
    )
    return replace(given, **other)


def marks(comparisons: list[Comparison], target: Target) -> list[tuple[float | None, str]]:
    return [(verdict.found, verdict.mark) for verdict in judge(comparisons, [target])]


FORWARD_OF_OUTLOOK = Target("outlook", "64@56", "eager", FORWARD, "conv3x3", 3.2)


@pytest.mark.parametrize(
    ("ratio", "mark"), [(3.1, "pass"), (3.2, "pass"), (3.21, "falls short"), (30.0, "falls short")]
)
def test_a_target_is_an_upper_limit_of_the_median(ratio: float, mark: str) -> None:
    assert marks([found(ratio)], FORWARD_OF_OUTLOOK) == [(ratio, mark)]


@pytest.mark.parametrize(
    "other",
    [{"measure": BOTH}, {"mode": "compiled"}, {"backend": "native"}, {"against": "timm"}],
    ids=lambda other: next(iter(other)),
)
def test_numbers_about_something_else_neither_pass_nor_fail(other: dict[str, str]) -> None:
    assert marks([found(0.1, **other)], FORWARD_OF_OUTLOOK) == [(None, "not measured")]


def test_a_target_elsewhere_is_not_listed() -> None:
    assert marks([found(0.1, place="128@28")], FORWARD_OF_OUTLOOK) == []
    assert marks([found(0.1, subject="sasa")], FORWARD_OF_OUTLOOK) == []


def test_against_every_peer_the_worst_ratio_counts_and_plain_forms_do_not() -> None:
    target = replace(FORWARD_OF_OUTLOOK, against="every peer", limit=1.0)
    peers = [found(0.5, against="timm", kind="peer"), found(1.5, against="other", kind="peer")]
    assert marks([*peers, found(9.0, against="unfold", kind="plain")], target) == [(1.5, "falls short")]
    assert marks([peers[0], found(9.0)], target) == [(0.5, "pass")]


def test_targets_of_the_native_kernel_want_it_forced() -> None:
    target = replace(FORWARD_OF_OUTLOOK, mode="native")
    assert marks([found(1.0)], target) == [(None, "not measured")]
    assert marks([found(1.0, backend="native")], target) == [(1.0, "pass")]


def test_targets_of_plain_eager_code_look_at_it_where_it_was_forced_too() -> None:
    comparisons = [found(1.0), found(5.0, backend="aten")]
    assert marks(comparisons, FORWARD_OF_OUTLOOK) == [(5.0, "falls short")]


def test_every_target_names_a_contender_or_a_network_that_there_is_another_of() -> None:
    networks = {(f"resnet50 with {network.rules}", network.name) for network in NETWORKS}
    names = {contender.name for contender in contenders()}
    assert all(t.subject in names or (t.subject, t.against) in networks for t in TARGETS)
    assert networks == {(t.subject, t.against) for t in TARGETS if t.subject not in names}


def test_targets_of_a_network_look_at_its_own_rows() -> None:
    row = found(0.3, subject="resnet50 with sasa", place="3x224x224", measure="memory inference", against="unfold")
    (target,) = [t for t in TARGETS if (t.subject, t.measure, t.against) == (row.subject, row.measure, row.against)]
    assert marks([row, replace(row, measure="inference")], target) == [(0.3, "falls short")]
    assert marks([replace(row, place="3x64x64")], target) == []  # of other images nothing is wanted


def test_the_textbook_network_has_the_shapes_and_parameters_of_the_rewritten_one() -> None:
    import convrewrite as cr

    (network,) = [network for network in NETWORKS if not network.folder]
    with torch.device("meta"):
        textbook = network.build(None)
    original = pytest.importorskip("torchvision").models.resnet50()
    rewritten = cr.rewrite(original, network.rules, start="fresh", example=(1, 3, 64, 64)).model
    assert sum(p.numel() for p in textbook.parameters()) == sum(p.numel() for p in rewritten.parameters())
    assert textbook(torch.empty(2, 3, 65, 64, device="meta")).shape == (2, 1000)  # odd sizes under its strides


def test_a_network_without_its_folder_is_left_out_with_the_reason(tmp_path: Any) -> None:
    (published,) = [network for network in NETWORKS if network.name == "LeapLabTHU/ACmix"]
    assert published.absent(None) == published.absent(tmp_path) == "no folder ACmix under --peers"
    (tmp_path / "ACmix").mkdir()
    assert published.absent(tmp_path) is None


def test_quartiles_are_those_of_the_ratios_of_each_round() -> None:
    assert ratios([2.0, 8.0, 3.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.5, 3.0)  # of 2, 4, 1
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_all_functions_run_in_every_round_and_rounds_begin_with_another() -> None:
    seen: list[str] = []
    slow = 0.0

    def waits(name: str) -> None:
        nonlocal slow
        seen.append(name)
        slow = sum(range(400_000))  # longer than the least sample, so that each sample is one call

    samples = alternate({name: lambda name=name: waits(name) for name in "ab"}, rounds=2, device=CPU)  # type: ignore[misc]
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}
    assert "".join(seen[:4]) == "aabb"  # warm up, then how often a sample calls it
    assert "".join(dict.fromkeys(seen[4:])) == "ab"
    assert seen[-1] == "a"


def test_peak_memory_is_what_lives_at_once() -> None:
    x = torch.randn(256, 1024)  # 1 MiB

    def chain() -> Tensor:
        y = x + 1
        z = y + 1
        del y
        return z + 1

    chain()
    assert 2 * 2**20 <= peak_bytes(chain, CPU) < 2.1 * 2**20


def test_the_highest_running_sum_counts_and_what_was_there_before_does_not() -> None:
    assert highest([3, 4, -3, 1]) == 7
    assert highest([-5, 2]) == 0
    assert highest([]) == 0


def test_a_forward_pass_is_inference_and_the_other_call_reaches_every_gradient() -> None:
    class Seen(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    modes: list[tuple[bool, bool]] = []
    conv = Seen(2, 2, 1)
    calls = calls_of(conv, torch.randn(1, 2, 3, 3))
    calls[FORWARD]()
    assert conv.weight.grad is None
    calls[BOTH]()
    assert modes == [(False, False), (True, True)]
    assert conv.weight.grad is not None
    once = conv.weight.grad.clone()
    calls[BOTH]()
    assert torch.equal(conv.weight.grad, once)  # neither added up nor of another cotangent


def test_a_backend_is_forced_inside_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for before in (None, "aten"):
        monkeypatch.delenv(VARIABLE, raising=False)
        if before:
            monkeypatch.setenv(VARIABLE, before)
        with forced("native"):
            assert os.environ[VARIABLE] == "native"
        assert os.environ.get(VARIABLE) == before


def test_each_block_is_compared_with_the_convolution_and_the_forms_it_has(tiny: Result) -> None:
    seen = {(c.subject, c.place, c.measure, c.against) for c in tiny.comparisons}
    for measure in (FORWARD, BOTH, f"memory {FORWARD}", f"memory {BOTH}"):
        assert ("outlook", "8@5", measure, "conv3x3") in seen
        assert ("outlook", "8@5", measure, "unfold") in seen
        assert ("criss_cross", "8@5", measure, "conv3x3") in seen
    assert all(c.ours > 0 and c.theirs > 0 and c.ratio.low <= c.ratio.median <= c.ratio.high for c in tiny.comparisons)
    assert "criss_cross 8@5 against speedinghzl/CCNet: --peers not given" in tiny.left_out


def test_the_result_says_how_it_was_obtained(tiny: Result) -> None:
    about = json.loads(json.dumps(tiny.to_dict()))["about"]
    assert (about["command"], about["threads"], about["batch"], about["rounds"]) == ("told", 1, 2, 2)
    assert about["torch"] == torch.__version__
    assert about["device"]


def test_the_number_of_threads_is_put_back(tiny: Result) -> None:
    before = torch.get_num_threads()
    run(replace(TINY, names=("criss_cross",), threads=before + 1, rounds=1))
    assert torch.get_num_threads() == before


def test_markdown_has_a_row_for_each_time_and_a_mark_for_each_target(tiny: Result) -> None:
    verdicts = judge([found(3.0)], [FORWARD_OF_OUTLOOK])
    text = markdown(replace(tiny, verdicts=verdicts))
    times = [c for c in tiny.comparisons if not c.measure.startswith("memory")]
    assert sum(line.startswith("| 8@5") for line in text.splitlines()) == len(times)
    assert "| pass" in text
    assert "`told`" in text


@pytest.mark.parametrize(("value", "text"), [(31.4, "31"), (3.14, "3.14"), (0.314, "0.31"), (0.0314, "0.031")])
def test_ratios_are_written_with_the_digits_that_count(value: float, text: str) -> None:
    assert ratio_text(value) == text


def test_a_block_that_cannot_stand_there_is_left_out_with_its_reason() -> None:
    result = run(replace(TINY, names=("sasa_stem",)))
    assert not result.comparisons
    assert result.left_out == ("sasa_stem 8@5: it replaces more than a convolution",)


@pytest.mark.parametrize("text", ["64", "64@", "@56", "64@x", "0@5", "-1@5"])
def test_what_is_no_shape_is_an_error(text: str) -> None:
    with pytest.raises(ConvrewriteError, match="channels@side"):
        Shape.parse(text)


def test_an_unknown_block_is_an_error_with_the_closest_name() -> None:
    with pytest.raises(ConvrewriteError, match="did you mean 'outlook'"):
        contenders(["outlok"])


def test_a_variant_can_be_named_alone() -> None:
    assert [c.name for c in contenders(["non_local/gaussian"])] == ["non_local/gaussian"]
    assert len(contenders(["non_local"])) == 4


def test_plain_acmix_is_acmix() -> None:
    """The textbook form and the block, with the same weights: an honest baseline computes the same function."""
    torch.manual_seed(0)
    plain = UnfoldACmix(8).double()
    place = contenders(["acmix"])[0].place(Shape(8, 9), 2)
    block = ACmix(place, ACmixOptions()).double()
    state = block.state_dict()
    for i, name in enumerate(("conv1", "conv2", "conv3")):
        state[f"{name}.weight"], state[f"{name}.bias"] = plain.qkv.weight[8 * i :][:8], plain.qkv.bias[8 * i :][:8]  # type: ignore[index]
    for name, module in (("conv_p", plain.position), ("fc", plain.fc), ("dep_conv", plain.shift)):
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items() if f"{name}.{key}" in state}
    block.load_state_dict(state)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(plain(x), block(x))


def test_plain_outlook_is_outlook() -> None:
    torch.manual_seed(0)
    plain = UnfoldOutlook(8).double()
    block: Any = contenders(["outlook"])[0].build(Shape(8, 5), 2).double()
    for name in ("v", "attn", "proj"):
        state = getattr(plain, name).state_dict()
        getattr(block.attention, name).load_state_dict(
            {k: t.flatten(1) if t.ndim == 4 else t for k, t in state.items()}
        )
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(plain(x), block(x))


@pytest.mark.parametrize("module", [UnfoldSASA(16), WholeLogits(16, 5, 4, 16, 16), WholeLogits(16, 5, 8, 160, 8)])
def test_other_plain_forms_keep_channels_and_size(module: nn.Module) -> None:
    assert module(torch.randn(2, 16, 5, 5)).shape == (2, 16, 5, 5)


def test_the_command_prints_json_that_names_itself() -> None:
    done = CliRunner().invoke(
        command, ["blocks", "criss_cross", "--at", "8@4", "--rounds", "1", "--batch", "1", "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result.keys() == {"about", "comparisons", "verdicts", "left_out"}
    assert result["about"]["command"].startswith("convrewrite")
    assert "criss_cross 8@4" in done.stderr


def test_a_whole_network_is_compared_with_its_original(tmp_path: Any) -> None:
    from convrewrite.bench.models import INFERENCE, STEP
    from convrewrite.bench.models import Request as ModelRequest
    from convrewrite.bench.models import run as run_model

    result = run_model(
        ModelRequest(model="resnet18", rules="criss-cross", start="exact", input=(3, 32, 32), batch=2, rounds=1)
    )
    seen = {(c.measure, c.against) for c in result.comparisons}
    assert seen == {(m, "original") for name in (INFERENCE, STEP) for m in (name, f"memory {name}")}
    assert all(c.ours > 0 and c.place == "3x32x32" for c in result.comparisons)
    assert "images/s" in markdown(result)


@pytest.mark.parametrize("wrong", ["224", "3x224", "3x0x5", "axbxc"])
def test_what_is_no_image_is_an_error_of_one_line(wrong: str) -> None:
    done = CliRunner().invoke(command, ["models", "resnet18", "--input", wrong])
    assert done.exit_code == 1
    assert "write 3x224x224" in done.output
    assert "Traceback" not in done.output
