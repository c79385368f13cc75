"""Outlook attention and the Outlooker equal their equation pixel by pixel, VOLO's code, and its parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.outlook import Outlook, OutlookOptions, default_heads
from convrewrite.blocks.outlooker import Outlooker, OutlookerOptions
from convrewrite.blocks.overlap import outlook
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import awake, gradients_match, inserted, instead_of, refusal, sample
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_sasa import loop_outlook


def gathered(block: Outlook, x: Tensor, **told: Any) -> Tensor:
    """z of the equation, from the block's own parameters."""
    options = block.options
    return loop_outlook(
        dict(block.attention.state_dict()),
        x,
        heads=block.attention.heads,
        window=options.window,
        step=options.step,
        normalise=options.normalise,
        **told,
    )


def projected(block: Outlook, z: Tensor) -> Tensor:
    """W_o z + b_o."""
    proj = block.attention.proj
    return torch.einsum("oc,bchw->bohw", proj.weight, z) + proj.bias[:, None, None]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 1},
    "two heads, normalised": {"heads": 2, "normalise": True},
    "weights at every other pixel": {"heads": 2, "step": 2},
    "weights at every other, normalised": {"heads": 1, "step": 2, "normalise": True},
    "window 5, step 3, normalised": {"heads": 1, "window": 5, "step": 3, "normalise": True},
    "window 5, step 2": {"heads": 1, "window": 5, "step": 2},
    "window 1": {"heads": 2, "window": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 3), (1, 4)])
def test_equals_the_equation_pixel_by_pixel(size: tuple[int, int], options: str) -> None:
    where = instead_of(3, 4, size)
    assert refusal("outlook", where, **OPTIONS[options]) is None
    block, x = awake(Outlook, where, **OPTIONS[options]), sample(where)
    torch.testing.assert_close(block(x), projected(block, gathered(block, x)), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("dilation", "size"), [((2, 2), (6, 5)), ((1, 3), (4, 7)), ((3, 2), (2, 2))])
def test_dilation_dilates_the_window(dilation: tuple[int, int], size: tuple[int, int], normalise: bool) -> None:
    padding = (dilation[1], dilation[1], dilation[0], dilation[0])
    where = instead_of(3, 4, size, dilation=dilation, padding=padding)
    block, x = awake(Outlook, where, heads=2, normalise=normalise), sample(where)
    want = projected(block, gathered(block, x, dilation=dilation))
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("size", [(7, 5), (6, 4), (1, 1), (2, 3)])
def test_stride_is_the_mean_of_the_pixels_that_are_there(size: tuple[int, int], step: int) -> None:
    where = instead_of(3, 4, size, stride=(2, 2))
    block, x = awake(Outlook, where, heads=2, step=step), sample(where)
    full = projected(block, gathered(block, x))
    want = torch.zeros(where.out_shape, dtype=x.dtype)
    for i in range(want.shape[2]):
        for j in range(want.shape[3]):
            want[:, :, i, j] = full[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_without_padding_the_centres_of_the_convolution_are_kept() -> None:
    where = instead_of(3, 4, (6, 5), padding=(0,) * 4)
    block, x = awake(Outlook, where, heads=2), sample(where)
    want = projected(block, gathered(block, x))[..., 1:-1, 1:-1]
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_padding_beyond_same_is_zeros_around_the_input() -> None:
    where = instead_of(3, 4, (4, 3), padding=(2, 3, 1, 2))
    block, x = awake(Outlook, where, heads=2), sample(where)
    want = projected(block, gathered(block, F.pad(x, (1, 2, 0, 1))))
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_a_transposed_map_with_transposed_weights_gives_the_transposed_result() -> None:
    where, across = instead_of(3, 4, (6, 5)), instead_of(3, 4, (5, 6))
    block, turned = awake(Outlook, where, heads=2), awake(Outlook, across, heads=2)
    x = sample(where)
    with torch.no_grad():
        for name in ("weight", "bias"):
            theirs = getattr(block.attention.attn, name)
            by_tap = theirs.view(
                2, 3, 3, 3, 3, *theirs.shape[1:]
            )  # heads, target row and column, source row and column
            getattr(turned.attention.attn, name).copy_(by_tap.transpose(1, 2).transpose(3, 4).reshape(theirs.shape))
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(block.state_dict())  # axes not told apart
    assert not torch.allclose(turned(x.mT), block(x).mT)


@pytest.mark.parametrize("options", ["plain", "two heads, normalised", "weights at every other pixel"])
def test_gradients_are_those_of_finite_differences(options: str) -> None:
    values, size = 4, (3, 2)
    heads, step = OPTIONS[options]["heads"], OPTIONS[options].get("step", 1)
    torch.manual_seed(0)
    v = torch.randn(2, values, *size, dtype=torch.float64, requires_grad=True)
    small = [-(-n // step) for n in size]
    a = torch.randn(2, heads * 81, *small, dtype=torch.float64, requires_grad=True)
    normalise = OPTIONS[options].get("normalise", False)
    assert torch.autograd.gradcheck(
        lambda v, a: outlook(v, a, heads=heads, window=3, step=step, normalise=normalise), (v, a), fast_mode=True
    )


def test_gradients_reach_every_parameter_of_the_block() -> None:
    where = instead_of(2, 2, (3, 3), stride=(2, 2))
    assert gradients_match(awake(Outlook, where, heads=1), sample(where))


def test_gradients_of_a_dilated_window_are_those_of_finite_differences() -> None:
    v = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    a = torch.randn(1, 81, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, a: outlook(v, a, heads=1, window=3, dilation=(2, 1), normalise=False), (v, a), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_stays_close(dtype: torch.dtype) -> None:
    where = instead_of(8, 8, (9, 7))
    x = sample(where)
    block = awake(Outlook, where, heads=2)
    want = torch.autograd.grad(block(x).square().mean(), list(block.parameters()))
    block = block.to(dtype)
    got = torch.autograd.grad(block(x.to(dtype)).float().square().mean(), list(block.parameters()))
    for ours, expected in zip(got, want, strict=True):
        assert ours.dtype == dtype
        size = expected.abs().max()
        torch.testing.assert_close(ours.double() / size, expected / size, **TOLERANCE[torch.bfloat16])


def test_a_constant_value_comes_back_as_it_is_only_when_normalised() -> None:
    """Away from the border the weights of each target sum to one, so nine windows give nine times the value."""
    v, a = torch.ones(1, 2, 7, 7, dtype=torch.float64), torch.randn(1, 81, 7, 7, dtype=torch.float64)
    for normalise, value in ((False, 9.0), (True, 1.0)):
        y = outlook(v, a, heads=1, window=3, normalise=normalise)[..., 2:-2, 2:-2]
        torch.testing.assert_close(y, torch.full_like(y, value), **TOLERANCE[v.dtype])


@pytest.mark.parametrize("normalise", [False, True])
def test_windows_overlap_nine_six_and_four_times(normalise: bool) -> None:
    """With all weight on the centre's own value, 1 everywhere, a pixel gets as many as there are windows."""
    logits = torch.zeros(1, 1, 9, 9, 4, 5, dtype=torch.float64)
    logits[:, :, :, 4] = 1e4
    y = outlook(torch.ones(1, 1, 4, 5).double(), logits.view(1, 81, 4, 5), heads=1, window=3, normalise=normalise)
    rows, columns = torch.tensor([2.0, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 2])
    want = torch.ones(4, 5) if normalise else rows[:, None] * columns
    torch.testing.assert_close(y[0, 0], want.double(), **TOLERANCE[y.dtype])


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_the_layer_equals_volo_s_from_its_own_state_dict(size: tuple[int, int], window: int, step: int) -> None:
    volo = pytest.importorskip("timm.models.volo")
    theirs = volo.OutlookAttention(8, 2, window, padding=window // 2, stride=step).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    where = instead_of(8, 8, size)
    ours = awake(Outlook, where, heads=2, window=window, step=step)
    ours.attention.load_state_dict(theirs.state_dict())
    x = sample(where)
    want = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("step", [1, 2])
def test_the_outlooker_equals_volo_s_from_its_own_state_dict(step: int) -> None:
    volo = pytest.importorskip("timm.models.volo")
    theirs = volo.Outlooker(8, 3, 1, stride=step, num_heads=2).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    where = inserted(8, (7, 6))
    ours = awake(Outlooker, where, heads=2, step=step)
    ours.load_state_dict(theirs.state_dict())
    x = sample(where)
    want = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), want, **TOLERANCE[x.dtype])


def test_an_outlooker_of_volo_d1_has_as_many_parameters() -> None:
    """192 channels, 6 heads: 2 C^2 + C + (C + 1) 81 N, an MLP of 3 C, two norms (timm's volo_d1_224, network.0.0)."""
    volo = pytest.importorskip("timm.models.volo")
    where = inserted(192, (28, 28))
    theirs = sum(p.numel() for p in volo.Outlooker(192, 3, 1, stride=2, num_heads=6).parameters())
    ours = sum(p.numel() for p in Outlooker(where, OutlookerOptions()).parameters())
    assert Outlooker.cost(where, OutlookerOptions()).params == ours == theirs


def test_resnet50_has_the_parameters_of_the_formula() -> None:
    """2 C^2 + C + 81 (C + 1) N with N = C / 32, in place of 9 C^2, in all sixteen 3 x 3."""
    total = 25_557_032  # torchvision's resnet50
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        where = instead_of(channels, channels, (7, 7))
        count = sum(p.numel() for p in Outlook(where, OutlookOptions()).parameters())
        assert count == Outlook.cost(where, OutlookOptions()).params
        total += blocks * (count - 9 * channels**2)
    assert total == 19_951_038


@pytest.mark.parametrize(("channels", "heads"), [(64, 2), (512, 16), (16, 1), (48, 1), (100, 2), (112, 2), (97, 1)])
def test_default_heads_are_the_largest_divisor_up_to_a_32nd(channels: int, heads: int) -> None:
    assert default_heads(channels) == heads


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_flops_are_those_of_the_products(stride: int, step: int) -> None:
    """Counted on matrix products of the same sizes."""
    where = instead_of(32, 64, (14, 12), stride=(stride, stride))
    pixels, centres, outputs = 14 * 12, 14 * 12 // step**2, 14 * 12 // stride**2
    with FlopCounterMode(display=False) as counter:
        empty = torch.zeros(1, device="meta").new_empty
        torch.mm(empty(pixels, 32), empty(32, 64))
        torch.mm(empty(centres, 32), empty(32, 2 * 81))
        torch.bmm(empty(2 * pixels, 1, 25), empty(2 * pixels, 25, 32))
        torch.mm(empty(outputs, 64), empty(64, 64))
    assert Outlook.cost(where, OutlookOptions(step=step)).flops == counter.get_total_flops()


COSTED: dict[str, tuple[Place, dict[str, Any]]] = {
    "28 x 28": (instead_of(64, 64, (28, 28)), {}),
    "more channels, stride 2": (instead_of(32, 64, (29, 28), stride=(2, 2)), {}),
    "28 x 28, step 2": (instead_of(64, 128, (28, 28)), {"step": 2}),
    "29 x 27, step 2": (instead_of(64, 64, (29, 27)), {"step": 2}),
}


@pytest.mark.parametrize("name", COSTED)
def test_activation_bytes_are_those_measured(name: str) -> None:
    where, options = COSTED[name][0], OutlookOptions(**COSTED[name][1])
    cost = Outlook.cost(where, options)
    infer, train = measured_bytes(Outlook(where, options), torch.randn(where.in_shape))
    assert cost.act_infer == pytest.approx(infer, rel=0.15)
    assert cost.act_train == pytest.approx(train, rel=0.15)


@pytest.mark.parametrize("step", [1, 2])
def test_an_outlooker_s_activation_bytes_are_those_measured(step: int) -> None:
    where, options = inserted(64, (28, 28)), OutlookerOptions(step=step)
    cost = Outlooker.cost(where, options)
    infer, train = measured_bytes(Outlooker(where, options), torch.randn(where.in_shape))
    assert cost.act_infer == pytest.approx(infer, rel=0.15)
    assert cost.act_train == pytest.approx(train, rel=0.15)


def test_no_nine_fold_copy_of_the_values_is_made() -> None:
    """The unfolded form holds K^2 = 9 times the values; with 32 channels a head ours holds less than that in all."""
    where = instead_of(64, 64, (56, 56))
    infer, _ = measured_bytes(Outlook(where, OutlookOptions()), torch.randn(where.in_shape))
    assert infer < 9 * 4 * 64 * 56 * 56


def test_an_outlooker_opens_with_the_first_step() -> None:
    """Its zero projections, and at the start they alone, have a gradient; after one step every parameter has."""
    where = inserted(8, (6, 5))
    block = Outlooker(where, OutlookerOptions(heads=2)).double()
    x, target = sample(where), sample(where, seed=2)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        (block(x) - target).square().mean().backward()
        moved = {name.rsplit(".", 1)[0] for name, p in block.named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            assert moved == {"attn.proj", "mlp.fc2"}
        optimiser.step()
    assert moved == {"norm1", "attn.v", "attn.attn", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}


REFUSED: dict[str, tuple[str, Place, dict[str, Any]]] = {
    "64 channels not divisible by 6 heads": ("outlook", instead_of(64, 64, (8, 8)), {"heads": 6}),
    "convolution has 2 groups, outlook mixes all channels (groups must be 1)": (
        "outlook",
        instead_of(8, 8, (8, 8), groups=2),
        {},
    ),
    "window 4 is even, outlook needs a centre (an odd one)": ("outlook", instead_of(8, 8, (8, 8)), {"window": 4}),
    "step 3 with window 3 leaves out pixels (step must be at most 2)": (
        "outlooker",
        inserted(8, (8, 8)),
        {"step": 3},
    ),
    "dilation 2 with step 2 leaves out pixels (step must be 1)": (
        "outlook",
        instead_of(8, 8, (8, 8), dilation=(1, 2)),
        {"step": 2},
    ),
    "outlook can only replace a convolution, not be inserted": ("outlook", inserted(8, (8, 8)), {}),
    "the convolution's output is empty (0 x 0)": (
        "outlook",
        Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))),
        {},
    ),
    "the block changes from 8x8x8 to 8x4x4, outlooker keeps channels and size": (
        "outlooker",
        instead_of(8, 8, (8, 8), stride=(2, 2)),
        {},
    ),
    "the map changes from 8x8x8 to 8x4x4, outlooker keeps channels and size": (
        "outlooker",
        Place((1, 8, 8, 8), (1, 8, 4, 4)),
        {},
    ),
    "8 channels not divisible by 3 heads": ("outlooker", inserted(8, (8, 8)), {"heads": 3}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    name, where, options = REFUSED[reason]
    assert refusal(name, where, **options) == reason
