"""The blocks as textbooks and most repositories write them, done properly: by unfold, or with all logits held.

They are what a user would have without this package, so they use no tricks, but make no avoidable mistakes either.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrewrite.bench.baselines import baseline, whole_logits

WINDOW = 7


def _windows(x: Tensor, heads: int, mode: str) -> Tensor:
    """(B, C, H, W) -> (B * N, d, 49, H * W), by unfold."""
    b, c, h, w = x.shape
    padded = F.pad(x, (WINDOW // 2,) * 4, mode=mode)
    return F.unfold(padded, WINDOW).view(b * heads, c // heads, WINDOW**2, h * w)


class UnfoldSASA(nn.Module):
    """Stand-alone self-attention, window 7, row and column embeddings, zero border."""

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, dim = heads, channels // heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(dim // 2, WINDOW, 1))
        self.columns = nn.Parameter(torch.randn(dim - dim // 2, 1, WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).chunk(3, 1)
        relative = torch.cat([self.rows.expand(-1, -1, WINDOW), self.columns.expand(-1, WINDOW, -1)])
        q = q.reshape(b * self.heads, c // self.heads, 1, h * w)
        keys = _windows(k, self.heads, "constant") + relative.flatten(1)[..., None]
        weights = (q * keys).sum(1).softmax(1)  # (B * N, 49, H*W)
        y: Tensor = (weights[:, None] * _windows(v, self.heads, "constant")).sum(2)  # (B * N, d, H*W)
        return y.view(b, c, h, w)


class UnfoldACmix(nn.Module):
    """ACmix with 4 heads, window 7 and reflected border."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, dim = heads, channels // heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.position = nn.Conv2d(2, dim, 1)
        self.fc = nn.Conv2d(3 * heads, 9, 1, bias=False)
        self.shift = nn.Conv2d(9 * dim, channels, 3, padding=1, groups=dim, bias=False)
        self.rates = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        dim = c // self.heads
        q, k, v = self.qkv(x).chunk(3, 1)
        grid = torch.stack(torch.meshgrid(_axis(h, x), _axis(w, x), indexing="ij")).flip(0)[None]
        place = self.position(grid)  # (1, d, H, W)
        query = q.reshape(b * self.heads, dim, 1, h * w) * dim**-0.5
        keys = _windows(k, self.heads, "reflect") + place.reshape(1, dim, 1, h * w) - _windows(place, 1, "reflect")
        weights = (query * keys).sum(1).softmax(1)
        attention = (weights[:, None] * _windows(v, self.heads, "reflect")).sum(2).view(b, c, h, w)
        mixed = self.fc(torch.cat([t.reshape(b, self.heads, dim, h * w) for t in (q, k, v)], 1))  # (B, 9, d, H*W)
        convolved = self.shift(mixed.permute(0, 2, 1, 3).reshape(b, 9 * dim, h, w))
        y: Tensor = self.rates[0] * attention + self.rates[1] * convolved
        return y


def _axis(size: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype)


class UnfoldOutlook(nn.Module):
    """Outlook attention, K = 3, by unfold and fold of the values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.v = nn.Conv2d(channels, channels, 1, bias=False)
        self.attn = nn.Conv2d(channels, self.heads * 81, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        dim = c // self.heads
        values = F.unfold(self.v(x), 3, padding=1).view(b, self.heads, dim, 9, h * w).permute(0, 1, 4, 3, 2)
        weights = (self.attn(x) * dim**-0.5).view(b, self.heads, 9, 9, h * w).permute(0, 1, 4, 2, 3).softmax(-1)
        out = (weights @ values).permute(0, 1, 4, 3, 2).reshape(b, c * 9, h * w)
        result: Tensor = self.proj(F.fold(out, (h, w), 3, padding=1))
        return result


class WholeLogits(nn.Module):
    """Attention over the map with relative logits, N heads, all of them held: the form of AA-Conv's and BoT's papers.

    With `convolution` a convolution makes the other output channels.
    """

    def __init__(self, channels: int, side: int, heads: int, keys: int, values: int) -> None:
        super().__init__()
        self.heads, self.keys, self.values, dim = heads, keys, values, keys // heads
        self.qkv = nn.Conv2d(channels, 2 * keys + values, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(2 * side - 1, dim) * dim**-0.5)
        self.columns = nn.Parameter(torch.randn(2 * side - 1, dim) * dim**-0.5)
        self.convolution = (
            nn.Conv2d(channels, channels - values, 3, padding=1, bias=False) if values < channels else None
        )
        self.proj = nn.Conv2d(values, values, 1, bias=False) if values < channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        parts = self.qkv(x).split([self.keys, self.keys, self.values], 1)
        q, k, v = (t.reshape(b, self.heads, t.shape[1] // self.heads, h * w).transpose(2, 3) for t in parts)
        q = q * (self.keys // self.heads) ** -0.5
        grid = q.view(b, self.heads, h, w, q.shape[3])
        logits = (q @ k.transpose(2, 3)).view(b, self.heads, h, w, h, w)
        logits = logits + torch.einsum("bnyxd,yed->bnyxe", grid, _pairs(self.rows, h))[..., None]
        logits = logits + torch.einsum("bnyxd,xed->bnyxe", grid, _pairs(self.columns, w))[..., None, :]
        out = logits.view(b, self.heads, h * w, h * w).softmax(3) @ v
        out = self.proj(out.transpose(2, 3).reshape(b, self.values, h, w))
        return out if self.convolution is None else torch.cat([self.convolution(x), out], 1)


def _pairs(table: Tensor, size: int) -> Tensor:
    """A table over offsets (2 n - 1, d) laid out over (query, key): (n, n, d)."""
    at = torch.arange(size, device=table.device)
    return table[at - at[:, None] + size - 1]


@baseline("sasa", name="unfold", kind="plain")
def _sasa(channels: int, side: int, peers: Path | None) -> nn.Module:
    return UnfoldSASA(channels)


@baseline("acmix", name="unfold", kind="plain")
def _acmix(channels: int, side: int, peers: Path | None) -> nn.Module:
    return UnfoldACmix(channels)


@baseline("outlook", name="unfold", kind="plain")
def _outlook(channels: int, side: int, peers: Path | None) -> nn.Module:
    return UnfoldOutlook(channels)


@baseline("aa_conv", name="whole logits", kind="plain", needs=whole_logits(8))
def _aa_conv(channels: int, side: int, peers: Path | None) -> nn.Module:
    keys, values = aa_widths(channels)
    return WholeLogits(channels, side, 8, keys, values)


@baseline("mhsa", name="whole logits", kind="plain", needs=whole_logits(4))
def _mhsa(channels: int, side: int, peers: Path | None) -> nn.Module:
    return WholeLogits(channels, side, 4, channels, channels)


def aa_widths(channels: int) -> tuple[int, int]:
    """Channels of AA-Conv's keys and values: 8 heads, kappa .2, upsilon .1, 20 a head or more (arXiv 1904.09925)."""
    return 8 * max(20, channels // 5 // 8), 8 * max(1, channels // 10 // 8)
