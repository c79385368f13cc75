"""Relative attention over a whole map equals a loop over pairs in all its forms, and holds no large map's pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convrewrite.blocks import relative, relative_tiles
from convrewrite.blocks.relative import relative_attention, resized
from tests.blocks import TOLERANCE
from tests.blocks.measure import AliveBytes
from tests.blocks.reference_relative import loop_relative


def inputs(height: int, width: int, values: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, rows, columns."""
    torch.manual_seed(0)
    shapes = [(2, height, width, 2, 4)] * 2 + [(2, height, width, 2, values), (2 * height - 1, 4), (2 * width - 1, 4)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


FORMS = {"whole": 0, "streamed": 0, "row by row": 1, "heads at a time": 400, "one tile": 10**9}
"""Most logits of a tile, where there are tiles. A map of 3 x 4 with two heads and two images has 4 x 144."""


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    most = 10**9 if request.param == "whole" else 0
    monkeypatch.setattr(relative, "DENSE_KEYS", most)
    monkeypatch.setattr(relative, "DENSE_PER_CHANNEL", most)
    if request.param == "streamed":
        monkeypatch.setattr(relative, "_takes_tiles", lambda q: False)
    monkeypatch.setattr(relative_tiles, "TILE_ELEMENTS", FORMS[request.param])
    return str(request.param)


forms = pytest.mark.parametrize("form", FORMS, indirect=True)


@forms
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("terms", ["both", "rows", "columns", "none"])
@pytest.mark.parametrize("scale_position", [True, False])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (1, 1)])
def test_equals_the_loop_over_pairs(size: tuple[int, int], scale_position: bool, terms: str) -> None:
    q, k, v, rows, columns = inputs(*size)
    tables = rows if terms in ("both", "rows") else None, columns if terms in ("both", "columns") else None
    got = relative_attention(q, k, v, scale=0.4, rows=tables[0], columns=tables[1], scale_position=scale_position)
    want = loop_relative(q, k, v, 0.4, *tables, 0.4 if scale_position else 1.0)
    torch.testing.assert_close(got, want, **TOLERANCE[q.dtype])


@forms
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("values", [1, 20])
def test_values_may_be_of_any_width(values: int) -> None:
    q, k, v, rows, columns = inputs(3, 3, values)
    got = relative_attention(q, k, v, scale=1.0, rows=rows, columns=columns)
    torch.testing.assert_close(got, loop_relative(q, k, v, 1.0, rows, columns, 1.0), **TOLERANCE[q.dtype])


@forms
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("images", [1, 2])
def test_gradients_are_those_of_finite_differences(images: int) -> None:
    tensors = [t[:images] if t.dim() == 5 else t for t in inputs(2, 3, 2)]

    def run(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return relative_attention(q, k, v, scale=0.5, rows=rows, columns=columns)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors])


@forms
def test_gradients_are_those_of_the_loop_over_pairs(form: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(3, 4)]
    grad = torch.randn(2, 3, 4, 2, 3, dtype=torch.float64)
    q, k, v, rows, columns = tensors
    got = relative_attention(q, k, v, scale=0.4, rows=rows, columns=columns, scale_position=False)
    want = loop_relative(q, k, v, 0.4, rows, columns, 1.0)
    found, wanted = (torch.autograd.grad(y, tensors, grad) for y in (got, want))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[grad.dtype])


TILES = {
    1: [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)],
    100: [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)],
    300: [(0, 0), (2, 0)],
    10**9: [(0, 0)],
}
"""Where (head, row) tiles of at most so many logits begin: three heads of a 3 x 4 map, 48 logits a row of queries."""


@pytest.mark.parametrize("most", TILES)
def test_tiles_are_rows_of_one_head_or_a_few_heads(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relative_tiles, "TILE_ELEMENTS", most)
    found = [(heads.start, rows.start) for heads, rows in relative_tiles._tiles(torch.empty(3, 3, 4, 1))]
    assert found == TILES[most]


def test_a_large_map_s_logits_are_not_kept_for_gradients_either() -> None:
    tensors = [t.requires_grad_() for t in inputs(40, 40, dtype=torch.float32)]
    with AliveBytes(tensors) as alive:
        q, k, v, rows, columns = tensors
        relative_attention(q, k, v, scale=0.5, rows=rows, columns=columns).sum().backward()
    assert alive.peak < 4 * 2 * 1600**2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_the_value(dtype: torch.dtype) -> None:
    q, k, v, rows, columns = inputs(4, 5)
    want = relative_attention(q, k, v, scale=0.5, rows=rows, columns=columns)
    got = relative_attention(*(t.to(dtype) for t in (q, k, v)), scale=0.5, rows=rows, columns=columns)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


def test_a_large_map_s_logits_are_never_held_for_all_pairs() -> None:
    q, k, v, rows, columns = inputs(40, 40, dtype=torch.float32)
    with torch.no_grad(), AliveBytes([q, k, v, rows, columns]) as alive:
        relative_attention(q, k, v, scale=0.5, rows=rows, columns=columns)
    assert alive.peak < 4 * 2 * 1600**2  # less than one head of both images
    with torch.no_grad(), AliveBytes([q, k, v]) as alive:  # the measure does see them where they are
        torch.softmax(torch.einsum("byxnd,bhwnd->bnyxhw", q, k).flatten(4), -1)
    assert alive.peak > 4 * 2 * 2 * 1600**2


def test_a_table_of_the_map_s_own_size_is_taken_as_it_is() -> None:
    table = torch.randn(7, 3)
    assert resized(table, 4) is table


def test_a_resized_table_keeps_its_middle_and_its_ends() -> None:
    table = torch.tensor([[-3.0, 9.0], [-2.0, 4.0], [-1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [2.0, 4.0], [3.0, 9.0]])
    assert resized(table, 7)[:, 0].tolist() == [-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert resized(table, 7)[:, 1].tolist() == [9, 6.5, 4, 2.5, 1, 0.5, 0, 0.5, 1, 2.5, 4, 6.5, 9]
    assert resized(table, 2).tolist() == [[-3, 9], [0, 0], [3, 9]]
    assert resized(table, 1).tolist() == [[0, 0]]
    assert resized(table[3:4] + 5, 2).tolist() == [[5, 5]] * 3
