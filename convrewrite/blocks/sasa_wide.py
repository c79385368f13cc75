"""Stand-alone self-attention with heads of full width, which can be a given convolution exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.aggregate import aggregate, chunk_elements, padded_pixels, windows
from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import Affine, conv_of, largest
from convrewrite.blocks.held import check_conv, mixed, nearest_first, refuse_heads, solve_mix, within_kernel
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Cost, Pair, Place

FLOAT_BYTES = 4


class SASAWideOptions(BlockOptions):
    """Options of `SASAWide`."""

    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads M; fewer than the default cannot hold a convolution. Default: one for each tap of "
        "the kernel, and one more where the window is larger than that",
    )
    nmse: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of a fitted start: as few heads as lose at most this share of the output's variance; `heads` is "
        "then the most",
    )
    window: int | None = Field(
        default=None, ge=1, description="side of the attention window, in taps. Default: the convolution's kernel"
    )
    key_dim: int = Field(default=8, ge=1, description="channels D of a query and of a key")
    locality: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="how much of a head lies on its own tap at the start; the rest is spread over the window evenly",
    )


@register_block("sasa_wide")
class SASAWide(Block):
    """Self-attention over a window with heads that see all channels, exactly the convolution at its start.

    With q_h = W_h x of M heads and one k = W_k x for all of them (1 x 1, no bias, D channels), learned r and beta:

        y_i = sum_h P_h sum_o softmax_o( D^-.5 q_ih . (k_{i+o} + r_o) + beta_ho ) x_{i+o}  (+ b)

    o runs over the taps of the window, P_h is C_out x C_in (block-diagonal where the convolution has groups).
    With W_h = 0 nothing but beta is left, and the block *is* the convolution with kernel K_u = sum_h P_h s_hu,
    s_h = softmax(beta_h). Head h starts on one tap t_h of the convolution's kernel, softly, n = taps of the window:

        s_hu = locality [u = t_h] + (1 - locality) / n

    A window larger than the kernel has one more head, the background, with 1 / n everywhere: it takes away what
    the others spread beyond the kernel. For any locality these patterns can be told apart, so `load_conv` solves P
    from the weights; W_h starts at 0 with a gradient that is not, and beta's is as alive as at a fresh start.

    What the convolution pads (zeros, or by its padding_mode) is map like any other: padded zeros are keys that take
    their share of the softmax and give 0. A window larger than the kernel sees zeros beyond that. Stride,
    dilation, groups, bias are the convolution's own: queries stand where its windows do.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, L counts the pixels of the
        padded map, Q = HoWo and G is the number of groups.

    Parameters:
        M C_out C_in / G + (M + 1) D C_in + n (M + D)     (+ C_out with a bias)

    FLOPs (2 per multiply-add; softmax and elementwise work are not counted):
        B 2 ( L C_in D + Q M ( C_in D + n (D + C_in) + C_out C_in / G ) )

    Reference:
        After Ramachandran et al. 2019, arXiv 1906.05909, equation 3; `sasa` is that paper's block. Heads of full width
        that stand for the taps of a kernel are from Cordonnier et al. 2020, arXiv 1911.03584, theorem 1. Different
        from both: values are the input itself, projected after the sum (P holds W_V and W_O of a head); one key for
        all heads; beta; and no hard attention: theorem 1's patterns are the kernel's taps in the limit alone, where
        their gradient is 0.
    """

    Options = SASAWideOptions
    paper = "after Ramachandran et al. 2019, arXiv 1906.05909, and Cordonnier et al. 2020, arXiv 1911.03584"
    options: SASAWideOptions

    def __init__(self, place: Place, options: SASAWideOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = spec = place.conv
        self.reach = reach = _reach(spec, options.window)
        self.heads = options.heads or reach.heads
        self.query = nn.Linear(self.in_channels, self.heads * options.key_dim, bias=False)
        self.key = nn.Linear(self.in_channels, options.key_dim, bias=False)
        self.relative = nn.Parameter(torch.empty(reach.taps, options.key_dim))
        self.offset_bias = nn.Parameter(self._patterns().log().float())
        self.mix = nn.Parameter(torch.empty(self.out_channels, self.in_channels // spec.groups, self.heads))
        self.bias = nn.Parameter(torch.zeros(self.out_channels)) if spec.bias else None
        nn.init.normal_(self.relative, std=options.key_dim**-0.5)
        nn.init.kaiming_uniform_(self.mix, a=math.sqrt(5))

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, SASAWideOptions)
        taps = math.prod(_reach(place.conv, options.window).window) if place.conv else 0
        return refuse_heads(cls.name, place.conv, options.heads, taps, taps, (place.in_shape[2], place.in_shape[3]))

    @classmethod
    def holds(cls, place: Place, options: BlockOptions) -> bool:
        assert isinstance(options, SASAWideOptions) and place.conv is not None
        reach = _reach(place.conv, options.window)
        return min(*reach.before, *reach.after) >= 0 and (options.heads or reach.heads) >= reach.heads

    def load_conv(self, conv: nn.Conv2d) -> None:
        """Become `conv`: the start's patterns, P solved from its weights, no content.

        Raises:
            ConvrewriteError: `conv` is not the convolution that the block was built for, or the heads are too few.
        """
        check_conv(self, conv, self.spec)
        bias = self._patterns().log().to(self.offset_bias.dtype)  # rounded as it will be used
        (left, right), (top, bottom) = ((self.reach.before[axis], self.reach.after[axis]) for axis in (1, 0))
        if min(left, right, top, bottom) < 0:
            window = "x".join(map(str, self.reach.window))
            raise ConvrewriteError(f"a window of {window} taps cannot hold a kernel of {conv.kernel_size}")
        kernel = F.pad(conv.weight.detach(), (left, right, top, bottom)).flatten(2)
        with torch.no_grad():
            self.mix.copy_(solve_mix(kernel, bias.double().softmax(1)))
            self.offset_bias.copy_(bias)
            self.query.weight.zero_()
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)

    @torch.no_grad()
    def kernel(self) -> Tensor:
        """The kernel of the convolution that the block is where W_h = 0: (C_out, C_in / groups, window), float64."""
        flat = self.mix.double() @ self.offset_bias.double().softmax(1)
        return flat.view(*flat.shape[:2], *self.reach.window)

    def plain(self) -> nn.Conv2d | None:
        spec, kernel = self.spec, self.kernel() if self.content() == 0 else None
        kernel = None if kernel is None else within_kernel(kernel, self.reach.before, spec.kernel, self.mix.dtype)
        return None if kernel is None else conv_of(spec, kernel, self.bias, like=self.mix)

    def content(self) -> float:
        return largest(self.query.weight)

    def folded(self, after: Affine | None) -> SASAWide | None:
        return mixed(self, after)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        spec, reach = self.spec, self.reach
        pixels = padded_pixels(x, spec.padding, spec.padding_mode)  # (B, H, W, C), as the convolution sees it
        k = self.key(pixels)
        q = self._queries(pixels, k)  # (B, Ho, Wo, M, D)
        around = (0, 0, reach.zeros[2], reach.zeros[3], reach.zeros[0], reach.zeros[1])
        k, pixels = (F.pad(t, around) if any(around) else t for t in (k, pixels.to(k.dtype)))
        keys = windows(k, reach.window, spec.stride, spec.dilation).flatten(3, 4)  # (B, Ho, Wo, n, D)
        keys = keys + self.relative.to(k.dtype)
        logits = torch.matmul(q, keys.transpose(3, 4))  # (B, Ho, Wo, M, n)
        del q, k, keys  # nothing needs them any more, and they are large
        logits = logits + self.offset_bias.to(torch.promote_types(self.offset_bias.dtype, torch.float32))
        attention = logits.softmax(-1)
        del logits
        y = aggregate(
            pixels,
            attention,
            self.mix,
            window=reach.window,
            stride=spec.stride,
            dilation=spec.dilation,
            groups=spec.groups,
        )
        y = (y if self.bias is None else y + self.bias.to(y.dtype)).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()

    def _queries(self, pixels: Tensor, k: Tensor) -> Tensor:
        """Scaled queries of the pixels that the convolution's windows are centred on, (B, Ho, Wo, M, D)."""
        spec = self.spec
        first = [(spec.kernel[axis] - 1) // 2 * spec.dilation[axis] for axis in (0, 1)]
        span = [spec.dilation[axis] * (spec.kernel[axis] - 1) for axis in (0, 1)]
        rows, columns = (
            slice(first[axis], first[axis] + pixels.shape[axis + 1] - span[axis], spec.stride[axis]) for axis in (0, 1)
        )
        weight = self.query.weight * self.options.key_dim**-0.5
        q = F.linear(pixels[:, rows, columns], weight).to(k.dtype)
        return q.view(*q.shape[:3], self.heads, self.options.key_dim)

    def _patterns(self) -> Tensor:
        """s of the heads at the start, (M, n) in float64."""
        reach, spread = self.reach, 1 - self.options.locality
        patterns = torch.full((self.heads, reach.taps), 1 / reach.taps, dtype=torch.float64)
        for head, tap in enumerate(reach.peaks[: self.heads]):
            if tap is not None:
                patterns[head] *= spread
                patterns[head, tap] += self.options.locality
        return patterns

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, SASAWideOptions) and place.conv is not None
        spec, reach = place.conv, _reach(place.conv, options.window)
        heads, dim, c_in = options.heads or reach.heads, options.key_dim, spec.in_channels
        projected = spec.out_channels * c_in // spec.groups
        batch, queries = place.in_shape[0], math.prod(place.out_shape[2:])
        pixels = _pixels(place, spec.padding)
        per_query = c_in * dim + reach.taps * (dim + c_in) + projected
        infer, train = _activations(place, reach, heads, dim)
        return Cost(
            params=heads * projected
            + (heads + 1) * dim * c_in
            + reach.taps * (heads + dim)
            + (spec.out_channels if spec.bias else 0),
            flops=2 * batch * (pixels * c_in * dim + queries * heads * per_query),
            act_infer=FLOAT_BYTES * batch * infer,
            act_train=FLOAT_BYTES * batch * train,
        )


@dataclass(frozen=True)
class _Reach:
    """The attention window beside the convolution's kernel.

    Attributes:
        window: taps, (rows, columns).
        before, after: taps of the window beyond the kernel's first and last, on either axis; negative where it is
            smaller.
        peaks: the tap of the window that each head starts on, None for the background; those of the kernel first.
        heads: how many of them tell all taps of the kernel apart.
        zeros: what the window needs beyond the convolution's own padding: (top, bottom, left, right).
    """

    window: Pair
    before: Pair
    after: Pair
    peaks: tuple[int | None, ...]
    heads: int
    zeros: tuple[int, int, int, int]

    @property
    def taps(self) -> int:
        return math.prod(self.window)


def _reach(spec: ConvSpec, side: int | None) -> _Reach:
    window = spec.kernel if side is None else (side, side)
    before = tuple((window[axis] - spec.kernel[axis]) // 2 for axis in (0, 1))
    after = tuple(window[axis] - spec.kernel[axis] - before[axis] for axis in (0, 1))
    inside: list[int] = []
    outside: list[int] = []
    for row, column in nearest_first(window):
        at = (row - before[0], column - before[1])
        within = all(0 <= at[axis] < spec.kernel[axis] for axis in (0, 1))
        (inside if within else outside).append(row * window[1] + column)
    background: list[int | None] = [None] if outside else []
    dilation = spec.dilation
    zeros = (before[0] * dilation[0], after[0] * dilation[0], before[1] * dilation[1], after[1] * dilation[1])
    peaks = (*inside, *background, *outside)
    return _Reach(window, (before[0], before[1]), (after[0], after[1]), peaks, len(inside) + len(background), zeros)


def _pixels(place: Place, *paddings: tuple[int, int, int, int]) -> int:
    """Pixels of the map with all these around it, each (left, right, top, bottom)."""
    height = place.in_shape[2] + sum(top + bottom for _, _, top, bottom in paddings)
    return height * (place.in_shape[3] + sum(left + right for left, right, _, _ in paddings))


def _activations(place: Place, reach: _Reach, heads: int, dim: int) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass, for one image."""
    assert place.conv is not None
    spec, (height, width) = place.conv, (place.out_shape[2], place.out_shape[3])
    queries, logits = height * width, height * width * heads * reach.taps
    top, bottom, left, right = reach.zeros
    pixels, read = _pixels(place, spec.padding), _pixels(place, spec.padding, (left, right, top, bottom))
    q, keys = queries * heads * dim, queries * reach.taps * dim
    making = read * (spec.in_channels + dim) + q + max(2 * keys, keys + logits)
    summing = read * spec.in_channels + logits + queries * spec.out_channels
    summing += chunk_elements(spec, (height, width), heads, reach.taps)
    copies = read if any(reach.zeros) else 0  # of the pixels with zeros around, beside those without
    kept = (pixels + copies + queries) * spec.in_channels + q + keys + logits
    return max(making, read * spec.in_channels + 2 * logits, summing), kept
