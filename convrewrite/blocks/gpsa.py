"""Gated positional self-attention: one head for each tap of a convolution, which it can be exactly."""

from __future__ import annotations

import copy
import math
from itertools import product

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, conv_spec, query_grid, register_block
from convrewrite.blocks.centres import at_centres
from convrewrite.blocks.folding import Affine, conv_of, largest
from convrewrite.errors import ConvrewriteError
from convrewrite.sites import ConvSpec, Cost, Place

FLOAT_BYTES = 4

CONTENT_SHARE = 1 - 1 / (1 + math.exp(-1))
"""Share of content at the papers' start: 1 - sigmoid(1)."""

HELD_LOCALITY = 40.0
"""Locality at which a head sees its tap alone: exp(-40), what is left for each neighbour, is nothing beside 1 even in
float64, and is not yet zero in float32, so the positions still have a gradient, however small."""

HELD_SHARE = 0.25
"""Share of content in the heads that hold a convolution beside a background: about that of the papers' start."""

ONE_HOT = 37.0
"""By how much a tap's logit has to lead its neighbours' for them to have less than 2^-53 of its weight."""

KEY_ALIGNMENT = 8
DENSE_PER_CHANNEL = 2


class GPSAOptions(BlockOptions):
    """Options of `GPSA`."""

    key_dim: int | None = Field(
        default=None,
        ge=1,
        description="channels of a key in each head; if not given C_out over the taps, in steps of 8, at least 8",
    )
    locality: float = Field(
        default=1.0, gt=0, description="sharpness of the positional heads at a fresh start, per squared pixel"
    )
    background: bool = Field(
        default=False,
        description="one head more, of content alone, so that an exact start has content in all heads; not the paper's",
    )


@register_block("gpsa")
class GPSA(Block):
    """Attention by content and by position, mixed by a learned gate for each head; one head for each tap of the kernel.

    With X the map's pixels, q, k = W x (1 x 1, no bias) of N = k^2 heads of D channels, and V_h of full C_out x C_in:

        y_i  = sum_h V_h sum_j ( (1 - g_h) P_h(i, j) + g_h S_h(i, j) ) X_j
        S_h  = softmax_j( D^-.5 q_ih . k_jh )                                         j over the map
        P_h  = softmax_j( u_h1 dx + u_h2 dy + u_h3 (dx^2 + dy^2) ),  (dx, dy) = j - i     j over the zero-padded map

    P starts as a bump around tap t_h of the convolution, u = locality (2 t_x, 2 t_y, -1). Its keys are those of the map
    with the convolution's zero padding: out-of-image keys take their share of P and give zero. (Without that sink
    the border would be the convolution's with replicate padding: 24 of 49 pixels of a 7 x 7 map.) With g = 0 and
    sharp P the block is the convolution with weights V; `load_conv` makes it that.

    P is the product of a softmax along rows and one along columns, since its logits are their sum, so it is applied as
    two small matrices at any map size, and never held over pairs of pixels.

    With the option `background` there are k^2 + 1 heads, and the last one starts as content alone (g = 1). A held
    convolution then has g = 1/4, V_h = 4/3 K_h and W_q = 0 in the others: every S is the mean over the map, and what
    the heads add of it the last one takes away, V_last = - 1/3 sum_h K_h. So content learns from the first step on.

    Queries stand at the centres of the convolution's windows, so stride, dilation and any padding are its own. Where
    a centre is outside the map (padding beyond "same"), q is 0. A bias is kept if the convolution has one.

    Shape:
        (B, C_in, H, W) -> (B, C_out, Ho, Wo), the size the convolution gives.

    Parameters:
        N C_in C_out + 2 N D C_in + 4 N     (+ C_out with a bias), N = k^2, or k^2 + 1 with a background

    FLOPs (2 per multiply-add, Q = HoWo, L = HW; softmax and elementwise work are not counted):
        B 2 N ( Q C_in C_out + (Q + L) C_in D + Q L (D + C_in) + (Ho L + Q W) C_in )

    Reference:
        d'Ascoli et al. 2021, arXiv 2103.10697 (ConViT), and 2106.05795 (Transformed CNNs). g is
        1 - sigmoid(lambda) there: a sigmoid can neither be exactly 1 nor learn near it, so here the gate itself is
        learned, from 1 - sigmoid(1). V_h is W_out W_V of the papers' head h, at full width.

    Facts found in published code:
        - facebookresearch/convit has no padded keys, a bias in its position logits (it cancels), and head widths
          C / N, too narrow for a convolution; its `pos_proj` has the order (dx, dy, squared distance), as here.
    """

    Options = GPSAOptions
    paper = "d'Ascoli et al. 2021, arXiv 2103.10697 and 2106.05795"
    options: GPSAOptions

    def __init__(self, place: Place, options: GPSAOptions) -> None:
        super().__init__(place, options)
        assert place.conv is not None  # refuse() said so
        self.spec = spec = place.conv
        self.heads, self.key_dim = _heads(spec, options), _key_dim(spec, options)
        self.qk = nn.Conv2d(self.in_channels, 2 * self.heads * self.key_dim, 1, bias=False)
        self.weight = nn.Parameter(torch.empty(self.out_channels, self.in_channels, *spec.kernel))
        self.bias = nn.Parameter(torch.zeros(self.out_channels)) if spec.bias else None
        self.position = nn.Parameter(_bumps(spec, options.locality, background=options.background))
        self.gate = nn.Parameter(torch.full((self.heads,), CONTENT_SHARE))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.background: nn.Parameter | None = None
        if options.background:
            bound = (self.in_channels * math.prod(spec.kernel)) ** -0.5  # that of the other heads
            self.background = nn.Parameter(torch.empty(self.out_channels, self.in_channels).uniform_(-bound, bound))
            with torch.no_grad():
                self.gate[-1] = 1

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, GPSAOptions)
        conv = place.conv
        if conv is None:
            return "gpsa can only replace a convolution, not be inserted"
        if conv.groups > 1:
            return f"convolution has {conv.groups} groups, gpsa mixes all channels (groups must be 1)"
        if conv.padding_mode != "zeros":
            return f"padding_mode '{conv.padding_mode}', gpsa's keys outside the map are zeros"
        height, width = conv.out_size(*place.in_shape[2:])
        if height < 1 or width < 1:
            return f"the convolution's output is empty ({height} x {width})"
        return None

    @classmethod
    def holds(cls, place: Place, options: BlockOptions) -> bool:
        return True

    def load_conv(self, conv: nn.Conv2d) -> None:
        """Become `conv`: its weights as values, every head on its tap; no content, or with a background content undone.

        The positions then hardly learn (their gradient is of the order of exp(-40)). No values make up for heads that
        are wide enough to: at locality a the pixel beside the kernel gets exp(-a) of the outermost tap, so errors of
        1e-5 and 1e-12 need an a of 12 and 28. The gates learn, and through them the content; with a background the
        content does from the first step on.

        Raises:
            ConvrewriteError: `conv` is not the convolution that the block was built for.
        """
        if conv_spec(conv) != self.spec:
            raise ConvrewriteError(f"gpsa was built for {self.spec} and cannot hold {conv_spec(conv)}")
        with torch.no_grad():
            self.weight.copy_(conv.weight)
            if self.bias is not None and conv.bias is not None:
                self.bias.copy_(conv.bias)
            taps = len(_bumps(self.spec, HELD_LOCALITY))
            self.position[:taps] = _bumps(self.spec, HELD_LOCALITY)
            self.gate.zero_()
            if self.background is not None:
                self.gate[:taps], self.gate[taps:] = HELD_SHARE, 1
                self.weight.div_(1 - HELD_SHARE)
                self.background.copy_(-conv.weight.double().sum((2, 3)) * HELD_SHARE / (1 - HELD_SHARE))
                self.qk.weight[: self.heads * self.key_dim] = 0

    def plain(self) -> nn.Conv2d | None:
        if self.content() != 0 or not self._one_hot():
            return None
        if self.background is None:
            return conv_of(self.spec, self.weight, self.bias, like=self.weight)
        gate = self.gate.detach().double()
        values = torch.cat([self.weight.detach().flatten(2), self.background.detach()[:, :, None]], 2).double()
        mean, size = (values * gate).sum(2), (values * gate).abs().sum(2)  # of what each S, which is a mean, adds
        eps = torch.finfo(self.weight.dtype).eps
        if float(gate[-1]) != 1 or bool((mean.abs() > eps * size).any()):
            return None
        kernel = (values * (1 - gate))[:, :, :-1].view_as(self.weight)
        return conv_of(self.spec, kernel, self.bias, like=self.weight)

    def content(self) -> float:
        """The gates; with a background the queries: without them every S is one mean, which the heads may undo."""
        return largest(self.gate if self.background is None else self.qk.weight[: self.heads * self.key_dim])

    def folded(self, after: Affine | None) -> GPSA | None:
        if after is None:
            return None
        twin = copy.deepcopy(self)
        twin.weight, twin.bias = after.weight(self.weight), after.bias(self.bias, self.weight)
        if self.background is not None:
            twin.background = after.weight(self.background)
        return twin

    def _one_hot(self) -> bool:
        """Whether every head sees its own tap alone: what is left for others is less than rounding in float64."""
        for axis in (0, 1):
            taps = torch.tensor(_offsets(self.spec, axis), dtype=torch.float64)
            tap = taps[:, None].expand(self.spec.kernel) if axis == 0 else taps.expand(self.spec.kernel)
            linear, square = (self.position.detach().double().cpu()[: tap.numel(), i] for i in (1 - axis, 2))
            # l(t) - l(t + s) for s = 1 and -1; farther ones are lower still, as the logits are concave.
            lead = [-s * linear - square * (2 * s * tap.flatten() + 1) for s in (1, -1)]
            if bool((square > 0).any()) or float(torch.stack(lead).min()) < ONE_HOT:
                return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        seen = self._seen(x).permute(0, 2, 3, 1, 4).flatten(3)  # (B, Ho, Wo, N*C_in)
        weight = self.weight.flatten(2).transpose(1, 2)  # (C_out, N, C_in)
        if self.background is not None:
            weight = torch.cat([weight, self.background[:, None]], 1)
        y = F.linear(seen, weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()

    def _seen(self, x: Tensor) -> Tensor:
        """What each head sees of x, (B, N, Ho, Wo, C_in)."""
        near, far = self._by_position(x.permute(0, 2, 3, 1)), self._by_content(x)
        far = far.to(near.dtype) - near
        return torch.addcmul(near, self.gate.to(near.dtype).view(1, -1, 1, 1, 1), far)

    def _by_position(self, pixels: Tensor) -> Tensor:
        """sum_j P_h(i, j) X_j, (B, N, Ho, Wo, C_in)."""
        left, _, top, _ = self.spec.padding
        batch, height, width, channels = pixels.shape
        rows = self._axis_softmax(0, height)[:, :, top : top + height].to(pixels.dtype)  # (N, Ho, H)
        columns = self._axis_softmax(1, width)[:, :, left : left + width].to(pixels.dtype)  # (N, Wo, W)
        lines = torch.matmul(rows.flatten(0, 1), pixels.flatten(2))  # (B, N*Ho, W*C_in)
        return torch.matmul(columns[:, None], lines.view(batch, self.heads, rows.shape[1], width, channels))

    def _axis_softmax(self, axis: int, size: int) -> Tensor:
        """P along one axis over the zero-padded map, (N, queries, before + size + after), in float32 or wider."""
        before, after = (self.spec.padding[i] for i in ((2, 3), (0, 1))[axis])
        start, count = query_grid(
            size, self.spec.kernel[axis], self.spec.stride[axis], self.spec.dilation[axis], before, after
        )
        dtype = torch.promote_types(self.position.dtype, torch.float32)
        position = self.position.to(dtype)
        key = torch.arange(-before, size + after, device=position.device, dtype=dtype)
        query = torch.arange(count, device=position.device, dtype=dtype) * self.spec.stride[axis] + start
        offset = key - query[:, None]  # (queries, keys)
        linear, square = position[:, 1 - axis, None, None], position[:, 2, None, None]
        return (linear * offset + square * offset.square()).softmax(-1)

    def _by_content(self, x: Tensor) -> Tensor:
        """sum_j S_h(i, j) X_j, (B, N, Ho, Wo, C_in)."""
        centres = at_centres(x, self.spec)
        batch, channels, height, width = centres.shape
        to_q, to_k = self.qk.weight.flatten(1).chunk(2)
        q, k = self._project(centres, to_q), self._project(x, to_k)  # (B, N, Q, D), (B, N, L, D)
        values = x.flatten(2).transpose(1, 2).to(q.dtype).contiguous()  # (B, L, C_in), the same for all heads
        if _holds_logits(values.shape[1], channels) and q.dtype in (torch.float32, torch.float64):
            weights = torch.matmul(q * self.key_dim**-0.5, k.transpose(2, 3)).softmax(-1)  # (B, N, Q, L)
            out = torch.bmm(weights.flatten(1, 2), values)
        else:
            out = _streamed(q, k, values, self.key_dim**-0.5)
        return out.reshape(batch, self.heads, height, width, channels)

    def _project(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, N, h*w, D)."""
        tokens = F.linear(x.flatten(2).transpose(1, 2), weight)
        return tokens.view(*tokens.shape[:2], self.heads, self.key_dim).transpose(1, 2)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, GPSAOptions)
        assert place.conv is not None
        batch, c_in, height, width = place.in_shape
        c_out, heads, dim = place.conv.out_channels, _heads(place.conv, options), _key_dim(place.conv, options)
        out_height, out_width = place.out_shape[2:]
        keys, queries = height * width, out_height * out_width
        flops = queries * c_in * c_out + (queries + keys) * c_in * dim + queries * keys * (dim + c_in)
        flops += (out_height * keys + queries * width) * c_in
        infer, train = _activations(place, heads, dim)
        return Cost(
            params=heads * (c_in * c_out + 2 * dim * c_in + 4) + (c_out if place.conv.bias else 0),
            flops=batch * 2 * heads * flops,
            act_infer=FLOAT_BYTES * infer,
            act_train=FLOAT_BYTES * train,
        )


def _activations(place: Place, heads: int, dim: int) -> tuple[int, int]:
    """Elements alive at once in inference and kept for the backward pass."""
    assert place.conv is not None
    batch, c_in, height, width = place.in_shape
    c_out, out_height, out_width = place.out_shape[1:]
    keys, queries = height * width, out_height * out_width
    seen, lines, weight = queries * c_in, out_height * width * c_in, heads * c_in * c_out  # the weight is permuted
    if _holds_logits(keys, c_in):
        inner = 2 * (queries + keys) * dim + queries * keys + max(queries * keys, seen)
        kept = (queries + keys) * dim + queries * keys
    else:
        inner = (queries + keys) * dim + (2 * queries + keys) * max(dim, c_in)
        kept = (2 * queries + keys) * max(dim, c_in)
    peak = batch * heads * max(seen + inner, 3 * seen, seen + lines + queries * width)
    last = batch * (heads * seen + c_out * queries) + weight
    shared = c_in * (3 * keys + queries)  # x, the values, x of the queries, x of the positions
    return max(peak, last), batch * (heads * (kept + lines + 2 * seen + queries * width) + shared) + weight


def _streamed(q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """SDPA with values (B, L, C) shared by the heads, at one common width, which its memory-saving kernels want."""
    dim, width = q.shape[-1], values.shape[-1]
    common = -(-max(dim, width) // KEY_ALIGNMENT) * KEY_ALIGNMENT
    q, k = (F.pad(t, (0, common - dim)) for t in (q, k))
    values = F.pad(values, (0, common - width))[:, None].expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(q, k, values, scale=scale)[..., :width]


def _holds_logits(keys: int, channels: int) -> bool:
    """Whether the content's logits are held whole: only if they are no more than a few of what comes out of it."""
    return keys <= DENSE_PER_CHANNEL * channels


def _heads(spec: ConvSpec, options: GPSAOptions) -> int:
    return math.prod(spec.kernel) + options.background


def _key_dim(spec: ConvSpec, options: GPSAOptions) -> int:
    if options.key_dim is not None:
        return options.key_dim
    return max(1, spec.out_channels // math.prod(spec.kernel) // KEY_ALIGNMENT) * KEY_ALIGNMENT


def _bumps(spec: ConvSpec, locality: float, *, background: bool = False) -> Tensor:
    """u of the heads, (N, 3): logits are -locality times the squared distance from the tap; the background's is 0."""
    taps = [_offsets(spec, axis) for axis in (0, 1)]
    bumps = [[2.0 * x, 2.0 * y, -1.0] for y, x in product(*taps)] + [[0.0, 0.0, -1.0]] * background
    return torch.tensor(bumps) * locality


def _offsets(spec: ConvSpec, axis: int) -> list[int]:
    """Position of every tap along an axis, from the centre of the window."""
    span = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
    return [tap * spec.dilation[axis] - (span - 1) // 2 for tap in range(spec.kernel[axis])]
