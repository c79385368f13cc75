"""Full-width heads equal their equations pixel by pixel, and the convolutions that they hold."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks import aggregate
from convrewrite.blocks.base import BLOCKS, Block, conv_spec
from convrewrite.blocks.gpsa import GPSA
from convrewrite.blocks.held import solve_mix
from convrewrite.blocks.outlook_wide import OutlookWide
from convrewrite.blocks.sasa_wide import SASAWide
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Place
from tests.blocks import TOLERANCE
from tests.blocks.dense_places import gradients_match
from tests.blocks.measure import measured_bytes
from tests.blocks.reference_wide import loop_outlook_wide, loop_sasa_wide

EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest error, relative to the largest output, of a block that holds a convolution."""


def place(
    c_in: int, c_out: int, size: tuple[int, int], kernel: tuple[int, int] = (3, 3), batch: int = 1, **conv: Any
) -> Place:
    """A place whose convolution pads "same" unless told otherwise."""
    down, right = (conv.get("dilation", (1, 1))[axis] * (kernel[axis] - 1) // 2 for axis in (0, 1))
    spec = ConvSpec(c_in, c_out, kernel, **{"padding": (right, right, down, down), **conv})
    return Place((batch, c_in, *size), (batch, c_out, *spec.out_size(*size)), spec)


def build(name: str, where: Place, **options: Any) -> Any:
    """A block in float64 with every parameter at random."""
    torch.manual_seed(0)
    cls = BLOCKS.get(name)
    assert cls.refuse(where, cls.Options(**options)) is None
    block = cls(where, cls.Options(**options)).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.6)
    return block


PLACES = {
    "same, bias": place(2, 3, (4, 3), bias=True),
    "batch of 2": place(2, 2, (2, 3), batch=2),
    "odd size, stride 2": place(2, 2, (5, 4), stride=(2, 2)),
    "stride 2 down, 1 across": place(2, 2, (4, 3), stride=(2, 1)),
    "dilation": place(2, 2, (4, 3), dilation=(2, 1)),
    "no padding": place(2, 2, (4, 3), padding=(0, 0, 0, 0)),
    "uneven padding": place(2, 2, (3, 3), padding=(0, 1, 3, 2)),
    "2 x 3 kernel": place(2, 2, (3, 4), kernel=(2, 3)),
    "groups": place(4, 6, (3, 3), groups=2),
    "depthwise": place(3, 3, (3, 3), groups=3),
    "reflecting": place(2, 2, (3, 4), padding_mode="reflect"),
    "replicating": place(2, 2, (3, 3), padding_mode="replicate"),
    "circular": place(2, 2, (3, 3), padding_mode="circular"),
    "1 x 1": place(2, 2, (1, 1)),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sasa_wide": ("sasa_wide", {"key_dim": 3}),
    "sasa_wide, window 4, 2 heads": ("sasa_wide", {"key_dim": 2, "window": 4, "heads": 2}),
    "outlook_wide": ("outlook_wide", {}),
    "outlook_wide, 3 heads": ("outlook_wide", {"heads": 3}),
}
everywhere = pytest.mark.parametrize("where", PLACES)


@everywhere
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_equation_pixel_by_pixel(where: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "CHUNK_ELEMENTS", 100)  # several chunks
    at, (name, given) = PLACES[where], OPTIONS[options]
    assert at.conv is not None
    block = build(name, at, **given)
    x = torch.randn(at.in_shape, dtype=torch.float64)
    state = dict(block.state_dict())
    if name == "sasa_wide":
        side = given.get("window")
        window = (side, side) if side else at.conv.kernel
        want = loop_sasa_wide(state, x, at.conv, window=window, key_dim=given["key_dim"])
    else:
        want = loop_outlook_wide(state, x, at.conv)
    assert tuple(want.shape) == at.out_shape
    torch.testing.assert_close(block(x), want, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("name", ["sasa_wide", "outlook_wide"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_finite_differences(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "CHUNK_ELEMENTS", 1)  # a chunk for every row
    at = place(2, 2, (3, 3), kernel=(2, 2), padding=(1, 0, 0, 1), stride=(1, 2), bias=True, groups=groups)
    block = build(name, at, heads=2)
    assert gradients_match(block, torch.randn(at.in_shape, dtype=torch.float64))


def test_a_transposed_map_with_transposed_weights_gives_the_transposed_result() -> None:
    block, turned = (build("sasa_wide", place(2, 2, size), key_dim=2) for size in ((4, 3), (3, 4)))
    order = torch.arange(9).view(3, 3).t().flatten()
    state = dict(block.state_dict())
    turned.load_state_dict(
        state | {"offset_bias": state["offset_bias"][:, order], "relative": state["relative"][order]}
    )
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(turned(x.mT), block(x).mT, **TOLERANCE[x.dtype])
    turned.load_state_dict(state)  # axes not told apart
    assert not torch.allclose(turned(x.mT), block(x).mT)


def convolution(kernel: Any, stride: int, dilation: int, groups: int, mode: Any) -> nn.Conv2d:
    pads = tuple(dilation * (k // 2) for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    return nn.Conv2d(8, 8, kernel, stride=stride, dilation=dilation, groups=groups, padding=pads, padding_mode=mode)


def where_stands(conv: nn.Conv2d, size: tuple[int, int], batch: int = 1) -> Place:
    spec = conv_spec(conv)
    return Place((batch, spec.in_channels, *size), (batch, spec.out_channels, *spec.out_size(*size)), spec)


def holding(name: str, conv: nn.Conv2d, size: tuple[int, int], **options: Any) -> Any:
    """The block that holds `conv`."""
    cls, where = BLOCKS.get(name), where_stands(conv, size)
    assert cls.refuse(where, cls.Options(**options)) is None
    assert cls.holds(where, cls.Options(**options))
    block = cls(where, cls.Options(**options)).to(conv.weight.dtype)
    block.load_conv(conv)
    return block


def error(block: Block, conv: nn.Conv2d, x: Tensor) -> float:
    """Largest difference, relative to the convolution's largest output."""
    with torch.no_grad():
        want = conv(x)
        return float((block(x) - want).abs().max() / want.abs().max())


MODES = ["zeros", "reflect", "replicate", "circular"]
MATRIX = list(product([1, 2], [1, 2], [1, 4, 8], MODES))
"""stride, dilation, groups (8: depthwise), padding mode."""


HOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sasa_wide": ("sasa_wide", {}),
    "sasa_wide in a larger window": ("sasa_wide", {"window": 9, "locality": 0.3}),
    "outlook_wide": ("outlook_wide", {}),
    "gpsa": ("gpsa", {}),
    "gpsa with a background": ("gpsa", {"background": True}),
}
HELD = [
    pytest.param(
        *HOLDERS[name], kernel, id=f"{name}-{kernel}", marks=pytest.mark.slow if kernel > 3 and name[0] == "o" else ()
    )
    for name, kernel in product(HOLDERS, [3, 5, 7])
]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "options", "kernel"), HELD)
def test_is_the_convolution_that_it_holds(name: str, options: dict[str, Any], kernel: int, dtype: torch.dtype) -> None:
    """Of every stride, dilation, number of groups and padding mode, borders included; or it refuses with a reason."""
    size = (7, 8) if name == "outlook_wide" and kernel == 7 else (15, 14)  # 120,050 weights a pixel
    held = 0
    for stride, dilation, groups, mode in MATRIX:
        torch.manual_seed(0)
        conv = convolution(kernel, stride, dilation, groups, mode).to(dtype)
        reason = BLOCKS.get(name).refuse(where_stands(conv, size), BLOCKS.get(name).Options(**options))
        if name == "gpsa" and (groups > 1 or mode != "zeros"):
            assert reason is not None
            assert f"{groups} groups" in reason or f"'{mode}'" in reason
            continue
        x = torch.randn(1, 8, *size, dtype=dtype)
        assert error(holding(name, conv, size, **options), conv, x) <= EXACT[dtype], (stride, dilation, groups, mode)
        held += 1
    assert held == {"gpsa": 4}.get(name, len(MATRIX))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", ["sasa_wide", "outlook_wide"])
def test_is_the_convolution_with_any_kernel_and_padding(name: str) -> None:
    cases: list[dict[str, Any]] = [
        {"kernel_size": (5, 3), "padding": (2, 1), "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1), "stride": (1, 2)},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 4, "padding": "same", "dilation": (1, 3)},
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 4},
        {"kernel_size": 3, "padding": (3, 0), "stride": 3, "dilation": 2},
    ]
    for case in cases:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, **case).double()
        x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
        assert error(holding(name, conv, (9, 8)), conv, x) <= EXACT[x.dtype], case


@pytest.mark.parametrize("name", ["sasa_wide", "outlook_wide"])
def test_is_the_convolution_at_any_locality_and_at_sizes_other_than_the_planned(name: str) -> None:
    conv = convolution(3, 2, 1, 1, "zeros").double()
    for locality in (0.05, 0.5, 0.95):
        block = holding(name, conv, (9, 9), locality=locality)
        for size in ((1, 1), (2, 30), (17, 8)):
            x = torch.randn(1, 8, *size, dtype=torch.float64)
            assert error(block, conv, x) <= EXACT[x.dtype], (locality, size)


def test_a_1x1_convolution_is_held_in_a_window_of_3() -> None:
    conv = nn.Conv2d(4, 6, 1, stride=2).double()
    block = holding("sasa_wide", conv, (5, 6), window=3)
    assert block.heads == 2  # its tap, and the background
    assert error(block, conv, torch.randn(1, 4, 5, 6, dtype=torch.float64)) <= EXACT[torch.float64]


@pytest.mark.parametrize("name", ["sasa_wide", "outlook_wide"])
def test_the_kernel_of_a_held_convolution_can_be_read_back(name: str) -> None:
    conv = convolution((3, 4), 1, 1, 2, "zeros").double()
    kernel = holding(name, conv, (6, 6)).kernel()
    want = conv.weight if name == "sasa_wide" else F.pad(conv.weight, (1, 2, 1, 1))
    torch.testing.assert_close(kernel, want.detach(), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["sasa_wide", "outlook_wide"])
def test_every_part_of_a_held_convolution_matters(name: str) -> None:
    conv = convolution(3, 1, 1, 1, "zeros").double()
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    silent = {"key.weight", "relative"}  # until the query has learned
    for part, _ in holding(name, conv, (5, 5)).named_parameters():
        block = holding(name, conv, (5, 5))
        with torch.no_grad():
            block.get_parameter(part).flatten()[0] += 1
        assert (error(block, conv, x) > 1e-4) == (part not in silent), part


FEWER = [
    ("sasa_wide", 8, {}),
    ("sasa_wide", 9, {"window": 5}),
    ("outlook_wide", 9, {}),
    ("sasa_wide", 9, {"window": 2}),
]


@pytest.mark.parametrize(("name", "heads", "options"), FEWER)
def test_fewer_heads_or_a_smaller_window_do_not_hold_and_say_so(name: str, heads: int, options: dict[str, Any]) -> None:
    conv = convolution(3, 1, 1, 1, "zeros")
    cls, where = BLOCKS.get(name), where_stands(conv, (5, 5))
    given = cls.Options(**{**options, "heads": min(heads, options.get("window", 3) ** 2)})
    assert cls.refuse(where, given) is None
    assert not cls.holds(where, given)
    block = cls(where, given)
    assert block(torch.randn(1, 8, 5, 5)).shape == (1, 8, 5, 5)
    with pytest.raises(ConvrewriteError, match=r"do not span the kernel of|cannot hold a kernel of"):
        block.load_conv(conv)


def test_refuses_to_hold_another_convolution_than_its_own() -> None:
    for name in ("sasa_wide", "outlook_wide"):
        block = holding(name, convolution(3, 1, 1, 1, "zeros"), (5, 5))
        with pytest.raises(ConvrewriteError, match=f"{name} was built for"):
            block.load_conv(convolution(3, 2, 1, 1, "zeros"))


def test_patterns_that_are_alike_are_found_out() -> None:
    with pytest.raises(ConvrewriteError, match="2 heads do not span the kernel of 2 taps"):
        solve_mix(torch.randn(1, 1, 2), torch.full((2, 2), 0.5))


LOGITS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sasa_wide": (("offset_bias", "query.weight"), {}),
    "outlook_wide": (("attn.bias", "attn.weight"), {}),
    "gpsa": (("qk.weight",), {"background": True}),  # not its positions, see below
}
GROUPED = [(3, 1), (3, 16), (5, 16)]
LEARNING = [(name, kernel, groups) for name, (kernel, groups) in product(LOGITS, GROUPED) if name != "gpsa"]


def gradients(name: str, kernel: int, groups: int, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """At step 0, by parameter: of a block that holds a convolution, and of a fresh one like it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, kernel, padding=kernel // 2, groups=groups)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's networks
    held = holding(name, conv, (8, 8), **options)
    fresh = type(held)(where_stands(conv, (8, 8)), held.options)
    x, towards = torch.randn(4, 16, 8, 8), torch.randn(4, 16, 8, 8)
    for block in (held, fresh):
        (block(x) * towards).mean().backward()
    return [{part: p.grad for part, p in block.named_parameters() if p.grad is not None} for block in (held, fresh)]


@pytest.mark.parametrize(("name", "kernel", "groups"), [*LEARNING, ("gpsa", 3, 1), ("gpsa", 5, 1), ("gpsa", 7, 1)])
def test_a_held_convolution_learns_its_attention_as_fast_as_a_fresh_block(name: str, kernel: int, groups: int) -> None:
    """Gradients of the logits' parameters are within a factor of 10 of those at a fresh start."""
    parts, options = LOGITS[name]
    held, fresh = gradients(name, kernel, groups, options)
    for part in parts:
        ratio = float(held[part].norm() / fresh[part].norm())
        assert 0.1 <= ratio <= 10, (part, ratio)
    if name == "gpsa":  # the keys learn once the queries do, as in sasa_wide
        queries = (kernel**2 + 1) * 8
        ratio = float(held["qk.weight"][:queries].norm() / fresh["qk.weight"][:queries].norm())
        assert 0.1 <= ratio <= 10, ratio
        assert not held["qk.weight"][queries:].any()


def test_gpsa_without_a_background_learns_no_content_at_first_and_no_positions_with_one() -> None:
    """What the others' criterion leaves out, so that it is known: only the gate is alive, then the queries as well."""
    for background in (False, True):
        held, fresh = gradients("gpsa", 3, 1, {"background": background})
        assert bool(held["qk.weight"].any()) == background
        assert float(held["position"].norm() / fresh["position"].norm()) < 1e-9
        assert float(held["gate"][:9].norm() / fresh["gate"][:9].norm()) >= 0.1


def test_heads_start_softly_on_their_taps() -> None:
    at = place(4, 4, (5, 5))
    block = SASAWide(at, SASAWide.Options(window=5))
    patterns = block.offset_bias.softmax(1).view(10, 5, 5)
    assert patterns[0, 2, 2].item() == pytest.approx(0.5 + 0.5 / 25)
    assert patterns[0, 0, 0].item() == pytest.approx(0.5 / 25)
    assert torch.allclose(patterns[9], torch.full((5, 5), 1 / 25))
    assert patterns[:9].sum(0)[1:4, 1:4].min() > 0.5  # each tap of the kernel has its head


COSTED = {
    "14 x 14": place(128, 128, (14, 14), batch=2),
    "stride 2": place(128, 128, (14, 14), batch=2, stride=(2, 2)),
    "20 x 20, fewer channels": place(64, 32, (20, 20), batch=2),
    "groups, bias": place(64, 64, (14, 14), batch=2, groups=16, bias=True),
    "depthwise 5 x 5": place(32, 32, (9, 9), kernel=(5, 5), batch=2, groups=32),
}


@pytest.mark.parametrize("where", COSTED)
@pytest.mark.parametrize(
    ("name", "options"), [("sasa_wide", {}), ("sasa_wide", {"window": 7, "heads": 4}), ("outlook_wide", {})]
)
def test_activation_bytes_are_those_measured(where: str, name: str, options: dict[str, Any]) -> None:
    at, cls = COSTED[where], BLOCKS.get(name)
    given = cls.Options(**options)
    infer, train = measured_bytes(cls(at, given), torch.randn(at.in_shape))
    assert cls.cost(at, given).act_infer == pytest.approx(infer, rel=0.2)
    assert cls.cost(at, given).act_train == pytest.approx(train, rel=0.2)


def test_parameters_and_flops_are_those_of_matrix_products() -> None:
    at = place(6, 8, (5, 7), batch=2, stride=(2, 2), groups=2, bias=True)  # 7 x 9 padded, 3 x 4 out
    cost = SASAWide.cost(at, SASAWide.Options(key_dim=5))
    assert cost.params == 9 * 8 * 3 + 10 * 5 * 6 + 9 * (9 + 5) + 8
    per_head = 6 * 5 + 9 * 5 + 9 * 6 + 8 * 3
    assert cost.flops == 2 * 2 * (63 * 6 * 5 + 12 * 9 * per_head)
    cost = OutlookWide.cost(at, OutlookWide.Options())
    assert cost.params == 10 * 8 * 3 + 7 * 10 * 81 + 8
    assert cost.flops == 2 * 2 * (63 * 6 * 10 * 81 + 12 * 10 * (25 * 6 + 8 * 3))


REFUSED = {
    "a window of 1 tap leaves nothing to attend to": (place(4, 4, (5, 5), kernel=(1, 1)), {}),
    "10 heads, a window of 9 taps tells at most 9 apart": (place(4, 4, (5, 5)), {"heads": 10}),
    "sasa_wide can only replace a convolution, not be inserted": (Place((1, 4, 5, 5), (1, 4, 5, 5)), {}),
    "the convolution's output is empty (0 x 0)": (Place((1, 4, 2, 2), (1, 4, 0, 0), ConvSpec(4, 4, (3, 3))), {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_value_that_is_wrong(reason: str) -> None:
    where, options = REFUSED[reason]
    assert SASAWide.refuse(where, SASAWide.Options(**options)) == reason
    if options != {"heads": 10}:
        assert OutlookWide.refuse(where, OutlookWide.Options()) == reason.replace("sasa_wide", "outlook_wide")
    else:
        assert OutlookWide.refuse(where, OutlookWide.Options(heads=10)) is None


def test_gpsa_s_gate_opens_and_its_positions_stay() -> None:
    """What the docstring says of a held convolution: learning starts at the gate."""
    conv = convolution(3, 1, 1, 1, "zeros").double()
    block = holding("gpsa", conv, (7, 7))
    assert isinstance(block, GPSA)
    block(torch.randn(2, 8, 7, 7, dtype=torch.float64)).square().sum().backward()
    assert block.gate.grad is not None and block.position.grad is not None
    assert block.gate.grad.abs().min() > 1e-3
    assert block.position.grad.abs().max() < 1e-9
