"""The self-attention of Bottleneck Transformers: every position attends to the whole map, by content and offset."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import Affine, frozen
from convrewrite.blocks.pooled import pooled_grid
from convrewrite.blocks.relative import holds_logits, relative_attention
from convrewrite.blocks.relative_tiles import tile_elements
from convrewrite.sites import Cost, Place

FLOAT_BYTES = 4


class MHSAOptions(BlockOptions):
    """Options of `MHSA`."""

    heads: int = Field(default=4, ge=1, description="attention heads N; must divide the output channels")
    table: int | None = Field(
        default=None,
        ge=1,
        description="positions a side the relative tables are made for; the planned size if not given",
    )
    scale_position: bool = Field(default=True, description="whether d^-.5 multiplies the position term too")


@register_block("mhsa")
class MHSA(Block):
    """Global multi-head self-attention with relative positions, in place of a spatial convolution.

    With q, k, v = W x (1 x 1, no bias) of N heads of d = C_out / N channels:

        y_i = sum_j softmax_j( d^-.5 q_i . (k_j + rH_{j_y - i_y} + rW_{j_x - i_x}) ) v_j

    rH (2h - 1, d) and rW (2w - 1, d) are learned and shared by the heads; there is no output projection (the
    bottleneck's last 1 x 1 is one). With scale_position off the factor d^-.5 stands at q_i . k_j alone.

    Stride: attention at the input's resolution, then the mean of stride x stride positions, at the last row and column
    of as many as there are. Positions are those where the convolution's windows were centred; where they lie outside
    the map (padding beyond "same"), x is zero-padded first and its zeros count as map. A bias of the replaced
    convolution becomes one of the output. Its dilation and padding_mode have no meaning here.
    Other sizes than the planned: rH and rW are interpolated linearly, ends to ends.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives; below, HW is after such padding.

    Parameters:
        3 C_in C_out + (2h + 2w - 2) d    (+ C_out with a bias); h x w = H x W of the planned size, or table x table

    FLOPs (2 per multiply-add; softmax, pooling and elementwise work are not counted, and q . r once for each row and
    column, as it depends on no more):
        B HW ( 6 C_in C_out + 4 HW C_out + 2 C_out (H + W) )

    Reference:
        Srinivas et al. 2021, arXiv 2101.11605; the relative logits are those of Bello et
        al. 2019, arXiv 1904.09925. ResNet-50 with it in the last stage has 20,859,176 parameters with tables for
        14 x 14 in all three blocks (table: 14), as where that stage has stride 1; 20,852,008 with the planned sizes.

    Facts found in published code:
        - timm's `BottleneckAttn` scales the position term only with scale_pos_embed, off by default: that is
          scale_position off here. AA-Conv's listing, from which the term comes, scales q before both products.
        - timm's takes the one map size it was made for, and pools with `AvgPool2d(2, 2)`, which for odd sizes returns
          less than the strided convolution does.
    """

    Options = MHSAOptions
    paper = "Srinivas et al. 2021, arXiv 2101.11605"
    options: MHSAOptions

    def __init__(self, place: Place, options: MHSAOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = place.conv
        self.head_dim = self.out_channels // options.heads
        self.qkv = nn.Conv2d(self.in_channels, 3 * self.out_channels, 1, bias=False)
        height, width = _tables(place, options)
        self.height_rel = nn.Parameter(torch.empty(2 * height - 1, self.head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * width - 1, self.head_dim))
        self.bias = nn.Parameter(torch.zeros(self.out_channels)) if place.conv.bias else None
        nn.init.normal_(self.qkv.weight, std=self.in_channels**-0.5)
        nn.init.normal_(self.height_rel, std=self.head_dim**-0.5)
        nn.init.normal_(self.width_rel, std=self.head_dim**-0.5)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, MHSAOptions)
        conv = place.conv
        if conv is None:
            return "mhsa can only replace a convolution, not be inserted"
        if conv.groups > 1:
            return f"convolution has {conv.groups} groups, mhsa mixes all channels (groups must be 1)"
        if conv.out_channels % options.heads:
            return f"{conv.out_channels} channels not divisible by {options.heads} heads"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return None

    def folded(self, after: Affine | None) -> MHSA | None:
        if after is None:
            return None
        twin = copy.deepcopy(self)
        q, k, v = self.qkv.weight.chunk(3)
        twin.qkv.weight = frozen(torch.cat([q, k, after.weight(v)]))
        twin.bias = after.bias(self.bias, v)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        grid = pooled_grid(self.spec, x.shape[2], x.shape[3], 1)
        x = grid.pad(x)
        batch, _, height, width = x.shape
        qkv = F.linear(x.flatten(2).transpose(1, 2), self.qkv.weight.flatten(1))  # (B, H*W, 3*C)
        q, k, v = qkv.view(batch, height, width, 3, self.options.heads, self.head_dim).unbind(3)
        out = relative_attention(
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            rows=self.height_rel,
            columns=self.width_rel,
            scale_position=self.options.scale_position,
        )  # (B, H, W, N, d)
        y, z = grid.y, grid.x
        out = out[:, y.start : y.start + y.count, z.start : z.start + z.count].flatten(3)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        out = grid.pool(out.permute(0, 3, 1, 2))  # (B, C, Ho, Wo)
        return out if channels_last else out.contiguous()

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, MHSAOptions)
        assert place.conv is not None
        batch, c_in = place.in_shape[:2]
        c_out, dim = place.conv.out_channels, place.conv.out_channels // options.heads
        height, width = _map(place)
        rows, columns = _tables(place, options)
        positions = height * width
        flops = 6 * c_in * c_out + 4 * positions * c_out + 2 * c_out * (height + width)
        infer, train = _activations(place, options)
        return Cost(
            params=3 * c_in * c_out + (2 * rows + 2 * columns - 2) * dim + (c_out if place.conv.bias else 0),
            flops=batch * positions * flops,
            act_infer=FLOAT_BYTES * infer,
            act_train=FLOAT_BYTES * train,
        )


def _map(place: Place) -> tuple[int, int]:
    """Size of the map that the attention runs on, at the planned size."""
    assert place.conv is not None
    grid = pooled_grid(place.conv, place.in_shape[2], place.in_shape[3], 1)
    return grid.y.size, grid.x.size


def _tables(place: Place, options: MHSAOptions) -> tuple[int, int]:
    """Positions (vertical, horizontal) that the tables are made for."""
    return (options.table, options.table) if options.table is not None else _map(place)


def _activations(place: Place, options: MHSAOptions) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass."""
    assert place.conv is not None
    batch, tile = place.in_shape[0], 0
    channels, heads = place.conv.out_channels, options.heads
    dim = channels // heads
    height, width = _map(place)
    positions = height * width
    joined = 2 * (channels + heads * (height + width))  # q and k with their position terms
    if holds_logits(positions, dim):
        peak = joined + heads * positions + max(heads * positions, 2 * channels)
        kept = joined + heads * positions + 3 * channels
    else:
        peak = kept = 4 * channels + heads
        tile = tile_elements(heads * batch, (height, width))
    peak += 3 * channels
    kept += place.in_shape[1] + (channels if place.conv.stride != (1, 1) else 0)
    return batch * positions * peak + tile, batch * positions * kept
