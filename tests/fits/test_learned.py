"""Learned patterns, SASA's two options, and strides that are made by pooling: against brute force and measurements."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.blocks.base import BLOCKS, conv_spec
from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.fits import learned
from convrewrite.fits.base import FITS
from convrewrite.fits.learned import BOUND, bounded, pattern_system
from convrewrite.fits.pooling import pooled_patterns, pooled_window
from convrewrite.fits.target import Window, prior
from convrewrite.sites import ConvSpec, Place
from tests.blocks.measure import measured_bytes

from .test_fits import built, convolution, fitted, measured, seen, smooth

PROJECTED = {"heads": 2, "window": 3, "offset_bias": True, "projection": True}


def by_hand(block: SASA, x: Tensor, stride: int) -> Tensor:
    """The block's equation for a 3 x 3 window, pixel by pixel: zero border, 8 channels, 2 heads, no dilation."""
    state = block.state_dict()
    q, k, v = F.conv2d(x, state["qkv.weight"]).view(len(x), 3, 2, 4, *x.shape[2:]).unbind(1)
    height, width = x.shape[2:]
    out = x.new_zeros(len(x), 2, 4, height, width)
    for image, head, i, j in itertools.product(range(len(x)), range(2), range(height), range(width)):
        logits, values = [], []
        for tap, (down, right) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            inside = 0 <= i + down < height and 0 <= j + right < width
            zero = x.new_zeros(4)
            key = k[image, head, :, i + down, j + right] if inside else zero
            values.append(v[image, head, :, i + down, j + right] if inside else zero)
            r = torch.cat([state["row_embedding"][0, :, down + 1], state["column_embedding"][0, :, right + 1]])
            logits.append(q[image, head, :, i, j] @ (key + r) + state["offset_bias"][head, tap])
        weights = torch.stack(logits).softmax(0)
        out[image, head, :, i, j] = sum(w * value for w, value in zip(weights, values, strict=True))
    pooled = F.avg_pool2d(out.flatten(1, 2), stride, stride, ceil_mode=True)
    mixed = torch.einsum("oc,bcij->boij", state["projection.weight"][:, :, 0, 0], pooled)
    biased: Tensor = mixed + state["projection.bias"][:, None, None]
    return biased


@pytest.mark.parametrize("stride", [1, 2])
def test_sasa_with_a_projection_and_offset_biases_is_its_equation_pixel_by_pixel(stride: int) -> None:
    torch.manual_seed(0)
    block = built("sasa", convolution(stride=stride), side=5, **PROJECTED)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert isinstance(block, SASA)
    torch.testing.assert_close(block(x), by_hand(block, x, stride), rtol=0, atol=1e-10)


def test_the_two_options_cost_a_square_with_bias_and_a_logit_for_each_head_and_tap_and_are_off() -> None:
    place = Place((2, 16, 9, 9), (2, 32, 5, 5), ConvSpec(16, 32, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)))
    plain = SASA.cost(place, SASAOptions(heads=4, window=5))
    for name, params in {"projection": 32 * 32 + 32, "offset_bias": 4 * 25}.items():
        options = SASAOptions.model_validate({"heads": 4, "window": 5, name: True})
        cost, block = SASA.cost(place, options), SASA(place, options)
        assert cost.params - plain.params == params
        assert sum(p.numel() for p in block.parameters()) == cost.params
        assert cost.flops - plain.flops == (2 * 2 * 25 * 32 * 32 if name == "projection" else 0)
    assert not SASAOptions().projection and not SASAOptions().offset_bias


@pytest.mark.parametrize("stride", [1, 2])
def test_a_projection_keeps_what_it_projects_and_an_offset_bias_nothing(stride: int) -> None:
    spec = ConvSpec(64, 64, (3, 3), stride=(stride, stride), padding=(1, 1, 1, 1))
    place, x = Place((1, 64, 28, 28), (1, 64, *spec.out_size(28, 28)), spec), torch.randn(1, 64, 28, 28)
    plain = SASAOptions()
    infer, train = measured_bytes(SASA(place, plain), x)
    for name, more in {"projection": 4 * 64 * (28 // stride) ** 2, "offset_bias": 0}.items():
        options = SASAOptions.model_validate({name: True})
        stated = SASA.cost(place, options).act_train - SASA.cost(place, plain).act_train
        assert measured_bytes(SASA(place, options), x) == (infer, train + more)
        assert stated == more


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_the_quadratic_form_of_the_patterns_is_the_error(centred: bool, images: bool) -> None:
    torch.manual_seed(1)
    conv = convolution(4, 6)
    window = Window.of_kernel(conv_spec(conv))
    scale = torch.rand(6, dtype=torch.float64) + 0.5
    target = seen(conv, smooth(6, 4), window, scale=scale) if images else prior(conv.weight, conv.bias, conv_spec(conv))
    maps = torch.randn(3, 6, 4, dtype=torch.float64)
    system, right = pattern_system(target, maps, centred=centred)
    gaps = []
    for _ in range(2):
        patterns = torch.rand(3, 9, dtype=torch.float64)
        kernel = torch.einsum("noc,nu->ocu", maps, patterns)
        bias = target.best_bias(kernel) if centred else torch.zeros_like(target.bias)
        flat = patterns.flatten()
        form = float(flat @ system @ flat - 2 * right.flatten() @ flat)
        gaps.append(target.nmse(kernel, bias) * target.power - form)
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-9)


def test_bounded_logits_keep_their_order_and_their_rank_and_stay_within_the_bound() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64) * 5
    inside = bounded(logits)
    assert float(inside.abs().max()) <= BOUND + 1e-9 < float(logits.abs().max())
    assert torch.equal(inside.argsort(1), logits.argsort(1))
    assert int(torch.linalg.matrix_rank(inside)) == 2
    mild = torch.tensor([[0.5, -0.5]])
    assert torch.equal(bounded(mild), mild)


@pytest.mark.parametrize("name", ["sasa", "outlook"])
def test_learning_never_gives_a_worse_pattern_than_it_began_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    conv, images = convolution(), smooth(12, 8)
    options = PROJECTED if name == "sasa" else {"heads": 4}
    _, after = fitted(name, conv, images, **options)
    monkeypatch.setattr(learned, "ROUNDS", 0)
    _, before = fitted(name, conv, images, **options)
    assert after < 0.95 * before


def test_a_projection_finds_a_kernel_of_its_own_family() -> None:
    torch.manual_seed(4)
    patterns = torch.randn(2, 9, dtype=torch.float64).mul(2).softmax(1)
    heads = torch.randn(8, 2, 4, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    conv, images = convolution(), smooth(12, 8)
    conv.weight.data = torch.einsum("onj,njc,nu->ocu", *heads, patterns).view(8, 8, 3, 3)
    block, expected = fitted("sasa", conv, images, **PROJECTED)
    assert expected < 5e-3 and measured(conv, block, images) < 5e-3
    _, classic = fitted("sasa", conv, images, heads=2, window=3)
    assert classic > 0.05  # of which the paper's block is far


def test_each_option_brings_the_fit_nearer() -> None:
    torch.manual_seed(5)
    conv, images = convolution(16, 16), smooth(16, 16)
    errors = [
        fitted("sasa", conv, images, heads=4, window=3, **options)[1]
        for options in ({}, {"offset_bias": True}, {"offset_bias": True, "projection": True})
    ]
    assert errors[2] < 0.7 * errors[0] and errors[1] <= 1.001 * errors[0]


def test_few_channels_in_a_head_restrict_the_patterns_that_heads_share_and_the_fit_knows_it() -> None:
    """Heads of two channels have one table for rows and one for columns between them all."""
    torch.manual_seed(6)
    conv, images = convolution(), smooth(16, 8)
    block, shared = fitted("sasa", conv, images, heads=4, window=3)
    _, own = fitted("sasa", conv, images, heads=4, window=3, embeddings="per_head")
    assert own <= 1.001 * shared
    assert measured(conv, block, images) < 0.9


@pytest.mark.parametrize(
    "options", [PROJECTED, {"heads": 2, "window": 3, "offset_bias": True}, {**PROJECTED, "window": 5}]
)
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"stride": (1, 2)}, {"dilation": 2, "padding": 2}])
def test_with_offset_biases_the_expected_error_is_the_measured_one(
    settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """Borders included, and strides by pooling where the map's size is a multiple of them."""
    torch.manual_seed(7)
    conv, images = convolution(**settings), smooth(8, 8)
    block, expected = fitted("sasa", conv, images, **options)
    assert expected > 1e-4
    assert measured(conv, block, images) == pytest.approx(expected, rel=1e-4)


def test_a_strided_outlook_expects_what_is_measured_but_for_the_border() -> None:
    torch.manual_seed(8)
    conv, images = convolution(stride=2), smooth(2, 8, side=80)
    block, expected = fitted("outlook", conv, images, heads=4)
    assert 1e-3 < expected < 0.4
    assert measured(conv, block, images) == pytest.approx(expected, rel=0.3)


def test_pooled_patterns_are_the_mean_of_the_shifted_ones() -> None:
    patterns = torch.rand(2, 6, dtype=torch.float64)
    square, wanted = patterns.view(2, 3, 2), torch.zeros(2, 4, 4, dtype=torch.float64)
    for down, right in itertools.product(range(2), range(3)):
        wanted[:, down : down + 3, right : right + 2] += square / 6
    torch.testing.assert_close(pooled_patterns(patterns, (3, 2), (2, 3)), wanted.flatten(1))
    assert torch.equal(pooled_patterns(patterns, (3, 2), (1, 1)), patterns)


def test_the_window_of_a_pooled_block_reaches_one_stride_further() -> None:
    assert pooled_window(conv_spec(convolution(stride=2)), 3) == Window((4, 4), (0, 0))
    assert pooled_window(conv_spec(convolution(stride=(1, 2))), 5) == Window((5, 6), (1, 1))
    assert pooled_window(conv_spec(convolution(stride=2, dilation=2)), 3) is None
    assert pooled_window(conv_spec(convolution(dilation=2)), 3) == Window((3, 3), (0, 0))


def test_the_fewest_heads_within_the_limit_are_chosen() -> None:
    torch.manual_seed(9)
    conv, images = convolution(), smooth(12, 8)
    fit, spec = FITS.get("sasa_wide"), conv_spec(conv)
    target = seen(conv, images, Window.of_kernel(spec))
    errors = [fit.solve(built("sasa_wide", conv, heads=m), spec, target) for m in range(1, 10)]
    for limit in (0.5, 0.1, 0.03, 0.001, 1e-30):
        wanted = next((m for m, error in enumerate(errors, 1) if error <= limit), 9)
        chosen = fit.settle(built("sasa_wide", conv, nmse=limit), spec, target)
        assert chosen.model_dump()["heads"] == wanted
        most = fit.settle(built("sasa_wide", conv, nmse=limit, heads=3), spec, target)
        assert most.model_dump()["heads"] == min(wanted, 3)
    assert len({next((m for m, e in enumerate(errors, 1) if e <= limit), 9) for limit in (0.5, 0.1, 0.03, 0.001)}) > 2
    unasked = built("sasa_wide", conv)
    assert fit.settle(unasked, spec, target) == unasked.options == BLOCKS.get("sasa_wide").Options()
