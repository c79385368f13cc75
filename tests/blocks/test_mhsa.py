"""BoTNet's attention equals its equation computed pixel by pixel, timm's module, and the published parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.mhsa import MHSA, MHSAOptions
from convrewrite.sites import ConvSpec, Place
from tests.blocks import EXPORT, TOLERANCE
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_relative import loop_mhsa


def place(c_in: int, c_out: int, size: tuple[int, int], kernel: int = 3, batch: int = 1, **conv: Any) -> Place:
    """A place whose convolution pads "same" unless told otherwise."""
    same = conv.get("dilation", (1, 1))[0] * (kernel // 2)
    spec = ConvSpec(c_in, c_out, (kernel, kernel), **{"padding": (same,) * 4, **conv})
    return Place((batch, c_in, *size), (batch, c_out, *spec.out_size(*size)), spec)


def build(where: Place, **options: Any) -> MHSA:
    """An MHSA in float64 with every parameter at random."""
    torch.manual_seed(0)
    block = MHSA(where, MHSAOptions(**{"heads": 2, **options})).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


PLACES = {
    "same": place(3, 8, (4, 5), bias=True),
    "odd size, stride 2": place(3, 8, (5, 7), stride=(2, 2), bias=True),
    "even size, stride 2": place(3, 8, (6, 4), stride=(2, 2)),
    "dilation": place(3, 8, (5, 4), dilation=(2, 2)),
    "no padding": place(3, 8, (5, 6), padding=(0, 0, 0, 0)),
    "no padding, stride 2": place(3, 8, (6, 5), padding=(0, 0, 0, 0), stride=(2, 2)),
    "even kernel": place(3, 8, (4, 5), kernel=2, padding=(0, 0, 0, 0)),
    "1x1, stride 2": place(3, 8, (5, 4), kernel=1, stride=(2, 2)),
    "1 x 1": place(3, 8, (1, 1)),
    "1 x 4": place(3, 8, (1, 4)),
}


@pytest.mark.parametrize("scale_position", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_equals_the_equation_pixel_by_pixel(name: str, scale_position: bool) -> None:
    where = PLACES[name]
    assert where.conv is not None
    block = build(where, scale_position=scale_position)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = loop_mhsa(dict(block.state_dict()), x, where.conv, heads=2, scale_position=scale_position)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_padding_beyond_same_is_zeros_around_the_input() -> None:
    where = place(3, 8, (2, 3), padding=(2, 3, 1, 2))
    block = build(where)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    padded = F.pad(x, (1, 2, 0, 1))
    want = loop_mhsa(dict(block.state_dict()), padded, ConvSpec(3, 8, (3, 3), padding=(1, 1, 1, 1)), heads=2)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_gradients_are_those_of_finite_differences() -> None:
    block = build(place(2, 4, (3, 3), stride=(2, 2), bias=True), table=2)
    names, parameters = zip(*block.named_parameters(), strict=True)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_a_transposed_map_with_transposed_tables_gives_the_transposed_result() -> None:
    block, turned = build(place(3, 8, (4, 6))), build(place(3, 8, (6, 4)))
    state = dict(block.state_dict())
    state["height_rel"], state["width_rel"] = state["width_rel"], state["height_rel"]
    turned.load_state_dict(state)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(state | {"width_rel": state["width_rel"].flip(0)})  # left for right
    assert not torch.allclose(turned(x.mT), block(x).mT)


def test_without_position_the_pixels_order_does_not_matter() -> None:
    """And with it, it does: the tables act at the planned size and at others."""
    block = build(place(3, 8, (4, 4)))
    for size in ((4, 4), (6, 5)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        assert not torch.allclose(block(x).flip(3), block(x.flip(3)))
    nn.init.zeros_(block.height_rel)
    nn.init.zeros_(block.width_rel)
    torch.testing.assert_close(block(x).flip(3), block(x.flip(3)), **TOLERANCE[x.dtype])


def test_a_table_of_another_size_is_the_one_interpolated() -> None:
    """Tables of 3 positions on a map of 2 x 2: the ends and the middle are taken."""
    block, small = build(place(3, 8, (2, 2)), table=3), build(place(3, 8, (2, 2)))
    state = dict(block.state_dict())
    small.load_state_dict({k: t[::2] if k.endswith("_rel") else t for k, t in state.items()})
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(block(x), small(x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize("scale_position", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_timm_s_bottleneck_attention(stride: int, scale_position: bool) -> None:
    layers = pytest.importorskip("timm.layers.bottleneck_attn")
    size = (6, 8)
    theirs = layers.BottleneckAttn(
        12, 16, feat_size=size, stride=stride, num_heads=4, scale_pos_embed=scale_position
    ).double()
    ours = build(place(12, 16, size, stride=(stride, stride)), heads=4, scale_position=scale_position)
    ours.load_state_dict(
        {
            "qkv.weight": theirs.qkv.weight,
            "height_rel": theirs.pos_embed.height_rel,
            "width_rel": theirs.pos_embed.width_rel,
        }
    )
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE[x.dtype])


@pytest.mark.parametrize(("table", "want"), [(14, 20_859_176), (None, 20_852_008)])
def test_resnet50_has_the_published_parameters(table: int | None, want: int) -> None:
    total, options = 25_557_032, MHSAOptions(table=table)
    for where in (place(512, 512, (14, 14), stride=(2, 2)), *[place(512, 512, (7, 7))] * 2):
        params = sum(p.numel() for p in MHSA(where, options).parameters())
        assert params == MHSA.cost(where, options).params
        total += params - 9 * 512**2
    assert total == want


def test_flops_are_those_of_matrix_products() -> None:
    where = place(24, 32, (5, 6), batch=2, stride=(2, 2))
    tokens, pairs, offsets = 2 * 30, 2 * 30 * 30, 2 * 30 * (5 + 6)
    want = 2 * (tokens * 24 * 96 + 2 * pairs * 32 + offsets * 32)
    assert MHSA.cost(where, MHSAOptions()).flops == want


COSTED = {
    "14 x 14": place(512, 512, (14, 14), batch=2),
    "14 x 14, stride 2": place(512, 512, (14, 14), batch=2, stride=(2, 2)),
    "7 x 7": place(512, 512, (7, 7), batch=2),
    "24 x 24": place(128, 128, (24, 24)),
}


@pytest.mark.parametrize("name", COSTED)
def test_activation_bytes_are_those_measured(name: str) -> None:
    where, options = COSTED[name], MHSAOptions()
    infer, train = measured_bytes(MHSA(where, options), torch.randn(where.in_shape))
    cost = MHSA.cost(where, options)
    assert cost.act_infer == pytest.approx(infer, rel=0.2)
    assert cost.act_train == pytest.approx(train, rel=0.2)


REFUSED: dict[str, tuple[Place, dict[str, Any]]] = {
    "64 channels not divisible by 6 heads": (place(64, 64, (8, 8)), {"heads": 6}),
    "convolution has 2 groups, mhsa mixes all channels (groups must be 1)": (place(8, 8, (8, 8), groups=2), {}),
    "mhsa can only replace a convolution, not be inserted": (Place((1, 8, 8, 8), (1, 8, 8, 8)), {}),
    "the convolution's output is empty (0 x 0)": (Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = REFUSED[reason]
    assert MHSA.refuse(where, MHSAOptions(**options)) == reason


@pytest.mark.parametrize("name", PLACES)
def test_takes_every_place_of_this_file(name: str) -> None:
    assert MHSA.refuse(PLACES[name], MHSAOptions(heads=2)) is None


def test_onnxruntime_pools_odd_sizes_alike(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block, x = build(place(3, 8, (5, 7), stride=(2, 2))).float().eval(), torch.randn(1, 3, 5, 7)
    path = tmp_path / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(block, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), block(x).detach(), **EXPORT)
