"""The zoo's own parts: a trial finds what is wrong with a model, rows survive, the table names every exception."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from convrewrite.errors import ConvrewriteError
from convrewrite.zoo import Entry, Row, markdown, run
from convrewrite.zoo.run import read
from convrewrite.zoo.trial import try_model

NETS = """
import torch
from torch import nn

class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        inner = channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1), nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
        )
    def forward(self, x):
        return x + self.body(x)

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), Bottleneck(16), Bottleneck(16), nn.AdaptiveAvgPool2d(1))

def patches():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))

class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.used(x)

def idle():
    return Idle()

def other_kinds():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2))

def broken():
    raise ValueError("no such thing\\nsecond line")
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


def test_a_good_model_is_copied_without_a_trace_and_rewritten_by_a_rule_that_fits(nets: str) -> None:
    row = try_model(Entry("models", "", f"{nets}:net"))
    assert row.good and row.result == "good"
    assert (row.convs, row.copied, row.unseen, row.refused) == (7, 7, (), {})
    assert row.roles == {"pointwise": 4, "bottleneck_spatial": 2, "stem": 1}
    assert row.applied in row.rules and row.rules["acmix"] == 2
    assert set(row.laws.values()) == {"held"}
    assert set(row.seconds) == {"build", "capture", "plan", "copies", "plans", "rewrite"}


def test_a_model_that_no_rule_fits_says_what_it_has_instead(nets: str) -> None:
    row = try_model(Entry("models", "", f"{nets}:patches"))
    assert row.good and not row.rules
    assert row.none == "no rule looks for its convolutions larger than 1x1: 1 stem"


def test_a_convolution_that_is_never_called_is_named_with_the_reason_why_it_stays(nets: str) -> None:
    row = try_model(Entry("models", "", f"{nets}:idle"))
    assert (row.convs, row.copied) == (2, 1)
    assert row.refused == {"idle": "no call of it was seen, so its shapes are unknown"}
    assert "1 not copied (idle: no call" in markdown([row])


def test_convolutions_of_other_kinds_are_counted_apart(nets: str) -> None:
    row = try_model(Entry("models", "", f"{nets}:other_kinds"))
    assert row.convs == 1 and row.out_of_scope == {"ConvTranspose2d": 1}


def test_a_model_that_cannot_be_built_is_one_line(nets: str) -> None:
    row = try_model(Entry("models", "", f"{nets}:broken"))
    assert not row.good and row.error.endswith("the factory failed: ValueError: no such thing")


def test_an_equal_copy_keeps_keys_and_output_and_is_no_alias() -> None:
    import convrewrite as cr
    from convrewrite.zoo.trial import COPIES

    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 3, 1))
    new, report = cr.rewrite(model, COPIES, example=(2, 2, 6, 6))
    assert len(report.plan.edits) == 2 and list(new.state_dict()) == list(model.state_dict())
    assert {drift.max_relative for drift in report.drift} == {0.0}
    x = torch.rand(2, 2, 6, 6)
    assert torch.equal(new(x), model(x))
    with torch.no_grad():
        new[0].weight.fill_(5)
    assert not torch.equal(new(x), model(x))


# --- rows, table, run ---

ROW = Row(
    "timm:net", "timm", "nets", (1, 3, 8, 8), 10, 2, roles={"stem": 2}, copied=2, identical=True,
    rules={"acmix": 1}, applied="acmix", laws={"kept": "held"}, seconds={"capture": 0.5},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ({}, "good"),
        ({"applied": "", "laws": {}, "rules": {}, "none": "only 1x1"}, "good"),
        ({"laws": {"kept": "broken", "start": "held"}}, "acmix breaks kept"),
        ({"identical": False}, "equal copies changed the output or the state-dict keys"),
        ({"unseen": ("a", "b")}, "2 of 2 convolutions are no site (a)"),
        ({"error": "no way"}, "no way"),
    ],
)
def test_a_row_is_good_or_says_why_not(change: dict[str, object], result: str) -> None:
    row = replace(ROW, **change)  # type: ignore[arg-type]
    assert row.result == result and row.good == (result == "good")
    assert Row.from_json(row.to_json()) == row
    assert f"| {result} |" in markdown([row])
    assert ("Exceptions (1):" in markdown([row])) == (result != "good")


def test_a_row_without_a_rule_and_without_a_reason_is_not_good() -> None:
    assert not replace(ROW, applied="", laws={}).good


def test_models_that_have_a_row_are_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(replace(ROW, error="earlier").to_json() + "\n" + ROW.to_json() + "\n")
    assert read(out) == [ROW]  # the last row of a model counts
    assert run([Entry("timm", "nets", "timm:net")], out, watch=lambda entry: pytest.fail(entry.spec)) == [ROW]


def test_a_foreign_file_of_rows_is_refused_with_its_line(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(ROW.to_json() + '\n{"spec": "x"}\n')
    with pytest.raises(ConvrewriteError, match=r"rows\.jsonl:2: this is no row of the zoo"):
        read(out)


@pytest.mark.slow
def test_a_process_that_takes_too_long_or_dies_leaves_a_row_and_the_next_model_runs(nets: str) -> None:
    Path(nets).write_text(
        NETS + "\ndef dies():\n    import os\n    os._exit(3)\n\ndef sleeps():\n    import time\n    time.sleep(600)\n"
    )
    names = ("dies", "net", "sleeps")
    rows = run([Entry("models", "", f"{nets}:{name}") for name in names], timeout=60)
    assert [row.good for row in rows] == [False, True, False]
    assert [rows[0].error, rows[2].error] == ["the process ended with status 3", "not done after 60 seconds"]
