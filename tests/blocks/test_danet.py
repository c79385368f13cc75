"""DANet's position and channel attention equal their equations, position by position, and the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.channel_attention import ChannelAttention, ChannelAttentionOptions
from convrewrite.blocks.position_attention import PositionAttention, PositionAttentionOptions
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import SIZES, awake, gradients_match, inserted, peer, sample
from tests.blocks.reference_dense import loop_channel_attention, loop_position_attention


@pytest.mark.parametrize("size", [*SIZES, (7, 6)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_position_attention_equals_the_equation(size: tuple[int, int], channels: int) -> None:
    where = inserted(channels, size)
    block, x = awake(PositionAttention, where), sample(where)
    torch.testing.assert_close(block(x), loop_position_attention(block.state_dict(), x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_channel_attention_equals_the_equation(size: tuple[int, int], channels: int) -> None:
    where = inserted(channels, size)
    block, x = awake(ChannelAttention, where), sample(where)
    torch.testing.assert_close(block(x), loop_channel_attention(block.state_dict(), x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("size", [(2, 2), (4, 3)], ids=["products", "SDPA"])
def test_gradients_are_those_of_finite_differences(size: tuple[int, int]) -> None:
    where = inserted(4, size)
    for cls in (PositionAttention, ChannelAttention):
        assert gradients_match(awake(cls, where), sample(where))


def test_channel_attention_differs_from_the_paper_s_sign() -> None:
    """The paper's equation 3 takes the softmax of the energies themselves; the authors' code, of their negatives."""
    where = inserted(4, (3, 3))
    block, x = awake(ChannelAttention, where), sample(where)
    flat = x.flatten(2)
    paper = (torch.softmax(flat @ flat.mT, -1) @ flat).view_as(x) * block.gamma + x
    assert not torch.allclose(block(x), paper, atol=1e-3)


def test_position_attention_has_the_authors_parameters_at_512_channels() -> None:
    where = inserted(512, (7, 7))
    assert PositionAttention.cost(where, PositionAttentionOptions()).params == 328_321
    assert ChannelAttention.cost(where, ChannelAttentionOptions()).params == 1


def test_flops_are_torch_s_count_of_the_plain_products() -> None:
    where = inserted(16, (6, 5))
    x = torch.empty(2, 16, 30, device="meta")
    with FlopCounterMode(display=False) as counter:
        q, k, v = (torch.nn.functional.conv1d(x, x.new_empty(width, 16, 1)) for width in (2, 2, 16))
        torch.bmm(v, torch.bmm(q.mT, k).mT)
    assert PositionAttention.cost(where, PositionAttentionOptions()).flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(x, x.mT), x)
    assert ChannelAttention.cost(where, ChannelAttentionOptions()).flops == counter.get_total_flops()


@pytest.mark.parametrize("size", [(3, 5), (9, 8)], ids=str)
def test_equals_the_authors_code_from_its_own_state_dict(size: tuple[int, int]) -> None:
    module = peer("DANet/encoding/nn/da_att.py")
    where = inserted(16, size)
    for cls, theirs in ((PositionAttention, module.PAM_Module(16)), (ChannelAttention, module.CAM_Module(16))):
        for parameter in theirs.double().parameters():
            torch.nn.init.normal_(parameter)
        ours = cls(where, cls.Options()).double()  # type: ignore[arg-type]
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(sample(where)), theirs(sample(where)), **TOLERANCE[torch.float64])
