"""DANet's attentions, alone and side by side, equal their equations position by position, and the authors' code."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.channel_attention import ChannelAttention, ChannelAttentionOptions
from convrewrite.blocks.dual_attention import DualAttention, DualAttentionOptions
from convrewrite.blocks.position_attention import PositionAttention, PositionAttentionOptions
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import SIZES, awake, gradients_match, inserted, peer, sample
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_dense import loop_channel_attention, loop_dual_attention, loop_position_attention


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


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_dual_attention_equals_the_equation(channels: int, size: tuple[int, int], convolutions: bool) -> None:
    where = inserted(channels, size)
    block, x = awake(DualAttention, where, convolutions=convolutions), sample(where)
    torch.testing.assert_close(block(x), loop_dual_attention(block.state_dict(), x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("convolutions", [True, False])
def test_dual_attention_has_the_gradients_of_finite_differences(convolutions: bool) -> None:
    where = inserted(4, (3, 2))
    assert gradients_match(awake(DualAttention, where, convolutions=convolutions, reduction=2), sample(where))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convolutions", [True, False])
def test_dual_attention_starts_as_the_bitwise_identity_and_opens(convolutions: bool, training: bool) -> None:
    where = inserted(8, (5, 4))
    block, x = (
        DualAttention(where, DualAttentionOptions(convolutions=convolutions)).train(training),
        sample(where).float(),
    )
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    moved = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == ({"conv8.weight", "conv8.bias"} if convolutions else {"sa.gamma", "sc.gamma"})


def test_dual_attention_at_2048_channels_counts_as_by_hand() -> None:
    """Four 3 x 3 with norms, position attention at 512 channels, two gates, the 1 x 1; then the attentions alone."""
    where = inserted(2048, (7, 7))
    head = 2 * 9 * 2048 * 512 + 2 * 9 * 512 * 512 + 4 * 2 * 512 + 328_321 + 1 + 512 * 2048 + 2048
    assert DualAttention.cost(where, DualAttentionOptions()).params == head
    alone = 2 * (2048 * 256 + 256) + 2048**2 + 2048 + 1 + 1
    assert DualAttention.cost(where, DualAttentionOptions(convolutions=False)).params == alone


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(64, (28, 28)), (256, (14, 14)), (512, (7, 7))])
def test_dual_attention_s_activation_bytes_are_those_measured(
    channels: int, size: tuple[int, int], convolutions: bool
) -> None:
    where, options = inserted(channels, size), DualAttentionOptions(convolutions=convolutions)
    cost = DualAttention.cost(where, options)
    infer, train = measured_bytes(DualAttention(where, options), torch.randn(where.in_shape, requires_grad=True))
    assert cost.act_infer == pytest.approx(infer, rel=0.15)
    assert cost.act_train == pytest.approx(train, rel=0.15)


def test_channel_attention_differs_from_the_paper_s_sign() -> None:
    """The paper takes the softmax of the energies themselves; the authors' code, of their negatives."""
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
    with FlopCounterMode(display=False) as counter:
        maps = torch.empty(2, 16, 6, 5, device="meta")
        for c_in, c_out, kernel in ((16, 4, 3), (16, 4, 3), (4, 4, 3), (4, 4, 3), (4, 16, 1)):
            torch.nn.functional.conv2d(maps[:, :c_in], x.new_empty(c_out, c_in, kernel, kernel), padding=kernel // 2)
        q, k, v = (torch.nn.functional.conv1d(x[:, :4], x.new_empty(width, 4, 1)) for width in (1, 1, 4))
        torch.bmm(v, torch.bmm(q.mT, k).mT)
        torch.bmm(torch.bmm(x[:, :4], x[:, :4].mT), x[:, :4])
    options = DualAttentionOptions(key_reduction=4)
    assert DualAttention.cost(where, options).flops == counter.get_total_flops()


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


def test_dual_attention_equals_the_authors_head_up_to_its_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """DANetHead of junfu1115/DANet with as many classes as channels: its first output is what we add to x."""
    attention = peer("DANet/encoding/nn/da_att.py")
    for name in ("peer", "peer.nn", "peer.models", "peer.models.sseg", "peer.models.sseg.base"):
        package: Any = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    vars(sys.modules["peer.nn"]).update(PAM_Module=attention.PAM_Module, CAM_Module=attention.CAM_Module)
    vars(sys.modules["peer.models.sseg.base"]).update(BaseNet=nn.Module)
    head = peer("DANet/encoding/models/sseg/danet.py", name="peer.models.sseg.danet").DANetHead
    theirs = head(32, 32, nn.BatchNorm2d).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {
        k.replace("conv8.1.", "conv8."): v for k, v in theirs.state_dict().items() if k[:5] not in ("conv6", "conv7")
    }
    where = inserted(32, (5, 4))
    ours = DualAttention(where, DualAttentionOptions()).double().eval()
    ours.load_state_dict(state)
    x = sample(where)
    torch.testing.assert_close(ours(x) - x, theirs(x)[0], **TOLERANCE[x.dtype])
