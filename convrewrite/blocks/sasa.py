"""Stand-alone self-attention: every pixel attends to the window around it, and nothing else is there."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import Affine, fold
from convrewrite.blocks.local import NARROW, Axis, line_elements, local_attention, reads_maps, tile_counts
from convrewrite.blocks.pooled import PooledGrid, pooled_grid
from convrewrite.blocks.projections import project_maps, unbind_qkv
from convrewrite.sites import Cost, Place

FLOAT_BYTES = 4
WAVELENGTH = 10_000.0
"""Longest wavelength of the sinusoids over 2 pi, as in Vaswani et al. 2017, arXiv 1706.03762, section 3.5."""


class SASAOptions(BlockOptions):
    """Options of `SASA`."""

    heads: int = Field(default=8, ge=1, description="attention heads N; must divide the output channels")
    window: int = Field(default=7, ge=1, description="side of the attention window, in taps")
    position: Literal["relative", "absolute", "none"] = Field(
        default="relative", description="learned embeddings of the offset, sinusoids of the place, or nothing"
    )
    embeddings: Literal["shared", "per_head"] = Field(
        default="shared", description="one relative embedding for all heads, or one for each"
    )
    border: Literal["zero", "masked"] = Field(
        default="zero", description="keys outside the map are zeros that take part, or are absent"
    )
    projection: bool = Field(
        default=False, description="a 1 x 1 convolution with bias over the outputs of all heads; not the paper's"
    )
    offset_bias: bool = Field(
        default=False,
        description="a learned logit for each head and tap, whatever the content; fitted starts stand on it",
    )


@register_block("sasa")
class SASA(Block):
    """Self-attention of each pixel over a window, in place of a convolution.

    With q, k, v = W x (1 x 1, no bias) of N heads of d = C_out / N channels:

        y_i = sum_o softmax_o( q_i . (k_{i+o} + r_o) ) v_{i+o}      relative
        y_i = sum_o softmax_o( q_i . (k_{i+o} + p_{i+o}) ) v_{i+o}  absolute; without p: none

    r_o = (row embedding of the vertical offset, column embedding of the horizontal one), half of d each (the odd
    channel goes to the columns). p is the same of sinusoids in pixels. No 1 / sqrt(d), no output projection.

    Two options are not the paper's, and off by default: `projection` puts y through W_O (1 x 1, with a bias) after the
    heads, as other attention has it; `offset_bias` adds beta_ho to the logits, as Swin has it. Without the first each
    output channel has the spatial pattern of its head alone, without the second a pattern can only stand on content.

    Stride: attention at the input's resolution, then the mean of stride x stride pixels, at the last row and
    column of as many as there are. Dilation of the replaced convolution dilates the window. Windows
    are centred where the convolution's were; where that is outside the map (padding beyond "same"), x is
    zero-padded first and its zeros count as map. The convolution's padding_mode has no part: `border` rules.

    border "zero": what lies outside is x = 0, so k = v = 0 there (p too) but q . r is not, and it takes its share
    of the softmax. border "masked": the softmax runs over the keys on the map alone.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, HW is after such padding
        and Q the number of pixels before pooling (HW where the convolution pads "same").

    Parameters:
        3 C_in C_out + e,  e = k d (relative, shared), k C_out (relative, per_head), 0 (absolute, none)
        + C_out^2 + C_out (projection)  + N k^2 (offset_bias)

    FLOPs (2 per multiply-add; of the sums above, without the masked-out keys of tiles; softmax, pooling and
    elementwise work are not counted):
        B HW 6 C_in C_out + B Q C_out 6 k^2      4 k^2 in place of 6 k^2 unless relative
        + B HoWo 2 C_out^2 (projection)

    q . r counts for each of the k^2 offsets, as the equation has it and as the paper's 7.0 GFLOPs for ResNet-50
    need it (6.97 by this formula), although it runs here as rows plus columns, which is 2 k and not 2 k^2.

    The stated activation bytes are those of the backend "aten"; the others hold less.

    Reference:
        Ramachandran et al. 2019, arXiv 1906.05909, equations 2 and 3; our o is (a - i, b - j). The text groups the
        projections by heads, the parameter counts of its tables say dense, and dense they are. The paper does not say
        how the border is filled, how weights start, or to what sinusoids are added. Ours: both borders to choose
        from; PyTorch's 1 x 1 convolution for W and a deviation of d^-.5 for r; the keys.

    Facts found in published code:
        - MerHS/SASA-pytorch sums q . k over the channels of all heads, so its one softmax is shared by all of them:
          its result equals this block's with heads=1 (bias off, embeddings to match).
        - leaderj1001/Stand-Alone-Self-Attention never sums q k over channels before its softmax, and gives the
          row embedding to the first half of all channels, the column embedding to the second: not half in each head.
    """

    Options = SASAOptions
    paper = "Ramachandran et al. 2019, arXiv 1906.05909"
    options: SASAOptions

    def __init__(self, place: Place, options: SASAOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = place.conv
        self.head_dim = self.out_channels // options.heads
        self.qkv = nn.Conv2d(self.in_channels, 3 * self.out_channels, 1, bias=False)
        self.row_embedding: nn.Parameter | None = None
        self.column_embedding: nn.Parameter | None = None
        if options.position == "relative":
            tables = options.heads if options.embeddings == "per_head" else 1
            half = self.head_dim // 2
            self.row_embedding = nn.Parameter(torch.empty(tables, half, options.window))
            self.column_embedding = nn.Parameter(torch.empty(tables, self.head_dim - half, options.window))
            nn.init.normal_(self.row_embedding, std=self.head_dim**-0.5)
            nn.init.normal_(self.column_embedding, std=self.head_dim**-0.5)
        self.projection: nn.Conv2d | None = None
        if options.projection:
            self.projection = nn.Conv2d(self.out_channels, self.out_channels, 1)
        self.offset_bias: nn.Parameter | None = None
        if options.offset_bias:
            self.offset_bias = nn.Parameter(torch.zeros(options.heads, options.window**2))

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, SASAOptions)
        conv = place.conv
        if conv is None:
            return "sasa can only replace a convolution, not be inserted"
        if conv.groups > 1:
            return f"convolution has {conv.groups} groups, sasa mixes all channels (groups must be 1)"
        if conv.out_channels % options.heads:
            return f"{conv.out_channels} channels not divisible by {options.heads} heads"
        if options.position != "none" and conv.out_channels == options.heads:
            return f"{options.heads} heads of 1 channel, {options.position} position needs 2 (one for each axis)"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return None

    def folded(self, after: Affine | None) -> SASA | None:
        if after is None or self.projection is None:  # without W_O nothing adds to a channel
            return None
        twin = copy.deepcopy(self)
        assert twin.projection is not None
        fold(twin.projection, after)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        window = self.options.window
        grid = pooled_grid(self.spec, x.shape[2], x.shape[3], window)
        q, k, v = unbind_qkv(self._project(grid.pad(x)))  # (B, H, W, N, d)
        q = q[:, grid.y.start :, grid.x.start :][:, : grid.y.count, : grid.x.count]
        if self.options.position == "absolute":
            k = k + sinusoids(k.shape[1], k.shape[2], self.head_dim, k)
        rows, columns = self._relative()
        att = local_attention(
            q,
            k,
            v,
            window=(window, window),
            scale=1.0,
            dilation=self.spec.dilation,
            start=(grid.y.start, grid.x.start),
            border="zero" if self.options.border == "zero" else "mask",
            rows=rows,
            columns=columns,
            bias=self.offset_bias,
            backend=self.backend,
        )
        y = grid.pool(att.flatten(3).permute(0, 3, 1, 2))  # (B, C, Ho, Wo)
        y = y if self.projection is None else self.projection(y)
        return y if channels_last else y.contiguous()

    def _project(self, x: Tensor) -> Tensor:
        """x (B, C_in, H, W) -> q, k, v as (B, H, W, 3, N, d); in memory a map where the backend reads such."""
        batch, _, height, width = x.shape
        weight, heads = self.qkv.weight.flatten(1), self.options.heads
        tables = self.row_embedding is not None or self.offset_bias is not None
        if x.is_contiguous() and reads_maps(self.backend, x, self.head_dim, tables=tables):
            maps = project_maps(weight, x)  # (B, 3*C, H*W)
            return maps.view(batch, 3, heads, self.head_dim, height, width).permute(0, 4, 5, 1, 2, 3)
        tokens = F.linear(x.flatten(2).transpose(1, 2), weight)  # (B, H*W, 3*C)
        return tokens.view(batch, height, width, 3, heads, self.head_dim)

    def _relative(self) -> tuple[Tensor | None, Tensor | None]:
        """r as the sum of two tables (N or 1, d, k): rows in the first channels of a head, columns in the others."""
        if self.row_embedding is None or self.column_embedding is None:
            return None, None
        half = self.row_embedding.shape[1]
        rows = F.pad(self.row_embedding, (0, 0, 0, self.head_dim - half))
        return rows, F.pad(self.column_embedding, (0, 0, half, 0))

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, SASAOptions) and place.conv is not None
        batch, c_in, in_height, in_width = place.in_shape
        c_out, heads, window = place.conv.out_channels, options.heads, options.window
        relative = options.position == "relative"
        grid = pooled_grid(place.conv, in_height, in_width, window)
        positions, queries = grid.y.size * grid.x.size, grid.y.count * grid.x.count
        tables = heads if options.embeddings == "per_head" else 1
        params = 3 * c_in * c_out + (tables * window * (c_out // heads) if relative else 0)
        flops = batch * positions * 6 * c_in * c_out
        flops += batch * queries * c_out * (6 if relative else 4) * window**2
        params += heads * window**2 if options.offset_bias else 0
        if options.projection:
            params += (c_out + 1) * c_out
            flops += 2 * math.prod(place.out_shape) * c_out
        infer, train = _activations(grid, options, c_out)
        if options.projection:
            train += math.prod(place.out_shape[1:])  # what it projects
        return Cost(
            params=params,
            flops=flops,
            act_infer=FLOAT_BYTES * batch * infer,
            act_train=FLOAT_BYTES * batch * train,
        )


def _activations(grid: PooledGrid, options: SASAOptions, channels: int) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass, for one image."""
    relative, heads = options.position == "relative", options.heads
    y, x = grid.y, grid.x
    projected, queries = 3 * channels * y.size * x.size, channels * y.count * x.count
    pooled = queries if grid.stride != (1, 1) else 0
    placed = channels * y.size * x.size if options.position == "absolute" else 0  # k + p
    if (relative or options.offset_bias) and channels // heads <= NARROW:  # tap by tap, one image after the other
        beside, sums = line_elements(y, x, heads, channels // heads)
        return projected + placed + queries + beside, projected + placed + sums + pooled
    padded = 0  # k and v with zeros around them
    if options.border == "zero":
        y, x = _with_border(y), _with_border(x)
        padded = 2 * channels * y.size * x.size
    tiles, tile_queries, tile_keys = tile_counts(y, x)
    if tiles == 1 and not relative:  # attention reads q, k, v where they are
        beside = queries + heads * tile_queries + tile_queries * tile_keys
        kept = projected if padded == 0 else projected + padded
        return projected + placed + padded + beside, kept + placed * (padded == 0) + pooled + beside
    width = channels // heads
    if relative:  # always tiles, and one more channel for each row and column of a tile's keys
        y, x = y.tiled(), x.tiled()
        tiles, tile_queries, tile_keys = y.tiles * x.tiles, y.tile * x.tile, y.extent * x.extent
        width += y.extent + x.extent
    tiled = tiles * heads * width * 2 * (tile_queries + tile_keys)  # q, k, v and the output
    masks = tile_queries * tile_keys * (tiles if options.border == "masked" else 1)
    sums = tiles * heads * tile_queries  # of the softmax
    narrow = tiles * channels * tile_keys if relative else 0  # v before it is padded to the width of k
    kept = projected if relative else 0
    return projected + placed + padded + tiled + masks + sums + narrow, tiled + masks + sums + kept + pooled


def _with_border(axis: Axis) -> Axis:
    """The axis with the zeros that its windows reach."""
    before, after = (max(0, amount) for amount in axis.padding)
    return replace(axis, size=axis.size + before + after, start=axis.start + before)


def sinusoids(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sinusoids of each pixel's row and column, (H, W, 1, channels), rows in the first half of the channels.

    Along an axis with c channels, channel 2i is sin(t / 10000^(2i/c)) and channel 2i+1 its cosine, t in pixels.
    """
    half = channels // 2
    rows = _wave(height, half, like)[:, None].expand(height, width, half)
    columns = _wave(width, channels - half, like)[None].expand(height, width, channels - half)
    return torch.cat([rows, columns], -1)[:, :, None].to(like.dtype)


def _wave(size: int, channels: int, like: Tensor) -> Tensor:
    """(size, channels), in float32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    at = torch.arange(size, device=like.device, dtype=dtype)[:, None]
    channel = torch.arange(channels, device=like.device)
    angle = at * WAVELENGTH ** (-(channel - channel % 2).to(dtype) / max(channels, 1))
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
