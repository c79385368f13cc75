"""Every registered block keeps the contract of `Block` at every place it does not refuse."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block, conv_spec
from convrewrite.blocks.folding import Affine
from convrewrite.sites import Place
from tests.blocks import EXPORT, TOLERANCE

# name: (in channels, out channels, (H, W), kernel, what else the convolution has)
CONVOLUTIONS: dict[str, tuple[int, int, tuple[int, int], int, dict[str, int | str | bool]]] = {
    "3x3": (16, 16, (12, 10), 3, {"padding": 1, "bias": False}),
    "stride 2, odd size": (16, 16, (9, 7), 3, {"padding": 1, "stride": 2}),
    "stride 2, even size": (16, 16, (20, 18), 3, {"padding": 1, "stride": 2}),
    "dilation 2": (16, 16, (11, 9), 3, {"padding": 2, "dilation": 2}),
    "more channels": (8, 32, (7, 7), 3, {"padding": 1}),
    "fewer channels": (32, 16, (7, 6), 3, {"padding": 1}),
    "1x1": (16, 32, (6, 5), 1, {}),
    "1x1, stride 2": (16, 16, (7, 6), 1, {"stride": 2}),
    "5x5": (16, 16, (9, 8), 5, {"padding": 2}),
    "no padding": (16, 16, (9, 8), 3, {}),
    "padding beyond same": (16, 16, (5, 6), 3, {"padding": 3}),
    "even kernel": (16, 16, (8, 7), 2, {}),
    "groups": (16, 16, (8, 8), 3, {"padding": 1, "groups": 2}),
    "depthwise": (16, 16, (8, 8), 3, {"padding": 1, "groups": 16}),
    "reflecting": (16, 16, (8, 8), 3, {"padding": 1, "padding_mode": "reflect"}),
    "map of 1 x 1": (16, 16, (1, 1), 3, {"padding": 1}),
    "map of 2 x 3": (16, 16, (2, 3), 3, {"padding": 1}),
    "large map": (16, 16, (23, 40), 3, {"padding": 1}),
    "odd channels": (3, 7, (8, 8), 3, {"padding": 1}),
}
REGULAR = {"conv": "3x3", "pool": "stride 2, even size", "block": "3x3"}
"""A place that every block of a span takes."""


def shipped() -> list[tuple[str, type[Block]]]:
    """The blocks that come with convrewrite; tests that share the process register some of their own."""
    return [(name, cls) for name, cls in BLOCKS.items() if cls.__module__.startswith("convrewrite.blocks.")]


def convolution(name: str) -> nn.Conv2d:
    c_in, c_out, _, kernel, rest = CONVOLUTIONS[name]
    return nn.Conv2d(c_in, c_out, kernel, **rest)  # type: ignore[arg-type]


def places() -> list[tuple[str, str]]:
    """(block, place) for every place of the table and both ways to stand there, where the block takes it."""
    return [
        (block, f"{action} {name}")
        for block, cls in shipped()
        for name in CONVOLUTIONS
        for action in cls.actions
        if cls.refuse(place(name, action, cls.span), cls.Options()) is None
    ]


def stood_there(name: str, span: str, x: Tensor) -> Tensor:
    """What comes out of the modules that a block replaces."""
    y: Tensor = convolution(name)(x)
    return F.max_pool2d(y, 3, 2, 1) if span == "pool" else y


def place(name: str, action: str, span: str) -> Place:
    c_in, _, size, _, _ = CONVOLUTIONS[name]
    if action == "insert":
        return Place((2, c_in, *size), (2, c_in, *size))
    shape = stood_there(name, span, torch.zeros(2, c_in, *size)).shape
    return Place((2, c_in, *size), tuple(shape), conv_spec(convolution(name)))


def build(block: str, where: str) -> tuple[Block, Place]:
    torch.manual_seed(0)
    action, name = where.split(" ", 1)
    cls = BLOCKS.get(block)
    at = place(name, action, cls.span)
    return cls(at, cls.Options()).eval(), at


def awake(block: Block) -> Block:
    """The block with every parameter at random, so that no gate hides a part of it."""
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    return block


UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""By how much of a number rounding it may change it."""


def rounding_error(block: Block, x: Tensor, got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Largest difference, as a multiple of what rounding explains.

    Input, weights, hidden maps and output are each rounded once, at most by half a unit of what a block computes; a
    softmax of large logits makes more of the input's rounding, so that is measured: by the block itself, in float32, on
    the rounded input. A block that adds to x is judged by what it adds, which x would hide.
    """
    base = x if type(block).exact else torch.zeros(())
    scale = (want - base).abs().max()
    rounded = x.to(dtype).float()
    inherent = (block(rounded) - want - (rounded - x if type(block).exact else 0)).abs().max()
    limit = 2.5 * (UNIT[dtype] * scale + inherent)
    return float(((got.float() - want).abs().max() / limit).detach())


TAKEN = places()
everywhere = pytest.mark.parametrize(("name", "where"), TAKEN, ids=[f"{b}-{w}" for b, w in TAKEN])
USUAL = [(block, next(where for b, where in TAKEN if b == block)) for block, _ in shipped()]
once = pytest.mark.parametrize(("name", "where"), USUAL, ids=[b for b, _ in USUAL])


def test_every_block_takes_a_plain_convolution_s_place_or_a_way_in() -> None:
    assert TAKEN
    for block, _ in shipped():
        regular = REGULAR[BLOCKS.get(block).span]
        assert any(b == block and w.endswith(f" {regular}") for b, w in TAKEN), block


def test_no_block_says_it_can_do_nothing() -> None:
    for block, cls in shipped():
        assert set(cls.actions) <= {"replace", "insert"}, block
        assert cls.actions, block
        assert cls.paper, block


@everywhere
def test_returns_the_size_that_the_convolution_would(name: str, where: str) -> None:
    block, at = build(name, where)
    y = block(torch.randn(at.in_shape))
    assert tuple(y.shape) == at.out_shape
    assert y.isfinite().all()
    assert y.is_contiguous()


@everywhere
def test_costs_the_parameters_it_has(name: str, where: str) -> None:
    block, at = build(name, where)
    cls = type(block)
    cost = cls.cost(at, cls.Options())
    assert cost.params == sum(p.numel() for p in block.parameters())
    assert cost.flops > 0
    assert cost.act_infer > 0
    assert cost.act_train > 0


@everywhere
def test_costs_grow_with_the_batch_and_parameters_do_not(name: str, where: str) -> None:
    at, cls = build(name, where)[1], BLOCKS.get(name)
    one, three = (
        cls.cost(Place((n, *at.in_shape[1:]), (n, *at.out_shape[1:]), at.conv), cls.Options()) for n in (1, 3)
    )
    assert three.params == one.params
    assert one.flops < three.flops <= 3 * one.flops  # some work is done once for all images
    assert three.act_infer >= one.act_infer
    assert three.act_train > one.act_train


@everywhere
def test_takes_other_sizes_than_the_planned(name: str, where: str) -> None:
    block, at = build(name, where)
    action, conv_name = where.split(" ", 1)
    batch, channels, height, width = at.in_shape
    for size in ((height + 1, width + 2), (max(height - 1, 3), width + 19)):
        x = torch.randn(batch, channels, *size)
        want = x.shape if action == "insert" else stood_there(conv_name, type(block).span, x).shape
        assert block(x).shape == want


@everywhere
def test_images_of_a_batch_do_not_see_each_other(name: str, where: str) -> None:
    block, at = build(name, where)
    awake(block).double()
    x = torch.randn(at.in_shape, dtype=torch.float64)
    alone = torch.cat([block(image[None]) for image in x])
    torch.testing.assert_close(block(x), alone, **TOLERANCE[x.dtype])


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(name: str, where: str, dtype: torch.dtype) -> None:
    block, at = build(name, where)
    y = block.to(dtype)(torch.randn(at.in_shape, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@everywhere
def test_takes_an_empty_batch(name: str, where: str) -> None:
    block, at = build(name, where)
    assert tuple(block(torch.zeros(0, *at.in_shape[1:])).shape) == (0, *at.out_shape[1:])


@everywhere
def test_channels_last_changes_the_layout_alone(name: str, where: str) -> None:
    block, at = build(name, where)
    x = torch.randn(at.in_shape)
    want = awake(block)(x)
    got = block(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, **TOLERANCE[x.dtype])


@everywhere
def test_a_state_dict_and_a_deep_copy_carry_everything(name: str, where: str) -> None:
    block, at = build(name, where)
    x = torch.randn(at.in_shape)
    want = awake(block)(x)
    fresh, _ = build(name, where)
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(fresh(x), want)
    assert torch.equal(copy.deepcopy(block)(x), want)


@everywhere
@pytest.mark.parametrize("dtype", UNIT)
def test_autocast_is_close_on_the_scale_of_what_the_block_adds(name: str, where: str, dtype: torch.dtype) -> None:
    block, at = build(name, where)
    x = torch.randn(at.in_shape)
    awake(block)
    want = block(x)
    with torch.autocast("cpu", dtype):
        got = block(x)
    assert got.isfinite().all()
    assert rounding_error(block, x, got, want, dtype) <= 1


@everywhere
@pytest.mark.parametrize("given", ["float32", "autocast"])
def test_trains_under_autocast(name: str, where: str, given: str) -> None:
    """Whatever dtype the layer before left: what a residual sum makes is float32, what a convolution makes is not.

    In eval mode: a batch norm of the batch's own statistics makes rounding large where attention is near uniform.
    """
    block, at = build(name, where)
    awake(block)
    x = torch.randn(at.in_shape)
    weight = torch.randn(at.out_shape)
    want = gradients(block, x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(block, x.bfloat16() if given == "autocast" else x, weight)
    noise = 0.01 * max(gradient.norm() for gradient in want.values())  # some gradients are 0, but for rounding
    for (what, gradient), expected in zip(got.items(), want.values(), strict=True):
        assert (gradient - expected).norm() <= 0.1 * expected.norm() + noise, what


def gradients(block: Block, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of the sum of the output times `weight`; the backward pass runs outside autocast, as PyTorch's loops have it."""
    x = x.clone().requires_grad_()
    named = {"x": x, **dict(block.named_parameters())}
    loss = (block(x).float() * weight).sum()
    with torch.autocast("cpu", enabled=False):
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def test_an_error_of_a_tenth_is_no_rounding() -> None:
    for name, where in USUAL:
        block, at = build(name, where)
        x = torch.randn(at.in_shape)
        want = awake(block)(x)
        base = x if type(block).exact else torch.zeros(())
        for dtype in UNIT:
            wrong = base + (want - base) * 1.1
            assert rounding_error(block, x, wrong, want, dtype) > 1, name


@once
def test_the_gradient_reaches_every_parameter(name: str, where: str) -> None:
    block, at = build(name, where)
    awake(block).double().train()
    x = torch.randn(at.in_shape, dtype=torch.float64, requires_grad=True)
    block(x).square().sum().backward()
    for parameter_name, parameter in [("x", x), *block.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        silent = parameter.grad.abs().max() < 1e-12
        assert silent == (parameter_name in type(block).silent), parameter_name


HAVE_SECOND_DERIVATIVES = ("aa_conv", "channel_attention", "criss_cross", "mhsa", "outlook_wide", "sasa_wide")
"""At every size; the others may refuse where a kernel of torch or of this project has none."""


@once
@pytest.mark.parametrize("size", [(6, 5), (12, 10), (26, 24)], ids=str)  # what is held whole, and what goes in tiles
def test_second_derivatives_are_right_or_refused(name: str, where: str, size: tuple[int, int]) -> None:
    """As a gradient penalty takes them, against differences of first derivatives."""
    block, at = build(name, where)
    awake(block).double()
    x, step = torch.randn(2, *at.in_shape[:2], *size, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(block(x).square().sum(), x)[0]

    x.requires_grad_()
    try:
        (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * step).sum(), x)
    except RuntimeError as refused:
        assert "derivative" in str(refused) or "no autograd formula" in str(refused)
        assert name not in HAVE_SECOND_DERIVATIVES
        return
    difference = (slope(x + 1e-6 * step) - slope(x - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(second, difference, rtol=1e-5, atol=1e-6 * float(difference.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_block_starts_as_the_bitwise_identity(dtype: torch.dtype) -> None:
    for name, where in TAKEN:
        if BLOCKS.get(name).exact and where.startswith("insert "):
            block, at = build(name, where)
            x = torch.randn(at.in_shape, dtype=dtype)
            assert torch.equal(block.to(dtype)(x), x), f"{name}-{where}"
            assert torch.equal(block.train()(x), x), f"{name}-{where}"


def after_it(channels: int) -> Affine:
    """Factors of both signs, as a trained batch norm has them, and one 0."""
    scale = torch.randn(channels, dtype=torch.float64)
    scale[0] = 0
    return Affine(scale, torch.randn(channels, dtype=torch.float64))


def check_fused(block: Block, x: Tensor) -> None:
    """Its form for inference computes the same, at two sizes, with and without a batch norm after it."""
    before = copy.deepcopy(block.state_dict())
    sizes = x, torch.randn(1, x.shape[1], x.shape[2] + 3, x.shape[3] + 2, dtype=x.dtype)
    for after in (None, after_it(block.out_channels)):
        fused = block.fused(after)
        if fused is None:
            continue
        for image in sizes:
            want = block(image)
            if after is not None:
                want = want * after.scale.view(-1, 1, 1) + after.shift.view(-1, 1, 1)
            got = fused(image)
            assert got.is_contiguous()
            torch.testing.assert_close(got, want, **TOLERANCE[x.dtype])
        shared = {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in block.parameters()}
        assert not shared
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), key


@everywhere
def test_fused_it_computes_the_same(name: str, where: str) -> None:
    block, at = build(name, where)
    awake(block).double()
    x = torch.randn(at.in_shape, dtype=torch.float64)
    with torch.no_grad():
        check_fused(block, x)
    assert block.plain() is None
    content = block.content()
    assert content is None or content > 0


HOLDING = [
    (block, where)
    for block, where in TAKEN
    if where.startswith("replace ")
    and BLOCKS.get(block).holds(
        place(where.split(" ", 1)[1], "replace", BLOCKS.get(block).span), BLOCKS.get(block).Options()
    )
]


@pytest.mark.parametrize(("name", "where"), HOLDING, ids=[f"{b}-{w}" for b, w in HOLDING])
def test_a_block_that_holds_a_convolution_gives_it_back(name: str, where: str) -> None:
    block, at = build(name, where)
    conv = convolution(where.split(" ", 1)[1]).double()
    block.double().load_conv(conv)
    plain = block.plain()
    assert type(plain) is nn.Conv2d
    assert block.content() == 0
    assert conv_spec(plain) == conv_spec(conv)
    torch.testing.assert_close(plain.weight, conv.weight, **TOLERANCE[torch.float64])
    assert (plain.bias is None and conv.bias is None) or torch.equal(plain.bias, conv.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        check_fused(block, torch.randn(at.in_shape, dtype=torch.float64))


def test_a_block_that_starts_as_the_identity_says_so() -> None:
    for name, where in TAKEN:
        if BLOCKS.get(name).exact and where.startswith("insert "):
            block, _ = build(name, where)
            assert type(block.plain()) is nn.Identity, f"{name}-{where}"
            assert type(block.fused()) is nn.Identity
            assert block.content() == 0


def variants() -> list[tuple[str, str, dict[str, Any]]]:
    """(block, place, option): every other value of options that have few (yes or no, one of several words)."""
    found = []
    for name, where in USUAL:
        cls = BLOCKS.get(name)
        at = place(where.split(" ", 1)[1], where.split(" ", 1)[0], cls.span)
        for key, field in cls.Options.model_fields.items():
            values = (True, False) if field.annotation is bool else get_args(field.annotation)
            for value in values:
                other = isinstance(value, (bool, str)) and value != field.default
                if other and cls.refuse(at, cls.Options(**{key: value})) is None:
                    found.append((name, where, {key: value}))
    return found


VARIED = variants()


@pytest.mark.parametrize(("name", "where", "option"), VARIED, ids=[f"{b}-{o}" for b, _, o in VARIED])
def test_the_contract_holds_for_every_word_of_an_option(name: str, where: str, option: dict[str, Any]) -> None:
    at, cls = build(name, where)[1], BLOCKS.get(name)
    options = cls.Options(**option)
    torch.manual_seed(0)
    block = awake(cls(at, options).eval())
    x = torch.randn(at.in_shape)
    want = block(x)
    assert tuple(want.shape) == at.out_shape
    cost = cls.cost(at, options)
    assert cost.params == sum(p.numel() for p in block.parameters())
    assert min(cost.flops, cost.act_infer, cost.act_train) > 0
    assert torch.equal(copy.deepcopy(block)(x), want)
    fresh = cls(at, options).eval()
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(fresh(x), want)
    torch.testing.assert_close(torch.cat([block(image[None]) for image in x]), want, **TOLERANCE[x.dtype])
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), want, **TOLERANCE[x.dtype])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want, **TOLERANCE[x.dtype])
    if cls.exact and where.startswith("insert "):
        assert torch.equal(cls(at, options)(x), x)
        assert type(cls(at, options).plain()) is nn.Identity
    with torch.no_grad():
        check_fused(block.double(), x.double())


@once
def test_compiles_as_one_graph(name: str, where: str) -> None:
    block, at = build(name, where)
    x = torch.randn(at.in_shape, requires_grad=True)
    compiled = torch.compile(awake(block), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), **TOLERANCE[x.dtype])
    compiled(x).sum().backward()
    assert x.grad is not None


@once
def test_exports_with_any_batch(name: str, where: str) -> None:
    block, at = build(name, where)
    x = torch.randn(at.in_shape)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(awake(block), (x,), dynamic_shapes=({0: batch},))
    larger = torch.cat([x, x + 1, x - 1])
    torch.testing.assert_close(program.module()(larger), block(larger), **TOLERANCE[x.dtype])


@once
def test_onnxruntime_computes_the_same(name: str, where: str, tmp_path: Path) -> None:
    block, at = build(name, where)
    check_onnx(awake(block), torch.randn(at.in_shape), tmp_path)


def check_onnx(block: Block, x: Tensor, folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = folder / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(block, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected: Tensor = block(x).detach()
    torch.testing.assert_close(torch.from_numpy(got), expected, **EXPORT)


def exported() -> list[tuple[str, str, dict[str, Any]]]:
    """What is exported beside the defaults: every word of an option, and a map of several tiles."""
    local = next(where for name, where in TAKEN if name == "sasa" and where.endswith(" large map"))
    return [*VARIED, ("sasa", local, {"offset_bias": True, "projection": True})]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "option"), exported(), ids=[f"{b}-{w}-{o}" for b, w, o in exported()])
def test_every_word_of_an_option_is_exported(name: str, where: str, option: dict[str, Any], tmp_path: Path) -> None:
    at, cls = build(name, where)[1], BLOCKS.get(name)
    torch.manual_seed(0)
    block, x = awake(cls(at, cls.Options(**option)).eval()), torch.randn(at.in_shape)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},)).module()
    several = torch.cat([x, 1 - x, x + 1])
    torch.testing.assert_close(program(several), block(several), **EXPORT)
    check_onnx(block, x, tmp_path)
