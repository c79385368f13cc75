"""Runs the Triton kernels in Triton's interpreter against nested loops, and prints the errors found as JSON.

A program of its own, because Triton reads TRITON_INTERPRET when it is imported:
``TRITON_INTERPRET=1 python -m tests.kernels.triton_cases``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from convrewrite.kernels import triton_local


@dataclass(frozen=True)
class Case:
    """q is (batch, *grid, heads, width), k (batch, *size, heads, width), v as wide as `value`."""

    size: tuple[int, int]
    grid: tuple[int, int]
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    start: tuple[int, int] = (0, 0)
    border: str = "reflect"
    batch: int = 1
    heads: int = 2
    width: int = 4
    value: int = 4
    tables: str = ""  # of r(ows), c(olumns), b(ias); capital: one for each head
    layout: str = "tokens"
    dtype: torch.dtype = torch.float64


CASES = {
    "plain": Case((4, 3), (4, 3), batch=2),
    "zero border": Case((4, 5), (4, 5), border="zero"),
    "masked border": Case((4, 5), (4, 5), border="mask"),
    "all tables, shared": Case((3, 4), (3, 4), border="zero", tables="rcb"),
    "all tables, one a head": Case((3, 4), (3, 4), border="mask", tables="RCB", heads=3),
    "tables at mirrors": Case((3, 4), (3, 4), tables="Rcb"),
    "rows alone": Case((3, 3), (3, 3), border="zero", tables="r"),
    "columns alone": Case((3, 3), (3, 3), border="mask", tables="C"),
    "stride": Case((6, 5), (3, 3), stride=(2, 2), start=(0, 0), tables="rc"),
    "dilation": Case((6, 5), (6, 5), dilation=(2, 1), border="zero"),
    "even window": Case((4, 4), (4, 4), window=(2, 4), border="mask"),
    "moved start": Case((5, 5), (3, 4), start=(1, 1)),
    "mirrors met again and again": Case((2, 2), (2, 2), window=(5, 1), heads=1),
    "a map of one pixel": Case((1, 1), (1, 1), window=(3, 1), tables="r"),
    "one row": Case((1, 6), (1, 6), border="zero"),
    "window of one": Case((3, 3), (3, 3), window=(1, 1), tables="b"),
    "no window meets the map": Case((1, 2), (1, 2), window=(2, 1), dilation=(3, 1), border="mask"),
    "odd widths": Case((3, 3), (3, 3), width=3, value=5, heads=3, border="mask"),
    "one channel": Case((3, 3), (3, 3), width=1, value=1, heads=5, border="zero"),
    "wide heads": Case((3, 2), (3, 2), width=40, value=40, heads=1, border="mask"),
    "maps": Case((4, 3), (4, 3), layout="map", tables="rc", border="zero"),
    "strided slices": Case((4, 3), (4, 3), layout="slice", border="mask"),
    "float32": Case((4, 4), (4, 4), tables="rcb", border="zero", dtype=torch.float32),
    "bfloat16": Case((4, 4), (4, 4), tables="rc", border="mask", dtype=torch.bfloat16),
    "float16": Case((4, 4), (4, 4), border="zero", dtype=torch.float16),
    "empty batch": Case((4, 4), (4, 4), batch=0, tables="rcb"),
}


def reflected(at: int, size: int) -> int:
    """A position folded into 0..size-1 by mirrors at both ends, one reflection after the other."""
    while size > 1 and not 0 <= at < size:
        at = -at if at < 0 else 2 * (size - 1) - at
    return 0 if size == 1 else at


def by_loops(case: Case, scale: float, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor | None]) -> Tensor:
    """The definition, one query and one tap at a time."""
    shape = q.shape[:1] + q.shape[3:4]
    rows, columns, bias = tables["r"], tables["c"], tables["b"]
    found = []
    for y in range(case.grid[0]):
        for x in range(case.grid[1]):
            logits, values = [], []
            for tap in range(case.window[0] * case.window[1]):
                a, b = divmod(tap, case.window[1])
                at_y = case.start[0] + y * case.stride[0] + a * case.dilation[0]
                at_x = case.start[1] + x * case.stride[1] + b * case.dilation[1]
                at_y -= case.dilation[0] * (case.window[0] - 1) // 2
                at_x -= case.dilation[1] * (case.window[1] - 1) // 2
                inside = 0 <= at_y < case.size[0] and 0 <= at_x < case.size[1]
                if case.border == "reflect":
                    at_y, at_x, inside = reflected(at_y, case.size[0]), reflected(at_x, case.size[1]), True
                if not inside and case.border == "mask":
                    continue
                key = k[:, at_y, at_x] if inside else k.new_zeros(*shape, case.width)
                key = key if rows is None else key + rows[:, :, a]
                key = key if columns is None else key + columns[:, :, b]
                logit = scale * (q[:, y, x] * key).sum(-1)  # (B, N)
                logits.append(logit if bias is None else logit + bias[:, tap])
                values.append(v[:, at_y, at_x] if inside else v.new_zeros(*shape, case.value))
            if not logits:
                found.append(v.new_zeros(*shape, case.value))
                continue
            weights = torch.stack(logits).softmax(0)
            found.append((weights[..., None] * torch.stack(values)).sum(0))
    return torch.stack(found, 1).unflatten(1, case.grid)


def tensors(case: Case) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """q, k, v, laid out as the case says, with NaN in all memory around them; and the tables."""
    torch.manual_seed(0)

    def laid_out(size: tuple[int, int], width: int) -> Tensor:
        shape = (case.batch, *size, case.heads, width)
        values = torch.randn(shape, dtype=case.dtype)
        if case.layout == "map":
            return values.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        if case.layout == "tokens":
            return values
        around = torch.full([n + 2 for n in shape], torch.nan, dtype=case.dtype)
        inner = around[tuple(slice(1, -1) for _ in shape)]
        return inner.copy_(values)

    widths = {"r": (case.width, case.window[0]), "c": (case.width, case.window[1])}
    widths["b"] = (case.window[0] * case.window[1],)  # type: ignore[assignment]
    tables: dict[str, Tensor | None] = {}
    for name, shape in widths.items():
        heads = case.heads if name.upper() in case.tables else 1
        present = name in case.tables.lower()
        tables[name] = torch.randn(heads, *shape, dtype=case.dtype) if present else None
    return [laid_out(case.grid, case.width), laid_out(case.size, case.width), laid_out(case.size, case.value)], tables


def guarded(like: Tensor) -> Tensor:
    """An empty tensor as `like`; one with pixels, heads and channels lies in a larger one that must stay 7."""
    if like.ndim < 5:
        return like.new_empty(like.shape)
    around = torch.full([n + 2 for n in like.shape], 7.0, dtype=like.dtype)
    GUARDS.append(around)
    return around[tuple(slice(1, -1) for _ in like.shape)]


GUARDS: list[Tensor] = []
SCALE = 0.7


def untouched(around: Tensor) -> bool:
    """Whether the border of a guarded tensor is as it was."""
    inner = torch.zeros(around.shape, dtype=torch.bool)
    inner[tuple(slice(1, -1) for _ in around.shape)] = True
    return bool((around[~inner] == 7).all())


def run(case: Case, scale: float) -> dict[str, float | bool]:
    """Largest error of the output and of each gradient, as a share of the largest number, against float64 loops.

    "guards": whether nothing was written around the outputs. `scale` is that of the loops.
    """
    inputs, tables = tensors(case)
    exact = [t.double().requires_grad_() for t in inputs]
    exact_tables = {n: None if t is None else t.double().requires_grad_() for n, t in tables.items()}
    want = by_loops(case, scale, *exact, exact_tables)
    grad = torch.randn(want.shape, dtype=torch.float64).to(case.dtype)
    if want.requires_grad:  # not so where no window meets the map
        want.backward(grad.double())
    args = (case.window, SCALE, case.stride, case.dilation, case.start, case.border, *tables.values())
    GUARDS.clear()
    with mock.patch.object(triton_local, "_like", lambda q, width: guarded(q.new_empty(*q.shape[:4], width))):
        out, lse = triton_local.forward(*inputs, *args)
    with mock.patch.object(torch, "empty_like", guarded):
        found = triton_local.backward(grad, *inputs, out, lse, *args)
    errors: dict[str, float | bool] = {"out": _error(out, want)}
    leaves = [*exact, *exact_tables.values()]
    for name, got, leaf in zip(("q", "k", "v", "rows", "columns", "bias"), found, leaves, strict=True):
        if (got is None) != (leaf is None):
            errors[name] = float("inf")
        elif got is not None and leaf is not None:
            errors[name] = _error(got, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    errors["guards"] = len(GUARDS) > 0 and all(untouched(around) for around in GUARDS)
    return errors


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    difference = (got.double() - want).abs()
    if difference.numel() == 0:
        return 0.0
    worst = (difference.max() / want.abs().max().clamp(min=1e-3)).item()
    return float("inf") if worst != worst else worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--scale", type=float, default=SCALE)
    chosen = parser.parse_args()
    json.dump({name: run(CASES[name], chosen.scale) for name in chosen.cases or CASES}, sys.stdout)
