"""Exact starts that keep the convolution beside the attention, over the same grid of convolutions as full-width heads.

`test_wide.py` has the blocks that hold a convolution with no convolution left.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block
from convrewrite.blocks.blend import Blend
from convrewrite.blocks.sasa import SASA, SASAOptions
from tests.blocks.test_wide import EXACT, MATRIX, convolution, error, holding, where_stands

SIZE = (8, 9)
OPTIONS: dict[str, dict[str, Any]] = {
    "aa_conv": {"heads": 2, "upsilon": 0.5, "kappa": 0.5},
    "acmix": {"heads": 2},
    "channel_attention": {},
    "criss_cross": {},
    "dual_attention": {},
    "gpsa": {"key_dim": 2},
    "mhsa": {"heads": 2},
    "non_local": {},
    "outlook": {"heads": 2},
    "outlook_wide": {"heads": 1},
    "position_attention": {},
    "sasa": {"heads": 2, "window": 3},
    "sasa_wide": {"key_dim": 2},
}
REPLACING = sorted(n for n in BLOCKS.names() if "replace" in BLOCKS.get(n).actions and BLOCKS.get(n).span == "conv")


def test_the_grid_knows_every_block_that_takes_a_convolution_s_place() -> None:
    ours = {name for name in REPLACING if BLOCKS.get(name).__module__.startswith("convrewrite.blocks")}
    assert set(OPTIONS) == ours


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_residual_augmentation_is_the_convolution_that_it_holds(kernel: int, dtype: torch.dtype) -> None:
    options = {"form": "residual", "heads": 2}
    for stride, dilation, groups, mode in MATRIX:
        torch.manual_seed(0)
        conv = convolution(kernel, stride, dilation, groups, mode).to(dtype)
        block = holding("aa_conv", conv, SIZE, **options)
        assert error(block, conv, torch.randn(1, 8, *SIZE, dtype=dtype)) <= EXACT[dtype]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("kernel", [3, 5, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_blend_is_the_convolution_to_the_bit_whatever_the_block(name: str, kernel: int, dtype: torch.dtype) -> None:
    """Of every stride, dilation, number of groups and padding mode; or the block refuses, for the groups alone."""
    cls = BLOCKS.get(name)
    options, blended = cls.Options(**OPTIONS[name]), 0
    for stride, dilation, groups, mode in MATRIX:
        if name == "outlook_wide" and (kernel > 3 or mode != "zeros"):
            continue  # its weights grow with the fourth power of the kernel, and a blend does not look at them
        torch.manual_seed(0)
        conv = convolution(kernel, stride, dilation, groups, mode).to(dtype)
        place = where_stands(conv, SIZE)
        reason = cls.refuse(place, options)
        if reason is not None:
            assert f"{groups} groups" in reason or f"'{mode}'" in reason or str(stride) in reason, reason
            continue
        block = cls(place, options).to(dtype)
        x = torch.randn(1, 8, *SIZE, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(Blend(conv, block)(x), conv(x)), (stride, dilation, groups, mode)
            assert not torch.allclose(block(x), conv(x), rtol=0.1)  # the block alone is another function
        blended += 1
    assert blended or (name == "outlook_wide" and kernel > 3)


def _gradients(module: nn.Module, x: Tensor, towards: Tensor) -> dict[str, float]:
    module.zero_grad()
    (module(x) * towards).mean().backward()
    return {name: float(p.grad.norm()) for name, p in module.named_parameters() if p.grad is not None}


OPENS = {"gpsa": ("gate", {}), "aa_conv": ("attn_out.weight", {"form": "residual", "heads": 2})}


@pytest.mark.parametrize("name", OPENS)
def test_what_opens_a_closed_attention_learns_as_fast_as_in_a_fresh_block(name: str) -> None:
    """Their attention is shut at step 0 by construction: the share of content, or the output projection, opens it."""
    part, options = OPENS[name]
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    held = holding(name, conv, (8, 8), **options)
    fresh = type(held)(where_stands(conv, (8, 8)), held.options)
    x, towards = torch.randn(4, 16, 8, 8), torch.randn(4, 16, 8, 8)
    ratio = _gradients(held, x, towards)[part] / _gradients(fresh, x, towards)[part]
    assert 0.1 <= ratio <= 10, ratio


@pytest.mark.parametrize("name", ["aa_conv", "blend"])
def test_one_step_opens_a_closed_attention_and_its_logits_learn(name: str) -> None:
    torch.manual_seed(0)
    conv, options = nn.Conv2d(16, 16, 3, padding=1), {"form": "residual", "heads": 2}
    module: Block | Blend = (
        holding("aa_conv", conv, (8, 8), **options)
        if name == "aa_conv"
        else Blend(conv, SASA(where_stands(conv, (8, 8)), SASAOptions(heads=2, window=3)))
    )
    part = "qkv_conv.weight" if name == "aa_conv" else "block.qkv.weight"
    x, towards = torch.randn(4, 16, 8, 8), torch.randn(4, 16, 8, 8)
    assert _gradients(module, x, towards).get(part, 0.0) == 0.0
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(10 * parameter.grad)
    assert _gradients(module, x, towards)[part] > 0
