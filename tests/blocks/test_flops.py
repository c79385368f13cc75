"""FLOPs of SASA, its stem, AA-Conv and the Outlooker are torch's count of the plain products in their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.aa_conv import AAConv, AAConvOptions
from convrewrite.blocks.outlooker import Outlooker, OutlookerOptions
from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.blocks.sasa_stem import SASAStem, SASAStemOptions
from convrewrite.sites import ConvSpec, Place
from tests.blocks.dense_places import inserted, instead_of


@pytest.mark.parametrize(("position", "kinds"), [("relative", 3), ("absolute", 2), ("none", 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sasa_multiplies_each_pixel_s_window_by_keys_values_and_offsets(stride: int, position: Any, kinds: int) -> None:
    """At the input's resolution, whatever the stride: projections of 63 pixels, then windows of 49 places."""
    where = instead_of(6, 8, (9, 7), stride=(stride, stride))
    pixels = torch.empty(63, 6, device="meta")
    with FlopCounterMode(display=False) as counter:
        for _ in "qkv":
            torch.mm(pixels, pixels.new_empty(6, 8))
        for _ in range(kinds):  # q.k, the weighted values, and q.r
            torch.bmm(pixels.new_empty(63 * 2, 1, 4), pixels.new_empty(63 * 2, 4, 49))
    cost = SASA.cost(where, SASAOptions(heads=2, window=7, position=position))
    assert cost.flops == where.in_shape[0] * counter.get_total_flops()


@pytest.mark.parametrize(("position", "lines"), [("relative", 9 + 8), ("none", 0)])
@pytest.mark.parametrize("groups", [1, 2])
def test_aa_conv_multiplies_a_smaller_convolution_and_attention_over_the_map(
    groups: int, position: Any, lines: int
) -> None:
    """16 channels out, of which 8 by attention: 2 heads of 5 key and 4 value channels over 72 pixels."""
    where = instead_of(6, 16, (9, 8), groups=groups)
    x = torch.empty(1, 6, 9, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(x, x.new_empty(8, 6 // groups, 3, 3), padding=1, groups=groups)
        torch.mm(x.new_empty(72, 6), x.new_empty(6, 10 + 10 + 8))
        torch.bmm(x.new_empty(2, 72, 5), x.new_empty(2, 5, 72))
        torch.bmm(x.new_empty(2, 72, 72), x.new_empty(2, 72, 4))
        if lines:  # a query's product with the offset of a row or column is the same for all keys there
            torch.bmm(x.new_empty(2, 72, 5), x.new_empty(2, 5, lines))
        torch.mm(x.new_empty(72, 8), x.new_empty(8, 8))
    options = AAConvOptions(heads=2, kappa=0.1, upsilon=0.5, min_key_dim=5, position=position)
    assert AAConv.cost(where, options).flops == where.in_shape[0] * counter.get_total_flops()


@pytest.mark.parametrize("mixtures", [1, 4])
@pytest.mark.parametrize("size", [(16, 12), (15, 9)])
def test_the_stem_multiplies_pixels_by_three_matrices_and_blocks_of_sixteen_by_themselves(
    size: tuple[int, int], mixtures: int
) -> None:
    """4 x 3 blocks, cut off at the end or not; mixing the value matrices is the same for all blocks and not counted."""
    where = Place((2, 3, *size), (2, 8, 4, 3), ConvSpec(3, 8, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)))
    with FlopCounterMode(display=False) as counter:
        pixels = torch.empty(4 * 3 * 16, 3, device="meta")
        for _ in "qkv":
            torch.mm(pixels, pixels.new_empty(3, 8))
        heads = pixels.new_empty(4 * 3 * 2, 16, 4)
        torch.bmm(torch.bmm(heads, heads.mT), heads)
    cost = SASAStem.cost(where, SASAStemOptions(heads=2, mixtures=mixtures))
    assert cost.flops == where.in_shape[0] * counter.get_total_flops()


@pytest.mark.parametrize("step", [1, 2])
def test_an_outlooker_is_outlook_attention_and_two_matrices_of_an_mlp(step: int) -> None:
    """32 channels, one head, a window of 3: each pixel's sum runs over the 5 x 5 that share a window with it."""
    where = inserted(32, (7, 6))
    with FlopCounterMode(display=False) as counter:
        pixels = torch.empty(42, 32, device="meta")
        for _ in ("values", "projection"):
            torch.mm(pixels, pixels.new_empty(32, 32))
        torch.mm(pixels.new_empty(42 if step == 1 else 4 * 3, 32), pixels.new_empty(32, 81))
        torch.bmm(pixels.new_empty(42, 1, 25), pixels.new_empty(42, 25, 32))
        torch.mm(torch.mm(pixels, pixels.new_empty(32, 96)), pixels.new_empty(96, 32))
    cost = Outlooker.cost(where, OutlookerOptions(step=step, mlp_ratio=3))
    assert cost.flops == where.in_shape[0] * counter.get_total_flops()
