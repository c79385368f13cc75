"""The non-local block equals its equations, position by position, and the code that is copied most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.non_local import NonLocal, NonLocalOptions, mean_of_relu
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import SIZES, awake, gradients_match, inserted, peer, refusal, sample
from tests.blocks.reference_dense import loop_non_local

PAIRWISE = ["embedded_gaussian", "dot_product", "gaussian", "concatenation"]


@pytest.mark.parametrize("sub_sample", [True, False], ids=["pool", "all"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("size", [*SIZES, (7, 6)], ids=str)
@pytest.mark.parametrize("channels", [1, 6])
def test_equals_the_equations(size: tuple[int, int], pairwise: str, sub_sample: bool, channels: int) -> None:
    where = inserted(channels, size)
    block, x = awake(NonLocal, where, pairwise=pairwise, sub_sample=sub_sample), sample(where)
    want = loop_non_local(block.state_dict(), x, pairwise=pairwise, sub_sample=sub_sample)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("pairwise", ["embedded_gaussian", "gaussian"])
def test_scale_divides_the_logits_by_the_root_of_their_width(pairwise: str) -> None:
    where = inserted(6, (4, 3))
    block, x = awake(NonLocal, where, pairwise=pairwise, scale=True), sample(where)
    want = loop_non_local(block.state_dict(), x, pairwise=pairwise, sub_sample=True, scale=True)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])
    plain = awake(NonLocal, where, pairwise=pairwise)
    assert not torch.allclose(block(x), plain(x))


@pytest.mark.parametrize("pairwise", ["dot_product", "concatenation"])
def test_scale_is_refused_where_it_means_nothing(pairwise: str) -> None:
    reason = refusal("non_local", inserted(8, (4, 4)), pairwise=pairwise, scale=True)
    assert reason == f"scale has no meaning for {pairwise}, which has no softmax"


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_other_widths_and_no_norm(pairwise: str) -> None:
    where = inserted(4, (4, 5))
    for inter in (1, 3, 9):
        block = awake(NonLocal, where, pairwise=pairwise, inter_channels=inter, norm="none")
        want = loop_non_local(block.state_dict(), sample(where), pairwise=pairwise, sub_sample=True, norm=False)
        torch.testing.assert_close(block(sample(where)), want, **TOLERANCE[torch.float64])
        assert block.g.out_channels == inter


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("sub_sample", [True, False], ids=["pool", "all"])
def test_gradients_are_those_of_finite_differences(pairwise: str, sub_sample: bool) -> None:
    where = inserted(3, (4, 3))
    block = awake(NonLocal, where, pairwise=pairwise, sub_sample=sub_sample)
    assert gradients_match(block, sample(where))


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 40), (40, 3), (1, 1)])
def test_mean_of_relu_is_the_plain_sum(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, queries, dtype=torch.float64), torch.randn(2, keys, dtype=torch.float64)
    g = torch.randn(2, keys, 3, dtype=torch.float64)
    for shift in (0.0, 100.0, -100.0):  # some keys, all keys, no key
        want = torch.einsum("blm,bmd->bld", (a[:, :, None] + shift + b[:, None]).relu(), g) / keys
        torch.testing.assert_close(mean_of_relu(a + shift, b, g), want, **TOLERANCE[a.dtype])


def test_mean_of_relu_has_relu_s_gradients_at_ties_too() -> None:
    a = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(mean_of_relu(a, b, g).square().sum(), (a, b, g))
    plain = torch.einsum("blm,bmd->bld", (a[:, :, None] + b[:, None]).relu(), g) / 4
    want = torch.autograd.grad(plain.square().sum(), (a, b, g))
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE[a.dtype])


def test_resnet50_with_five_blocks_has_32_915_496_parameters() -> None:
    added = [NonLocal.cost(inserted(c, (14, 14)), NonLocalOptions()).params for c in (512, 512, 1024, 1024, 1024)]
    assert 25_557_032 + sum(added) == 32_915_496


def plain_flops(pairwise: str, *, keys: int) -> int:
    """Torch's count of the products that the docstring names, 2 images of 16 x 30, d = 8."""
    x = torch.empty(2, 16, 30, device="meta")

    def conv(c_in: int, c_out: int, count: int = 30) -> None:
        torch.nn.functional.conv1d(x.new_empty(2, c_in, count), x.new_empty(c_out, c_in, 1))

    def product(rows: int, inner: int, columns: int) -> None:
        torch.bmm(x.new_empty(2, rows, inner), x.new_empty(2, inner, columns))

    with FlopCounterMode(display=False) as counter:
        conv(16, 8)
        conv(8, 16)
        if pairwise in ("embedded_gaussian", "dot_product"):
            conv(16, 8)
            conv(16, 8)
        if pairwise == "embedded_gaussian":
            product(30, 8, keys)
            product(30, keys, 8)
        elif pairwise == "gaussian":
            product(30, 16, keys)
            product(30, keys, 8)
        elif pairwise == "dot_product":
            product(8, keys, 8)
            product(30, 8, 8)
        else:
            torch.mm(x.new_empty(1, 8), x.new_empty(8, 16))  # w_1 folded into theta
            conv(16, 1)
            if keys == 30:
                torch.mm(x.new_empty(1, 8), x.new_empty(8, 16))
                conv(16, 1)
            else:
                conv(16, 8)
                conv(8, 1, keys)
    return counter.get_total_flops()


@pytest.mark.parametrize(("sub_sample", "keys"), [(True, 6), (False, 30)])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_flops_are_torch_s_count_of_the_docstring_s_products(pairwise: str, sub_sample: bool, keys: int) -> None:
    options: Any = {"pairwise": pairwise, "sub_sample": sub_sample}
    cost = NonLocal.cost(inserted(16, (6, 5)), NonLocalOptions(**options))
    assert cost.flops == plain_flops(pairwise, keys=keys)


def test_dot_product_takes_the_cheaper_order_of_its_two_products() -> None:
    """d = 4 on 30 positions: 2 (30 + 30) 16 against 4 30 30 4; d = 64: 4 30 30 64 against 2 (30 + 30) 4096."""
    for inter, products in ((4, 2 * 60 * 16), (64, 4 * 30 * 30 * 64)):
        options = NonLocalOptions(pairwise="dot_product", sub_sample=False, inter_channels=inter)
        flops = NonLocal.cost(inserted(16, (6, 5), batch=1), options).flops
        assert flops == 30 * 8 * 16 * inter + products


@pytest.mark.parametrize(("size", "sub_sample"), [((6, 8), True), ((9, 7), True), ((9, 7), False)], ids=str)
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_equals_alexhex7_from_its_own_state_dict(pairwise: str, size: tuple[int, int], sub_sample: bool) -> None:
    module = peer(f"Non-local_pytorch/lib/non_local_{pairwise}.py")
    theirs = module.NONLocalBlock2D(16, sub_sample=sub_sample).double()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    where, options = inserted(16, size), NonLocalOptions(pairwise=pairwise, sub_sample=sub_sample)
    ours = NonLocal(where, options).double()
    state = theirs.state_dict()
    ours.load_state_dict({k.replace("g.0.", "g.").replace("phi.0.", "phi."): v for k, v in state.items()})
    x = sample(where)
    for mode in (True, False):  # batch statistics, then running ones
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-9, atol=1e-9)
