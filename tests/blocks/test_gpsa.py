"""GPSA equals its equation computed pixel by pixel, ConViT's code, and with its borders the convolution it holds."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks import gpsa
from convrewrite.blocks.base import conv_spec
from convrewrite.blocks.folding import Affine
from convrewrite.blocks.gpsa import GPSA, GPSAOptions
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_relative import loop_gpsa

EXACT: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 0, "atol": 1e-5},
    torch.float64: {"rtol": 0, "atol": 1e-12},
}


def place(c_in: int, c_out: int, size: tuple[int, int], kernel: int = 3, batch: int = 1, **conv: Any) -> Place:
    """A place whose convolution pads "same" unless told otherwise."""
    same = conv.get("dilation", (1, 1))[0] * (kernel // 2)
    spec = ConvSpec(c_in, c_out, (kernel, kernel), **{"padding": (same,) * 4, **conv})
    return Place((batch, c_in, *size), (batch, c_out, *spec.out_size(*size)), spec)


def build(where: Place, **options: Any) -> GPSA:
    """A GPSA in float64 with every parameter at random."""
    torch.manual_seed(0)
    block = GPSA(where, GPSAOptions(**{"key_dim": 2, **options})).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


PLACES = {
    "same": place(3, 4, (4, 5)),
    "bias, batch of 2": place(3, 4, (3, 3), batch=2, bias=True),
    "odd size, stride 2": place(3, 4, (5, 7), stride=(2, 2)),
    "even size, stride 2 and 1": place(3, 4, (6, 4), stride=(2, 1)),
    "dilation": place(3, 4, (4, 4), dilation=(2, 2)),
    "no padding": place(3, 4, (4, 5), padding=(0, 0, 0, 0)),
    "padding beyond same": place(3, 4, (2, 3), padding=(2, 2, 2, 2)),
    "uneven padding": place(3, 4, (4, 3), padding=(0, 1, 1, 2)),
    "even kernel": place(3, 4, (4, 5), kernel=2, padding=(0, 0, 0, 0)),
    "1x1, stride 2": place(3, 4, (5, 4), kernel=1, stride=(2, 2)),
    "1 x 1": place(3, 4, (1, 1)),
}


@pytest.mark.parametrize("dense", [0, 10**9], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", PLACES)
def test_equals_the_equation_pixel_by_pixel(name: str, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpsa, "DENSE_PER_CHANNEL", dense)
    check_equation(PLACES[name], background=False)


@pytest.mark.parametrize("name", ["bias, batch of 2", "even size, stride 2 and 1", "even kernel", "1 x 1"])
def test_equals_the_equation_with_a_background_too(name: str) -> None:
    check_equation(PLACES[name], background=True)


def check_equation(where: Place, *, background: bool) -> None:
    assert where.conv is not None
    block = build(where, background=background)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = loop_gpsa(dict(block.state_dict()), x, where.conv)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 without bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation 2": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "5x3": {"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2)},
    "1x1": {"kernel_size": 1},
    "2x2": {"kernel_size": 2, "stride": 2},
    "4x4 same": {"kernel_size": 4, "padding": "same"},
    "no padding": {"kernel_size": 3},
    "padding 3": {"kernel_size": 3, "padding": 3},
}


def holding(conv: nn.Conv2d, size: tuple[int, int], **options: Any) -> GPSA:
    spec = conv_spec(conv)
    where = Place((2, spec.in_channels, *size), (2, spec.out_channels, *spec.out_size(*size)), spec)
    block = GPSA(where, GPSAOptions(**options)).to(conv.weight.dtype)
    block.load_conv(conv)
    return block


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("size", [(7, 7), (8, 5), (40, 33)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_is_the_convolution_that_it_holds(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 16, **CONVOLUTIONS[name]).to(dtype)
    x = torch.randn(2, 12, *size, dtype=dtype)
    torch.testing.assert_close(holding(conv, size)(x), conv(x), **EXACT[dtype])


def test_is_the_convolution_at_sizes_other_than_the_planned() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, stride=2).double()
    block = holding(conv, (9, 9))
    for size in ((1, 1), (2, 30), (17, 8)):
        x = torch.randn(1, 4, *size, dtype=torch.float64)
        torch.testing.assert_close(block(x), conv(x), **EXACT[x.dtype])


BACKGROUND_PARTS = ("background", "weight", "gate", "qk.weight")


def test_with_a_background_every_part_matters_and_the_convolution_can_be_read_back() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    block = holding(conv, (7, 8), background=True)
    torch.testing.assert_close(block(x), conv(x), **EXACT[x.dtype])
    plain = block.plain()
    assert plain is not None
    torch.testing.assert_close(plain.weight, conv.weight, rtol=1e-15, atol=0, check_stride=False)
    assert torch.equal(plain.bias, conv.bias)  # type: ignore[arg-type]
    for part in BACKGROUND_PARTS:
        block = holding(conv, (7, 8), background=True)
        with torch.no_grad():
            block.get_parameter(part).flatten()[0] += 0.1
        assert not torch.allclose(block(x), conv(x), **EXACT[x.dtype]), part
        assert block.plain() is None, part


def test_what_follows_is_folded_into_a_block_with_a_background_too() -> None:
    torch.manual_seed(0)
    block, norm = build(place(3, 4, (4, 5), bias=True), background=True), nn.BatchNorm2d(4).double()
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2.0)  # type: ignore[arg-type]
    folded = block.folded(Affine.of_norm(norm.eval()))
    assert folded is not None
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(x), norm(block(x)), **TOLERANCE[x.dtype])


def test_a_fresh_background_sees_content_alone_and_is_as_large_as_the_others() -> None:
    block = GPSA(place(64, 64, (5, 5)), GPSAOptions(background=True))
    assert block.gate.tolist() == pytest.approx([1 - 0.7310586] * 9 + [1.0])
    assert block.position[9].tolist() == [0.0, 0.0, -1.0]
    assert block.background is not None
    assert block.background.std().item() == pytest.approx(block.weight.std().item(), rel=0.05)


@pytest.mark.parametrize("part", ["weight", "position", "gate", "bias"])
def test_is_not_the_convolution_once_a_part_is_changed(part: str) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    block, x = holding(conv, (7, 7)), torch.randn(1, 4, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        block.get_parameter(part).flatten()[0] += 1 if part != "position" else 80
    assert not torch.allclose(block(x), conv(x), **EXACT[x.dtype])


def test_without_the_zero_sink_24_of_49_pixels_would_be_wrong() -> None:
    """With keys on the map alone a head whose tap is outside takes the nearest pixel: replicate padding."""
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False).double()
    x = torch.randn(1, 4, 7, 7, dtype=torch.float64)
    replicated = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), conv.weight)
    wrong = (replicated - conv(x)).abs().amax(1) > 1e-9
    assert int(wrong.sum()) == 24
    torch.testing.assert_close(holding(conv, (7, 7))(x), conv(x), **EXACT[x.dtype])


def test_a_held_convolution_can_start_to_learn_content() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    block = holding(conv, (7, 7))
    block(torch.randn(2, 4, 7, 7, dtype=torch.float64)).square().sum().backward()
    assert block.gate.grad is not None
    assert block.gate.grad.abs().min() > 1e-3


def test_does_not_touch_the_convolution_and_shares_nothing_with_it() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    before = conv.weight.clone()
    block = holding(conv, (7, 7))
    nn.init.zeros_(block.weight)
    assert torch.equal(conv.weight, before)


def test_refuses_to_hold_another_convolution_than_its_own() -> None:
    block = holding(nn.Conv2d(4, 4, 3, padding=1), (7, 7))
    with pytest.raises(ConvrewriteError, match="was built for"):
        block.load_conv(nn.Conv2d(4, 4, 3, padding=1, stride=2))


def test_a_fresh_block_looks_around_its_taps_with_the_paper_s_share_of_content() -> None:
    block = GPSA(place(4, 4, (5, 5), dilation=(2, 2)), GPSAOptions(locality=0.5))
    taps = [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 0), (0, 2), (2, -2), (2, 0), (2, 2)]  # (down, right)
    assert block.position.tolist() == [[right, down, -0.5] for down, right in taps]
    assert block.gate.tolist() == pytest.approx([1 - 0.7310586] * 9)


@pytest.mark.parametrize("more", [False, True])
def test_gradients_are_those_of_finite_differences(more: bool) -> None:
    where = place(2, 2, (3, 2), kernel=2, padding=(1, 0, 0, 1), stride=(1, 2), bias=True)
    block = build(where, background=more)
    names, parameters = zip(*block.named_parameters(), strict=True)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_a_transposed_map_with_transposed_weights_gives_the_transposed_result() -> None:
    block, turned = build(place(3, 4, (4, 6))), build(place(3, 4, (6, 4)))
    order = torch.arange(9).view(3, 3).t().flatten()  # head of the transposed tap
    state = dict(block.state_dict())
    state["weight"] = state["weight"].mT
    state["gate"] = state["gate"][order]
    state["qk.weight"] = state["qk.weight"].view(2, 9, 2, 3)[:, order].reshape(36, 3, 1, 1)
    unturned = state["position"][order]
    turned.load_state_dict(state | {"position": unturned[:, [1, 0, 2]]})
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(state | {"position": unturned})  # axes not told apart
    assert not torch.allclose(turned(x.mT), block(x).mT)


def test_parameters_are_those_of_the_formula() -> None:
    where = place(256, 512, (14, 14), stride=(2, 2))
    block = GPSA(where, GPSAOptions())
    assert block.key_dim == 56  # 512 over 9 taps, down to a multiple of 8
    want = 9 * 256 * 512 + 2 * 9 * 56 * 256 + 4 * 9
    assert sum(p.numel() for p in block.parameters()) == GPSA.cost(where, GPSAOptions()).params == want
    with_background = GPSAOptions(background=True)
    want = 10 * 256 * 512 + 2 * 10 * 56 * 256 + 4 * 10
    assert sum(p.numel() for p in GPSA(where, with_background).parameters()) == want
    assert GPSA.cost(where, with_background).params == want


def test_flops_are_those_of_matrix_products() -> None:
    where = place(6, 8, (5, 7), batch=2, stride=(2, 2))  # 3 x 4 out
    per_head = 12 * 6 * 8 + (12 + 35) * 6 * 8 + 12 * 35 * 8 + 12 * 35 * 6 + 3 * 5 * 7 * 6 + 3 * 4 * 7 * 6
    assert GPSA.cost(where, GPSAOptions()).flops == 2 * 2 * 9 * per_head
    assert GPSA.cost(where, GPSAOptions(background=True)).flops == 2 * 2 * 10 * per_head


COSTED = {
    "7 x 7": place(512, 512, (7, 7), batch=2),
    "14 x 14, stride 2": place(256, 256, (14, 14), batch=2, stride=(2, 2)),
    "14 x 14": place(256, 256, (14, 14), batch=2),
    "20 x 20": place(64, 64, (20, 20), batch=2),
}


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("name", COSTED)
def test_activation_bytes_are_those_measured(name: str, more: bool) -> None:
    where, options = COSTED[name], GPSAOptions(background=more)
    infer, train = measured_bytes(GPSA(where, options), torch.randn(where.in_shape))
    cost = GPSA.cost(where, options)
    assert cost.act_infer == pytest.approx(infer, rel=0.2)
    assert cost.act_train == pytest.approx(train, rel=0.2)


REFUSED: dict[str, Place] = {
    "convolution has 2 groups, gpsa mixes all channels (groups must be 1)": place(8, 8, (8, 8), groups=2),
    "padding_mode 'reflect', gpsa's keys outside the map are zeros": place(8, 8, (8, 8), padding_mode="reflect"),
    "gpsa can only replace a convolution, not be inserted": Place((1, 8, 8, 8), (1, 8, 8, 8)),
    "the convolution's output is empty (0 x 0)": Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    assert GPSA.refuse(REFUSED[reason], GPSAOptions()) == reason


@pytest.mark.parametrize("name", PLACES)
def test_takes_every_place_of_this_file(name: str) -> None:
    assert GPSA.refuse(PLACES[name], GPSAOptions()) is None


def test_equals_convit_s_attention_where_no_key_is_padded() -> None:
    """Of facebookresearch/convit under $CONVREWRITE_PEERS: the pixels whose windows lie on the map, same heads."""
    root = os.environ.get("CONVREWRITE_PEERS")
    if not root:
        pytest.skip("CONVREWRITE_PEERS is not set")
    pytest.importorskip("timm")
    spec = importlib.util.spec_from_file_location("peer_convit", Path(root) / "convit" / "convit.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # timm about its old module paths
        for name in ("matplotlib", "matplotlib.pyplot"):  # imported there and never used
            patch.setitem(sys.modules, name, ModuleType(name))
        spec.loader.exec_module(module)
    size, heads, dim, channels = 6, 9, 2, 18
    theirs = module.GPSA(channels, heads)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = GPSA(place(channels, channels, (size, size), padding=(0, 0, 0, 0), bias=True), GPSAOptions(key_dim=dim))
    out, values = theirs.proj.weight.unflatten(1, (heads, dim)), theirs.v.weight.unflatten(0, (heads, dim))
    with torch.no_grad():
        ours.weight.copy_(torch.einsum("ohd,hdi->oih", out, values).reshape(channels, channels, 3, 3))
        ours.qk.weight.copy_(theirs.qk.weight[..., None, None])
        ours.position.copy_(theirs.pos_proj.weight)
        ours.gate.copy_(1 - theirs.gating_param.sigmoid())
        assert ours.bias is not None
        ours.bias.copy_(theirs.proj.bias)
    x = torch.randn(2, channels, size, size)
    want = theirs(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(2, channels, size, size)
    torch.testing.assert_close(ours(x), want[:, :, 1:-1, 1:-1], **TOLERANCE[torch.float32])
