"""Position, channel, criss-cross and non-local attention: what holds for all of them, and their shared attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convrewrite.blocks.base import BLOCKS
from convrewrite.blocks.tokens import attend, holds_logits, in_tiles
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import NAMES, awake, inserted, instead_of, refusal, sample
from tests.blocks.measure import measured_bytes

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("position_attention", {}),
    ("position_attention", {"reduction": 2}),
    ("channel_attention", {}),
    ("criss_cross", {"recurrence": 1}),
    ("criss_cross", {"recurrence": 3}),
    ("non_local", {"norm": "none"}),
    ("non_local", {"pairwise": "gaussian", "inter_channels": 8}),
    *[
        ("non_local", {"pairwise": pairwise, "sub_sample": pool})
        for pairwise in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
        for pool in (True, False)
    ],
]
variants = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{o}" for n, o in VARIANTS])


@variants
@pytest.mark.parametrize("shape", [(2, 64, 28, 28), (2, 128, 8, 8), (2, 64, 16, 12)], ids=str)
def test_activation_bytes_are_those_measured(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    cls, where = BLOCKS.get(name), Place(shape, shape)
    cost = cls.cost(where, cls.Options(**options))
    infer, train = measured_bytes(cls(where, cls.Options(**options)), torch.randn(shape, requires_grad=True))
    assert cost.act_infer == pytest.approx(infer, rel=0.05)
    assert cost.act_train == pytest.approx(train, rel=0.05)


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_bitwise_identity_and_every_gate_gets_a_gradient(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    where = inserted(16, (7, 6))
    torch.manual_seed(0)
    block = BLOCKS.get(name)(where, BLOCKS.get(name).Options(**options)).to(dtype).train()
    x = sample(where).to(dtype)
    y = block(x)
    assert torch.equal(y, x)
    y.float().square().sum().backward()
    gates = [p for n, p in block.named_parameters() if n == "gamma" or n in ("W.1.weight", "W.weight")]
    assert gates
    assert all(gate.grad is not None and bool(gate.grad.abs().max() > 0) for gate in gates)


@variants
def test_an_open_gate_changes_the_output(name: str, options: dict[str, Any]) -> None:
    where = inserted(8, (4, 3))
    x = sample(where)
    assert not torch.allclose(awake(BLOCKS.get(name), where, **options)(x), x)


@variants
def test_parameters_are_those_of_the_formula(name: str, options: dict[str, Any]) -> None:
    for channels in (1, 5, 16, 48):
        where = inserted(channels, (6, 5))
        cls = BLOCKS.get(name)
        block = cls(where, cls.Options(**options))
        assert cls.cost(where, cls.Options(**options)).params == sum(p.numel() for p in block.parameters())


@variants
def test_a_transposed_map_gives_the_transposed_result(name: str, options: dict[str, Any]) -> None:
    where = inserted(8, (6, 4))
    block, x = awake(BLOCKS.get(name), where, **options), sample(where)
    torch.testing.assert_close(block(x.mT), block(x).mT, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("name", NAMES)
def test_in_place_of_a_convolution_stands_the_same_as_inserted(name: str) -> None:
    cls, x = BLOCKS.get(name), sample(inserted(8, (5, 4), batch=1))
    torch.testing.assert_close(
        awake(cls, instead_of(8, 8, (5, 4)))(x), awake(cls, inserted(8, (5, 4)))(x), rtol=0, atol=0
    )


REFUSED = {
    "stride 2x2, {} keeps the size (stride must be 1)": instead_of(8, 8, (8, 8), stride=(2, 2)),
    "stride 1x2, {} keeps the size (stride must be 1)": instead_of(8, 8, (8, 8), stride=(1, 2)),
    "8 -> 16 channels, {} keeps them (they must be equal)": instead_of(8, 16, (8, 8)),
    "convolution has 2 groups, {} mixes all channels (groups must be 1)": instead_of(8, 8, (8, 8), groups=2),
    "the convolution makes 8x9 into 6x7, {} keeps the size": instead_of(8, 8, (8, 9), padding=(0, 0, 0, 0)),
}
TAKEN = {
    "inserted": inserted(8, (5, 4)),
    "one channel": inserted(1, (5, 4)),
    "one position": inserted(8, (1, 1)),
    "3x3": instead_of(8, 8, (5, 4)),
    "dilated": instead_of(8, 8, (9, 9), dilation=(2, 2), padding=(2, 2, 2, 2)),
    "1x1": Place((1, 8, 5, 4), (1, 8, 5, 4), ConvSpec(8, 8, (1, 1), bias=True)),
    "reflecting": instead_of(8, 8, (5, 4), padding_mode="reflect"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_what_changes_size_or_channels_with_the_value(name: str, reason: str) -> None:
    assert refusal(name, REFUSED[reason]) == reason.format(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", TAKEN)
def test_takes_every_place_that_keeps_size_and_channels(name: str, where: str) -> None:
    assert refusal(name, TAKEN[where]) is None


# keys and widths on both sides of the choice between products and SDPA, keys wider and narrower than values
@pytest.mark.parametrize(
    ("keys", "width", "values"), [(5, 4, 4), (40, 4, 4), (5, 2, 8), (40, 2, 8), (5, 8, 2), (40, 8, 2)]
)
def test_attend_is_the_softmax_sum(keys: int, width: int, values: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((7, width), (keys, width), (keys, values)))
    weight = (0.3 * torch.einsum("bld,bmd->blm", q, k)).exp()
    want = torch.einsum("blm,bmc->blc", weight / weight.sum(2, keepdim=True), v)
    torch.testing.assert_close(attend(q, k, v, 0.3), want, **TOLERANCE[q.dtype])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_attend_in_tiles_is_the_softmax_sum_and_so_are_its_gradients(scale: float) -> None:
    """600 narrow keys, some tiles of queries and a shorter last one."""
    torch.manual_seed(0)
    shapes = ((700, 8), (600, 8), (600, 128))
    leaves = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert in_tiles(600, 8, 128)
    weight = (scale * torch.einsum("bld,bmd->blm", *leaves[:2])).softmax(2)
    want = torch.einsum("blm,bmc->blc", weight, leaves[2])
    got = attend(*leaves, scale)
    torch.testing.assert_close(got, want, **TOLERANCE[want.dtype])
    grad = torch.randn_like(want)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[want.dtype])


@pytest.mark.parametrize(("keys", "width", "values"), [(512, 8, 128), (600, 64, 128), (1025, 8, 128), (3136, 8, 64)])
def test_attend_takes_tiles_neither_for_few_nor_for_wide_keys_nor_for_large_maps(
    keys: int, width: int, values: int
) -> None:
    assert not in_tiles(keys, width, values)


def test_large_maps_never_hold_their_logits() -> None:
    """4096 positions: their logits alone are 64 MiB, the map is 0.25 MiB."""
    where = inserted(16, (64, 64), batch=1)
    for name in ("position_attention", "non_local"):
        block = BLOCKS.get(name)(where, BLOCKS.get(name).Options())
        infer, train = measured_bytes(block, torch.randn(where.in_shape, requires_grad=True))
        assert max(infer, train) < 2**21
    assert not holds_logits(4096, 16)


def test_many_channels_never_hold_their_energies() -> None:
    where = inserted(2048, (4, 4), batch=1)
    block = BLOCKS.get("channel_attention")(where, BLOCKS.get("channel_attention").Options())
    infer, train = measured_bytes(block, torch.randn(where.in_shape, requires_grad=True))
    assert max(infer, train) < 2**20  # 16 MiB with them


def test_half_precision_keeps_logits_in_float32() -> None:
    """Energies of 90,000 overflow float16; here channel 0 resembles channel 1 least, so it gathers from it."""
    where = inserted(2, (30, 30), batch=1)
    block = BLOCKS.get("channel_attention")(where, BLOCKS.get("channel_attention").Options()).half()
    nn.init.ones_(dict(block.named_parameters())["gamma"])
    x = torch.full(where.in_shape, 10.0, dtype=torch.float16)
    x[:, 1] = -10
    assert torch.equal(block(x), torch.zeros_like(x))


def test_attention_in_tiles_has_a_second_derivative() -> None:
    q, k, v = (torch.randn(1, 530, width, dtype=torch.float64, requires_grad=True) for width in (2, 2, 68))
    assert in_tiles(530, 2, 68)
    assert not holds_logits(530, 68)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(1, 2)).softmax(-1) @ v

    step = torch.randn_like(q)
    of_both = []
    for attention in (attend, plain):
        (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        of_both.append(torch.autograd.grad((first * step).sum(), (q, k, v)))
    for got, want in zip(*of_both, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
