"""Outlook attention with heads of full width, which can be a given convolution exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.aggregate import aggregate, chunk_elements, padded_pixels
from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import Affine, conv_of, largest
from convrewrite.blocks.held import check_conv, mixed, nearest_first, refuse_heads, solve_mix, within_kernel
from convrewrite.blocks.outlook import start_linear
from convrewrite.sites import ConvSpec, Cost, Pair, Place

FLOAT_BYTES = 4


class OutlookWideOptions(BlockOptions):
    """Options of `OutlookWide`."""

    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads M; fewer than the default cannot hold a convolution. Default: one for each tap of "
        "the kernel, and one more",
    )
    locality: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="how much of a head's weights lies on its own tap at the start; the rest is spread evenly",
    )


@register_block("outlook_wide")
class OutlookWide(Block):
    """Outlook attention with heads that see all channels, exactly the convolution at its start.

    With a_c = W_a x_c + b_a of n^2 numbers for each of M heads, n the taps of the convolution's kernel:

        y_i = sum_h P_h sum_c sum_p softmax_p( a_ch[m, p] ) x_{c+p}  (+ b)

    c runs over the centres in the window around i, m is where c lies in it, p runs over the taps of the window around
    c: c weighs its own surroundings for each of n targets, as in outlook attention. P_h is C_out x C_in
    (block-diagonal where the convolution has groups). No keys: weights come from the centre alone.

    With W_a = 0 the block is a convolution over the (2 kh - 1) x (2 kw - 1) offsets that c + p reaches from i. Head h
    starts on tap t_h of the kernel: each centre puts `locality` on the source at t_h from the target, or on the nearest
    to it in its window, and spreads the rest evenly. The last head, the background, spreads all of it: it takes
    away what the others put beyond the kernel. `load_conv` solves P from the weights; W_a starts at 0 with a
    gradient that is not.

    Centres are all pixels of the map as the convolution pads it (zeros, or by its padding_mode), so that a pixel at
    the border has as many as any other; sources beyond are zeros that take their share. Stride, dilation, groups,
    bias are the convolution's own: only the pixels that it keeps are summed.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, L counts the pixels of the
        padded map, Q = HoWo and G is the number of groups.

    Parameters:
        M C_out C_in / G + (C_in + 1) M n^2     (+ C_out with a bias)

    FLOPs (2 per multiply-add; softmax, the sums of weights and elementwise work are not counted):
        B 2 ( L C_in M n^2 + Q M ( (2 kh - 1) (2 kw - 1) C_in + C_out C_in / G ) )

    Weights grow with the fourth power of the kernel's side: 810 a pixel for 3 x 3, 16,250 for 5 x 5.

    Reference:
        After Yuan et al. 2021, arXiv 2106.13112, equations 3 to 5; `outlook` is that paper's block. Different from it:
        values are the input itself, projected after the sum (P holds W_v and W_o of a head), heads have full
        width, the logits are not scaled by d^-.5, and stride leaves pixels out in place of pooling them.
    """

    Options = OutlookWideOptions
    paper = "after Yuan et al. 2021, arXiv 2106.13112"
    options: OutlookWideOptions

    def __init__(self, place: Place, options: OutlookWideOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = spec = place.conv
        self.heads = _heads(spec, options)
        self.attn = nn.Linear(self.in_channels, self.heads * math.prod(spec.kernel) ** 2)
        self.mix = nn.Parameter(torch.empty(self.out_channels, self.in_channels // spec.groups, self.heads))
        self.bias = nn.Parameter(torch.zeros(self.out_channels)) if spec.bias else None
        start_linear(self.attn)
        nn.init.kaiming_uniform_(self.mix, a=math.sqrt(5))
        with torch.no_grad():
            self.attn.bias.copy_(self._logits())

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, OutlookWideOptions)
        taps = math.prod(place.conv.kernel) if place.conv else 0
        size = (place.in_shape[2], place.in_shape[3])
        return refuse_heads(cls.name, place.conv, options.heads, taps, taps + 1, size)

    @classmethod
    def holds(cls, place: Place, options: BlockOptions) -> bool:
        assert isinstance(options, OutlookWideOptions) and place.conv is not None
        return _heads(place.conv, options) > math.prod(place.conv.kernel)

    def load_conv(self, conv: nn.Conv2d) -> None:
        """Become `conv`: the start's patterns, P solved from its weights, no content.

        Raises:
            ConvrewriteError: `conv` is not the convolution that the block was built for, or the heads are too few.
        """
        check_conv(self, conv, self.spec)
        logits = self._logits().to(self.attn.bias.dtype)  # rounded as it will be used
        rows, columns = self.spec.kernel
        top, left = (rows - 1) // 2, (columns - 1) // 2
        kernel = F.pad(conv.weight.detach(), (left, columns - 1 - left, top, rows - 1 - top)).flatten(2)
        with torch.no_grad():
            self.mix.copy_(solve_mix(kernel, self._patterns(logits.double()).flatten(1)))
            self.attn.bias.copy_(logits)
            self.attn.weight.zero_()
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)

    @torch.no_grad()
    def kernel(self) -> Tensor:
        """The kernel of the convolution that the block is where W_a = 0, in float64.

        (C_out, C_in / groups, 2 kh - 1, 2 kw - 1); the kernel's own first tap is at ((kh - 1) // 2, (kw - 1) // 2).
        """
        patterns = self._patterns(self.attn.bias.double())
        flat = self.mix.double() @ patterns.flatten(1)
        return flat.view(*flat.shape[:2], *patterns.shape[1:])

    def plain(self) -> nn.Conv2d | None:
        size, kernel = self.spec.kernel, self.kernel() if self.content() == 0 else None
        before = (size[0] - 1) // 2, (size[1] - 1) // 2
        kernel = None if kernel is None else within_kernel(kernel, before, size, self.mix.dtype)
        return None if kernel is None else conv_of(self.spec, kernel, self.bias, like=self.mix)

    def content(self) -> float:
        return largest(self.attn.weight)

    def folded(self, after: Affine | None) -> OutlookWide | None:
        return mixed(self, after)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        spec = self.spec
        pixels = padded_pixels(x, spec.padding, spec.padding_mode)  # (B, H, W, C), as the convolution sees it
        logits = self.attn(pixels)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        by_centre = logits.view(*logits.shape[:3], self.heads, *spec.kernel, math.prod(spec.kernel)).softmax(
            -1, dtype=dtype
        )
        pixels = pixels.to(logits.dtype)
        del logits  # as large as what was made of it
        attention: Tensor = _ByOffset.apply(by_centre, spec.kernel, spec.stride, spec.dilation)
        del by_centre
        before = [(spec.kernel[axis] - 1) // 2 * spec.dilation[axis] for axis in (0, 1)]
        after = [(spec.kernel[axis] - 1) * spec.dilation[axis] - before[axis] for axis in (0, 1)]
        pixels = F.pad(pixels, (0, 0, before[1], after[1], before[0], after[0]))
        y = aggregate(
            pixels,
            attention.flatten(4),
            self.mix,
            window=_offsets(spec.kernel),
            stride=spec.stride,
            dilation=spec.dilation,
            groups=spec.groups,
        )
        y = (y if self.bias is None else y + self.bias.to(y.dtype)).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()

    def _logits(self) -> Tensor:
        """b_a at the start, (M n^2) in float64."""
        kernel, spread = self.spec.kernel, 1 - self.options.locality
        taps = math.prod(kernel)
        weights = torch.full((self.heads, *kernel, *kernel), 1 / taps, dtype=torch.float64)
        for head, tap in enumerate(nearest_first(kernel)[: self.heads]):
            weights[head] *= spread
            for centre in product(*map(range, kernel)):
                wanted = (tap[axis] + (kernel[axis] - 1) // 2 - centre[axis] for axis in (0, 1))
                row, column = (min(max(0, at), size - 1) for at, size in zip(wanted, kernel, strict=True))
                weights[(head, *centre, row, column)] += self.options.locality
        return weights.log().flatten()

    def _patterns(self, logits: Tensor) -> Tensor:
        """The weight of each offset from a pixel where W_a = 0: (M n^2) -> (M, 2 kh - 1, 2 kw - 1)."""
        kernel = self.spec.kernel
        by_centre = logits.view(self.heads, *kernel, math.prod(kernel)).softmax(-1)
        patterns = logits.new_zeros(self.heads, *_offsets(kernel))
        for (row, column), offsets in _centres(kernel):
            patterns[:, *offsets] += by_centre[:, row, column].view(-1, *kernel)
        return patterns

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, OutlookWideOptions) and place.conv is not None
        spec, taps, heads = place.conv, math.prod(place.conv.kernel), _heads(place.conv, options)
        c_in, batch, queries = spec.in_channels, place.in_shape[0], math.prod(place.out_shape[2:])
        left, right, top, bottom = spec.padding
        pixels = (place.in_shape[2] + top + bottom) * (place.in_shape[3] + left + right)
        projected, made = spec.out_channels * c_in // spec.groups, heads * taps**2
        per_query = heads * (math.prod(_offsets(spec.kernel)) * c_in + projected)
        infer, train = _activations(place, heads)
        return Cost(
            params=heads * projected + (c_in + 1) * made + (spec.out_channels if spec.bias else 0),
            flops=2 * batch * (pixels * c_in * made + queries * per_query),
            act_infer=FLOAT_BYTES * batch * infer,
            act_train=FLOAT_BYTES * batch * train,
        )


class _ByOffset(torch.autograd.Function):
    """The weights of all centres that reach a pixel, summed by their offset from it.

    (B, H, W, M, kh, kw, n) -> (B, Ho, Wo, M, 2 kh - 1, 2 kw - 1). By hand, as autograd would make a gradient of the
    whole input for each of the n centres.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
        ctx.shape, ctx.geometry = weights.shape, (kernel, stride, dilation)
        size = [
            (weights.shape[axis + 1] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1)
        ]
        total = weights.new_zeros(weights.shape[0], *size, weights.shape[3], *_offsets(kernel))
        for (row, column), offsets in _centres(kernel):
            at = _positions((row, column), (size[0], size[1]), stride, dilation)
            total[:, :, :, :, *offsets] += weights[:, *at, :, row, column].unflatten(4, kernel)  # type: ignore[no-untyped-call]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        kernel, stride, dilation = ctx.geometry
        to_weights = grad.new_zeros(ctx.shape)
        for (row, column), offsets in _centres(kernel):
            at = _positions((row, column), (grad.shape[1], grad.shape[2]), stride, dilation)
            to_weights[:, *at, :, row, column] = grad[:, :, :, :, *offsets].flatten(4)
        return to_weights, None, None, None


def _offsets(kernel: Pair) -> Pair:
    """How many offsets, in taps, two steps of a window reach along both axes."""
    return 2 * kernel[0] - 1, 2 * kernel[1] - 1


def _centres(kernel: Pair) -> Iterator[tuple[Pair, tuple[slice, slice]]]:
    """(where a centre lies in a pixel's window, the offsets from the pixel that its own window covers)."""
    for row, column in product(range(kernel[0]), range(kernel[1])):
        yield (row, column), (slice(row, row + kernel[0]), slice(column, column + kernel[1]))


def _positions(centre: Pair, count: Pair, stride: Pair, dilation: Pair) -> tuple[slice, slice]:
    """The pixels of the padded map that lie at `centre` in the windows of all outputs."""
    first = [centre[axis] * dilation[axis] for axis in (0, 1)]
    rows, columns = (
        slice(first[axis], first[axis] + (count[axis] - 1) * stride[axis] + 1, stride[axis]) for axis in (0, 1)
    )
    return rows, columns


def _heads(spec: ConvSpec, options: OutlookWideOptions) -> int:
    return options.heads or math.prod(spec.kernel) + 1


def _activations(place: Place, heads: int) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass, for one image."""
    assert place.conv is not None
    spec, (rows, columns) = place.conv, place.conv.kernel
    (height, width), reached = place.out_shape[2:], math.prod(_offsets(spec.kernel))
    left, right, top, bottom = spec.padding
    size = place.in_shape[2] + top + bottom, place.in_shape[3] + left + right
    pixels, made = math.prod(size) * spec.in_channels, math.prod(size) * heads * (rows * columns) ** 2
    read = (size[0] + (rows - 1) * spec.dilation[0]) * (size[1] + (columns - 1) * spec.dilation[1]) * spec.in_channels
    weights = height * width * heads * reached
    summing = read + weights + height * width * spec.out_channels
    summing += chunk_elements(spec, (height, width), heads, reached)
    return max(pixels + 2 * made, pixels + made + weights, summing), pixels + made + read + weights
