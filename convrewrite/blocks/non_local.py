"""The non-local block: every position gathers from all positions by a pairwise function, and the result is added."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convrewrite.blocks.base import Block, BlockOptions, float32, register_block
from convrewrite.blocks.folding import largest
from convrewrite.blocks.tokens import (
    FLOAT_BYTES,
    attend,
    attend_elements,
    attend_maps,
    holds_logits,
    pointwise,
    refuse_change,
    to_map,
    to_tokens,
    whole_precision,
)
from convrewrite.sites import Cost, Place

INIT_STD = 0.01


class NonLocalOptions(BlockOptions):
    """Options of `NonLocal`."""

    pairwise: Literal["embedded_gaussian", "dot_product", "gaussian", "concatenation"] = Field(
        default="embedded_gaussian", description="the function f that compares two positions"
    )
    inter_channels: int | None = Field(
        default=None, ge=1, description="channels d of theta, phi and g; half of the map's if not given"
    )
    sub_sample: bool = Field(default=True, description="2 x 2 max pool after phi and g: a quarter of the keys")
    scale: bool = Field(default=False, description="divide a softmax's logits by the root of their width")
    norm: Literal["batch", "none"] = Field(
        default="batch", description="batch norm after W_z, its gain zero at the start; or none, and W_z zero"
    )


@register_block("non_local")
class NonLocal(Block):
    """A sum over all positions weighted by a pairwise function f, added to the map through a gain that starts at zero.

    With theta, phi, g: 1 x 1 with bias, C -> d, and W_z: 1 x 1 with bias, d -> C, then batch norm:

        z_i = x_i + BN( W_z y_i )        y_i = sum_j f(i, j) g_j / N(i)        over the M keys j

        embedded_gaussian   f = exp(theta_i . phi_j)                     N = sum_j f
        gaussian            f = exp(x_i . x_j), no theta and phi         N = sum_j f
        dot_product         f = theta_i . phi_j                          N = M
        concatenation       f = ReLU(w . [theta_i, phi_j])               N = M

    M = HW, or a quarter of it with sub_sample (2 x 2 max pool after phi and g, or of x_j). `scale` divides the
    exponents by the root of their width (d, or C for gaussian). Inserted, the block is the exact identity at the
    start: BN's gain and bias are zero, or W_z is where there is no BN. In place of a convolution (stride 1, equal
    channels and size) stands the same z, x included.

    None of the four holds the HW x M matrix where it is large: the exponentials run through SDPA; the dot product is
    theta (phi^T g), or (theta phi^T) g where that is less work; and concatenation is a_i + b_j with scalars
    a = w_1 . theta, b = w_2 . phi, positive for the keys with b_j > -a_i, so after a sort by b

        y_i = ( a_i G_n + H_n ) / M,   n = #{j: b_j > -a_i},   G_n, H_n: sums of g_j, b_j g_j over the n largest b_j

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Parameters:
        3 (C + 1) d + (d + 1) C + 2 C;  gaussian: less 2 (C + 1) d;  concatenation: 2 d more;  no norm: less 2 C

    FLOPs (2 per multiply-add, L = HW; softmax, pooling, sums, sorts and elementwise work are not counted):
        W_z and g:            B L 4 C d
        embedded_gaussian     + B L 4 C d + B 4 L M d
        gaussian              + B 2 L M (C + d)
        dot_product           + B L 4 C d + B min(4 L M d, 2 (L + M) d^2)
        concatenation         + B L 4 C + 4 C d;  with sub_sample + B L 2 C (d + 1) + B M 2 d + 2 C d

    Reference:
        Wang et al. 2018, arXiv 1711.07971, equations 1 to 6. Parameter names are those of AlexHex7/Non-local_pytorch
        without its sub-sampling (with it, `g` and `phi` are `g.0` and `phi.0` there).

    Facts found in code:
        - The authors' (facebookresearch/video-nonlocal-net) pools x before phi and g, the paper and AlexHex7 pool
          after them, as here; the authors' scales by d^-.5, the paper does not; weights start from a normal
          distribution, biases from zero, and so they do here (standard deviation 0.01).
        - phi's bias cancels in a softmax; W_z's bias cancels in a BN that trains.
        - ONNX has no stable sort: in its files concatenation is the double sum, with the HW x M matrix.
        - Odd sizes: the pool leaves out the last row and column, as in both codes, unless it is the only one.
    """

    Options = NonLocalOptions
    actions = ("insert", "replace")
    exact = True
    silent = ("phi.bias",)
    paper = "Wang et al. 2018, arXiv 1711.07971"
    options: NonLocalOptions

    def __init__(self, place: Place, options: NonLocalOptions) -> None:
        super().__init__(place, options)
        self.options = options
        channels, inter = self.in_channels, _inter(place, options)
        self.g = nn.Conv2d(channels, inter, 1)
        if options.pairwise != "gaussian":
            self.theta = nn.Conv2d(channels, inter, 1)
            self.phi = nn.Conv2d(channels, inter, 1)
        if options.pairwise == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inter, 1, 1, bias=False))
        last, norm = nn.Conv2d(inter, channels, 1), nn.BatchNorm2d(channels)
        self.W: nn.Module = nn.Sequential(last, norm) if options.norm == "batch" else last
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(norm.weight if options.norm == "batch" else last.weight)

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        assert isinstance(options, NonLocalOptions)
        if options.scale and options.pairwise in ("dot_product", "concatenation"):
            return f"scale has no meaning for {options.pairwise}, which has no softmax"
        return refuse_change(cls.name, place)

    def plain(self) -> nn.Identity | None:
        return nn.Identity() if self.content() == 0 else None

    def content(self) -> float:
        last = next(m for m in reversed(list(self.W.modules())) if isinstance(m, (nn.BatchNorm2d, nn.Conv2d)))
        return largest(last.weight, last.bias)  # of the norm, or of W_z where there is none

    def forward(self, x: Tensor) -> Tensor:
        gather = {
            "embedded_gaussian": self._embedded_gaussian,
            "gaussian": self._gaussian,
            "dot_product": self._dot_product,
            "concatenation": self._concatenation,
        }[self.options.pairwise]
        y: Tensor = self.W(to_map(gather(x), x))
        return x + y.to(x.dtype)

    def _keys(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, H*W, c), max-pooled if the block sub-samples: (B, M, c)."""
        if not self.options.sub_sample:
            return tokens
        return to_tokens(F.max_pool2d(to_map(tokens, x), (min(2, x.shape[2]), min(2, x.shape[3]))))

    def _scale(self, width: int) -> float:
        return float(width**-0.5) if self.options.scale else 1.0

    def _key_map(self, x: Tensor) -> Tensor:
        """As `_keys`, of maps."""
        return F.max_pool2d(x, (min(2, x.shape[2]), min(2, x.shape[3]))) if self.options.sub_sample else x

    def _stays_map(self, x: Tensor) -> bool:
        """Whether attention runs on maps as they are: small ones in float32 or float64, channels first."""
        return (
            whole_precision(x)
            and x.is_contiguous()
            and _small(self.options, x.shape[2] * x.shape[3], self.g.out_channels)
        )

    def _embedded_gaussian(self, x: Tensor) -> Tensor:
        if self._stays_map(x):
            q, k, v = self.theta(x), self._key_map(self.phi(x)), self._key_map(self.g(x))
            return attend_maps(q, k, v, self._scale(q.shape[1]))
        tokens = to_tokens(x)
        q = pointwise(self.theta, tokens)
        k = self._keys(pointwise(self.phi, tokens), x)
        v = self._keys(pointwise(self.g, tokens), x)
        del tokens  # the memory is needed elsewhere
        return attend(q, k, v, self._scale(q.shape[-1]))

    def _gaussian(self, x: Tensor) -> Tensor:
        if self._stays_map(x):
            return attend_maps(x, self._key_map(x), self._key_map(self.g(x)), self._scale(x.shape[1]))
        tokens = to_tokens(x)
        v = self._keys(pointwise(self.g, tokens), x)
        q = tokens.to(v.dtype)  # what autocast would have made of them
        return attend(q, self._keys(q, x), v, self._scale(q.shape[-1]))

    def _dot_product(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        q = pointwise(self.theta, tokens)
        k = self._keys(pointwise(self.phi, tokens), x)
        v = self._keys(pointwise(self.g, tokens), x)
        del tokens
        k = (k / v.shape[1]).transpose(1, 2)  # (B, d, M)
        if _matrix_first(q.shape[1], v.shape[1], v.shape[2]):
            return torch.bmm(torch.bmm(q, k), v)
        return torch.bmm(q, torch.bmm(k, v))

    def _concatenation(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        project = self.concat_project[0]
        assert isinstance(project, nn.Conv2d)
        weight = project.weight.view(2, -1)  # (2, d)
        a = _scalar(tokens, self.theta, weight[:1])  # (B, L)
        if self.options.sub_sample:
            b = F.linear(self._keys(pointwise(self.phi, tokens), x), weight[1:]).squeeze(-1)  # (B, M)
        else:
            b = _scalar(tokens, self.phi, weight[1:])
        g = self._keys(pointwise(self.g, tokens), x)
        del tokens
        if torch.onnx.is_in_onnx_export():  # which has no stable sort
            return torch.bmm(F.relu(a[:, :, None] + b[:, None]), g) / g.shape[1]
        return mean_of_relu(a, b, g).to(g.dtype)

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        assert isinstance(options, NonLocalOptions)
        channels, inter = place.in_shape[1], _inter(place, options)
        params = (channels + 1) * inter + (inter + 1) * channels
        params += 2 * channels if options.norm == "batch" else 0
        params += 0 if options.pairwise == "gaussian" else 2 * (channels + 1) * inter
        params += 2 * inter if options.pairwise == "concatenation" else 0
        infer, train = _activations(place, options)
        return Cost(params, _flops(place, options), FLOAT_BYTES * infer, FLOAT_BYTES * train)


def mean_of_relu(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """y_i = sum_j ReLU(a_i + b_j) g_j / M in O((L + M) (d + log)) instead of O(L M d).

    Args:
        a: (B, L). b: (B, M). g: (B, M, d).

    Returns:
        (B, L, d), in float32 or wider. Where a_i + b_j is exactly 0 the gradient is that of the flat side.
    """
    a, b, g = float32(a, b, g)
    batch, keys, width = g.shape
    queries = a.shape[1]
    # Queries come first, so that of equal values the stable sort counts the keys that are greater.
    order = torch.cat([-a, b], 1).detach().sort(dim=1, descending=True, stable=True).indices
    seen = (order >= queries).long().cumsum(1)
    count = torch.zeros_like(order).scatter(1, order, seen)[:, :queries]  # keys with b_j > -a_i
    b, order = b.sort(dim=1, descending=True, stable=True)
    start = torch.arange(batch, device=g.device)[:, None]
    g = g.flatten(0, 1).index_select(0, (order + start * keys).flatten()).view(batch, keys, width)
    sums = F.pad(torch.cat([g, b[..., None] * g], -1), (0, 0, 1, 0)).cumsum(1)  # (B, M + 1, 2*d)
    picked = sums.flatten(0, 1).index_select(0, (count + start * (keys + 1)).flatten()).view(batch, queries, 2 * width)
    del sums
    return torch.addcmul(picked[..., width:], a[..., None], picked[..., :width]) / keys


def _scalar(tokens: Tensor, conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """weight . conv(tokens), (B, L), by one product with the folded weights; weight (1, d)."""
    assert conv.bias is not None
    return F.linear(tokens, weight @ conv.weight.flatten(1), weight @ conv.bias).squeeze(-1)


def _inter(place: Place, options: NonLocalOptions) -> int:
    return options.inter_channels or max(1, place.in_shape[1] // 2)


def _matrix_first(queries: int, keys: int, width: int) -> bool:
    """Whether (theta phi^T) g is less work than theta (phi^T g)."""
    return 2 * queries * keys < (queries + keys) * width


def _sizes(place: Place, options: NonLocalOptions) -> tuple[int, int]:
    """(queries L, keys M)."""
    height, width = place.in_shape[2:]
    if not options.sub_sample:
        return height * width, height * width
    return height * width, max(1, height // 2) * max(1, width // 2)


def _small(options: NonLocalOptions, size: int, inter: int) -> bool:
    """Whether a softmax over a map of so many positions runs without tokens: x itself stands for them."""
    return options.pairwise in ("embedded_gaussian", "gaussian") and holds_logits(size, inter)


def _flops(place: Place, options: NonLocalOptions) -> int:
    batch, channels = place.in_shape[:2]
    inter, (size, keys) = _inter(place, options), _sizes(place, options)
    flops = 4 * batch * size * channels * inter
    if options.pairwise == "embedded_gaussian":
        return flops + batch * (4 * size * channels * inter + 4 * size * keys * inter)
    if options.pairwise == "gaussian":
        return flops + 2 * batch * size * keys * (channels + inter)
    if options.pairwise == "dot_product":
        products = min(4 * size * keys * inter, 2 * (size + keys) * inter**2)
        return flops + batch * (4 * size * channels * inter + products)
    if not options.sub_sample:
        return flops + 4 * batch * size * channels + 4 * channels * inter
    phi = 2 * batch * (size * channels * (inter + 1) + keys * inter)
    return flops + phi + 2 * channels * inter


def _activations(place: Place, options: NonLocalOptions) -> tuple[int, int]:
    """Elements (alive at once in inference, kept for training)."""
    batch, channels = place.in_shape[:2]
    inter, (size, keys) = _inter(place, options), _sizes(place, options)
    tokens = 0 if _small(options, size, inter) else size * channels  # a copy of the map
    projected, alive, kept = _gathering(options, tokens, channels, inter, size, keys)
    padded = options.pairwise == "gaussian" and not holds_logits(keys, inter)
    output, last = size * (max(channels, inter) if padded else inter), size * channels
    norm = last if options.norm == "batch" else 0  # its input is kept, its output lives beside it
    infer = max(tokens + projected, alive, max(output + last + norm, 2 * last))
    return batch * infer, batch * (kept + norm)


def _gathering(
    options: NonLocalOptions, tokens: int, channels: int, inter: int, size: int, keys: int
) -> tuple[int, int, int]:
    """Elements for one image: of projections beside the tokens, alive while y is computed, kept (y and tokens too)."""
    pool = options.sub_sample
    query, key = size * inter, keys * inter
    full = query if pool else 0  # what goes into a max pool is kept for its backward pass
    projected = 2 * (query + key) if pool else 3 * query
    if options.pairwise == "embedded_gaussian":
        alive, kept = attend_elements(size, keys, inter, inter)
        return projected, alive + query + 2 * key, kept + tokens + 2 * full
    if options.pairwise == "gaussian":
        alive, kept = attend_elements(size, keys, channels, inter)
        own = keys * channels if pool else 0  # without a pool the keys are the tokens
        projected = query + own + (key if pool else 0)
        twice = (2 if own == 0 else 1) * size * channels  # queries, and the same as keys: both are the tokens
        return projected, alive + tokens + own + key, kept + full + tokens - twice
    if options.pairwise == "dot_product":
        middle = size * keys if _matrix_first(size, keys, inter) else inter**2
        alive = max(query + 3 * key, 2 * (query + key) + middle)
        return projected, alive, tokens + 2 * (full + query + key) + middle
    alive = 4 * key + 2 * max(query, key)
    return query + key + (2 * key if pool else 0), alive, tokens + 2 * full + (2 if pool else 1) * key + 3 * query
