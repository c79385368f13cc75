"""The sum of outlook attention, over overlapping windows, without ever unfolding the map.

The published form unfolds v to K^2 copies, multiplies each with a K^2 x K^2 matrix and folds the products back.
Here the weights, which are small, are folded first: those of all centres that move v from pixel i to pixel j are
one number, so what is left is one weighted sum over the (2K - 1)^2 offsets between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.blocks.local import Pair


def outlook(
    values: Tensor, logits: Tensor, *, heads: int, window: int, step: int = 1, dilation: Pair = (1, 1), normalise: bool
) -> Tensor:
    """Outlook attention of given values and logits, without unfolding the values.

        y_j = sum_i sum_p softmax_p( a_i[j - i, p] ) v_{i+p}

    over the centres i (every step-th position) with j in their window, and the taps p of that window; v is 0
    outside the map. The K^2 x K^2 weights of all centres that reach j are first summed into one weight for
    each of the (2K - 1)^2 offsets from j, so that v is read (2K - 1)^2 times and never copied K^2 times.

    Args:
        values: v, (B, C, H, W).
        logits: a, (B, N K^4, ceil(H / step), ceil(W / step)); channel (n K^2 + target) K^2 + source.
        dilation: distance of the taps (vertical, horizontal); 1 unless step is.
        normalise: divide y_j by the number of centres that write to j.

    Returns:
        (B, C, H, W), in the dtype of `values`.
    """
    weights = source_softmax(logits, heads, window)
    return weighted_overlap(values, [weights], step=step, dilation=dilation, normalise=normalise)


def outlook_gradients(
    grad: Tensor, values: Tensor, logits: Tensor, *, heads: int, window: int, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and logits of `outlook` at step 1, not normalised, without autograd."""
    (b, c, h, w), side = values.shape, 2 * window - 1
    shares = source_softmax(logits, heads, window)
    by_offset = _by_offset(shares, (h, w), 1, dilation)
    maps, of = (t.contiguous().view(b, heads, c // heads, h, w) for t in (values, grad))
    to_values, to_offsets = _gradients(of, maps, by_offset, side, dilation)
    to_shares = _to_centres(to_offsets, shares.shape, dilation)
    flat, of_flat = (t.view(b * heads * window**2, window**2, h * w) for t in (shares, to_shares))
    to_logits = torch._softmax_backward_data(of_flat, flat, 1, flat.dtype)
    return to_values.view(values.shape), to_logits.view(logits.shape)


def weighted_overlap(
    values: Tensor, softmaxed: list[Tensor], *, step: int = 1, dilation: Pair = (1, 1), normalise: bool
) -> Tensor:
    """`outlook` from the result of `source_softmax`, in a list that is emptied.

    The largest tensor here, which inference needs no more after its first use: an argument itself would be kept
    alive by the caller.
    """
    b, c, h, w = values.shape
    heads, window = softmaxed[0].shape[1:3]
    weights = _by_offset(softmaxed.pop(), (h, w), step, dilation)  # (B, N, (2K-1)^2, H, W)
    y = _weighted_sum(values.contiguous().view(b, heads, c // heads, h, w), weights, 2 * window - 1, dilation).view(
        b, c, h, w
    )
    if normalise:
        y = normalised(y, window, step, dilation)
    return y.to(values.dtype)


def normalised(y: Tensor, window: int, step: int, dilation: Pair) -> Tensor:
    """Each pixel of (B, C, H, W) divided by the number of centres that write to it."""
    rows, columns = (_writers(n, window, step, d, y) for n, d in zip(y.shape[2:], dilation, strict=True))
    return y / (rows[:, None] * columns)


def source_softmax(logits: Tensor, heads: int, window: int) -> Tensor:
    """Softmax over the sources: (B, N, K, K, K, K, h, w), target row and column first, then the source's."""
    b, _, h, w = logits.shape
    # In three dimensions: torch's softmax over an inner one takes three times as long with more of them on CPU.
    weights = logits.contiguous().view(b * heads * window**2, window**2, h * w).softmax(1)
    return weights.view(b, heads, window, window, window, window, h, w)


def _by_offset(weights: Tensor, size: Pair, step: int, dilation: Pair) -> Tensor:
    """One weight for each pixel j and offset from it: (B, N, (2K-1)^2, H, W)."""
    result: Tensor = _ByOffset.apply(_at_every_pixel(weights, size, step), dilation)
    return result


class _ByOffset(torch.autograd.Function):
    """(B, N, K, K, K, K, H, W) -> (B, N, (2K-1)^2, H, W): the weights of all centres that write to a pixel, summed.

    By hand, as autograd would make a gradient of the whole input for each of the K^2 targets.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, dilation: Pair) -> Tensor:
        b, heads, window, *_, h, w = weights.shape
        ctx.shape, ctx.dilation = weights.shape, dilation
        total = weights.new_zeros(b, heads, 2 * window - 1, 2 * window - 1, h, w)
        for (row, column), here, there in _targets(window, h, w, dilation):
            total[here] += weights[:, :, row, column][there]
        return total.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_centres(grad, ctx.shape, ctx.dilation), None


def _to_centres(grad: Tensor, shape: tuple[int, ...], dilation: Pair) -> Tensor:
    """Gradients (B, N, (2K-1)^2, H, W) of summed weights as those of each centre's, in their shape."""
    b, heads, window, *_, h, w = shape
    grad = grad.reshape(b, heads, 2 * window - 1, 2 * window - 1, h, w)
    to_weights = grad.new_zeros(shape)
    for (row, column), here, there in _targets(window, h, w, dilation):
        to_weights[:, :, row, column][there] = grad[here]
    return to_weights


def _targets(
    window: int, height: int, width: int, dilation: Pair
) -> Iterator[tuple[Pair, tuple[slice | EllipsisType, ...], tuple[slice | EllipsisType, ...]]]:
    """(target, where it adds to the summed weights, where its own weights for that lie), each over the last axes."""
    for row, column in product(range(window), repeat=2):
        down, right = (row - window // 2) * dilation[0], (column - window // 2) * dilation[1]
        if abs(down) >= height or abs(right) >= width:
            continue  # the target is outside the map for every centre on it
        offsets = tuple(slice(window - 1 - at, 2 * window - 1 - at) for at in (row, column))
        pixels = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
        centres = slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right))
        yield (row, column), (..., *offsets, *pixels), (..., *centres)


def _at_every_pixel(weights: Tensor, size: Pair, step: int) -> Tensor:
    """Weights of centres `step` apart with zeros between them: (..., h, w) -> (..., H, W)."""
    if step == 1:
        return weights
    flat = weights.flatten(0, 5)  # (*, h, w)
    spread = F.pad(flat[..., None, :, None], (0, step - 1, 0, 0, 0, step - 1))  # (*, h, step, w, step)
    spread = spread.flatten(1, 2).flatten(2)[:, : size[0], : size[1]]
    return spread.reshape(*weights.shape[:-2], *size)


def _weighted_sum(values: Tensor, weights: Tensor, side: int, dilation: Pair) -> Tensor:
    """y_j = sum_o w_j[o] v_{j+o} over side x side offsets; values (B, N, d, H, W), weights (B, N, side^2, H, W)."""
    result: Tensor = _WeightedSum.apply(values, weights, side, dilation)
    return result


class _WeightedSum(torch.autograd.Function):
    """`_weighted_sum` with a backward of its own: autograd would make a padded gradient for each of the taps.

    In eager mode a few heads at a time, which stay in a processor's cache through all taps, with rows laid end to end:
    a shift by an offset is then a shift of one long row. A compiler fuses the plain form by itself.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, side: int, dilation: Pair) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.side, ctx.dilation = side, dilation
        y = values.new_zeros(values.shape, dtype=torch.promote_types(values.dtype, torch.float32))
        if torch.compiler.is_compiling():
            padded = _padded(values, side, dilation)
            for tap, rows, columns in _taps(values, side, dilation):
                y.addcmul_(padded[..., rows, columns], weights[:, :, tap, None])
            return y
        lines = _Lines.of(values, side, dilation)
        buffers = [y.new_zeros(size) for size in lines.buffers(values)]
        taps, flat = list(lines.taps(values)), y.flatten(0, 1)
        count = -1
        for part in lines.parts(values):
            maps, pixels = values.flatten(0, 1)[part], weights.flatten(0, 1)[part]
            if maps.shape[0] != count:  # the first part, and the last if it is smaller
                count = maps.shape[0]
                source, by, total = (buffer[:count] for buffer in buffers)
                of_taps = by[:, :, None].unbind(1)
                terms = [(source[..., begin : begin + lines.length], of_taps[tap]) for tap, begin in taps]
                inner, weighted, cut = lines.inner(source), lines.cut(by), lines.cut(total)
            inner.copy_(maps)
            weighted.copy_(pixels)
            torch.mul(*terms[0], out=total)
            for shifted, factor in terms[1:]:
                total.addcmul_(shifted, factor)
            flat[part] = cut
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, weights = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return *_whole_gradients(grad, values, weights, ctx.side, ctx.dilation), None, None
        return *_gradients(grad, values, weights, ctx.side, ctx.dilation), None, None


def _whole_gradients(grad: Tensor, values: Tensor, weights: Tensor, side: int, dilation: Pair) -> tuple[Tensor, Tensor]:
    """Gradients of the values and the weights, all heads at once."""
    padded = _padded(values, side, dilation)
    to_values = torch.zeros_like(padded, dtype=grad.dtype)
    to_weights = torch.zeros_like(weights)
    for tap, rows, columns in _taps(values, side, dilation):
        to_values[..., rows, columns].addcmul_(grad, weights[:, :, tap, None])
        to_weights[:, :, tap] = (grad * padded[..., rows, columns]).sum(2)
    reach_y, reach_x = (side // 2 * d for d in dilation)
    h, w = values.shape[-2:]
    to_values = to_values[..., reach_y : reach_y + h, reach_x : reach_x + w]
    return to_values.to(values.dtype), to_weights


def _gradients(grad: Tensor, values: Tensor, weights: Tensor, side: int, dilation: Pair) -> tuple[Tensor, Tensor]:
    """As `_whole_gradients`, a few heads at a time."""
    to_values, to_weights = torch.empty_like(values), torch.zeros_like(weights)
    lines = _Lines.of(values, side, dilation)
    for part in lines.parts(values):
        source, by, of = lines.padded(values, part), lines.pixels(weights, part), lines.pixels(grad, part)
        to_source = torch.zeros_like(source, dtype=grad.dtype)
        for tap, begin in lines.taps(values):
            to_source[..., begin : begin + lines.length].addcmul_(of, by[:, tap, None])
        to_by = lines.products(of, source)
        to_values.flatten(0, 1)[part] = lines.inner(to_source)
        to_weights.flatten(0, 1)[part] = lines.cut(to_by)
    return to_values, to_weights


LINE_ELEMENTS = 2**17
"""Elements of the values of heads that are worked on at once."""


def line_elements(size: Pair, side: int, heads: int, width: int) -> int:
    """Elements that the weighted sum of one image holds at once besides arguments and result, at dilation 1."""
    (h, w), across = size, size[1] + side - 1
    count = min(heads, max(1, LINE_ELEMENTS // (h * w * width)))
    return count * ((h + side) * across * width + h * across * (side**2 + width))


@dataclass(frozen=True)
class _Lines:
    """Maps as one long line each, rows end to end with as many zeros between them as an offset can reach across.

    Attributes:
        size: (H, W). reach: offsets to either side (vertical, horizontal). width: of a row with its zeros.
    """

    size: Pair
    side: int
    dilation: Pair
    reach: Pair
    width: int

    @classmethod
    def of(cls, values: Tensor, side: int, dilation: Pair) -> _Lines:
        h, w = values.shape[-2:]
        reach = side // 2 * dilation[0], side // 2 * dilation[1]
        return cls((h, w), side, dilation, reach, w + 2 * reach[1])

    @property
    def length(self) -> int:
        """Of a line of pixels, which begins at the first one."""
        return self.size[0] * self.width

    def parts(self, values: Tensor) -> Iterator[slice]:
        """Heads of images, (B N) in all, a few at a time."""
        count = values.shape[0] * values.shape[1]
        step = max(1, LINE_ELEMENTS // max(1, values[0, 0].numel() if count else 1))
        for begin in range(0, count, step):
            yield slice(begin, begin + step)

    @property
    def rest(self) -> int:
        """Rows of zeros below those that an offset can reach: the last offsets go on beyond the last row."""
        return 1 if self.reach[1] else 0

    def buffers(self, values: Tensor) -> tuple[tuple[int, ...], ...]:
        """Shapes of the padded lines, the weights and the result of a part: zeros are written once for all parts."""
        part = next(self.parts(values), slice(0))
        count, padded = min(part.stop, values.shape[0] * values.shape[1]), self.size[0] + 2 * self.reach[0] + self.rest
        channels = values.shape[2]
        lines = ((channels, padded * self.width), (self.side**2, self.length), (channels, self.length))
        return tuple((count, *line) for line in lines)

    def padded(self, values: Tensor, part: slice) -> Tensor:
        """Lines with zeros all around, (heads, d, more than length)."""
        (down, right), rest = self.reach, self.rest
        return F.pad(values.flatten(0, 1)[part], (right, right, down, down + rest)).flatten(-2)

    def pixels(self, x: Tensor, part: slice) -> Tensor:
        """Lines with zeros after each row, (heads, channels, length)."""
        return F.pad(x.flatten(0, 1)[part], (0, self.width - self.size[1])).flatten(-2)

    def taps(self, values: Tensor) -> Iterator[tuple[int, int]]:
        """(tap, where its line begins in a padded one) for every offset that meets the map."""
        for tap, rows, columns in _taps(values, self.side, self.dilation):
            yield tap, rows.start * self.width + columns.start

    def products(self, pixels: Tensor, padded: Tensor) -> Tensor:
        """(heads, taps, length): of each pixel with each offset from it, summed over the channels.

        All offsets of a channel at once, so that the sums are what stays in the cache.
        """
        window = padded.shape[0], self.side, self.side, self.length
        along = padded.stride(2)
        steps = padded.stride(0), self.dilation[0] * self.width * along, self.dilation[1] * along, along
        total = pixels.new_zeros(window)
        for c in range(pixels.shape[1]):
            at = padded.as_strided(window, steps, padded.storage_offset() + c * padded.stride(1))
            total.addcmul_(pixels[:, c, None, None], at)
        return total.flatten(1, 2)

    def cut(self, lines: Tensor) -> Tensor:
        """The maps of lines of pixels."""
        return lines.view(*lines.shape[:-1], self.size[0], self.width)[..., : self.size[1]]

    def inner(self, lines: Tensor) -> Tensor:
        """The maps inside padded lines."""
        (h, w), (down, right) = self.size, self.reach
        maps = lines.view(*lines.shape[:-1], lines.shape[-1] // self.width, self.width)
        return maps[..., down : down + h, right : right + w]


def _padded(values: Tensor, side: int, dilation: Pair) -> Tensor:
    reach_y, reach_x = (side // 2 * d for d in dilation)
    return F.pad(values, (reach_x, reach_x, reach_y, reach_y))


def _taps(values: Tensor, side: int, dilation: Pair) -> Iterator[tuple[int, slice, slice]]:
    """(tap, rows, columns) of the padded values for every offset that meets the map."""
    h, w = values.shape[-2:]
    for row, column in product(range(side), repeat=2):
        down, right = row * dilation[0], column * dilation[1]
        if abs(down - side // 2 * dilation[0]) < h and abs(right - side // 2 * dilation[1]) < w:
            yield row * side + column, slice(down, down + h), slice(right, right + w)


def _writers(size: int, window: int, step: int, dilation: int, like: Tensor) -> Tensor:
    """How many centres of one axis write to each position: (size,)."""
    centre = torch.arange(0, size, step, device=like.device)
    offset = torch.arange(size, device=like.device)[:, None] - centre
    reached = (offset % dilation == 0) & (offset.abs() <= window // 2 * dilation)
    return reached.sum(1).to(like.dtype)
