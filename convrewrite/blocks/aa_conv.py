"""Attention-augmented convolution: some output channels from a convolution, the others from attention over the map."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.centres import at_centres
from convrewrite.blocks.folding import Affine, conv_of, fold, largest
from convrewrite.blocks.held import check_conv
from convrewrite.blocks.relative import holds_logits, relative_attention, streamed_width
from convrewrite.blocks.relative_tiles import tile_elements
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Cost, Place

FLOAT_BYTES = 4
COORDINATES = 3


class AAConvOptions(BlockOptions):
    """Options of `AAConv`."""

    heads: int = Field(default=8, ge=1, description="attention heads N")
    kappa: float = Field(default=0.2, gt=0, description="channels of all keys, as a share of the output channels")
    upsilon: float = Field(default=0.1, gt=0, le=1, description="output channels from attention, as a share of all")
    min_key_dim: int = Field(default=20, ge=1, description="least channels of a key in each head")
    position: Literal["relative", "absolute", "none"] = Field(
        default="relative",
        description="learned vectors of the offset; coordinates as three more input channels; or nothing",
    )
    pool: int = Field(
        default=1,
        ge=1,
        le=2,
        description="2 attends on the 3 x 3 average-pooled map of half the size and scales the result up",
    )
    outputs: Literal["last", "chosen"] = Field(
        default="last",
        description="which output channels come from attention: the last, or those that a fitted start gives up",
    )
    form: Literal["concat", "residual"] = Field(
        default="concat",
        description="attention takes the place of output channels, or is added to the last of a whole convolution, "
        "which an exact start then holds",
    )


@register_block("aa_conv")
class AAConv(Block):
    """A convolution whose last output channels are replaced by global self-attention.

    With q, k, v = W x (1 x 1, no bias) of N heads, d_k and d_v channels in all, D = d_k / N:

        head_i = sum_j softmax_j( D^-.5 q_i . (k_j + rH_{j_y - i_y} + rW_{j_x - i_x}) ) v_j
        y      = [ conv(x), W_o [head_1 .. head_N] ]        C_out - d_v and d_v channels

        d_k = N max(min_key_dim, floor(kappa C_out / N))        d_v = N max(1, floor(upsilon C_out / N))

    rH (2h - 1, D) and rW (2w - 1, D) are learned, shared by the heads, scaled like the rest. position "absolute" has
    none and gives the attention x with three more channels instead, column, row (each from -1 to 1) and
    their distance from the centre; "none" has nothing.

    Stride: attention runs over the positions where the convolution's windows are centred, every stride-th.
    Where that is outside the map (padding beyond "same"), x is zero there. pool 2 averages these positions,
    3 x 3 with stride 2 over what is on the map, and brings the result back by bilinear interpolation. Dilation, groups,
    padding_mode and, where the replaced convolution has one, a bias (on conv and W_o) are those of the convolution.
    Other sizes than the planned: rH and rW are interpolated linearly, ends to ends.

    outputs "chosen": the channels are put in another order afterwards, kept in the buffer `order` (C_out,); it starts
    as the order above, and a fitted start chooses which channels the attention is to take over.

    form "residual" (not the paper's): the convolution keeps all its channels, and attention is added to the last d_v,

        y = conv(x) + [ 0, W_o [head_1 .. head_N] ]        conv with C_out channels and the bias, W_o without one

    `load_conv` takes the convolution over and sets W_o = 0: the convolution exactly, with a gradient into W_o.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, h x w = Ho x Wo, or
        ceil(Ho / 2) x ceil(Wo / 2) with pool 2, and L = hw. rH and rW have the h x w of the planned size.

    Parameters:
        (C_out - d_v) C_in k^2 / groups + C_in (2 d_k + d_v) + d_v^2 + (2h + 2w - 2) d_k / N    (+ C_out with a bias)
        no rH, rW unless relative; C_in + 3 in place of C_in in the second term with absolute; C_out in place of
        C_out - d_v in the first with residual, here and below

    FLOPs (2 per multiply-add; softmax, pooling, interpolation and elementwise work are not counted, and q . r once for
    each row and column, as it depends on no more):
        B HoWo 2 (C_out - d_v) C_in k^2 / groups
        + B L ( 2 C_in (2 d_k + d_v) + 2 L (d_k + d_v) + 2 d_k (h + w) + 2 d_v^2 )      no h + w unless relative

    Reference:
        Bello et al. 2019, arXiv 1904.09925: our rH, rW are r^H, r^W; N is N_h. The floor of 20
        channels a head makes the paper's parameter counts come out (25.8, 45.4 and 61.6 M for ResNet-50, 101, 152).
        The paper does not say which stride, which border of the pooling or which interpolation: its 8.3 GFLOPs
        for ResNet-50 need pooling in the 28 x 28 stage (8.41 by this formula, 9.44 without).

    Facts found in published code:
        - The paper's listing draws r with mean D^-.5 and deviation 1, its argument order being mixed up; here the
          mean is 0 and the deviation D^-.5.
        - leaderj1001/Attention-Augmented-Conv2d ("in paper" variant) makes new random tables in every forward, so they
          are never trained, and scales q in place on a view from torch.split, which PyTorch refuses where gradients
          are wanted; its relative logits are these. Its output heads swap channels and positions: attention
          (L, d) is reshaped, not transposed, to (d, H, W).
    """

    Options = AAConvOptions
    paper = "Bello et al. 2019, arXiv 1904.09925"
    options: AAConvOptions

    def __init__(self, place: Place, options: AAConvOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = spec = place.conv
        self.keys, self.values = _widths(spec, options)
        rest = _kept_channels(spec, options)
        self.conv_out = _convolution(spec, rest) if rest else None
        extra = COORDINATES if options.position == "absolute" else 0
        self.qkv_conv = nn.Conv2d(self.in_channels + extra, 2 * self.keys + self.values, 1, bias=False)
        own_bias = spec.bias and options.form == "concat"  # else the convolution has it for all channels
        self.attn_out = nn.Conv2d(self.values, self.values, 1, bias=own_bias)
        self.order: Tensor | None = None
        if options.outputs == "chosen":
            del self.order
            self.register_buffer("order", torch.arange(self.out_channels))
        self.key_rel_h: nn.Parameter | None = None
        self.key_rel_w: nn.Parameter | None = None
        if options.position == "relative":
            height, width = _attended(place, options)
            dim = self.keys // options.heads
            self.key_rel_h = nn.Parameter(torch.empty(2 * height - 1, dim))
            self.key_rel_w = nn.Parameter(torch.empty(2 * width - 1, dim))
            nn.init.normal_(self.key_rel_h, std=dim**-0.5)
            nn.init.normal_(self.key_rel_w, std=dim**-0.5)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, AAConvOptions)
        conv = place.conv
        if conv is None:
            return "aa_conv can only replace a convolution, not be inserted"
        _, values = _widths(conv, options)
        rest = conv.out_channels - values
        if rest < 0:
            return f"{conv.out_channels} output channels, {options.heads} heads need at least one each"
        if options.form == "residual" and options.outputs == "chosen":
            return "outputs chosen has nothing to give up in the form residual (wanted: last)"
        if options.form == "concat" and rest % conv.groups:
            return f"{rest} channels beside the {values} of attention, not divisible by {conv.groups} groups"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return None

    @classmethod
    def holds(cls, place: Place, options: BlockOptions) -> bool:
        assert isinstance(options, AAConvOptions)
        return options.form == "residual"

    def load_conv(self, conv: nn.Conv2d) -> None:
        """Become `conv`, in the form "residual": its weights as they are, and W_o = 0.

        Queries, keys, values and tables have no gradient until W_o has left zero, after one step.

        Raises:
            ConvrewriteError: `conv` is not the convolution that the block was built for, or the form is "concat".
        """
        check_conv(self, conv, self.spec)
        if self.options.form != "residual" or self.conv_out is None:
            raise ConvrewriteError(f"aa_conv of the form {self.options.form} cannot hold a convolution")
        with torch.no_grad():
            self.conv_out.weight.copy_(conv.weight)
            if self.conv_out.bias is not None and conv.bias is not None:
                self.conv_out.bias.copy_(conv.bias)
            self.attn_out.weight.zero_()

    def plain(self) -> nn.Conv2d | None:
        if self.content() != 0 or self.conv_out is None:
            return None
        return conv_of(self.spec, self.conv_out.weight, self.conv_out.bias, like=self.conv_out.weight)

    def content(self) -> float | None:
        return largest(self.attn_out.weight) if self.options.form == "residual" else None

    def folded(self, after: Affine | None) -> AAConv | None:
        if after is None:
            return None
        twin = copy.deepcopy(self)
        scale, shift = after.scale, after.shift
        if self.order is not None:  # y[order] is what comes out, so channel c is scaled by what order sends it to
            back = self.order.argsort()
            scale, shift = scale[back], shift[back]
        rest = self.out_channels - self.values
        last = Affine(scale[rest:], shift[rest:] if self.options.form == "concat" else torch.zeros_like(shift[rest:]))
        if twin.conv_out is not None:
            first = Affine(scale, shift) if self.options.form == "residual" else Affine(scale[:rest], shift[:rest])
            fold(twin.conv_out, first)
        if self.options.form == "residual":
            twin.attn_out.weight = last.weight(self.attn_out.weight)
        else:
            fold(twin.attn_out, last)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        att = self._attention(x)  # (B, d_v, Ho, Wo)
        y = att if self.conv_out is None else self._joined(self._convolution(x, self.conv_out), att)
        if self.order is not None:
            y = y.index_select(1, self.order)
        return y if channels_last else y.contiguous()

    def _joined(self, y: Tensor, att: Tensor) -> Tensor:
        """The two halves side by side, or attention on top of the last channels, (B, C_out, Ho, Wo)."""
        if self.options.form == "residual":
            rest = self.out_channels - self.values
            y, att = y[:, :rest], y[:, rest:] + att
        return torch.cat([y, att], 1)

    def _convolution(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """The convolution's half, (B, C_out - d_v, Ho, Wo), with all C_out channels in the form residual."""
        if _uneven(self.spec):
            mode = "constant" if self.spec.padding_mode == "zeros" else self.spec.padding_mode
            x = F.pad(x, self.spec.padding, mode=mode)
        result: Tensor = conv(x)
        return result

    def _attention(self, x: Tensor) -> Tensor:
        """The attention's half, (B, d_v, Ho, Wo)."""
        x = at_centres(x, self.spec)  # (B, C_in, Ho, Wo)
        size = x.shape[2:]
        if self.options.pool == 2:
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        if self.options.position == "absolute":
            x = torch.cat([x, coordinates(x)], 1)
        batch, _, height, width = x.shape
        heads = self.options.heads
        tokens = F.linear(x.flatten(2).transpose(1, 2), self.qkv_conv.weight.flatten(1))  # (B, L, 2*d_k + d_v)
        tokens = tokens.view(batch, height, width, 2 * self.keys + self.values)
        parts = tokens[..., : self.keys], tokens[..., self.keys : 2 * self.keys], tokens[..., 2 * self.keys :]
        q, k, v = (t.view(batch, height, width, heads, t.shape[3] // heads) for t in parts)
        out = relative_attention(
            q, k, v, scale=(self.keys // heads) ** -0.5, rows=self.key_rel_h, columns=self.key_rel_w
        )  # (B, h, w, N, d_v / N)
        out = F.linear(out.flatten(3), self.attn_out.weight.flatten(1), self.attn_out.bias).permute(0, 3, 1, 2)
        if self.options.pool == 2:  # W_o is the same before and after, and cheaper before
            out = F.interpolate(out, size, mode="bilinear", align_corners=False)
        return out

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, AAConvOptions)
        assert place.conv is not None
        conv, batch, c_in = place.conv, place.in_shape[0], place.in_shape[1]
        keys, values = _widths(conv, options)
        height, width = _attended(place, options)
        positions, outputs = height * width, math.prod(place.out_shape[2:])
        relative = options.position == "relative"
        c_att = c_in + (COORDINATES if options.position == "absolute" else 0)
        taps = _kept_channels(conv, options) * c_in * math.prod(conv.kernel) // conv.groups
        params = taps + c_att * (2 * keys + values) + values**2 + (conv.out_channels if conv.bias else 0)
        flops = 2 * c_att * (2 * keys + values) + 2 * positions * (keys + values) + 2 * values**2
        if relative:
            params += (2 * height + 2 * width - 2) * (keys // options.heads)
            flops += 2 * keys * (height + width)
        infer, train = _activations(place, options)
        return Cost(
            params=params,
            flops=batch * (outputs * 2 * taps + positions * flops),
            act_infer=FLOAT_BYTES * infer,
            act_train=FLOAT_BYTES * train,
        )


def _convolution(spec: ConvSpec, channels: int) -> nn.Conv2d:
    """The replaced convolution with fewer output channels, at random. Uneven padding is left to the caller."""
    uneven = _uneven(spec)
    return nn.Conv2d(
        spec.in_channels,
        channels,
        spec.kernel,
        spec.stride,
        0 if uneven else (spec.padding[2], spec.padding[0]),
        spec.dilation,
        spec.groups,
        spec.bias,
        padding_mode="zeros" if uneven else spec.padding_mode,  # type: ignore[arg-type]  # a str in ConvSpec
    )


def coordinates(x: Tensor) -> Tensor:
    """Column, row and distance from the centre of every pixel of x: (B, 3, H, W). A single row or column is at 0."""
    batch, _, height, width = x.shape
    row, column = (_axis(size, x) for size in (height, width))
    column, row = column.expand(height, width), row[:, None].expand(height, width)
    planes = torch.stack([column, row, (column.square() + row.square()).sqrt()])
    return planes.to(x.dtype).expand(batch, COORDINATES, height, width)


def _axis(size: int, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    if size == 1:
        return torch.zeros(1, device=like.device, dtype=dtype)
    return torch.linspace(-1.0, 1.0, size, device=like.device, dtype=dtype)


def _widths(conv: ConvSpec, options: AAConvOptions) -> tuple[int, int]:
    """(d_k, d_v)."""
    heads = options.heads
    key = max(options.min_key_dim, _share(options.kappa, conv.out_channels, heads))
    return heads * key, heads * max(1, _share(options.upsilon, conv.out_channels, heads))


def _kept_channels(conv: ConvSpec, options: AAConvOptions) -> int:
    """Output channels of the block's own convolution."""
    return conv.out_channels - (_widths(conv, options)[1] if options.form == "concat" else 0)


def _share(share: float, channels: int, heads: int) -> int:
    """floor(share channels / heads), of the share as it is written: 0.3 of 10 is 3, though 0.3 * 10 may be less."""
    return math.floor(round(share * channels, 6)) // heads


def _attended(place: Place, options: AAConvOptions) -> tuple[int, int]:
    """Size (h, w) of the map that the attention runs on."""
    height, width = place.out_shape[2:]
    return -(-height // options.pool), -(-width // options.pool)


def _uneven(spec: ConvSpec) -> bool:
    """Whether ``nn.Conv2d`` cannot say this padding."""
    left, right, top, bottom = spec.padding
    return left != right or top != bottom


def _activations(place: Place, options: AAConvOptions) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass."""
    assert place.conv is not None
    batch, tile = place.in_shape[0], 0
    heads, c_in, c_out = options.heads, place.in_shape[1], place.conv.out_channels
    keys, values = _widths(place.conv, options)
    height, width = _attended(place, options)
    positions, outputs = height * width, math.prod(place.out_shape[2:])
    extra = height + width if options.position == "relative" else 0
    joined = 2 * (keys + heads * extra)  # q and k with their position terms
    if holds_logits(positions, keys // heads):
        peak = joined + heads * positions + max(heads * positions, 2 * values)
        kept = joined + heads * positions + values + (2 * keys if extra else 0)
    elif extra:
        peak = kept = 2 * keys + 2 * values + heads
        tile = tile_elements(heads * batch, (height, width))
    else:
        peak = kept = heads * (4 * streamed_width(keys // heads + extra, values // heads) + 1)
    added = values if options.form == "residual" else 0  # attention, and its sum with the last channels
    own = c_in if options.position == "absolute" or options.pool == 2 else 0  # a map of the attention's own
    peak += 2 * keys + values + own
    kept += c_in + values
    return max(batch * positions * peak + tile, batch * outputs * 2 * (c_out + added)), batch * positions * kept
