"""SASA and its stem equal their equations pixel by pixel, published code, and the paper's counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convrewrite.blocks.sasa import SASA, SASAOptions
from convrewrite.blocks.sasa_stem import SASAStem, SASAStemOptions
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import awake, gradients_match, instead_of, peer, refusal, sample
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_sasa import loop_sasa, loop_stem

Geometry = dict[str, Any]

# name: (place, what the loop is told)
PLACES: dict[str, tuple[Place, Geometry]] = {
    "same": (instead_of(3, 4, (5, 4)), {}),
    "odd size, stride 2": (instead_of(3, 4, (7, 5), stride=(2, 2)), {"count": (4, 3), "stride": (2, 2)}),
    "even size, stride 2": (instead_of(3, 4, (4, 6), stride=(2, 2)), {"count": (2, 3), "stride": (2, 2)}),
    "stride 2 down, 1 across": (instead_of(3, 4, (5, 4), stride=(2, 1)), {"count": (3, 4), "stride": (2, 1)}),
    "stride 3": (instead_of(3, 4, (7, 6), stride=(3, 3)), {"count": (3, 2), "stride": (3, 3)}),
    "dilation": (instead_of(3, 4, (6, 7), dilation=(2, 2), padding=(2,) * 4), {"dilation": (2, 2)}),
    "dilation down alone": (instead_of(3, 4, (6, 5), dilation=(2, 1), padding=(1, 1, 2, 2)), {"dilation": (2, 1)}),
    "no padding": (instead_of(3, 4, (6, 5), padding=(0,) * 4), {"start": (1, 1), "count": (4, 3)}),
    "no padding, stride 2": (
        instead_of(3, 4, (8, 7), padding=(0,) * 4, stride=(2, 2)),
        {"start": (1, 1), "count": (3, 3), "stride": (2, 2)},
    ),
    "1 x 1": (instead_of(3, 4, (1, 1)), {}),
    "1 x 1, stride 2": (instead_of(3, 4, (1, 1), stride=(2, 2)), {"stride": (2, 2)}),
    "2 x 3": (instead_of(3, 4, (2, 3)), {}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "shared embeddings, masked": {"heads": 2, "window": 3, "border": "masked"},
    "embeddings per head": {"heads": 2, "window": 3, "embeddings": "per_head"},
    "one head, window 5": {"heads": 1, "window": 5},
    "absolute": {"heads": 2, "window": 3, "position": "absolute"},
    "absolute, masked": {"heads": 1, "window": 3, "position": "absolute", "border": "masked"},
    "no position": {"heads": 4, "window": 3, "position": "none"},
    "even window": {"heads": 2, "window": 4, "position": "none", "border": "masked"},
    "even window, relative": {"heads": 2, "window": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["same", "odd size, stride 2", "2 x 3"])
def test_equals_the_equation_with_every_option(name: str, options: str) -> None:
    _equals_the_loop(name, OPTIONS[options])


@pytest.mark.parametrize("border", ["zero", "masked"])
@pytest.mark.parametrize("name", PLACES)
def test_equals_the_equation_at_every_place(name: str, border: str) -> None:
    _equals_the_loop(name, {"heads": 2, "window": 3, "border": border, "embeddings": "per_head"})


def test_equals_the_equation_with_an_odd_number_of_channels_a_head() -> None:
    where = instead_of(2, 6, (4, 3))
    block = awake(SASA, where, heads=2, window=3)
    assert block.row_embedding is not None
    assert block.column_embedding is not None
    assert (block.row_embedding.shape[1], block.column_embedding.shape[1]) == (1, 2)
    x = sample(where)
    torch.testing.assert_close(block(x), loop_sasa(block.state_dict(), x, heads=2, window=3), **TOLERANCE[x.dtype])


def _equals_the_loop(name: str, options: dict[str, Any]) -> None:
    where, geometry = PLACES[name]
    assert SASA.refuse(where, SASAOptions(**options)) is None
    block, x = awake(SASA, where, **options), sample(where)
    told = {key: value for key, value in options.items() if key != "embeddings"}
    want = loop_sasa(dict(block.state_dict()), x, **told, **geometry)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_padding_beyond_same_is_zeros_around_the_input() -> None:
    where = instead_of(3, 4, (4, 3), padding=(2, 3, 1, 2))
    block, x = awake(SASA, where, heads=2, window=3), sample(where)
    want = loop_sasa(dict(block.state_dict()), nn.functional.pad(x, (1, 2, 0, 1)), heads=2, window=3)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("options", ["shared embeddings, masked", "embeddings per head", "absolute"])
def test_a_transposed_map_with_exchanged_tables_gives_the_transposed_result(options: str) -> None:
    where, across = instead_of(3, 8, (6, 5)), instead_of(3, 8, (5, 6))
    block, turned = awake(SASA, where, **OPTIONS[options]), awake(SASA, across, **OPTIONS[options])
    x = sample(where)
    dim = block.head_dim
    with torch.no_grad():
        if block.row_embedding is not None and turned.row_embedding is not None:
            assert block.column_embedding is not None
            assert turned.column_embedding is not None
            turned.row_embedding.copy_(block.column_embedding)
            turned.column_embedding.copy_(block.row_embedding)
        # rows and columns live in the halves of a head, so q and k exchange theirs
        swap = torch.arange(8).view(-1, dim).roll(dim // 2, 1).flatten()
        q, k, v = block.qkv.weight.chunk(3)
        turned.qkv.weight.copy_(torch.cat([q[swap], k[swap], v]))
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(block.state_dict())  # axes not told apart
    assert not torch.allclose(turned(x.mT), block(x).mT)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_finite_differences(options: str) -> None:
    where = instead_of(2, 4, (3, 3), stride=(2, 1))
    assert gradients_match(awake(SASA, where, **OPTIONS[options]), sample(where))


def test_a_zero_border_takes_part_through_the_embedding_and_a_masked_one_does_not() -> None:
    where = instead_of(4, 4, (3, 3))
    x = sample(where)
    blocks = {border: awake(SASA, where, heads=2, window=3, border=border) for border in ("zero", "masked")}
    assert not torch.allclose(blocks["zero"](x)[..., 0, 0], blocks["masked"](x)[..., 0, 0])
    torch.testing.assert_close(blocks["zero"](x)[..., 1, 1], blocks["masked"](x)[..., 1, 1], **TOLERANCE[x.dtype])


STAGES = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))  # channels, blocks, size of a ResNet-50's stages


def _rewritten(blocks: tuple[int, ...], **options: Any) -> tuple[int, int]:
    """(parameters, FLOPs) that SASA adds to a bottleneck ResNet, the 3 x 3 convolutions taken away."""
    params = flops = 0
    for (channels, _, size), count in zip(STAGES, blocks, strict=True):
        for i in range(count):
            stride = 2 if i == 0 and channels > 64 else 1
            where = instead_of(channels, channels, (size * stride,) * 2, stride=(stride, stride))
            assert where.conv is not None
            block, cost = SASA(where, SASAOptions(**options)), SASA.cost(where, SASAOptions(**options))
            assert cost.params == sum(p.numel() for p in block.parameters())
            params += cost.params - 9 * channels**2
            flops += cost.flops - where.conv.flops(1, size, size)
    return params, flops


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 18_015_504), ({"embeddings": "per_head"}, 18_038_632), ({"position": "none"}, 18_012_200)],
    ids=["shared", "per head", "none"],
)
def test_resnet50_has_the_parameters_of_the_paper_s_table(options: dict[str, Any], count: int) -> None:
    assert 25_557_032 + _rewritten((3, 4, 6, 3), **options)[0] == count


@pytest.mark.parametrize(
    ("blocks", "convolutional", "count"),
    [((1, 2, 4, 1), 13_696_552, 10_331_264), ((2, 3, 5, 2), 19_626_792, 14_173_384)],
    ids=["resnet26", "resnet38"],
)
def test_smaller_resnets_have_the_parameters_of_the_paper_s_table(
    blocks: tuple[int, ...], convolutional: int, count: int
) -> None:
    assert convolutional + _rewritten(blocks)[0] == count


def test_resnet50_takes_the_paper_s_seven_gflops() -> None:
    resnet50 = 8_178_368_512  # torchvision's at 224 x 224, as torch's own FlopCounterMode has it
    assert resnet50 + _rewritten((3, 4, 6, 3))[1] == pytest.approx(6.97e9, rel=0.01)


@pytest.mark.parametrize("border", ["zero", "masked"])
@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
@pytest.mark.parametrize(
    "where",
    [instead_of(64, 64, (28, 28)), instead_of(64, 128, (14, 14)), instead_of(64, 64, (29, 28), stride=(2, 2))],
    ids=["28 x 28", "14 x 14", "stride 2"],
)
def test_activation_bytes_are_those_measured(where: Place, position: Any, border: Any) -> None:
    options = SASAOptions(position=position, border=border)
    cost = SASA.cost(where, options)
    infer, train = measured_bytes(SASA(where, options), torch.randn(where.in_shape))
    assert cost.act_infer == pytest.approx(infer, rel=0.15)
    assert cost.act_train == pytest.approx(train, rel=0.15)


REFUSED: dict[str, tuple[Place, dict[str, Any]]] = {
    "64 channels not divisible by 6 heads": (instead_of(64, 64, (8, 8)), {"heads": 6}),
    "convolution has 2 groups, sasa mixes all channels (groups must be 1)": (instead_of(8, 8, (8, 8), groups=2), {}),
    "8 heads of 1 channel, relative position needs 2 (one for each axis)": (instead_of(8, 8, (8, 8)), {}),
    "8 heads of 1 channel, absolute position needs 2 (one for each axis)": (
        instead_of(8, 8, (8, 8)),
        {"position": "absolute"},
    ),
    "sasa can only replace a convolution, not be inserted": (Place((1, 8, 8, 8), (1, 8, 8, 8)), {}),
    "the convolution's output is empty (0 x 0)": (
        Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))),
        {"heads": 2},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = REFUSED[reason]
    assert refusal("sasa", where, **options) == reason


def test_takes_single_channel_heads_without_position() -> None:
    assert refusal("sasa", instead_of(8, 8, (8, 8)), position="none") is None


@pytest.mark.parametrize("stride", [1, 2])
def test_equals_merhs_sasa_pytorch_with_one_head(stride: int) -> None:
    theirs = peer("SASA-pytorch/model/sa_layer.py").SelfAttentionConv2d(6, 8, 7, padding=3, bias=False).double()
    where = instead_of(6, 8, (10, 8), stride=(stride, stride))
    ours = awake(SASA, where, heads=1)
    with torch.no_grad():
        ours.qkv.weight.copy_(
            torch.cat([theirs.weight_query.weight, theirs.weight_key.weight, theirs.weight_value.weight])
        )
        # theirs has the columns' embedding in the first half of a head
        assert ours.row_embedding is not None
        assert ours.column_embedding is not None
        q, k, v = ours.qkv.weight.chunk(3)
        swap = torch.arange(8).roll(4)
        ours.qkv.weight.copy_(torch.cat([q[swap], k[swap], v]))
        ours.row_embedding.copy_(theirs.relative_y[None])
        ours.column_embedding.copy_(theirs.relative_x[None])
    x = sample(where)
    want = nn.functional.avg_pool2d(theirs(x), stride)
    torch.testing.assert_close(ours(x), want, **TOLERANCE[x.dtype])


def stem_place(size: tuple[int, int], channels: int = 8) -> Place:
    """A ResNet's stem: 7 x 7 with stride 2, then a 3 x 3 max pool with stride 2 and padding 1."""
    spec = ConvSpec(3, channels, (7, 7), (2, 2), (3,) * 4)
    half = spec.out_size(*size)
    pool = ConvSpec(channels, channels, (3, 3), (2, 2), (1,) * 4)
    return Place((2, 3, *size), (2, channels, *pool.out_size(*half)), spec)


@pytest.mark.parametrize("mixtures", [1, 4])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [(8, 4), (9, 6), (7, 5), (1, 1), (2, 3)])
def test_the_stem_equals_its_equation_block_by_block(size: tuple[int, int], heads: int, mixtures: int) -> None:
    where = stem_place(size)
    block, x = awake(SASAStem, where, heads=heads, mixtures=mixtures), sample(where)
    want = loop_stem(dict(block.state_dict()), x, heads=heads)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_the_stem_s_gradients_are_those_of_finite_differences(size: tuple[int, int]) -> None:
    where = stem_place(size, channels=4)
    assert gradients_match(awake(SASAStem, where, heads=2, mixtures=2), sample(where)[:1])


def test_a_transposed_map_with_exchanged_embeddings_gives_the_stem_s_transposed_result() -> None:
    block, turned = (awake(SASAStem, stem_place(size), heads=2) for size in ((9, 6), (6, 9)))
    x = sample(stem_place((9, 6)))
    with torch.no_grad():
        turned.row_embedding.copy_(block.column_embedding)
        turned.column_embedding.copy_(block.row_embedding)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(block.state_dict())
    assert not torch.allclose(turned(x.mT), block(x).mT)


def test_pixels_beyond_the_map_do_not_enter_the_stem_s_statistics() -> None:
    """In training BN sees the H x W pixels alone: the same as of a map cut into blocks by hand."""
    block = awake(SASAStem, stem_place((5, 4)), heads=2, mixtures=1).train()
    assert block.norm.running_mean is not None
    before = block.norm.running_mean.clone()
    seen: list[torch.Tensor] = []
    block.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(sample(stem_place((5, 4))))
    assert seen[0].shape == (2, 8, 5, 4)
    assert not torch.equal(block.norm.running_mean, before)


def test_a_resnet_s_stem_is_its_place() -> None:
    where = Place((1, 3, 224, 224), (1, 64, 56, 56), ConvSpec(3, 64, (7, 7), (2, 2), (3,) * 4))
    options = SASAStemOptions()
    assert SASAStem.refuse(where, options) is None
    block = SASAStem(where, options)
    assert block(torch.randn(1, 3, 224, 224)).shape == (1, 64, 56, 56)
    # 6 matrices of 3 x 64; 4 rows, 4 columns and 4 mixtures of 16 numbers; gain and bias
    assert SASAStem.cost(where, options).params == sum(p.numel() for p in block.parameters()) == 1152 + 192 + 128


@pytest.mark.parametrize("size", [(64, 64), (61, 66)])
def test_the_stem_s_activation_bytes_are_those_measured(size: tuple[int, int]) -> None:
    where = stem_place(size, channels=64)
    cost = SASAStem.cost(where, SASAStemOptions())
    infer, train = measured_bytes(SASAStem(where, SASAStemOptions()), torch.randn(where.in_shape))
    assert cost.act_infer == pytest.approx(infer, rel=0.15)
    assert cost.act_train == pytest.approx(train, rel=0.15)


SEVEN = ConvSpec(3, 64, (7, 7), (2, 2), (3,) * 4)
NO_STEM: dict[str, tuple[Place, dict[str, Any]]] = {
    "sasa_stem can only replace a stem, not be inserted": (Place((1, 3, 8, 8), (1, 64, 2, 2)), {}),
    "the stem takes 224x224 to 112x112, sasa_stem to a quarter of it (56x56)": (
        Place((1, 3, 224, 224), (1, 64, 112, 112), SEVEN),
        {},
    ),
    "the stem's convolution has stride 1x1, sasa_stem replaces one of 2x2 and a pooling after it": (
        Place((1, 3, 1, 1), (1, 64, 1, 1), ConvSpec(3, 64, (3, 3), padding=(1,) * 4)),
        {},
    ),
    "64 channels not divisible by 3 heads": (Place((1, 3, 224, 224), (1, 64, 56, 56), SEVEN), {"heads": 3}),
    "convolution has 3 groups, sasa_stem mixes all channels (groups must be 1)": (
        Place((1, 3, 8, 8), (1, 6, 2, 2), ConvSpec(3, 6, (3, 3), (2, 2), (1,) * 4, groups=3)),
        {},
    ),
}


@pytest.mark.parametrize("reason", NO_STEM)
def test_the_stem_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = NO_STEM[reason]
    assert refusal("sasa_stem", where, **options) == reason
