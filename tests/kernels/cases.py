"""Local attention in float64 one tap at a time, and random problems to compare kernels on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from convrewrite.blocks.local import local_attention
from tests.blocks.reference import mirror, taps

Pair = tuple[int, int]


def tap_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Pair,
    stride: Pair,
    dilation: Pair,
    start: Pair,
    border: str,
    scale: float,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`local_attention` by one gather of keys and values for every tap, differentiable by autograd."""
    logits, values = [], []
    for a, dy in enumerate(taps(window[0], dilation[0])):
        for b, dx in enumerate(taps(window[1], dilation[1])):
            at = [
                [start[i] + step * stride[i] + (dy, dx)[i] for step in range(q.shape[1 + i])] for i in range(2)
            ]  # positions of the tap's keys
            inside = [torch.tensor([0 <= p < k.shape[1 + i] for p in at[i]]) for i in range(2)]
            there = (inside[0][:, None] & inside[1])[None, :, :, None]  # (1, Ho, Wo, 1)
            y, x = (torch.tensor([mirror(p, k.shape[1 + i]) for p in at[i]]) for i in range(2))
            key, value = k[:, y][:, :, x], v[:, y][:, :, x]
            if border != "reflect":
                key, value = key * there[..., None], value * there[..., None]
            for table, tap in ((rows, a), (columns, b)):
                key = key if table is None else key + table[..., tap]
            logit = scale * (q * key).sum(-1)
            logit = logit if bias is None else logit + bias[:, a * window[1] + b]
            logits.append(logit.masked_fill(~there, -torch.inf) if border == "mask" else logit)
            values.append(value)
    weight = torch.stack(logits).softmax(0)
    return (weight[..., None] * torch.stack(values)).sum(0)


@dataclass(frozen=True)
class Problem:
    """Sizes, geometry and memory layouts of one local attention."""

    batch: int
    heads: int
    width: int
    value_width: int
    queries: Pair
    keys: Pair
    window: Pair
    stride: Pair
    dilation: Pair
    start: Pair
    border: str
    layouts: tuple[str, str, str]
    tables: tuple[int, int, int]  # of rows, columns, bias: 0 none, 1 shared by the heads, 2 per head

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("window", "stride", "dilation", "start", "border")
        return {"scale": 0.6, **{name: getattr(self, name) for name in names}}

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v in their layouts, and the tables there are."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shapes = [(*self.queries, self.width), (*self.keys, self.width), (*self.keys, self.value_width)]
        found = {}
        for name, layout, (height, width, channels) in zip("qkv", self.layouts, shapes, strict=True):
            found[name] = laid_out(random(self.batch, height, width, self.heads, channels), layout)
        kh, kw = self.window
        ends = {"rows": (self.width, kh), "columns": (self.width, kw), "bias": (kh * kw,)}
        for given, (name, end) in zip(self.tables, ends.items(), strict=True):
            if given:
                found[name] = random(1 if given == 1 else self.heads, *end)
        return found


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, H, W, N, d) as tokens, as a map, or as part of something larger, every second in each way."""
    if layout == "tokens":
        return x
    if layout == "map":
        return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    if layout == "dim-major map":
        return x.permute(0, 4, 3, 1, 2).contiguous().permute(0, 3, 4, 2, 1)
    room = torch.full([2 * size + 1 for size in x.shape], torch.nan, dtype=x.dtype)
    inner = room[tuple(slice(1, 2 * size + 1, 2) for size in x.shape)]
    return inner.copy_(x)


@st.composite
def problems(draw: Any) -> Problem:
    """Random problems; with border "mask" every window holds a key, for without one it has no meaning."""

    def pair(low: int, high: int) -> Pair:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    window, stride, dilation = (draw(st.integers(1, 4)), draw(st.integers(1, 7))), pair(1, 3), pair(1, 3)
    queries = (draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 9, 16, 19])))
    keys, start = (draw(st.integers(1, 8)), draw(st.integers(1, 20))), pair(0, 2)
    border = draw(st.sampled_from(["reflect", "zero", "mask"]))
    if border == "mask":
        start = (0, 0)
        window = (window[0] | 1, window[1] | 1)  # odd: the middle tap is on the query
        keys = (
            max(keys[0], (queries[0] - 1) * stride[0] + 1),
            max(keys[1], (queries[1] - 1) * stride[1] + 1),
        )
    width = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 17]))
    layouts = st.sampled_from(["tokens", "map", "dim-major map", "part"])
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        width=width,
        value_width=draw(st.sampled_from([width, width, 1, 5, 8])),
        queries=queries,
        keys=keys,
        window=window,
        stride=stride,
        dilation=dilation,
        start=start,
        border=border,
        layouts=(draw(layouts), draw(layouts), draw(layouts)),
        tables=(draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 2))),
    )


def results(problem: Problem, tensors: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    """Output, and gradients of all tensors for a fixed gradient of it; by `tap_attention` where no backend is named."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    function: Any = tap_attention if backend is None else local_attention
    options = {} if backend is None else {"backend": backend}
    out = function(**leaves, **problem.geometry, **options)
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), seed, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest value of the wanted one, or of 1."""
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        if expected.numel():
            worst = float((got[name].double() - expected).abs().max())
            assert worst <= tolerance * max(1.0, float(expected.abs().max())), f"{name} differs by {worst:.3g}"


EXAMPLE = Problem(
    batch=2,
    heads=2,
    width=4,
    value_width=6,
    queries=(5, 19),
    keys=(5, 19),
    window=(3, 5),
    stride=(1, 1),
    dilation=(1, 1),
    start=(0, 0),
    border="zero",
    layouts=("map", "tokens", "part"),
    tables=(1, 2, 2),
)
