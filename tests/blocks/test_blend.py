"""A blend is its convolution at the start, its block at the end, and bitwise so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, conv_spec
from convrewrite.blocks.blend import Blend, blend_cost
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import Cost, Place


class Other(Block):
    """Stands for any block: another convolution."""

    inner: nn.Conv2d

    def __init__(self, place: Place, options: BlockOptions) -> None:
        super().__init__(place, options)
        self.inner = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


PLACE = Place((2, 3, 9, 8), (2, 4, 5, 4))


class Mixed(Blend):
    """A `Blend` whose parts have their types."""

    conv: nn.Conv2d
    block: Other


def blend(dtype: torch.dtype = torch.float32) -> tuple[Mixed, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False)
    return Mixed(conv, Other(PLACE, BlockOptions())).to(dtype), torch.randn(PLACE.in_shape, dtype=dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_bitwise_as_the_convolution(dtype: torch.dtype) -> None:
    mixed, x = blend(dtype)
    assert torch.equal(mixed(x), mixed.conv(x))
    assert not torch.equal(mixed(x), mixed.block(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_bitwise_as_the_block_whatever_the_gate(dtype: torch.dtype) -> None:
    mixed, x = blend(dtype)
    nn.init.uniform_(mixed.gate, -2, 2)
    mixed.anneal.fill_(1)
    assert torch.equal(mixed(x), mixed.block(x))


def test_is_exact_where_the_difference_of_the_two_would_overflow() -> None:
    mixed, x = blend(torch.float16)
    nn.init.constant_(mixed.conv.weight, 0.0)
    nn.init.constant_(mixed.block.inner.weight, 0.0)
    assert mixed.block.inner.bias is not None
    nn.init.constant_(mixed.block.inner.bias, -6e4)
    mixed.conv.bias = nn.Parameter(torch.full((4,), 6e4, dtype=torch.float16))
    assert torch.equal(mixed(x), mixed.conv(x))


@pytest.mark.parametrize(("gate", "anneal", "share"), [(0.25, 0.0, 0.25), (0.0, 0.5, 0.5), (0.5, 0.5, 0.75)])
def test_gate_and_anneal_mix_as_the_formula_says(gate: float, anneal: float, share: float) -> None:
    mixed, x = blend(torch.float64)
    nn.init.constant_(mixed.gate, gate)
    mixed.anneal.fill_(anneal)
    want = mixed.conv(x) + share * (mixed.block(x) - mixed.conv(x))
    torch.testing.assert_close(mixed(x), want)


def test_the_gate_has_a_gradient_at_the_start_and_the_block_has_none() -> None:
    mixed, x = blend(torch.float64)
    mixed(x).sum().backward()
    assert mixed.gate.grad is not None
    want = (mixed.block(x) - mixed.conv(x)).sum((0, 2, 3))
    torch.testing.assert_close(mixed.gate.grad.flatten(), want)
    assert mixed.block.inner.weight.grad is not None
    assert mixed.block.inner.weight.grad.count_nonzero() == 0


def test_finalize_gives_the_block_only_when_the_convolution_is_out() -> None:
    mixed, _ = blend()
    for anneal in (0.0, 0.999):
        mixed.anneal.fill_(anneal)
        with pytest.raises(ConvrewriteError, match=f"anneal is {anneal:g}.*set anneal to 1"):
            mixed.finalize()
    mixed.anneal.fill_(1)
    assert mixed.finalize() is mixed.block


def test_looks_like_its_convolution_and_saves_its_parts() -> None:
    mixed, x = blend()
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"):
        assert getattr(mixed, name) == getattr(mixed.conv, name)
    assert mixed.weight is mixed.conv.weight
    keys = ["anneal", "block.inner.bias", "block.inner.weight", "conv.weight", "gate"]
    assert sorted(mixed.state_dict()) == keys
    assert mixed.gate.shape == (4, 1, 1)
    assert mixed.anneal.shape == ()
    other, _ = blend()
    nn.init.normal_(mixed.gate)
    other.load_state_dict(mixed.state_dict())
    assert torch.equal(other(x), mixed(x))
    assert torch.equal(copy.deepcopy(mixed)(x), mixed(x))


def test_keeps_the_convolution_s_dtype_under_autocast() -> None:
    mixed, x = blend()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed(x), mixed.conv(x))


def test_compiles_and_exports() -> None:
    mixed, x = blend()
    nn.init.constant_(mixed.gate, 0.3)
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixed(x))
    torch.testing.assert_close(torch.export.export(mixed, (x,)).module()(x), mixed(x))


def test_costs_both_parts_and_the_gate() -> None:
    mixed, _ = blend()
    inner = conv_spec(mixed.block.inner)
    block = Cost(params=inner.params, flops=inner.flops(2, 5, 4), act_infer=10, act_train=7)
    cost = blend_cost(conv_spec(mixed.conv), PLACE, block)
    assert cost.params == sum(p.numel() for p in mixed.parameters())
    assert cost.flops == 2 * (2 * 2 * 4 * 3 * 9 * 5 * 4)  # two equal convolutions of a batch of two
    output = 4 * 2 * 4 * 5 * 4
    assert cost.act_infer == 3 * output
    assert cost.act_train == 7 + 2 * output
