"""Outlook attention by the native kernel equals a float64 brute force, stays inside its tensors, and compiles."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import convrewrite as cr
from convrewrite.blocks.outlook import Outlook, OutlookOptions
from convrewrite.blocks.outlook_op import kernel_for, outlook_op
from convrewrite.errors import BackendError
from convrewrite.kernels import native_outlook
from convrewrite.sites import ConvSpec, Place
from tests.kernels.cases import assert_close
from tests.kernels.test_native import guarded, on_x86, untouched

OP = "convrewrite.outlook"
some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

pytestmark = pytest.mark.usefixtures("native")


@dataclass(frozen=True)
class Problem:
    """Sizes of one outlook attention; `layout` of the values: "map", "channels last", or "part" of something larger."""

    batch: int
    heads: int
    width: int
    size: tuple[int, int]
    window: int
    dilation: tuple[int, int]
    layout: str

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        channels = self.heads * self.width, self.heads * self.window**4
        values, logits = (
            torch.randn(self.batch, c, *self.size, generator=generator, dtype=torch.float64).to(dtype) for c in channels
        )
        if self.layout == "channels last":
            values = values.contiguous(memory_format=torch.channels_last)
        if self.layout == "part":
            room = torch.full([2 * n + 1 for n in values.shape], torch.nan, dtype=dtype)
            values = room[tuple(slice(1, 2 * n + 1, 2) for n in values.shape)].copy_(values)
        return {"values": values, "logits": logits}


@st.composite
def problems(draw: Any) -> Problem:
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 17])),
        size=(draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 3, 7, 15, 16, 17, 19, 33]))),
        window=draw(st.sampled_from([1, 3, 3, 3, 5])),
        dilation=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        layout=draw(st.sampled_from(["map", "channels last", "part"])),
    )


def unfolded(values: Tensor, logits: Tensor, problem: Problem) -> Tensor:
    """The equation, pair by pair: every centre takes its share of one source of its window to one target of it."""
    k, (height, width) = problem.window, problem.size
    reach = [k // 2 * apart for apart in problem.dilation]
    weights = logits.view(problem.batch, problem.heads, k, k, k, k, 1, height, width).flatten(4, 5).softmax(4)
    maps = values.reshape(problem.batch, problem.heads, problem.width, height, width)
    padded = F.pad(maps, (reach[1], reach[1], reach[0], reach[0]))
    total = torch.zeros_like(padded)
    taps = [(row, column) for row in range(k) for column in range(k)]

    def around(tap: tuple[int, int]) -> tuple[Any, ...]:
        """Where the pixels that are this tap of each centre lie in padded maps."""
        down, right = (at * apart for at, apart in zip(tap, problem.dilation, strict=True))
        return ..., slice(down, down + height), slice(right, right + width)

    for target in taps:
        for i, source in enumerate(taps):
            part = torch.zeros_like(padded)
            part[around(target)] = weights[:, :, target[0], target[1], i] * padded[around(source)]
            total = total + part
    inside = ..., slice(reach[0], reach[0] + height), slice(reach[1], reach[1] + width)
    return total[inside].flatten(1, 2)


def results(problem: Problem, tensors: dict[str, Tensor], kernel: str | None) -> dict[str, Tensor]:
    """Output and gradients; by `unfolded` where no kernel is named."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    if kernel is None:
        out = unfolded(**leaves, problem=problem)
    else:
        out = outlook_op(*leaves.values(), problem.heads, problem.window, list(problem.dilation), kernel)
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), seed)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def exact(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return results(problem, {name: t.double() for name, t in tensors.items()}, None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("level", [0, 1, 2])
@some
@given(problem=problems())
def test_values_and_gradients_equal_the_brute_force(
    level: int, dtype: torch.dtype, tolerance: float, problem: Problem
) -> None:
    tensors = problem.tensors(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_outlook, "WIDEST", level)
        got = results(problem, tensors, "native")
    assert_close(got, exact(problem, tensors), tolerance)


@some
@given(problem=problems())
def test_the_composed_form_behind_the_operation_equals_the_brute_force(problem: Problem) -> None:
    tensors = problem.tensors(torch.float64)
    assert_close(results(problem, tensors, "aten"), exact(problem, tensors), 1e-11)


@pytest.mark.parametrize("size", [(56, 56), (7, 7), (15, 33)])
def test_sizes_that_take_several_tiles_equal_the_composed_form_in_float64(size: tuple[int, int]) -> None:
    problem = Problem(1, 1, 128, size, 3, (1, 1), "map")
    tensors = problem.tensors(torch.float32)
    want = results(problem, {name: t.double() for name, t in tensors.items()}, "aten")
    assert_close(results(problem, tensors, "native"), want, 1e-5)


@some
@given(problem=problems())
def test_reads_and_writes_nothing_outside_its_tensors(problem: Problem) -> None:
    tensors = {name: t.contiguous() for name, t in problem.tensors(torch.float32).items()}
    inputs = {"v": guarded(tensors["values"], torch.nan), "q": guarded(tensors["logits"], torch.nan)}
    out = guarded(torch.zeros_like(inputs["v"]), 12345.0)
    sizes = problem.heads, problem.window, problem.dilation
    native_outlook._run("outlook_forward", *sizes, {**inputs, "out": out})
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).float()
    grads = {f"grad_{name}": guarded(torch.full_like(t, torch.nan), 12345.0) for name, t in inputs.items()}
    native_outlook._run("outlook_backward", *sizes, {**inputs, "grad": guarded(seed, torch.nan), **grads})
    want = exact(problem, tensors)
    got = {"out": out, "values": grads["grad_v"], "logits": grads["grad_q"]}  # every element was written
    assert_close(got, want, 1e-5)
    assert all(untouched(t, 12345.0) for t in got.values())


EXAMPLE = Problem(2, 2, 5, (5, 19), 3, (1, 2), "channels last")


def test_threads_and_repetition_change_no_bit() -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    first, before = results(EXAMPLE, tensors, "native"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = results(EXAMPLE, tensors, "native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = EXAMPLE.tensors(dtype)
    got = results(EXAMPLE, tensors, "native")
    assert {t.dtype for t in got.values()} == {dtype}
    assert_close(got, exact(EXAMPLE, tensors), 2e-2)


def test_large_logits_do_not_overflow() -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    tensors["logits"] = tensors["logits"] * 1e4
    got = results(EXAMPLE, tensors, "native")
    assert all(t.isfinite().all() for t in got.values())
    assert_close({"out": got["out"]}, {"out": exact(EXAMPLE, tensors)["out"]}, 1e-5)


def test_a_nan_value_reaches_the_pixels_that_some_window_shares_with_it_and_no_others() -> None:
    problem = Problem(1, 1, 4, (8, 20), 3, (1, 1), "map")
    tensors = problem.tensors(torch.float32)
    tensors["values"][0, :, 2, 9] = torch.nan
    out = results(problem, tensors, "native")["out"]
    want = torch.zeros(8, 20, dtype=torch.bool)
    want[0:5, 7:12] = True  # 5 x 5
    assert torch.equal(out.isnan().all(1)[0], want)
    assert torch.equal(out.isnan().any(1)[0], want)


@pytest.mark.parametrize("kernel", ["native", "aten"])
def test_torch_s_own_checks_of_the_operation_pass(kernel: str) -> None:
    leaves = [t.requires_grad_() for t in EXAMPLE.tensors(torch.float64).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(outlook_op, (*leaves, EXAMPLE.heads, EXAMPLE.window, list(EXAMPLE.dilation), kernel))


def test_an_empty_batch_gives_empty_results() -> None:
    problem = Problem(0, 2, 3, (4, 5), 3, (1, 1), "map")
    leaves = [t.requires_grad_() for t in problem.tensors(torch.float32).values()]
    out = outlook_op(*leaves, 2, 3, [1, 1], "native")
    assert out.shape == (0, 6, 4, 5)
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [t.shape for t in leaves]


def block(**options: Any) -> Outlook:
    torch.manual_seed(0)
    place = Place((2, 8, 9, 10), (2, 8, 9, 10), ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1)))
    return Outlook(place, OutlookOptions(heads=2, **options))


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_compiled_block_is_one_graph_with_the_operation_in_it(normalise: bool, backend: str) -> None:
    module, x = block(normalise=normalise).double(), torch.randn(2, 8, 9, 10, dtype=torch.float64)
    cr.set_backend(module, backend)
    seen: list[str] = []

    def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(module, fullgraph=True, backend=inspect)(x)
    torch._dynamo.reset()
    assert any(OP in name for name in seen)
    torch.testing.assert_close(got, module(x), rtol=1e-11, atol=1e-11)


def test_an_exported_block_needs_none_of_our_operations() -> None:
    module, x = block().eval(), torch.randn(2, 8, 9, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (x,))
    assert not any(OP in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_the_backend_of_the_block_decides() -> None:
    x = torch.randn(2, 8, 9, 10)
    assert kernel_for("auto", x, 1) == kernel_for("native", x, 1) == "native"
    assert kernel_for("aten", x, 1) is None
    assert kernel_for("native", x, 2) is None  # weights at every other pixel: composed
    with pytest.raises(BackendError, match="did you mean 'native'"):
        kernel_for("nativ", x, 1)


@on_x86
def test_gradients_too_small_for_full_precision_are_zero_and_the_thread_s_arithmetic_is_as_before() -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    out = outlook_op(*leaves, EXAMPLE.heads, EXAMPLE.window, list(EXAMPLE.dilation), "native")
    grads = torch.autograd.grad(out, leaves, torch.full_like(out, 1e-40))
    assert not any(g.any() for g in grads)
    assert bool((torch.full((3,), 1e-40) * 1.0).any())
