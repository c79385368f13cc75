"""Outlook attention: each pixel writes to the window around it, with weights made from that pixel alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from convrewrite.blocks.base import BlockOptions
from convrewrite.blocks.local import Pair

FLOAT_BYTES = 4
INIT_STD = 0.02
HEAD_CHANNELS = 32


class OutlookOptions(BlockOptions):
    """Options of `Outlook`."""

    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads N; must divide the output channels C. Default: C / 32, "
        "or the next smaller number that divides C",
    )
    window: int = Field(default=3, ge=1, description="side K of the window, in taps; odd")
    step: int = Field(
        default=1, ge=1, description="weights are made at every step-th pixel, from the mean of step x step"
    )
    normalise: bool = Field(default=False, description="divide each pixel by the number of windows that write to it")


@register_block("outlook")
class Outlook(Block):
    """Outlook attention of a window of K x K, in place of a convolution.

    With v = W_v x (no bias) and a = d^-.5 (W_a mean(x) + b_a), N heads of d = C_out / N channels:

        z_j = sum_i sum_p softmax_p( a_i[j - i, p] ) v_{i+p}        y = W_o z + b_o

    i runs over the centres whose window holds j, p over the taps of that window; a_i has K^2 x K^2 numbers a head:
    for each target in the window of i a softmax over its sources. No keys: a_i is made from pixel i alone, or from
    the mean of step x step pixels for every step-th i. v is 0 outside the map, where sources still take their
    share of the softmax. `normalise` divides z_j by the number of centres that write to it (for K = 3 nine inside,
    six at edges, four in corners), which the paper does not.

    Stride: attention at the input's resolution, then the mean of stride x stride pixels (at the last row and
    column of as many as there are), then W_o, which is the same as after it. Dilation of the replaced convolution
    dilates the window. Pixels are kept where the convolution's windows are centred; where that is outside the map
    (padding beyond "same"), x is zero-padded first and its zeros count as map.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, HW is after such padding
        and hw = ceil(H / step) ceil(W / step).

    Parameters:
        C_in C_out + C_out^2 + C_out + (C_in + 1) N K^4

    FLOPs (2 per multiply-add; softmax, the sums of weights, pooling and elementwise work are not counted):
        B HW 2 C_out (C_in + (2K - 1)^2) + B hw 2 C_in N K^4 + B HoWo 2 C_out^2

    Reference:
        Yuan et al. 2021, arXiv 2106.13112, equations 3 to 5. Weights start as in the authors' code: normal, cut off
        at two deviations, deviation 0.02; biases 0. The paper's models have N = C / 32, K = 3 and step 2. With
        equal channels and stride 1 `attention` loads the state dict of VOLO's OutlookAttention as it is.

    Facts found in VOLO's code (sail-sg/volo, and timm's copy):
        - Its stride is our `step`: the output keeps H x W.
        - It unfolds v with a padding that is an option: 1 for K = 3. For K = 5 it has to be 2, as it is here.
    """

    Options = OutlookOptions
    paper = "Yuan et al. 2021, arXiv 2106.13112"
    options: OutlookOptions

    def __init__(self, place: Place, options: OutlookOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = place.conv
        self.attention = OutlookAttention(
            self.in_channels,
            self.out_channels,
            heads=options.heads or default_heads(self.out_channels),
            window=options.window,
            step=options.step,
            dilation=place.conv.dilation,
            normalise=options.normalise,
        )

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, OutlookOptions)
        conv = place.conv
        if conv is None:
            return "outlook can only replace a convolution, not be inserted"
        if conv.groups > 1:
            return f"convolution has {conv.groups} groups, outlook mixes all channels (groups must be 1)"
        if options.step > 1 and max(conv.dilation) > 1:
            return f"dilation {max(conv.dilation)} with step {options.step} leaves out pixels (step must be 1)"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return refuse_window(conv.out_channels, options.heads, options.window, options.step)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        grid = pooled_grid(self.spec, x.shape[2], x.shape[3], self.options.window)
        z = self.attention.gather(grid.pad(x))
        z = z[:, :, grid.y.start :, grid.x.start :][:, :, : grid.y.count, : grid.x.count]
        y = pointwise(self.attention.proj, grid.pool(z))  # (B, C, Ho, Wo)
        return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, OutlookOptions) and place.conv is not None
        batch, c_in, in_height, in_width = place.in_shape
        c_out, (height, width) = place.conv.out_channels, place.conv.out_size(in_height, in_width)
        grid = pooled_grid(place.conv, in_height, in_width, options.window)
        heads = options.heads or default_heads(c_out)
        size, outputs = (grid.y.size, grid.x.size), height * width
        params, flops, infer, train = outlook_cost(c_in, c_out, heads, options.window, options.step, size)
        pooled = outputs * c_out if grid.stride != (1, 1) else 0
        return Cost(
            params=params + (c_out + 1) * c_out,
            flops=batch * (flops + 2 * outputs * c_out**2),
            act_infer=FLOAT_BYTES * batch * max(infer, size[0] * size[1] * c_out + outputs * c_out + pooled),
            act_train=FLOAT_BYTES * batch * (train + size[0] * size[1] * c_out + pooled),
        )


class OutlookAttention(nn.Module):
    """The paper's layer at stride 1: W_v, W_a, and W_o; parameter names and shapes are those of VOLO's code.

    Shape: (B, C_in, H, W) -> (B, C_out, H, W).
    """

    def __init__(
        self, c_in: int, c_out: int, *, heads: int, window: int, step: int, dilation: Pair = (1, 1), normalise: bool
    ) -> None:
        super().__init__()
        self.heads, self.window, self.step = heads, window, step
        self.dilation, self.normalise = dilation, normalise
        self.scale = (c_out // heads) ** -0.5
        self.v = nn.Linear(c_in, c_out, bias=False)
        self.attn = nn.Linear(c_in, heads * window**4)
        self.proj = nn.Linear(c_out, c_out)
        for linear in (self.v, self.attn, self.proj):
            start_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(self.proj, self.gather(x))

    def gather(self, x: Tensor) -> Tensor:
        """z, the sum before W_o: (B, C_in, H, W) -> (B, C_out, H, W)."""
        centres = F.avg_pool2d(x, self.step, self.step, ceil_mode=True) if self.step > 1 else x
        return outlook(
            pointwise(self.v, x),
            pointwise(self.attn, centres, self.scale),
            heads=self.heads,
            window=self.window,
            step=self.step,
            dilation=self.dilation,
            normalise=self.normalise,
        )


def pointwise(linear: nn.Linear, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * linear(x) over the channels of a map: (B, C_in, H, W) -> (B, C_out, H, W)."""
    weight, bias = linear.weight, linear.bias
    if scale != 1.0:  # of the weights: cheaper than of the map
        weight, bias = weight * scale, bias * scale
    return F.conv2d(x, weight[:, :, None, None], bias)


def start_linear(linear: nn.Linear) -> None:
    """The authors' start: a normal distribution cut off at two deviations, bias 0."""
    nn.init.trunc_normal_(linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def refuse_window(channels: int, heads: int | None, window: int, step: int) -> str | None:
    """Why outlook attention cannot have these numbers, or None."""
    if window % 2 == 0:
        return f"window {window} is even, outlook needs a centre (an odd one)"
    if step > window:
        return f"step {step} with window {window} leaves out pixels (step must be at most the window)"
    if heads and channels % heads:
        return f"{channels} channels not divisible by {heads} heads"
    return None


def outlook_cost(
    c_in: int, c_out: int, heads: int, window: int, step: int, size: Pair
) -> tuple[int, int, int, int]:
    """(parameters, FLOPs, elements alive in inference, elements kept in training) of `gather`, for one image."""
    pixels, centres = size[0] * size[1], -(-size[0] // step) * -(-size[1] // step)
    made, spread, summed = (n * heads for n in (centres * window**4, pixels * window**4, pixels * (2 * window - 1) ** 2))
    padded = (size[0] + 2 * window - 2) * (size[1] + 2 * window - 2) * c_out
    flops = 2 * pixels * c_out * (c_in + (2 * window - 1) ** 2) + 2 * centres * c_in * heads * window**4
    pooled = centres * c_in if step > 1 else 0
    values = pixels * c_out
    between = 2 * spread if step > 1 else 0
    infer = values + max(pooled + 2 * made, made + between, made + spread + summed, summed + padded + values)
    return c_in * c_out + (c_in + 1) * heads * window**4, flops, infer, values + pooled + made + summed


def default_heads(channels: int) -> int:
    """C / 32, or the largest divisor of C below it; at least 1."""
    return next(n for n in range(max(1, channels // HEAD_CHANNELS), 0, -1) if channels % n == 0)


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
    b, c, h, w = values.shape
    weights = _by_offset(_attention(logits, heads, window), (h, w), step, dilation)  # (B, N, (2K-1)^2, H, W)
    y = _weighted_sum(values.view(b, heads, c // heads, h, w), weights, 2 * window - 1, dilation).view(b, c, h, w)
    if normalise:
        rows, columns = (_writers(n, window, step, d, y) for n, d in ((h, dilation[0]), (w, dilation[1])))
        y = y / (rows[:, None] * columns)
    return y.to(values.dtype)


def _attention(logits: Tensor, heads: int, window: int) -> Tensor:
    """Softmax over the sources: (B, N, K, K, K, K, h, w), target row and column first, then the source's."""
    b, _, h, w = logits.shape
    weights = logits.reshape(b, heads, window**2, window**2, h, w).softmax(3)
    return weights.view(b, heads, window, window, window, window, h, w)


def _by_offset(weights: Tensor, size: Pair, step: int, dilation: Pair) -> Tensor:
    """One weight for each pixel j and offset from it: (B, N, (2K-1)^2, H, W)."""
    result: Tensor = _ByOffset.apply(_at_every_pixel(weights, size, step), dilation)  # type: ignore[no-untyped-call]
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
        _, _, window, *_, h, w = ctx.shape
        grad = grad.unflatten(2, (2 * window - 1, 2 * window - 1))
        to_weights = grad.new_zeros(ctx.shape)
        for (row, column), here, there in _targets(window, h, w, ctx.dilation):
            to_weights[:, :, row, column][there] = grad[here]
        return to_weights, None


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
    result: Tensor = _WeightedSum.apply(values, weights, side, dilation)  # type: ignore[no-untyped-call]
    return result


class _WeightedSum(torch.autograd.Function):
    """`_weighted_sum` with a backward of its own: autograd would make a padded gradient for each of the taps."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, side: int, dilation: Pair) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.side, ctx.dilation = side, dilation
        padded = _padded(values, side, dilation)
        y = values.new_zeros(values.shape, dtype=torch.promote_types(values.dtype, torch.float32))
        for tap, rows, columns in _taps(values, side, dilation):
            y.addcmul_(padded[..., rows, columns], weights[:, :, tap, None])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, weights = ctx.saved_tensors
        padded = _padded(values, ctx.side, ctx.dilation)
        to_values = torch.zeros_like(padded, dtype=grad.dtype)
        to_weights = torch.zeros_like(weights)
        products = torch.empty_like(grad)  # one for all taps: fresh memory costs more than the product
        for tap, rows, columns in _taps(values, ctx.side, ctx.dilation):
            to_values[..., rows, columns].addcmul_(grad, weights[:, :, tap, None])
            to_weights[:, :, tap] = torch.mul(grad, padded[..., rows, columns], out=products).sum(2)
        reach_y, reach_x = (ctx.side // 2 * d for d in ctx.dilation)
        h, w = values.shape[-2:]
        to_values = to_values[..., reach_y : reach_y + h, reach_x : reach_x + w]
        return to_values.to(values.dtype), to_weights, None, None


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
    """How many centres of one axis write to each position, at least 1: (size,)."""
    centre = torch.arange(0, size, step, device=like.device)
    offset = torch.arange(size, device=like.device)[:, None] - centre
    reached = (offset % dilation == 0) & (offset.abs() <= window // 2 * dilation)
    return reached.sum(1).clamp(min=1).to(like.dtype)
