"""Dual attention (the head of DANet): position and channel attention side by side, their results summed."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, register_block
from convrewrite.blocks.channel_attention import ChannelAttention, ChannelAttentionOptions
from convrewrite.blocks.folding import largest
from convrewrite.blocks.position_attention import PositionAttention, PositionAttentionOptions
from convrewrite.blocks.tokens import FLOAT_BYTES, gated, refuse_change
from convrewrite.sites import Cost, Place


class DualAttentionOptions(BlockOptions):
    """Options of `DualAttention`."""

    convolutions: bool = Field(default=True, description="a 3 x 3 before and after each attention, as in the paper")
    reduction: int = Field(default=4, ge=1, description="the 3 x 3 bring C to C / reduction channels, at least one")
    key_reduction: int = Field(default=8, ge=1, description="keys of position attention: so many times narrower")


@register_block("dual_attention")
class DualAttention(Block):
    """Position attention and channel attention in parallel, summed and added to the map; the identity at the start.

    With P(u) = u + alpha pos(u) and Q(u) = u + beta chan(u), the blocks `position_attention` and `channel_attention`,
    and F_1 to F_4 a 3 x 3 convolution without bias, batch norm and ReLU each (F_1, F_2: C -> r = max(1, C //
    reduction); F_3, F_4: r -> r):

        y = x + W_8 ( F_3 P( F_1 x ) + F_4 Q( F_2 x ) )        W_8 a 1 x 1 r -> C with bias
        y = x + alpha pos(x) + beta chan(x)                    with `convolutions` off

    At the start W_8 (or alpha and beta) is zero, so that the block is the exact identity, in train mode too. In place
    of a convolution (stride 1, equal channels and size) stands the same y, x included.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters, with p(c) those of `position_attention` at c channels:
        18 C r + 18 r^2 + 8 r + p(r) + 1 + (r + 1) C, without convolutions p(C) + 1

    FLOPs (2 per multiply-add; norms, softmax and elementwise work are not counted), L = HW:
        B L (36 C r + 36 r^2 + 2 C r), and those of both attentions at r channels; without convolutions both at C alone

    Reference:
        Fu et al. 2019, arXiv 1809.02983: both attentions in parallel on the backbone's last map, each between two
        convolutions, summed element by element, then a convolution that gives the classes. The 3 x 3, r = C / 4, norms
        and ReLUs are those of the authors' code (junfu1115/DANet, DANetHead), whose parameter names these are.

    What is not the paper's:
        - The 1 x 1 after the sum leads back to C channels and is added to x; there it leads to the classes, after a
          dropout. The code's two further classifiers, on each attention's own map, are for its losses and left out.
        - Without convolutions x is counted once; the paper's plain sum would count it twice.
    """

    Options = DualAttentionOptions
    actions = ("insert", "replace")
    exact = True
    silent = ("sa.key_conv.bias",)
    paper = "Fu et al. 2019, arXiv 1809.02983"
    options: DualAttentionOptions

    def __init__(self, place: Place, options: DualAttentionOptions) -> None:
        super().__init__(place, options)
        channels = self.in_channels
        width, inner = _inner(place, options)
        self.sa = PositionAttention(inner, PositionAttentionOptions(reduction=options.key_reduction))
        self.sc = ChannelAttention(inner, ChannelAttentionOptions())
        if options.convolutions:
            self.conv5a = _convolution(channels, width)
            self.conv5c = _convolution(channels, width)
            self.conv51 = _convolution(width, width)
            self.conv52 = _convolution(width, width)
            self.conv8 = nn.Conv2d(width, channels, 1)
            nn.init.zeros_(self.conv8.weight)
            assert self.conv8.bias is not None
            nn.init.zeros_(self.conv8.bias)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        return refuse_change(cls.name, place)

    def plain(self) -> nn.Identity | None:
        return nn.Identity() if self.content() == 0 else None

    def content(self) -> float:
        if not self.options.convolutions:
            return largest(self.sa.gamma, self.sc.gamma)
        return largest(self.conv8.weight, self.conv8.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.options.convolutions:
            return gated(self.sa(x), self.sc.gamma, self.sc.attention(x))
        both: Tensor = self.conv51(self.sa(self.conv5a(x)))  # (B, r, H, W)
        both = both + self.conv52(self.sc(self.conv5c(x)))
        out: Tensor = self.conv8(both)  # (B, C, H, W)
        return x + out.to(x.dtype)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, DualAttentionOptions)
        batch, channels, height, width = place.in_shape
        reduced, inner = _inner(place, options)
        position = PositionAttention.cost(inner, PositionAttentionOptions(reduction=options.key_reduction))
        channel = ChannelAttention.cost(inner, ChannelAttentionOptions())
        full, narrow = (FLOAT_BYTES * batch * height * width * c for c in (channels, reduced))
        params, flops = position.params + channel.params, position.flops + channel.flops
        train = position.act_train + channel.act_train
        if not options.convolutions:
            return Cost(params, flops, max(position.act_infer, full + channel.act_infer), train)
        weights = 18 * channels * reduced + 18 * reduced**2
        return Cost(
            params=params + weights + 8 * reduced + (reduced + 1) * channels,
            flops=flops + 2 * batch * height * width * (weights + reduced * channels),
            act_infer=max(narrow + position.act_infer, 2 * narrow + channel.act_infer, narrow + 2 * full),
            act_train=train + 12 * narrow,
        )


def _inner(place: Place, options: DualAttentionOptions) -> tuple[int, Place]:
    """Channels that the attentions see, and the place that they stand at."""
    batch, channels, height, width = place.in_shape
    reduced = max(1, channels // options.reduction) if options.convolutions else channels
    return reduced, Place((batch, reduced, height, width), (batch, reduced, height, width))


def _convolution(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
