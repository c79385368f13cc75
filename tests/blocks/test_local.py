"""Local attention as ATen operations equals one query and one tap at a time, in every geometry, at every border.

The other backends: tests/kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.blocks.local import local_attention, reflect_pad
from convrewrite.kernels import aten
from tests.blocks import TOLERANCE
from tests.blocks.reference import loop_attention


@pytest.fixture(autouse=True)
def _aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVREWRITE_BACKEND", "aten")


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"size": (6, 5), "count": (6, 5), "window": (3, 3)},
    "7x7 on a smaller map": {"size": (4, 3), "count": (4, 3), "window": (7, 7)},
    "one pixel": {"size": (1, 1), "count": (1, 1), "window": (7, 7)},
    "even window": {"size": (5, 6), "count": (5, 6), "window": (4, 2)},
    "odd size, stride 2": {"size": (7, 5), "count": (4, 3), "window": (3, 3), "stride": (2, 2)},
    "dilation": {"size": (8, 7), "count": (8, 7), "window": (3, 3), "dilation": (2, 3)},
    "even span of a dilated even window": {"size": (6, 6), "count": (6, 6), "window": (2, 4), "dilation": (3, 1)},
    "starts inside": {"size": (8, 7), "count": (4, 3), "window": (5, 3), "start": (2, 2)},
    "all at once": {
        "size": (9, 8),
        "count": (3, 2),
        "window": (4, 3),
        "stride": (2, 3),
        "dilation": (2, 1),
        "start": (1, 2),
    },
    "tiles that overhang": {"size": (19, 3), "count": (19, 3), "window": (3, 1)},
}


def inputs(size: tuple[int, int], count: tuple[int, int], values: int = 4, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, *count, 2, 4, dtype=torch.float64)
    k = torch.randn(batch, *size, 2, 4, dtype=torch.float64)
    return [q, k, torch.randn(batch, *size, 2, values, dtype=torch.float64)]


@pytest.mark.parametrize("border", ["reflect", "zero", "mask"])
@pytest.mark.parametrize("dense", [0.0, 1e9], ids=["tiles", "whole map"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_the_loop_over_taps(name: str, dense: float, border: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "DENSE", dense)
    geometry = dict(GEOMETRIES[name])
    q, k, v = inputs(geometry.pop("size"), geometry.pop("count"))
    ours = local_attention(q, k, v, scale=0.7, border=border, **geometry)
    torch.testing.assert_close(
        ours, loop_attention(q, k, v, scale=0.7, border=border, **geometry), **TOLERANCE[q.dtype]
    )


@pytest.mark.parametrize("border", ["reflect", "zero", "mask"])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("name", ["3x3", "all at once", "tiles that overhang"])
def test_relative_terms_and_bias_equal_the_loop(name: str, shared: int, border: Any) -> None:
    geometry = dict(GEOMETRIES[name])
    q, k, v = inputs(geometry.pop("size"), geometry.pop("count"), values=3)
    kh, kw = geometry["window"]
    relative, bias = torch.randn(shared, 4, kh * kw, dtype=q.dtype), torch.randn(shared, kh * kw, dtype=q.dtype)
    rows, columns = torch.randn(shared, 4, kh, dtype=q.dtype), torch.randn(shared, 4, kw, dtype=q.dtype)
    both = relative + (rows[..., :, None] + columns[..., None, :]).flatten(2)
    ours = local_attention(
        q, k, v, scale=0.7, border=border, relative=relative, rows=rows, columns=columns, bias=bias, **geometry
    )
    want = loop_attention(q, k, v, scale=0.7, border=border, relative=both, bias=bias, **geometry)
    torch.testing.assert_close(ours, want, **TOLERANCE[q.dtype])


@pytest.mark.parametrize("values", [2, 9])
def test_values_may_be_narrower_or_wider_than_keys(values: int) -> None:
    q, k, v = inputs((5, 5), (5, 5), values=values)
    ours = local_attention(q, k, v, window=(3, 3), scale=1.0)
    torch.testing.assert_close(ours, loop_attention(q, k, v, window=(3, 3), scale=1.0), **TOLERANCE[q.dtype])


@pytest.mark.parametrize("dense", [0.0, 1e9], ids=["tiles", "whole map"])
def test_gradients_are_those_of_finite_differences(dense: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "DENSE", dense)
    q, k, v = (t.requires_grad_() for t in inputs((4, 3), (2, 2)))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, window=(3, 3), stride=(2, 2), scale=0.5)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_gradients_reach_every_relative_term() -> None:
    q, k, v = inputs((3, 3), (3, 3))
    terms = [torch.randn(2, 4, 9), torch.randn(2, 4, 3), torch.randn(1, 4, 3), torch.randn(2, 9)]

    def run(relative: Tensor, rows: Tensor, columns: Tensor, bias: Tensor) -> Tensor:
        return local_attention(
            q, k, v, window=(3, 3), scale=0.5, relative=relative, rows=rows, columns=columns, bias=bias
        )

    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in terms])


def test_an_empty_batch_gives_an_empty_batch() -> None:
    for size in ((3, 3), (20, 20)):
        q, k, v = inputs(size, size, batch=0)
        assert local_attention(q, k, v, window=(3, 3), scale=1.0).shape == (0, *size, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_the_value(dtype: torch.dtype) -> None:
    tensors = inputs((20, 20), (20, 20))
    want = local_attention(*tensors, window=(7, 7), scale=0.5)
    got = local_attention(*(t.to(dtype) for t in tensors), window=(7, 7), scale=0.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("pads", [(3, 3, 3, 3), (0, 2, 1, 0), (4, 4, 5, 5)])
def test_reflect_pad_is_torch_s_where_torch_has_one(pads: tuple[int, int, int, int]) -> None:
    x = torch.randn(2, 3, 6, 5)
    assert torch.equal(reflect_pad(x, *pads), F.pad(x, pads, mode="reflect"))


def test_reflect_pad_goes_on_between_the_mirrors_of_small_maps() -> None:
    line = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    assert reflect_pad(line, 5, 4, 0, 0).flatten().tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert reflect_pad(line[..., :1], 2, 1, 3, 3).shape == (1, 1, 7, 4)
    assert reflect_pad(line, -1, -1, 0, 0).flatten().tolist() == [1]
