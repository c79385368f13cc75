"""Selectors on the convolution itself: kind, kernel, stride, dilation, groups, channels, input size, cost."""

from __future__ import annotations

from convrewrite.selectors.base import Context, Wanted, by, differs, selector
from convrewrite.selectors.wanted import Numbers, OneOf
from convrewrite.sites import Site

OPS = ("conv2d", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@selector("op", OneOf(OPS, "kind of convolution"))
def op(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Kind of convolution; rules rewrite conv2d only."""
    return differs("op", site.op, wanted)


@selector("kernel", Numbers(pair=True))
def kernel(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Kernel size; a number or comparison must hold for height and width: 3, [3, 5], "1x7", ">=5"."""
    return differs("kernel", site.kernel, wanted, by(site.kernel))


@selector("stride", Numbers(pair=True))
def stride(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Stride, for height and width: 1, "2x1", ">=2"."""
    return differs("stride", site.stride, wanted, by(site.stride))


@selector("dilation", Numbers(pair=True))
def dilation(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Dilation, for height and width: 1, ">=2"."""
    return differs("dilation", site.dilation, wanted, by(site.dilation))


@selector("groups", Numbers(words=("depthwise",)))
def groups(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Groups: 1, ">1", or depthwise (as many groups as input channels, and more than one)."""
    words = {"depthwise"} if site.groups == site.in_channels > 1 else set()
    return differs("groups", (site.groups, words), wanted, str(site.groups))


@selector("in_channels", Numbers())
def in_channels(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Input channels: 64, "<=256"."""
    return differs("in_channels", site.in_channels, wanted)


@selector("out_channels", Numbers())
def out_channels(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Output channels: 64, "<=256"."""
    return differs("out_channels", site.out_channels, wanted)


@selector("size", Numbers(pair=True))
def size(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Height and width of the input: 14, "<=28", "56x56"."""
    if len(site.in_shape) != 4:
        return differs("size", None, wanted)
    return differs("size", site.in_shape[2:], wanted, by(site.in_shape[2:]))


@selector("area", Numbers(scaled=True))
def area(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Height times width of the input: "<=784"."""
    known = len(site.in_shape) == 4
    return differs("area", site.in_shape[2] * site.in_shape[3] if known else None, wanted)


@selector("params", Numbers(minimum=0, scaled=True))
def params(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Parameters of the convolution: ">=1M"."""
    return differs("params", site.params, wanted)


@selector("flops", Numbers(minimum=0, scaled=True))
def flops(site: Site, wanted: Wanted, context: Context) -> str | None:
    """Floating point operations of the convolution, 2 per multiply-add: ">=1G"."""
    return differs("flops", site.flops, wanted)
