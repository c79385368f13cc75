"""AA-Conv equals its equation computed pixel by pixel, and has the paper's parameters and FLOPs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.aa_conv import AAConv, AAConvOptions
from convrewrite.blocks.relative import relative_attention
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_relative import loop_aa_conv, loop_conv

SMALL: dict[str, Any] = {"heads": 2, "kappa": 0.5, "upsilon": 0.5, "min_key_dim": 2}


def place(c_in: int, c_out: int, size: tuple[int, int], kernel: int = 3, batch: int = 1, **conv: Any) -> Place:
    """A place whose convolution pads "same" unless told otherwise."""
    same = conv.get("dilation", (1, 1))[0] * (kernel // 2)
    spec = ConvSpec(c_in, c_out, (kernel, kernel), **{"padding": (same,) * 4, **conv})
    return Place((batch, c_in, *size), (batch, c_out, *spec.out_size(*size)), spec)


def build(where: Place, **options: Any) -> AAConv:
    """An AAConv in float64 with every parameter at random."""
    torch.manual_seed(0)
    block = AAConv(where, AAConvOptions(**{**SMALL, **options})).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


PLACES = {
    "same": place(3, 8, (4, 5)),
    "odd size, stride 2": place(3, 8, (7, 5), stride=(2, 2)),
    "even size, stride 2": place(3, 8, (6, 8), stride=(2, 2), bias=True),
    "dilation": place(3, 8, (5, 4), dilation=(2, 2)),
    "groups": place(4, 8, (4, 4), groups=2, bias=True),
    "no padding": place(3, 8, (5, 6), padding=(0, 0, 0, 0)),
    "padding beyond same": place(3, 8, (2, 3), padding=(2, 2, 2, 2)),
    "uneven padding": place(3, 8, (4, 5), padding=(0, 1, 1, 2)),
    "even kernel": place(3, 8, (4, 5), kernel=2, padding=(0, 0, 0, 0)),
    "1x1, stride 2": place(3, 8, (5, 4), kernel=1, stride=(2, 2)),
    "1 x 1": place(3, 8, (1, 1)),
    "1 x 4": place(3, 8, (1, 4)),
}


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
@pytest.mark.parametrize("name", PLACES)
def test_equals_the_equation_pixel_by_pixel(name: str, position: str, pool: int) -> None:
    where = PLACES[name]
    assert where.conv is not None
    block = build(where, position=position, pool=pool)
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = loop_aa_conv(dict(block.state_dict()), x, where.conv, heads=2, position=position, pool=pool)
    assert tuple(want.shape) == where.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


def test_all_channels_can_come_from_attention() -> None:
    where = place(3, 8, (4, 3))
    block = build(where, upsilon=1.0)
    assert block.conv_out is None
    x = torch.randn(where.in_shape, dtype=torch.float64)
    assert where.conv is not None
    want = loop_aa_conv(dict(block.state_dict()), x, where.conv, heads=2, position="relative", pool=1)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize(("position", "pool"), [("relative", 1), ("absolute", 2), ("none", 1)])
@pytest.mark.parametrize("name", PLACES)
def test_residual_adds_attention_to_the_last_channels_of_a_whole_convolution(
    name: str, position: str, pool: int
) -> None:
    where = PLACES[name]
    assert where.conv is not None
    block = build(where, position=position, pool=pool, form="residual")
    x = torch.randn(where.in_shape, dtype=torch.float64)
    state = dict(block.state_dict())
    assert state["conv_out.weight"].shape[0] == 8 and "attn_out.bias" not in state
    alone = {key: value for key, value in state.items() if not key.startswith("conv_out")}
    want = loop_conv(x, state["conv_out.weight"], state.get("conv_out.bias"), where.conv)
    want[:, 4:] += loop_aa_conv(alone, x, where.conv, heads=2, position=position, pool=pool)
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])
    assert AAConv.cost(where, block.options).params == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 2), (5, 2, 1)])
def test_residual_is_the_convolution_that_it_holds_bit_for_bit(
    kernel: int, stride: int, dilation: int, groups: int, mode: str
) -> None:
    padding = dilation * (kernel // 2)
    form = {"stride": stride, "dilation": dilation, "groups": groups, "padding_mode": mode}
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, kernel, padding=padding, bias=groups > 1, **form).double()
    where = place(4, 8, (9, 7), kernel, **{**form, "stride": (stride,) * 2, "dilation": (dilation,) * 2},
                  padding=(padding,) * 4, bias=groups > 1)  # fmt: skip
    block = build(where, form="residual")
    assert AAConv.holds(where, block.options)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    assert not torch.allclose(block(x), conv(x))
    block.load_conv(conv)
    assert torch.equal(block(x), conv(x))
    block(x).square().sum().backward()
    assert block.attn_out.weight.grad is not None and float(block.attn_out.weight.grad.abs().max()) > 1e-3


def test_the_paper_s_form_holds_no_convolution() -> None:
    where = PLACES["same"]
    block = build(where)
    assert not AAConv.holds(where, block.options)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False).double()
    with pytest.raises(ConvrewriteError, match="form concat cannot hold"):
        block.load_conv(conv)
    with pytest.raises(ConvrewriteError, match="aa_conv was built for"):
        build(where, form="residual").load_conv(nn.Conv2d(3, 8, 5, padding=2, bias=False).double())


def test_residual_takes_groups_that_the_attention_s_channels_do_not_fit() -> None:
    where, options = place(16, 16, (8, 8), groups=16), {"form": "residual"}
    assert AAConv.refuse(where, AAConvOptions(**options)) is None
    assert AAConv(where, AAConvOptions(**options))(torch.randn(where.in_shape)).shape == where.out_shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 1, 2)])
def test_the_convolution_s_half_keeps_its_padding_mode(mode: str, padding: tuple[int, int, int, int]) -> None:
    where = place(3, 8, (5, 5), padding=padding, padding_mode=mode)
    block = build(where)
    assert block.conv_out is not None
    x = torch.randn(where.in_shape, dtype=torch.float64)
    want = F.conv2d(F.pad(x, padding, mode=mode), block.conv_out.weight)
    torch.testing.assert_close(block(x)[:, :4], want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_gradients_are_those_of_finite_differences(position: str, pool: int) -> None:
    block = build(place(2, 4, (3, 4), stride=(1, 2)), position=position, pool=pool)
    names, parameters = zip(*block.named_parameters(), strict=True)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_a_transposed_map_with_transposed_tables_gives_the_transposed_result() -> None:
    block, turned = build(place(3, 8, (4, 6))), build(place(3, 8, (6, 4)))
    assert block.key_rel_h is not None
    assert block.key_rel_w is not None
    state = dict(block.state_dict())
    state["key_rel_h"], state["key_rel_w"] = state["key_rel_w"], state["key_rel_h"]
    state["conv_out.weight"] = state["conv_out.weight"].mT
    turned.load_state_dict(state)
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(state | {"key_rel_w": state["key_rel_w"].flip(0)})  # left for right
    assert not torch.allclose(turned(x.mT), block(x).mT)


@pytest.mark.parametrize("pool", [1, 2])
def test_an_empty_batch_gives_an_empty_batch(pool: int) -> None:
    block = build(place(3, 8, (4, 5)), pool=pool)
    assert block(torch.zeros(0, 3, 4, 5, dtype=torch.float64)).shape == (0, 8, 4, 5)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (20, 2)])
def test_runs_at_sizes_other_than_the_planned(size: tuple[int, int], position: str, pool: int) -> None:
    block = build(place(3, 8, (7, 5), stride=(2, 2)), position=position, pool=pool)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    want = F.conv2d(x, x.new_zeros(8, 3, 3, 3), stride=2, padding=1)
    assert block(x).shape == want.shape
    assert block(x).isfinite().all()


def test_starts_with_the_paper_s_tables() -> None:
    block = AAConv(place(256, 256, (14, 14)), AAConvOptions())
    assert block.key_rel_h is not None
    assert block.key_rel_w is not None
    assert block.key_rel_h.shape == block.key_rel_w.shape == (27, 20)
    for table in (block.key_rel_h, block.key_rel_w):
        assert table.std().item() == pytest.approx(20**-0.5, rel=0.15)
        assert abs(table.mean().item()) < 0.05


@pytest.mark.parametrize(
    ("channels", "upsilon", "values"), [(128, 0.1, 8), (256, 0.1, 24), (512, 0.1, 48), (16, 0.1, 8), (80, 0.3, 24)]
)
def test_has_the_paper_s_widths(channels: int, upsilon: float, values: int) -> None:
    block = AAConv(place(4, channels, (3, 3)), AAConvOptions(upsilon=upsilon))
    assert (block.keys, block.values) == (160, values)


def augmented(options: AAConvOptions) -> list[tuple[int, Place, AAConvOptions]]:
    """(how many a ResNet-50 has, place, options) of its last three stages' 3x3; the first one's is pooled."""
    pooled = options.model_copy(update={"pool": 2})
    return [
        (1, place(128, 128, (56, 56), stride=(2, 2)), pooled),
        (3, place(128, 128, (28, 28)), pooled),
        (1, place(256, 256, (28, 28), stride=(2, 2)), options),
        (5, place(256, 256, (14, 14)), options),
        (1, place(512, 512, (14, 14), stride=(2, 2)), options),
        (2, place(512, 512, (7, 7)), options),
    ]


PUBLISHED = {"resnet50": (25_557_032, (4, 6), 25_809_392), "resnet101": (44_549_160, (4, 23), 45_386_728)}
PUBLISHED["resnet152"] = (60_192_808, (8, 36), 61_613_536)


@pytest.mark.parametrize("name", PUBLISHED)
def test_resnets_have_the_paper_s_parameters(name: str) -> None:
    total, blocks, want = PUBLISHED[name]
    more = {128: blocks[0] - 4, 256: blocks[1] - 6, 512: 0}
    for count, where, options in augmented(AAConvOptions()):
        channels = where.in_shape[1]
        block = AAConv(where, options)
        params = sum(p.numel() for p in block.parameters())
        assert params == AAConv.cost(where, options).params
        count += more[channels] if count > 1 else 0
        total += count * (params - 9 * channels**2)
    assert total == want


def resnet50_flops() -> float:
    """2 per multiply-add of the convolutions and the classifier, from the architecture."""
    flops, c_in, side = 2.0 * (64 * 147 * 112**2 + 2048 * 1000), 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            out = side // 2 if stage and not block else side
            flops += 2.0 * (c_in * width * side**2 + 9 * width**2 * out**2 + 4 * width**2 * out**2)
            flops += 0 if block else 2.0 * c_in * 4 * width * out**2
            c_in, side = 4 * width, out
    return flops


@pytest.mark.parametrize(("pool", "giga"), [(2, 8.41), (1, 9.44)])
def test_resnet50_has_the_published_flops(pool: int, giga: float) -> None:
    total = resnet50_flops()
    assert total == pytest.approx(8.18e9, rel=0.01)  # the 4.09 GMAC that torchvision states
    for count, where, options in augmented(AAConvOptions()):
        options = options if pool == 2 else options.model_copy(update={"pool": 1})
        assert where.conv is not None
        total += count * (AAConv.cost(where, options).flops - where.conv.flops(1, *where.out_shape[2:]))
    assert total / 1e9 == pytest.approx(giga, rel=0.01)


COSTED: dict[str, tuple[Place, dict[str, Any]]] = {
    "14 x 14": (place(256, 256, (14, 14), batch=2), {}),
    "7 x 7, stride 2": (place(512, 512, (14, 14), batch=2, stride=(2, 2)), {}),
    "28 x 28, pooled": (place(128, 128, (28, 28), batch=2), {"pool": 2}),
    "14 x 14, residual": (place(256, 256, (14, 14), batch=2), {"form": "residual"}),
    "28 x 28, no position": (place(128, 128, (28, 28)), {"position": "none"}),
}


@pytest.mark.parametrize("name", COSTED)
def test_activation_bytes_are_those_measured(name: str) -> None:
    where, options = COSTED[name][0], AAConvOptions(**COSTED[name][1])
    infer, train = measured_bytes(AAConv(where, options), torch.randn(where.in_shape))
    cost = AAConv.cost(where, options)
    assert cost.act_infer == pytest.approx(infer, rel=0.2)
    assert cost.act_train == pytest.approx(train, rel=0.2)


REFUSED: dict[str, tuple[Place, dict[str, Any]]] = {
    "7 output channels, 8 heads need at least one each": (place(3, 7, (8, 8)), {}),
    "8 channels beside the 8 of attention, not divisible by 16 groups": (place(16, 16, (8, 8), groups=16), {}),
    "aa_conv can only replace a convolution, not be inserted": (Place((1, 8, 8, 8), (1, 8, 8, 8)), {}),
    "outputs chosen has nothing to give up in the form residual (wanted: last)": (
        place(16, 16, (8, 8)),
        {"form": "residual", "outputs": "chosen"},
    ),
    "the convolution's output is empty (0 x 0)": (Place((1, 8, 2, 2), (1, 8, 0, 0), ConvSpec(8, 8, (3, 3))), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = REFUSED[reason]
    assert AAConv.refuse(where, AAConvOptions(**options)) == reason


@pytest.mark.parametrize("name", PLACES)
def test_takes_every_place_of_this_file(name: str) -> None:
    assert AAConv.refuse(PLACES[name], AAConvOptions(**SMALL)) is None


@pytest.mark.parametrize("wrong", [{"pool": 3}, {"upsilon": 1.5}, {"kappa": 0}, {"heads": 0}, {"position": "sine"}])
def test_options_outside_their_limits_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AAConvOptions(**wrong)


def test_relative_logits_are_those_of_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of leaderj1001/Attention-Augmented-Conv2d under $CONVREWRITE_PEERS, with the tables it makes in every forward."""
    root = os.environ.get("CONVREWRITE_PEERS")
    if not root:
        pytest.skip("CONVREWRITE_PEERS is not set")
    folder = Path(root) / "Attention-Augmented-Conv2d" / "in_paper_attention_augmented_conv"
    spec = importlib.util.spec_from_file_location("peer_aa", folder / "attention_augmented_conv.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables: list[Tensor] = []
    draw = torch.randn

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        tables.append(draw(*args, **kwargs))
        return tables[-1]

    peer = module.AugmentedConv(3, 16, 3, dk=8, dv=8, Nh=2, relative=True)
    monkeypatch.setattr(torch, "randn", seen)
    with torch.no_grad():  # with gradients it fails: it scales q in place, and q is a view from torch.split
        flat_q, flat_k, flat_v, q, _, _ = peer.compute_flat_qkv(draw(1, 3, 4, 5), 8, 8, 2)
        logits = flat_q.transpose(2, 3) @ flat_k + sum(peer.relative_logits(q))
    want = logits.softmax(-1) @ flat_v.transpose(2, 3)  # (B, N, L, d)
    columns, rows = tables
    ours = (
        t.permute(0, 2, 1).unflatten(1, (4, 5)).unflatten(3, (2, 4))
        for t in (x.flatten(1, 2) for x in (flat_q, flat_k, flat_v))
    )
    got = relative_attention(*ours, scale=1.0, rows=rows, columns=columns)
    torch.testing.assert_close(got.flatten(1, 2).transpose(1, 2), want, **TOLERANCE[torch.float32])
