"""Local attention tap by tap in plain ATen, for narrow heads: shifted lines, a few heads at a time, nothing kept.

Matrix products over tiles waste most of their work where heads are narrow: of the keys of a tile a query wants few,
and one-hot channels for the relative terms are wider than the head. Here the rows of a map are laid end to end, with
the border between them, so that a tap is the same shift of one long line for all queries at once. A few heads are
worked on at a time, few enough to stay in a processor's cache through all taps. The backward pass makes the logits
again from one log-sum-exp for each query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.kernels import again
from convrewrite.kernels.geometry import EXCLUDED, Axis, LocalSpec, reflect_index
from convrewrite.kernels.layouts import empty_output, gap_between, side_by_side

NARROW = 8
"""Widest head that goes through lines. Against tiles, heads of 8 gain at 56 x 56, of 16 lose at 28 x 28 (on CPU)."""

ELEMENTS = 2**18
"""Elements of the lines and logits that are worked on at once."""

Tables = tuple[Tensor | None, Tensor | None, Tensor | None]


def narrow(x: Tensor, width: int) -> bool:
    """Whether heads of `width` channels, of tensors such as `x`, go through lines where there are relative terms.

    A compiler or an exporter is given the form that is made of few operations.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and width <= NARROW


def takes_lines(q: Tensor, k: Tensor, spec: LocalSpec) -> bool:
    """Whether attention with relative terms does: of narrow heads, a query for every pixel, and not nothing."""
    return narrow(q, q.shape[4]) and spec.stride == (1, 1) and min(q.numel(), k.numel()) > 0


def line_elements(y: Axis, x: Axis, heads: int, width: int) -> tuple[int, int]:
    """Elements that one image takes beside q, k, v and the output: (at once, kept for the backward pass)."""
    length = y.count * (x.count + x.span - 1)
    working = min(heads, _heads_at_once(y, x, width)) * length * (y.kernel * x.kernel + 4 * width)
    return heads * length + working, heads * length


def _heads_at_once(y: Axis, x: Axis, width: int) -> int:
    length = y.count * (x.count + x.span - 1)
    return max(1, ELEMENTS // (length * (y.kernel * x.kernel + 4 * width)))


def local_attention_lines(q: Tensor, k: Tensor, v: Tensor, spec: LocalSpec, *tables: Tensor | None) -> Tensor:
    """`convrewrite.blocks.local.local_attention` where `takes_lines`; tables are rows, columns and bias."""
    result: Tensor = _Lines.apply(q, k, v, spec, *tables)
    return result


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: LocalSpec, *tables: Tensor | None) -> Tensor:
        plan = _Plan.of(q, k, spec)
        out = empty_output(q, v.shape[-1])
        sums = q.new_empty(q.shape[0], q.shape[3], plan.length)
        for image, heads in plan.parts(q):
            source = plan.keys(k, image, heads)
            s = plan.logits(plan.queries(q, image, heads).mul_(spec.scale), source, _of_heads(tables, heads, q))
            top = s.amax(1, keepdim=True)
            s.sub_(top).exp_()
            total = s.sum(1, keepdim=True)
            sums[image, heads] = top.add_(total.log()).squeeze(1)
            mean = plan.means(s, plan.keys(v, image, heads))
            _maps(out)[image, heads] = plan.cut(mean.div_(total))
            del s, source, mean  # before the next are made
        ctx.save_for_backward(q, k, v, sums, *tables)
        ctx.spec = spec
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sums, *tables = ctx.saved_tensors
        again.refuse_if_wanted("local attention", grad, (q, k, v, *tables))
        plan, spec = _Plan.of(q, k, ctx.spec), ctx.spec
        gap = gap_between(q, k, v)
        to_q, to_k, to_v = side_by_side(q, gap).unbind(0) if gap else (torch.empty_like(t) for t in (q, k, v))
        to_tables = [None if t is None else torch.zeros_like(t.expand(q.shape[3], *t.shape[1:])) for t in tables]
        for image, heads in plan.parts(q):
            of_heads = _of_heads(tables, heads, q)
            lines = plan.queries(q, image, heads).mul_(spec.scale)
            keys, values, part = (
                plan.keys(k, image, heads),
                plan.keys(v, image, heads),
                plan.queries(grad, image, heads),
            )
            p = plan.logits(lines, keys, of_heads).sub_(sums[image, heads].unsqueeze(1)).exp_()
            of_values = torch.zeros_like(values)
            plan.scatter(of_values, p, part)
            _maps(to_v)[image, heads] = plan.unpadded(of_values)
            s = plan.dots(part, values)
            s.sub_((s * p).sum(1, keepdim=True)).mul_(p)  # gradient of the logits; 0 where part is, beyond the rows
            of_keys = torch.zeros_like(keys)
            plan.scatter(of_keys, s, lines)
            _maps(to_k)[image, heads] = plan.unpadded(of_keys)
            of_queries = plan.means(s, keys)
            plan.table_gradients(s, lines, of_heads, [None if t is None else t[heads] for t in to_tables], of_queries)
            _maps(to_q)[image, heads] = plan.cut(of_queries).mul_(spec.scale)
            del p, s, of_keys, of_values  # before the next are made
        shared = [
            None if of is None or t is None else of.sum(0, keepdim=True) if t.shape[0] == 1 else of
            for of, t in zip(to_tables, tables, strict=True)
        ]
        return to_q, to_k, to_v, None, *shared


def _maps(x: Tensor) -> Tensor:
    """(B, H, W, N, d) -> (B, N, d, H, W), a view."""
    return x.permute(0, 3, 4, 1, 2)


def _of_heads(tables: tuple[Tensor | None, ...] | list[Tensor | None], heads: slice, q: Tensor) -> Tables:
    """The tables of a few heads, in the dtype of `q`."""
    rows, columns, bias = (None if t is None else t.expand(q.shape[3], *t.shape[1:])[heads].to(q.dtype) for t in tables)
    return rows, columns, bias


@dataclass(frozen=True)
class _Plan:
    """Where rows, taps and border lie in a line.

    Attributes:
        pitch: of a row of keys with its border; of a row of queries too, with what is no query at its end.
        mask: what to add to the logits (taps, length), or None.
    """

    y: Axis
    x: Axis
    spec: LocalSpec
    pitch: int
    mask: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, spec: LocalSpec) -> _Plan:
        y, x = spec.axes(q.shape[1:3], k.shape[1:3])
        pitch = x.count + x.span - 1
        mask = None
        if spec.border == "mask":
            inside = [_inside(axis, q.device) for axis in (y, x)]  # (count, kernel)
            there = inside[0].T[:, None, :, None] & inside[1].T[None, :, None, :]
            outside = torch.where(there, 0.0, EXCLUDED).to(q.dtype)
            mask = F.pad(outside, (0, pitch - x.count)).flatten(2).flatten(0, 1)
        return cls(y, x, spec, pitch, mask)

    @property
    def length(self) -> int:
        """Of a line of queries."""
        return self.y.count * self.pitch

    def parts(self, q: Tensor) -> Iterator[tuple[int, slice]]:
        """(image, heads), a few heads at a time."""
        heads, width = q.shape[3:]
        step = _heads_at_once(self.y, self.x, width)
        for image in range(q.shape[0]):
            for begin in range(0, heads, step):
                yield image, slice(begin, min(begin + step, heads))

    def queries(self, q: Tensor, image: int, heads: slice) -> Tensor:
        """Lines (heads, d, length) of queries, or what has their size, zeros behind each row; a copy."""
        return F.pad(_maps(q)[image, heads], (0, self.pitch - self.x.count)).flatten(2)

    def keys(self, k: Tensor, image: int, heads: slice) -> Tensor:
        """Lines of keys with their border, as many more at the end as the last taps reach beyond the last row."""
        maps = _maps(k)[image, heads]
        if self.spec.border == "reflect":
            rows, columns = (reflect_index(_reach(axis, k.device), axis.size) for axis in (self.y, self.x))
            maps = maps.index_select(2, rows).index_select(3, columns)
            return F.pad(maps, (0, 0, 0, 1)).flatten(2)
        (top, bottom), (left, right) = self.y.padding, self.x.padding
        return F.pad(maps, (left, right, top, bottom + 1)).flatten(2)

    def unpadded(self, lines: Tensor) -> Tensor:
        """Gradients of lines of keys as those of the maps."""
        maps = lines.view(*lines.shape[:2], -1, self.pitch)[:, :, :-1]
        if self.spec.border == "reflect":
            for dim, axis in ((2, self.y), (3, self.x)):
                shape = [*maps.shape]
                shape[dim] = axis.size
                maps = maps.new_zeros(shape).index_add_(dim, reflect_index(_reach(axis, maps.device), axis.size), maps)
            return maps
        (top, bottom), (left, right) = self.y.padding, self.x.padding
        return F.pad(maps, (-left, -right, -top, -bottom))

    def cut(self, lines: Tensor) -> Tensor:
        """The maps of lines of queries."""
        return lines.view(*lines.shape[:2], self.y.count, self.pitch)[..., : self.x.count]

    def shifts(self) -> Iterator[tuple[int, slice]]:
        """(tap, where the keys of all queries for it lie in a line of keys)."""
        for tap in range(self.y.kernel * self.x.kernel):
            row, column = divmod(tap, self.x.kernel)
            begin = row * self.y.dilation * self.pitch + column * self.x.dilation
            yield tap, slice(begin, begin + self.length)

    def dots(self, q: Tensor, k: Tensor) -> Tensor:
        """(heads, taps, length): products of each query with the key at each tap, all taps of a channel at once."""
        window = q.shape[0], self.y.kernel, self.x.kernel, self.length
        s = q.new_zeros(window)
        steps = k.stride(0), self.y.dilation * self.pitch, self.x.dilation, 1
        for c in range(q.shape[1]):
            s.addcmul_(q[:, c, None, None], k.as_strided(window, steps, k.storage_offset() + c * k.stride(1)))
        return s.flatten(1, 2)

    def means(self, s: Tensor, v: Tensor) -> Tensor:
        """(heads, d, length): sums over the taps of what is there, weighted by s."""
        total = v.new_zeros(v.shape[0], v.shape[1], self.length)
        for tap, shift in self.shifts():
            total.addcmul_(v[..., shift], s[:, tap, None])
        return total

    def scatter(self, to: Tensor, s: Tensor, x: Tensor) -> None:
        """Adds s x of each query to the key at each tap: the transpose of `means`."""
        for tap, shift in self.shifts():
            to[..., shift].addcmul_(x, s[:, tap, None])

    def logits(self, q: Tensor, k: Tensor, tables: Tables) -> Tensor:
        """(heads, taps, length), of scaled queries."""
        rows, columns, bias = tables
        s = self.dots(q, k)
        grid = s.view(s.shape[0], self.y.kernel, self.x.kernel, self.length)
        if rows is not None:
            grid += torch.bmm(rows.transpose(1, 2), q)[:, :, None]
        if columns is not None:
            grid += torch.bmm(columns.transpose(1, 2), q)[:, None]
        if bias is not None:
            s += bias[..., None]
        if self.mask is not None:
            s += self.mask
        return s

    def table_gradients(self, s: Tensor, q: Tensor, tables: Tables, to: list[Tensor | None], to_q: Tensor) -> None:
        """Adds to the gradients of the tables, and what the tables add to those of the queries (without the scale)."""
        grid = s.view(s.shape[0], self.y.kernel, self.x.kernel, self.length)
        for table, of_table, over in zip(tables[:2], to[:2], (2, 1), strict=True):
            if table is not None and of_table is not None:
                of_terms = grid.sum(over)  # (heads, taps of the axis, length)
                of_table += torch.bmm(q, of_terms.transpose(1, 2)).to(of_table.dtype)
                to_q.baddbmm_(table, of_terms)
        if to[2] is not None:
            to[2] += s.sum(2).to(to[2].dtype)


def _reach(axis: Axis, device: torch.device) -> Tensor:
    """Positions that the windows of one axis reach together."""
    return torch.arange(axis.count + axis.span - 1, device=device) + axis.first


def _inside(axis: Axis, device: torch.device) -> Tensor:
    """Whether tap t of query i is on the map: (count, kernel)."""
    at = torch.arange(axis.count, device=device)[:, None] + axis.first
    at = at + torch.arange(axis.kernel, device=device) * axis.dilation
    return (at >= 0) & (at < axis.size)
