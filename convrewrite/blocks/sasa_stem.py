"""The attention stem of SASA: attention within 4 x 4 blocks of pixels, whose values know their place in the block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.local import EXCLUDED
from convrewrite.sites import Cost, Place

FLOAT_BYTES = 4
SIDE = 4
"""Side of a block and of the max pool: the paper's, and the quarter of the resolution that a ResNet's stem leaves."""

TOKENS = SIDE * SIDE


class SASAStemOptions(BlockOptions):
    """Options of `SASAStem`."""

    heads: int = Field(default=4, ge=1, description="attention heads N; must divide the output channels")
    mixtures: int = Field(default=4, ge=1, description="value matrices M, mixed by the place in the block")


@register_block("sasa_stem")
class SASAStem(Block):
    """Spatially aware self-attention in place of a ResNet's whole stem: convolution, norm, ReLU and max pool.

    The map is cut into blocks of 4 x 4 pixels, and every pixel attends to those of its own block. With q, k = W_Q x,
    W_K x (1 x 1, no bias) of N heads of d = C_out / N channels, M value matrices W_m, and (a, b) the place in a block:

        p(a, b, m) = softmax_m( (row_a + column_b) . nu_m )
        v_ab = ( sum_m p(a, b, m) W_m ) x_ab              the same p for all heads and blocks
        y    = max pool 4 x 4 of BN( sum_ab softmax_ab( q . k_ab ) v_ab )

    row_a, column_b and nu_m have d channels. No 1 / sqrt(d), no other position term, no ReLU. Blocks begin at the top
    left; one that the map's end cuts off has fewer keys, and its max runs over the pixels there are.

    Shape:
        (B, C_in, H, W) -> (B, C_out, ceil(H / 4), ceil(W / 4)), what a ResNet's stem gives at every size.

    Parameters:
        (2 + M) C_in C_out + (8 + M) d + 2 C_out

    FLOPs (2 per multiply-add; HW in whole blocks; mixing the matrices, softmax, BN and pooling are not counted):
        B HW (6 C_in C_out + 64 C_out)

    Reference:
        Ramachandran et al. 2019, arXiv 1906.05909, section 3.3 and appendix: 4 heads, blocks aligned with the pool.
        Not given there: M (4 here, as in published code), the width of row, column and nu (d here), and how weights
        start (here: PyTorch's 1 x 1 convolution; embeddings with deviation d^-.5).

    Facts found in published code:
        - MerHS/SASA-pytorch gives every row and column of the whole padded map an embedding of its own, so that its
          stem holds for one input size.
    """

    Options = SASAStemOptions
    span = "pool"
    paper = "Ramachandran et al. 2019, arXiv 1906.05909"
    options: SASAStemOptions

    def __init__(self, place: Place, options: SASAStemOptions) -> None:
        super().__init__(place, options)
        self.head_dim = self.out_channels // options.heads
        self.query = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False)
        self.key = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False)
        self.values = nn.Conv2d(self.in_channels, options.mixtures * self.out_channels, 1, bias=False)
        self.row_embedding = nn.Parameter(torch.empty(SIDE, self.head_dim))
        self.column_embedding = nn.Parameter(torch.empty(SIDE, self.head_dim))
        self.mixture_embedding = nn.Parameter(torch.empty(options.mixtures, self.head_dim))
        self.norm = nn.BatchNorm2d(self.out_channels)
        for embedding in (self.row_embedding, self.column_embedding, self.mixture_embedding):
            nn.init.normal_(embedding, std=self.head_dim**-0.5)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, SASAStemOptions)
        if place.conv is None:
            return "sasa_stem can only replace a stem, not be inserted"
        if place.conv.groups > 1:
            return f"convolution has {place.conv.groups} groups, sasa_stem mixes all channels (groups must be 1)"
        if place.conv.stride != (2, 2):
            stride = "x".join(map(str, place.conv.stride))
            return f"the stem's convolution has stride {stride}, sasa_stem replaces one of 2x2 and a pooling after it"
        (height, width), (out_height, out_width) = place.in_shape[2:], place.out_shape[2:]
        if (out_height, out_width) != (-(-height // SIDE), -(-width // SIDE)):
            return (
                f"the stem takes {height}x{width} to {out_height}x{out_width}, "
                f"sasa_stem to a quarter of it ({-(-height // SIDE)}x{-(-width // SIDE)})"
            )
        if place.out_shape[1] % options.heads:
            return f"{place.out_shape[1]} channels not divisible by {options.heads} heads"
        return None

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        b, _, h, w = x.shape
        rows, columns = -(-h // SIDE), -(-w // SIDE)
        x = F.pad(x, (0, columns * SIDE - w, 0, rows * SIDE - h))
        att = self._attend(_blocks(x, rows, columns), _absent(h, w, x)).to(x.dtype)  # (B*blocks, N, 16, d)
        att = att.transpose(1, 2).reshape(b, rows, columns, SIDE, SIDE, self.out_channels)
        att = att.permute(0, 5, 1, 3, 2, 4).reshape(b, self.out_channels, rows * SIDE, columns * SIDE)
        y = F.max_pool2d(self.norm(att[:, :, :h, :w]), SIDE, SIDE, ceil_mode=True)  # (B, C, rows, columns)
        return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _attend(self, tokens: Tensor, absent: Tensor | None) -> Tensor:
        """tokens (B*blocks, 16, C_in) -> attention within each block, (B*blocks, N, 16, d)."""
        heads = self.options.heads
        q, k = (F.linear(tokens, conv.weight.flatten(1)) for conv in (self.query, self.key))  # (B*blocks, 16, C)
        v = torch.einsum("bsi,soi->bso", tokens, self.mixed_values()).to(q.dtype)  # (B*blocks, 16, C)
        q, k, v = (t.view(*t.shape[:2], heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        mask = None
        if absent is not None:
            repeats = tokens.shape[0] // absent.shape[0]
            mask = absent.to(q.dtype).repeat(repeats, 1)[:, None, None]  # (B*blocks, 1, 1, 16)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    def mixed_values(self) -> Tensor:
        """The value matrix of each of the 16 places in a block, row by row: (16, C_out, C_in)."""
        place = self.row_embedding[:, None] + self.column_embedding  # (4, 4, d)
        mixture = (place.flatten(0, 1) @ self.mixture_embedding.t()).softmax(-1)  # (16, M)
        matrices = self.values.weight.view(self.options.mixtures, -1)
        return (mixture.to(matrices.dtype) @ matrices).view(TOKENS, self.out_channels, self.in_channels)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, SASAStemOptions)
        batch, c_in, height, width = place.in_shape
        c_out = place.out_shape[1]
        pixels = TOKENS * -(-height // SIDE) * -(-width // SIDE)
        outputs = pixels // TOKENS * c_out
        return Cost(
            params=(2 + options.mixtures) * c_in * c_out
            + (2 * SIDE + options.mixtures) * (c_out // options.heads)
            + 2 * c_out,
            flops=batch * pixels * (6 * c_in * c_out + 4 * TOKENS * c_out),
            act_infer=FLOAT_BYTES * batch * pixels * (c_in + 4 * c_out),
            act_train=FLOAT_BYTES * batch * (pixels * (c_in + 6 * c_out) + outputs),
        )


def _blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, 4 rows, 4 columns) -> the pixels of each block, (B*rows*columns, 16, C)."""
    b, c = x.shape[:2]
    blocks = x.view(b, c, rows, SIDE, columns, SIDE).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, 4, 4, C)
    return blocks.reshape(b * rows * columns, TOKENS, c)


def _absent(height: int, width: int, like: Tensor) -> Tensor | None:
    """Logits that hide the pixels of the blocks beyond the map, (blocks, 16); None where there are none."""
    if height % SIDE == 0 and width % SIDE == 0:
        return None
    inside = torch.ones(1, 1, height, width, device=like.device)
    inside = F.pad(inside, (0, -width % SIDE, 0, -height % SIDE))
    blocks = _blocks(inside, inside.shape[2] // SIDE, inside.shape[3] // SIDE)[..., 0]
    return (1 - blocks) * EXCLUDED
