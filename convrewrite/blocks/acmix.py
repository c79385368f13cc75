"""ACmix: windowed self-attention and a convolution fed by the same three projections, and added."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, query_grid, register_block
from convrewrite.blocks.folding import Affine, largest
from convrewrite.blocks.local import Axis, is_dense, local_attention, reads_maps, tile_counts
from convrewrite.blocks.projections import is_small, project_maps, unbind_qkv
from convrewrite.sites import ConvSpec, Cost, Place

FLOAT_BYTES = 4

PIECE_ELEMENTS = 2**19
"""Elements of q, k and v that the convolution path reorders at once at inference: 2 MiB in float32."""

Filters = tuple[Tensor, Tensor | None]
"""(C, 3*N, kc, kc) and a bias (C,): the convolution path as one grouped convolution."""


class ACmixOptions(BlockOptions):
    """Options of `ACmix`."""

    heads: int = Field(default=4, ge=1, description="attention heads N; must divide the output channels")
    window: int = Field(default=7, ge=1, description="side of the attention window, in taps")
    kernel_conv: int = Field(default=3, ge=1, description="side of the convolution path's kernel, in taps")
    layout: Literal["authors", "ordered"] = Field(
        default="authors", description="channel order of the convolution path: the authors', or the attention's own"
    )
    rates: Literal["shared", "channel"] = Field(
        default="shared", description="one weight for each path, or one for each path and output channel"
    )


@register_block("acmix")
class ACmix(Block):
    """Self-attention over a window plus a convolution, both computed from one set of projections.

    With q, k, v = W1 x, W2 x, W3 x (1 x 1, with bias) of N heads of d = C_out / N channels, and
    p = W_p (column, row) of coordinates that run from -1 to 1 over the map:

        att_i  = sum_o softmax_o( d^-.5 q_i . (k_{i+o} + p_i - p_{i+o}) ) v_{i+o}     mirrored at borders
        conv   = grouped_conv( fc [q_1..q_N, k_1..k_N, v_1..v_N] )                    zeros at borders
        y      = rate1 att + rate2 conv

    fc maps the 3N values that share a channel of the heads to kc^2; the grouped convolution has d groups,
    kc^2 channels each, and starts as the kc^2 shifts. p_i cancels in the softmax, so p is subtracted from k
    once; W_p's bias cancels too and is kept for the authors' checkpoints alone. fc and the grouped convolution
    are both linear, so they run as one grouped convolution on q, k, v with the product of their weights.

    The stated activation bytes are those of the backend "aten"; the others hold less.

    Dilation of the replaced convolution dilates both paths; stride keeps every stride-th query. Windows are
    centred where the convolution's were. Where that is outside the map (padding beyond "same"), x is
    zero-padded first and the coordinates run over the padded map.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, HW is after such padding.

    Parameters:
        3 (C_in + 1) C_out + 3 d + 3 N kc^2 + C_out kc^4 + 2   (2 C_out in place of 2 with ``rates="channel"``)

    FLOPs (2 per multiply-add; of the sums above with fc fused, without the masked-out keys of tiles; softmax and
    elementwise work are not counted):
        B HW 6 C_in C_out + HW 4 d + B HoWo C_out (4 k^2 + 6 N kc^2) + 6 N C_out kc^4

    Reference:
        Pan et al. 2022, arXiv 2111.14556, sections 3 and 4: our rate1, rate2 are alpha, beta; k is k_a and kc is k_c.
        Parameter names and shapes are those of the authors' code (LeapLabTHU/ACmix), so its state dict loads
        with ``load_state_dict`` as it is (defaults only: layout "authors", rates "shared").

    Facts found in the authors' code:
        - att is head-major (channel n d + i), conv is dim-major (i N + n), and they are added as they are:
          layout "authors". Layout "ordered" brings conv into head-major order.
        - dep_conv has no bias; it is built with one that `reset_parameters` turns into None.
        - It fails, or returns another size than the convolution, for dilation, kernel_conv != 3, even windows,
          odd sizes with stride 2, and maps of 3 x 3 or less.
    """

    Options = ACmixOptions
    paper = "Pan et al. 2022, arXiv 2111.14556"
    silent = ("conv_p.bias",)
    options: ACmixOptions

    def __init__(self, place: Place, options: ACmixOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = place.conv
        self.head_dim = self.out_channels // options.heads
        taps = options.kernel_conv**2
        self.conv1 = nn.Conv2d(self.in_channels, self.out_channels, 1)
        self.conv2 = nn.Conv2d(self.in_channels, self.out_channels, 1)
        self.conv3 = nn.Conv2d(self.in_channels, self.out_channels, 1)
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)
        self.fc = nn.Conv2d(3 * options.heads, taps, 1, bias=False)
        self.dep_conv = nn.Conv2d(
            taps * self.head_dim, self.out_channels, options.kernel_conv, groups=self.head_dim, bias=False
        )
        rates = self.out_channels if options.rates == "channel" else 1
        self.rate1 = nn.Parameter(torch.full((rates,), 0.5))
        self.rate2 = nn.Parameter(torch.full((rates,), 0.5))
        with torch.no_grad():  # output filter o copies input channel t shifted by tap t
            self.dep_conv.weight.copy_(torch.eye(taps).view(1, taps, *self.dep_conv.kernel_size))

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, ACmixOptions)
        conv = place.conv
        if conv is None:
            return "acmix can only replace a convolution, not be inserted"
        if conv.groups > 1:
            return f"convolution has {conv.groups} groups, acmix mixes all channels (groups must be 1)"
        if conv.padding_mode != "zeros":
            return f"padding_mode '{conv.padding_mode}', acmix's convolution path pads with zeros"
        if conv.out_channels % options.heads:
            return f"{conv.out_channels} channels not divisible by {options.heads} heads"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return None

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        pads, rows, columns = _grids(self.spec, x.shape[2], x.shape[3])
        dense = is_dense(*(replace(axis, kernel=self.options.window) for axis in (rows, columns)))
        maps = x.is_contiguous() and reads_maps(self.backend, x, self.head_dim, dense=dense)
        qkv = self._project(F.pad(x, pads) if any(pads) else x, maps=maps)  # (B, H, W, 3, N, d)
        att = self._attention(qkv, rows, columns)
        filters = self._filters()
        if not maps and _goes_in_pieces(qkv):
            return self._in_pieces(qkv, att, filters, rows, columns, channels_last=channels_last)
        conv = self._convolution(qkv, filters, rows, columns)
        y = torch.addcmul(conv, self.rate1.to(conv.dtype), att.to(conv.dtype)).permute(0, 3, 1, 2)  # (B, C, Ho, Wo)
        return y if channels_last else y.contiguous()

    def _in_pieces(
        self, qkv: Tensor, att: Tensor, filters: Filters, y: Axis, x: Axis, *, channels_last: bool
    ) -> Tensor:
        """The output, (B, C, Ho, Wo), a few images at a time.

        The convolution path reads a copy of q, k, v in another order. In fresh memory that costs several times the
        copying itself; a copy of few images is in memory that was just used, and in a processor's cache.
        """
        images, step = qkv.shape[0], _images(qkv[0].numel())
        out: Tensor | None = None
        for begin in range(0, images, step):
            part = slice(begin, begin + step)
            conv = self._convolution(qkv[part], filters, y, x)  # (b, Ho, Wo, C)
            if out is None:
                order = (0, 1, 2, 3) if channels_last else (0, 3, 1, 2)
                out = conv.new_empty([images if axis == 0 else conv.shape[axis] for axis in order])
                by_pixel = out if channels_last else out.permute(0, 2, 3, 1)
            torch.addcmul(conv, self.rate1.to(conv.dtype), att[part].to(conv.dtype), out=by_pixel[part])
            del conv  # before the next one is made
        assert out is not None  # there are images
        return out.permute(0, 3, 1, 2) if channels_last else out

    def _project(self, x: Tensor, *, maps: bool) -> Tensor:
        """x (B, C_in, H, W) -> q, k, v as (B, H, W, 3, N, d), all from one matrix product.

        In memory they are tokens, or with `maps` a map whose channels are the convolution path's groups in their order:
        then neither path has to copy them.
        """
        batch, _, height, width = x.shape
        heads, dim = self.options.heads, self.head_dim
        weight, bias = self._projection(maps=maps)
        if not maps:
            pixels = x.flatten(2).transpose(1, 2)
            if is_small(x):
                pixels = pixels.flatten(0, 1)  # one product for all images, and the bias in it
            tokens = F.linear(pixels, weight, bias)  # (B, H*W, 3*C)
            return tokens.view(batch, height, width, 3, heads, dim)
        qkv = project_maps(weight, x)  # (B, d*3*N, H*W)
        if bias is not None:
            qkv.add_(bias[:, None].to(qkv.dtype))  # convolutions are slower at this
        return qkv.view(batch, dim, 3, heads, height, width).permute(0, 4, 5, 2, 3, 1)

    def _projection(self, *, maps: bool) -> tuple[Tensor, Tensor | None]:
        """Weight (3*C, C_in) and bias (3*C,) of q, k, v; with `maps` in the order of the convolution path's groups."""
        weight = torch.cat([self.conv1.weight, self.conv2.weight, self.conv3.weight]).flatten(1)
        bias = torch.cat([_bias(self.conv1), _bias(self.conv2), _bias(self.conv3)])
        return (in_groups(weight, self.head_dim), in_groups(bias, self.head_dim)) if maps else (weight, bias)

    def _attention(self, qkv: Tensor, y: Axis, x: Axis) -> Tensor:
        """The attention path, (B, Ho, Wo, C) with channel n * d + i."""
        q, k, v = unbind_qkv(qkv)  # (B, H, W, N, d)
        q = q[:, y.start :: y.stride, x.start :: x.stride][:, : y.count, : x.count]
        out = local_attention(
            q,
            (k - self._position(y.size, x.size)).to(q.dtype),
            v,
            window=(self.options.window, self.options.window),
            scale=self.head_dim**-0.5,
            stride=(y.stride, x.stride),
            dilation=(y.dilation, x.dilation),
            start=(y.start, x.start),
            backend=self.backend,
        )
        return out.flatten(3)

    def _position(self, height: int, width: int) -> Tensor:
        """p, (H, W, 1, d), in float32 or wider: neighbours differ too little for half precision."""
        weight, bias = self.conv_p.weight.flatten(1), _bias(self.conv_p)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        column = torch.linspace(-1.0, 1.0, width, device=weight.device, dtype=dtype)[None, :, None, None]
        row = torch.linspace(-1.0, 1.0, height, device=weight.device, dtype=dtype)[:, None, None, None]
        return column * weight[:, 0] + row * weight[:, 1] + bias

    def _convolution(self, qkv: Tensor, filters: Filters, y: Axis, x: Axis) -> Tensor:
        """rate2 times the convolution path, (B, Ho, Wo, C)."""
        heads, dim = self.options.heads, self.head_dim
        weight, bias = filters
        # The layout of the weight decides that of the work: on CPU the grouped convolution's backward is faster
        # channels last (a fifth of the block's step at 64 x 56 x 56); its forward alone is not worth copying q, k, v.
        trains = torch.is_grad_enabled() and (qkv.requires_grad or weight.requires_grad)
        weight = weight.contiguous(memory_format=torch.channels_last if trains else torch.contiguous_format)
        grouped = qkv.flatten(3, 4).transpose(3, 4).flatten(3)  # (B, H, W, d*3*N)
        top, bottom = replace(y, kernel=self.options.kernel_conv).padding
        left, right = replace(x, kernel=self.options.kernel_conv).padding
        padding = (top, left)
        if not (0 <= top - bottom < y.stride and 0 <= left - right < x.stride and min(padding) >= 0):
            grouped = F.pad(grouped, (0, 0, left, right, top, bottom))  # negative amounts crop
            padding = (0, 0)
        grouped = grouped.permute(0, 3, 1, 2)  # (B, d*3*N, H, W)
        out = F.conv2d(grouped, weight, bias, self.spec.stride, padding, self.spec.dilation, dim)
        out = out.permute(0, 2, 3, 1)  # (B, Ho, Wo, d*N)
        if self.options.layout == "ordered":
            out = out.reshape(*out.shape[:3], dim, heads).transpose(3, 4).flatten(3)
        return out

    def _filters(self) -> Filters:
        """The convolution path as one grouped convolution of q, k, v: (C, 3*N, kc, kc), times rate2, and its bias."""
        weight = torch.einsum("otyx,ts->osyx", self.dep_conv.weight, self.fc.weight.flatten(1))
        rate: Tensor = self.rate2
        if self.options.layout == "ordered" and rate.numel() > 1:
            rate = in_groups(rate, self.head_dim)  # to the dim-major order of the filters
        return weight * rate.view(-1, 1, 1, 1), None

    def plain(self) -> nn.Conv2d | None:
        from convrewrite.blocks.acmix_fused import plain_acmix

        return plain_acmix(self)

    def content(self) -> float | None:
        return largest(self.rate1)

    def folded(self, after: Affine | None) -> ACmix | None:
        from convrewrite.blocks.acmix_fused import FusedACmix

        return FusedACmix(self, after)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, ACmixOptions)
        assert place.conv is not None
        batch, c_in, in_height, in_width = place.in_shape
        c_out, heads = place.conv.out_channels, options.heads
        dim, taps = c_out // heads, options.kernel_conv**2
        y, x = (replace(axis, kernel=options.window) for axis in _grids(place.conv, in_height, in_width)[1:])
        positions, queries = y.size * x.size, y.count * x.count
        rates = 2 * c_out if options.rates == "channel" else 2
        flops = batch * positions * 6 * c_in * c_out + positions * 4 * dim
        flops += batch * queries * c_out * (4 * options.window**2 + 6 * heads * taps) + 6 * heads * c_out * taps**2
        tiles, tile_queries, tile_keys = tile_counts(y, x)
        tiled = batch * tiles * c_out * 2 * (tile_queries + tile_keys)  # q, k, v and output in tiles
        extra = batch * tiles * heads * tile_queries + tile_queries * tile_keys  # softmax sums and the mask
        gathered = queries * c_out * batch if (tiles, tile_keys) == (1, positions) else tiled
        attention = batch * positions * 4 * c_out + gathered + extra
        an_image, piece = positions * 3 + queries, min(batch, _images(positions * 3 * c_out))
        # A piece's q, k, v are there twice, and what comes of them; from the second piece on all images' output too.
        in_pieces = max(
            piece * an_image, min(piece, batch - piece) * an_image + (batch * queries if piece < batch else 0)
        )
        convolution = (batch * an_image + in_pieces) * c_out + 6 * heads * c_out * taps
        kept = batch * (positions * (c_in + 3 * c_out) + queries * c_out) + 6 * heads * c_out * taps
        return Cost(
            params=3 * (c_in + 1) * c_out + 3 * dim + 3 * heads * taps + c_out * taps**2 + rates,
            flops=flops,
            act_infer=FLOAT_BYTES * max(attention, convolution),
            act_train=FLOAT_BYTES * (kept + tiled + extra),
        )


def _goes_in_pieces(qkv: Tensor) -> bool:
    """Whether the convolution path goes a few images at a time: on CPU, where no graph is recorded."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    recorded = recorded or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return qkv.device.type == "cpu" and qkv.shape[0] > 0 and not recorded


def _images(elements: int) -> int:
    """Of q, k, v with so many elements an image: how many images go at once."""
    return max(1, PIECE_ELEMENTS // elements)


def in_groups(channels: Tensor, head_dim: int) -> Tensor:
    """(heads * d, ...) -> (d * heads, ...): what belongs to one channel of the heads side by side."""
    return channels.view(-1, head_dim, *channels.shape[1:]).transpose(0, 1).flatten(0, 1)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _grids(spec: ConvSpec, height: int, width: int) -> tuple[list[int], Axis, Axis]:
    """Where the queries stand: zeros (left, right, top, bottom) that x needs so that every window of the
    convolution is centred on the map, then the vertical and horizontal axis on the map so padded."""
    left, right, top, bottom = spec.padding
    pads: list[int] = []
    axes: list[Axis] = []
    for i, size, before, after in ((1, width, left, right), (0, height, top, bottom)):
        kernel, stride, dilation = spec.kernel[i], spec.stride[i], spec.dilation[i]
        start, count = query_grid(size, kernel, stride, dilation, before, after)
        extra = max(0, -start), max(0, start + (count - 1) * stride - size + 1)
        pads += extra
        axes.append(Axis(size + sum(extra), count, kernel, stride, dilation, start + extra[0]))
    return pads, axes[1], axes[0]
