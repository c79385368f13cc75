"""The annealer: from where the blends are to exactly 1, on schedule, also by draws."""

from __future__ import annotations

import pytest
import torch

import convrewrite as cr
from convrewrite.errors import ConvrewriteError
from convrewrite.finalizing import blends_of
from convrewrite.training.annealing import anneal_at
from convrewrite.training.settings import Settings
from convrewrite.training.timetable import timetable

from .tiny import SHAPE, rewritten


def _values(model: torch.nn.Module) -> set[float]:
    return {float(blend.anneal) for blend in blends_of(model).values()}


def test_all_blends_move_together_and_end_at_exactly_one() -> None:
    model = rewritten()
    annealer = cr.Annealer(model, steps=3)
    seen = [annealer.step() for _ in range(5)]
    assert seen == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0, 1.0]
    assert _values(model) == {1.0}
    assert annealer.done


def test_a_delay_holds_the_blends_where_they_are() -> None:
    model = rewritten()
    annealer = cr.Annealer(model, steps=2, delay=2)
    assert [annealer.step() for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]


def test_the_cosine_is_slow_at_both_ends_and_half_way_in_the_middle() -> None:
    assert anneal_at(0, 10, "cosine") == 0.0
    assert anneal_at(1, 10, "cosine") == pytest.approx(0.024472, abs=1e-6)  # (1 - cos 18 deg) / 2
    assert anneal_at(5, 10, "cosine") == pytest.approx(0.5)
    assert anneal_at(10, 10, "cosine") == 1.0


def test_a_second_annealer_goes_on_where_the_blends_are() -> None:
    model = rewritten()
    cr.Annealer(model, steps=4).set(2)
    annealer = cr.Annealer(model, steps=2)
    assert _values(model) == {0.5}
    assert [annealer.step(), annealer.step()] == [0.75, 1.0]


def test_its_state_puts_another_one_where_it_was() -> None:
    one, other = rewritten(), rewritten()
    annealer = cr.Annealer(one, steps=4)
    annealer.set(3)
    again = cr.Annealer(other, steps=4)
    again.load_state_dict(annealer.state_dict())
    assert _values(other) == {0.75}
    assert again.step() == 1.0


def test_no_steps_take_over_at_once_but_not_before_the_delay() -> None:
    assert cr.Annealer(rewritten(), steps=0).value == 1.0
    annealer = cr.Annealer(rewritten(), steps=0, delay=1)
    assert [annealer.value, annealer.step()] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("steps", "schedule", "message"), [(-1, "linear", "0 or more"), (3, "lin", "linear or cosine")]
)
def test_what_is_not_possible_is_one_line(steps: int, schedule: str, message: str) -> None:
    with pytest.raises(ConvrewriteError, match=message):
        cr.Annealer(rewritten(), steps, schedule)  # type: ignore[arg-type]


def test_draws_use_each_site_s_block_as_often_as_annealed_and_always_at_one() -> None:
    model = rewritten().train()
    blend = blends_of(model)["layer1.0.conv2"]
    annealer = cr.Annealer(model, steps=4, theseus=True)
    annealer.set(1)
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        conv, block = blend.conv(x), blend.block(x)
        drawn = [blend(x) for _ in range(400)]
        assert all(torch.equal(y, conv) or torch.equal(y, block) for y in drawn)
        share = sum(torch.equal(y, block) for y in drawn) / len(drawn)
        assert 0.18 < share < 0.32  # 0.25 give or take three standard deviations
        annealer.set(4)
        assert all(torch.equal(blend(x), block) for _ in range(50))
        annealer.set(1)
        torch.testing.assert_close(blend.eval()(x), 0.75 * conv + 0.25 * block)  # measuring does not draw


def test_a_model_without_blends_is_left_alone() -> None:
    model = rewritten("fresh")
    before = model.eval()(torch.ones(SHAPE))
    annealer = cr.Annealer(model, steps=2)
    annealer.step()
    assert torch.equal(model(torch.ones(SHAPE)), before)


def test_the_timetable_trains_blocks_then_new_parts_then_all_and_anneals_in_between() -> None:
    settings = Settings(epochs=10, blocks_first=0.2, new_first=0.1, anneal=0.8, warmup=0.1)
    table = timetable(settings, "distill", 10, blockwise=True)
    assert (table.total, table.blocks_end, table.new_end, table.fade) == (100, 20, 30, 60)
    assert [table.phase(s) for s in (0, 19, 20, 29, 30, 99)] == ["blocks", "blocks", "new", "new", "all", "all"]
    rates = [table.rate(s) for s in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0 == rates[10]
    assert rates[-1] < 0.001
    assert [s for s in range(1, 101) if table.measures(s)] == list(range(10, 101, 10))
    assert timetable(settings, "finetune", 10, blockwise=True).blocks_end == 0
    assert timetable(settings, "distill", 10, blockwise=False).blocks_end == 0
