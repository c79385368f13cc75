"""Outlook attention: each pixel writes to the window around it, with weights made from that pixel alone."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import Affine
from convrewrite.blocks.local import Pair
from convrewrite.blocks.outlook_op import kernel_for, outlook_op
from convrewrite.blocks.overlap import line_elements, normalised, source_softmax, weighted_overlap
from convrewrite.blocks.pooled import pooled_grid
from convrewrite.blocks.projections import project_maps
from convrewrite.sites import Cost, Place

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

    At step 1 the native CPU kernel computes the sums, where there is one (`backend`), eager and compiled. The stated
    activation bytes are those of the backend "aten"; the kernel holds less.

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

    def folded(self, after: Affine | None) -> Outlook | None:
        if after is None:
            return None
        twin, last = copy.deepcopy(self), self.attention.proj
        twin.attention.proj.bias = after.bias(last.bias, last.weight)
        twin.attention.proj.weight = after.weight(last.weight)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        grid = pooled_grid(self.spec, x.shape[2], x.shape[3], self.options.window)
        z = self.attention.gather(grid.pad(x), self.backend)
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

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        return pointwise(self.proj, self.gather(x, backend))

    def gather(self, x: Tensor, backend: str = "auto") -> Tensor:
        """z, the sum before W_o: (B, C_in, H, W) -> (B, C_out, H, W). `backend` as `Block` has it."""
        centres = F.avg_pool2d(x, self.step, self.step, ceil_mode=True) if self.step > 1 else x
        values = pointwise(self.v, x)
        kernel = kernel_for(backend, values, self.step)
        if kernel is not None:
            logits = pointwise(self.attn, centres, self.scale)
            y: Tensor = outlook_op(values, logits, self.heads, self.window, list(self.dilation), kernel)
            return normalised(y, self.window, self.step, self.dilation) if self.normalise else y
        softmaxed = [source_softmax(pointwise(self.attn, centres, self.scale), self.heads, self.window)]
        return weighted_overlap(
            values,
            softmaxed,
            step=self.step,
            dilation=self.dilation,
            normalise=self.normalise,
        )


def pointwise(linear: nn.Linear, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * linear(x) over the channels of a map: (B, C_in, H, W) -> (B, C_out, H, W)."""
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if scale != 1.0:  # of the weights: cheaper than of the map
        weight, bias = weight * scale, None if bias is None else bias * scale
    if x.is_contiguous():
        y = project_maps(weight, x)
        if bias is not None:  # in place of the product itself: in place of a view, its backward would copy all of it
            y = y.add_(bias[:, None])
        return y.view(x.shape[0], weight.shape[0], *x.shape[2:])
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
    if step > window // 2 + 1:  # the last centre may lie step - 1 before the end
        return f"step {step} with window {window} leaves out pixels (step must be at most {window // 2 + 1})"
    if heads and channels % heads:
        return f"{channels} channels not divisible by {heads} heads"
    return None


def outlook_cost(c_in: int, c_out: int, heads: int, window: int, step: int, size: Pair) -> tuple[int, int, int, int]:
    """(parameters, FLOPs, elements alive in inference, elements kept in training) of `gather`, for one image.

    The scaled copy of W_a, kept in training whatever the batch, is left out.
    """
    pixels, centres = size[0] * size[1], -(-size[0] // step) * -(-size[1] // step)
    made, spread = centres * heads * window**4, pixels * heads * window**4
    summed = pixels * heads * (2 * window - 1) ** 2
    lines = line_elements(size, 2 * window - 1, heads, c_out // heads)
    flops = 2 * pixels * c_out * (c_in + (2 * window - 1) ** 2) + 2 * centres * c_in * heads * window**4
    pooled = centres * c_in if step > 1 else 0
    values = pixels * c_out
    between = spread if step > 1 else 0
    infer = values + max(pooled + 2 * made, made + between + summed, summed + lines + values)
    return c_in * c_out + (c_in + 1) * heads * window**4, flops, infer, values + pooled + made + summed


def default_heads(channels: int) -> int:
    """C / 32, or the largest divisor of C below it; at least 1."""
    return next(n for n in range(max(1, channels // HEAD_CHANNELS), 0, -1) if channels % n == 0)
