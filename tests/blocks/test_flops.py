"""FLOPs of SASA and AA-Conv are torch's count of the plain products in their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.blocks.aa_conv import AAConv, AAConvOptions
from convrewrite.blocks.sasa import SASA, SASAOptions
from tests.blocks.dense_places import instead_of


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
