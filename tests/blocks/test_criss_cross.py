"""Criss-cross attention equals its equation, position by position, and the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.criss_cross import CrissCross, CrissCrossOptions
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import SIZES, awake, gradients_match, inserted, peer, sample
from tests.blocks.reference_dense import loop_criss_cross


@pytest.mark.parametrize("size", [*SIZES, (7, 6)], ids=str)
@pytest.mark.parametrize(("channels", "recurrence"), [(1, 1), (3, 2), (16, 1), (16, 2)])
def test_equals_the_equation_applied_r_times(size: tuple[int, int], channels: int, recurrence: int) -> None:
    where = inserted(channels, size)
    block, x = awake(CrissCross, where, recurrence=recurrence), sample(where)
    want = loop_criss_cross(block.state_dict(), x, recurrence)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
def test_gradients_are_those_of_finite_differences(size: tuple[int, int]) -> None:
    where = inserted(3, size)
    assert gradients_match(awake(CrissCross, where), sample(where))


def test_one_pass_sees_row_and_column_alone_and_two_see_everything() -> None:
    where = inserted(8, (4, 5), batch=1)
    x = sample(where)
    moved = x.clone()
    moved[:, :, 1, 2] += 1
    for recurrence in (1, 2):
        block = awake(CrissCross, where, recurrence=recurrence)
        block.query_conv.weight.data *= 0.1  # so that no softmax is all but one-hot
        changed = ((block(moved) - block(x)).abs().amax((0, 1)) > 1e-9).tolist()
        for i in range(4):
            for j in range(5):
                assert changed[i][j] == (recurrence == 2 or i == 1 or j == 2), (recurrence, i, j)


def test_the_position_itself_counts_once() -> None:
    """With zero queries all H + W - 1 weights are equal; counted twice it would weigh 2 of H + W."""
    where = inserted(1, (3, 4), batch=1)
    block = awake(CrissCross, where, recurrence=1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.gamma.fill_(1)
        block.value_conv.weight.fill_(1)
    x = torch.zeros(where.in_shape, dtype=torch.float64)
    x[0, 0, 1, 1] = 6
    assert float(block(x)[0, 0, 1, 1].detach()) == pytest.approx(6 + 6 / 6, abs=1e-12)


def test_a_position_that_outweighs_all_others_is_exact() -> None:
    """Where one key takes all the weight nothing is lost by cancellation or by the exclusion of the second self."""
    where = inserted(4, (3, 3), batch=1)
    block, x = awake(CrissCross, where, recurrence=1), 30 * sample(where)
    torch.testing.assert_close(block(x), loop_criss_cross(block.state_dict(), x), **TOLERANCE[x.dtype])


def test_has_the_authors_parameters_at_512_channels_for_every_recurrence() -> None:
    for recurrence in (1, 2, 3):
        cost = CrissCross.cost(inserted(512, (7, 7)), CrissCrossOptions(recurrence=recurrence))
        assert cost.params == 328_321


def test_flops_are_torch_s_count_of_the_plain_products() -> None:
    where = inserted(16, (6, 5))
    x = torch.empty(2, 16, 30, device="meta")
    with FlopCounterMode(display=False) as counter:
        for width in (2, 2, 16):
            torch.nn.functional.conv1d(x, x.new_empty(width, 16, 1))
        for lines, length in ((2 * 5, 6), (2 * 6, 5)):
            weights = torch.bmm(x.new_empty(lines, length, 2), x.new_empty(lines, 2, length))
            torch.bmm(weights, x.new_empty(lines, length, 16))
    for recurrence in (1, 3):
        cost = CrissCross.cost(where, CrissCrossOptions(recurrence=recurrence))
        assert cost.flops == recurrence * counter.get_total_flops()


@pytest.mark.parametrize("recurrence", [1, 2])
@pytest.mark.parametrize("size", [(3, 5), (9, 8)], ids=str)
def test_equals_the_authors_code_from_its_own_state_dict(size: tuple[int, int], recurrence: int) -> None:
    theirs = peer("CCNet/cc_attention/functions.py").CrissCrossAttention(16).double()
    theirs.INF = lambda b, h, w: -torch.full((h,), float("inf")).diag().expand(b * w, h, h)  # theirs asks for CUDA
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    where = inserted(16, size)
    ours = CrissCross(where, CrissCrossOptions(recurrence=recurrence)).double()
    ours.load_state_dict(theirs.state_dict())
    x = want = sample(where)
    for _ in range(recurrence):
        want = theirs(want)
    torch.testing.assert_close(ours(x), want, rtol=1e-9, atol=1e-9)
