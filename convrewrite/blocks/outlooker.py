"""The Outlooker: outlook attention and an MLP, each behind a layer norm and added to the map."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.folding import largest
from convrewrite.blocks.outlook import OutlookAttention, default_heads, outlook_cost, refuse_window, start_linear
from convrewrite.sites import Cost, Place

FLOAT_BYTES = 4


class OutlookerOptions(BlockOptions):
    """Options of `Outlooker`."""

    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads N; must divide the channels C. Default: C / 32, "
        "or the next smaller number that divides C",
    )
    window: int = Field(default=3, ge=1, description="side K of the window, in taps; odd")
    step: int = Field(
        default=2, ge=1, description="weights are made at every step-th pixel, from the mean of step x step"
    )
    normalise: bool = Field(default=False, description="divide each pixel by the number of windows that write to it")
    mlp_ratio: float = Field(default=3.0, gt=0, description="hidden channels of the MLP, as a multiple of C")


@register_block("outlooker")
class Outlooker(Block):
    """Outlook attention, then an MLP, inserted into the way of a feature map or in place of a residual block.

        x <- x + attn( LN x )        x <- x + W_2 GELU( W_1 LN x )

    attn is that of the block `outlook`, at the map's own resolution. LN, W_1 and W_2 run over the channels of each
    pixel, with bias.

    Inserted, the freshly built block is the exact identity: the last linear map of each branch (W_o of attn, W_2)
    starts at zero, weight and bias. So the block has the paper's parameters and no others, its state dict is
    VOLO's, and the first step of training moves the whole of both matrices; a layer scale would add 2 C
    parameters that the paper does not have, to no other effect.

    `replace` puts it in place of the whole residual block around the convolution that the rule matched: both of its
    branches bring their own sum with x, so all of the block goes, shortcut and last activation included. It
    starts as in the authors' code (start: fresh; there is no exact one), and takes blocks that keep size and channels.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters, with M = int(C mlp_ratio):
        2 C^2 + C + (C + 1) N K^4 + 2 C M + M + C + 4 C

    FLOPs (2 per multiply-add; norms, softmax, the sums of weights, pooling and elementwise work are not counted):
        B HW (4 C^2 + 2 C (2K - 1)^2 + 4 C M) + B hw 2 C N K^4       hw = ceil(H / step) ceil(W / step)

    Reference:
        Yuan et al. 2021, arXiv 2106.13112; K = 3, step 2, N = C / 32 and mlp_ratio 3 are VOLO-D1's.
        Parameter names and shapes are those of VOLO's code (sail-sg/volo, timm), so its state dict loads as it is.
    """

    Options = OutlookerOptions
    actions = ("insert", "replace")
    exact = True
    span = "block"
    paper = "Yuan et al. 2021, arXiv 2106.13112"
    options: OutlookerOptions

    def __init__(self, place: Place, options: OutlookerOptions) -> None:
        super().__init__(place, options)
        channels = self.in_channels
        self.norm1 = nn.LayerNorm(channels)
        self.attn = OutlookAttention(
            channels,
            channels,
            heads=options.heads or default_heads(channels),
            window=options.window,
            step=options.step,
            normalise=options.normalise,
        )
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _MLP(channels, _hidden(channels, options))
        if place.conv is None:  # inserted
            for last in (self.attn.proj, self.mlp.fc2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, OutlookerOptions)
        if place.in_shape[1:] != place.out_shape[1:]:
            came, wanted = ("x".join(map(str, shape[1:])) for shape in (place.in_shape, place.out_shape))
            what = "map" if place.conv is None else "block"
            return f"the {what} changes from {came} to {wanted}, outlooker keeps channels and size"
        return refuse_window(place.in_shape[1], options.heads, options.window, options.step)

    def plain(self) -> nn.Identity | None:
        return nn.Identity() if self.content() == 0 else None

    def content(self) -> float:
        return largest(*(w for last in (self.attn.proj, self.mlp.fc2) for w in (last.weight, last.bias)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(_channels_first(self.norm1, x), self.backend).to(x.dtype)
        tokens = self.norm2(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        mixed: Tensor = self.mlp(tokens)
        return x + mixed.permute(0, 3, 1, 2).to(x.dtype)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, OutlookerOptions)
        batch, channels, height, width = place.in_shape
        heads, hidden = options.heads or default_heads(channels), _hidden(channels, options)
        pixels = height * width
        params, flops, infer, train = outlook_cost(
            channels, channels, heads, options.window, options.step, (height, width)
        )
        token, wide = pixels * channels, pixels * hidden
        return Cost(
            params=params + (channels + 1) * channels + 2 * channels * hidden + hidden + channels + 4 * channels,
            flops=batch * (flops + 2 * token * channels + 4 * token * hidden),
            act_infer=FLOAT_BYTES * batch * max(token + infer, 2 * token + 2 * wide),
            act_train=FLOAT_BYTES * batch * (train + 4 * token + 2 * wide),
        )


class _MLP(nn.Module):
    """W_2 GELU(W_1 x) over the last axis: (..., C) -> (..., C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        start_linear(self.fc1)
        start_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


def _channels_first(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm over the channels of each pixel, (B, C, H, W) -> (B, C, H, W) in the layout of `x`."""
    y: Tensor = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y


def _hidden(channels: int, options: OutlookerOptions) -> int:
    return max(1, int(channels * options.mlp_ratio))
