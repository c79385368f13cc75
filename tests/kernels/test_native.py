"""The native kernel and the ATen form equal a float64 brute force, and the kernel stays inside its tensors."""

from __future__ import annotations

import dataclasses
import platform

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from convrewrite.blocks.local import local_attention
from convrewrite.kernels import native_local
from convrewrite.kernels.geometry import LocalSpec
from tests.blocks.reference import loop_attention
from tests.kernels.cases import EXAMPLE, Problem, assert_close, laid_out, problems, results, tap_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

pytestmark = pytest.mark.usefixtures("native")
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernel sets x86's mode")


def geometry_of(problem: Problem) -> LocalSpec:
    numbers = problem.geometry
    return LocalSpec(**numbers)


@some
@given(problem=problems())
def test_the_brute_force_equals_one_query_at_a_time(problem: Problem) -> None:
    small = dataclasses.replace(problem, batch=1, queries=(min(problem.queries[0], 2), min(problem.queries[1], 3)))
    t = small.tensors(torch.float64)
    rows, columns = t.pop("rows", None), t.pop("columns", None)
    relative = torch.zeros(small.heads, small.width, *small.window, dtype=torch.float64)
    relative = relative if rows is None else relative + rows[..., :, None]
    relative = relative if columns is None else relative + columns[..., None, :]
    want = loop_attention(**t, relative=relative.flatten(2), **small.geometry)
    got = tap_attention(**t, rows=rows, columns=columns, **small.geometry)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0, 1, 2])
@some
@given(problem=problems())
def test_values_and_gradients_equal_the_brute_force(level: int, dtype: torch.dtype, problem: Problem) -> None:
    tensors = problem.tensors(dtype)
    want = results(problem, {name: t.double() for name, t in tensors.items()}, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_local, "WIDEST", level)
        assert_close(results(problem, tensors, "native"), want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@some
@given(problem=problems())
def test_the_aten_form_equals_the_brute_force(dtype: torch.dtype, problem: Problem) -> None:
    tensors = problem.tensors(dtype)
    want = results(problem, {name: t.double() for name, t in tensors.items()}, None)
    assert_close(results(problem, tensors, "aten"), want, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [(56, 56), (7, 7), (15, 33)])
@pytest.mark.parametrize("width", [64, 128])
def test_sizes_that_take_several_tiles_and_wide_heads_equal_the_brute_force(size: tuple[int, int], width: int) -> None:
    problem = dataclasses.replace(EXAMPLE, batch=1, heads=1, width=width, value_width=width, queries=size, keys=size)
    tensors = problem.tensors(torch.float32)
    want = results(problem, {name: t.double() for name, t in tensors.items()}, None)
    assert_close(results(problem, tensors, "native"), want, 2e-5)  # sums over 3136 queries


@some
@given(problem=problems())
def test_reads_and_writes_nothing_outside_its_tensors(problem: Problem) -> None:
    given_ones = {name: t.contiguous() for name, t in problem.tensors(torch.float32).items()}
    q, v = given_ones["q"], given_ones["v"]
    plain = {name: guarded(t, torch.nan) for name, t in given_ones.items()}
    tables = {name: t for name, t in plain.items() if name not in "qkv"}
    tables = {name: guarded(t.expand(problem.heads, *t.shape[1:]), torch.nan) for name, t in tables.items()}
    out = guarded(q.new_zeros(*q.shape[:4], v.shape[4]), 12345.0)
    lse = guarded(q.new_zeros(q.shape[:4]), 12345.0)
    inputs = {**plain, **tables}
    native_local._run("local_attention_forward", geometry_of(problem), {**inputs, "out": out, "lse": lse})
    want = results(problem, {name: t.double() for name, t in given_ones.items()}, None)
    assert_close({"out": out}, {"out": want["out"]}, 1e-5)
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).float()
    grads = {f"grad_{name}": guarded(torch.zeros_like(given_ones[name]), 12345.0) for name in "qkv"}
    sums = {f"grad_{name}": guarded(t.new_zeros(problem.batch, *t.shape), 12345.0) for name, t in tables.items()}
    everything = {**inputs, "out": out, "lse": lse, "grad": guarded(seed, torch.nan), **grads, **sums}
    native_local._run("local_attention_backward", geometry_of(problem), everything)
    assert_close({name: grads[f"grad_{name}"] for name in "qkv"}, {name: want[name] for name in "qkv"}, 1e-5)
    for tensor in (out, lse, *grads.values(), *sums.values()):
        assert untouched(tensor, 12345.0)


MARGIN = 64


def guarded(x: Tensor, around: float) -> Tensor:
    """A contiguous copy of x in the middle of memory that is otherwise filled with `around`."""
    room = x.new_full((x.numel() + 2 * MARGIN,), around)
    return room[MARGIN : MARGIN + x.numel()].view(x.shape).copy_(x)


def untouched(x: Tensor, around: float) -> bool:
    room = x.new_empty(0).set_(x.untyped_storage())  # type: ignore[call-overload]
    return bool((room[:MARGIN] == around).all() and (room[-MARGIN:] == around).all())


def test_the_guard_sees_a_write_on_either_side() -> None:
    for at in (MARGIN - 1, -MARGIN):
        x = guarded(torch.zeros(3), 12345.0)
        assert untouched(x, 12345.0)
        x.new_empty(0).set_(x.untyped_storage())[at] = 0.0  # type: ignore[call-overload]
        assert not untouched(x, 12345.0)


def test_a_nan_key_reaches_the_windows_that_hold_it_and_no_others() -> None:
    problem = dataclasses.replace(EXAMPLE, tables=(0, 0, 0))
    tensors = problem.tensors(torch.float32)
    tensors["k"][0, 2, 9, 1] = torch.nan
    out = results(problem, tensors, "native")["out"]
    want = torch.zeros(out.shape[:4], dtype=torch.bool)
    want[0, 1:4, 7:12, 1] = True  # window (3, 5)
    assert torch.equal(out.isnan().all(-1), want)
    assert torch.equal(out.isnan().any(-1), want)


def test_large_logits_do_not_overflow() -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    tensors["q"] = tensors["q"] * 1e4
    want = results(EXAMPLE, {name: t.double() for name, t in tensors.items()}, None)
    got = results(EXAMPLE, tensors, "native")
    assert got["out"].isfinite().all()
    assert_close({"out": got["out"]}, {"out": want["out"]}, 2e-2)  # logits of 1e4 have 1e-3 left


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("backend", ["native", "aten"])
def test_an_empty_batch_gives_empty_results_and_zero_gradients_of_tables(backend: str, batch: int) -> None:
    problem = dataclasses.replace(EXAMPLE, batch=batch, layouts=("map", "map", "tokens"))
    got = results(problem, problem.tensors(torch.float32), backend)
    assert got["out"].shape == (batch, 5, 19, 2, 6)
    assert bool((got["rows"] == 0).all()) == (batch == 0)


def test_expanded_inputs_and_gradients_are_read_by_their_strides() -> None:
    tensors = EXAMPLE.tensors(torch.float64)
    tensors["k"] = tensors["k"][:1, :, :, :1].expand(2, -1, -1, 2, -1)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = native_local_sum(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()))  # the gradient of a sum is one number, expanded
    want = torch.autograd.grad(tap_attention(**leaves, **EXAMPLE.geometry).sum(), list(leaves.values()))
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def native_local_sum(leaves: dict[str, Tensor]) -> Tensor:
    return local_attention(**leaves, **EXAMPLE.geometry, backend="native").sum()


def test_threads_and_repetition_change_no_bit() -> None:
    tensors = EXAMPLE.tensors(torch.float32)
    first = results(EXAMPLE, tensors, "native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = results(EXAMPLE, tensors, "native")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_x86
def test_numbers_too_small_for_full_precision_are_zero_and_the_thread_s_arithmetic_is_as_before() -> None:
    leaves = {name: t.requires_grad_() for name, t in EXAMPLE.tensors(torch.float32).items()}
    out = local_attention(**leaves, **EXAMPLE.geometry, backend="native")
    grads = torch.autograd.grad(out, list(leaves.values()), torch.full_like(out, 1e-40))
    assert not any(g.any() for g in grads)
    assert bool((torch.full((3,), 1e-40) * 1.0).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = EXAMPLE.tensors(dtype)
    want = results(EXAMPLE, {name: t.double() for name, t in tensors.items()}, None)
    got = results(EXAMPLE, tensors, "native")
    assert {name: t.dtype for name, t in got.items()} == {"out": dtype, **dict.fromkeys(tensors, dtype)}
    assert_close(got, want, 2e-2)


def test_a_map_goes_in_and_comes_out_as_a_map() -> None:
    problem = dataclasses.replace(EXAMPLE, layouts=("map", "map", "map"))
    got = results(problem, problem.tensors(torch.float32), "native")
    assert got["out"].permute(0, 3, 4, 1, 2).is_contiguous()
    assert all(got[name].permute(0, 3, 4, 1, 2).is_contiguous() for name in "qkv")
    assert laid_out(got["out"], "tokens").shape == (2, 5, 19, 2, 6)
