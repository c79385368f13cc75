"""Numbers and facts as short text: the one place that decides how a figure looks.

Everything returned is on one line and free of control characters, so that a hostile module name can
neither break a table nor send escape codes to a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from convrewrite.sites import Pair, Site

_UNITS = ("", "K", "M", "G", "T", "P", "E")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(number: int) -> str:
    """Three significant digits: 999, 1.23K, 36.9K, 231M."""
    return _scaled(number, lambda value: 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0)


def total(number: int) -> str:
    """Two decimals, for sums over a model: 999, 25.56M, 8.18G."""
    return _scaled(number, lambda value: 2)


def _scaled(number: int, decimals: Callable[[float], int]) -> str:
    value, unit = float(number), 0
    while unit + 1 < len(_UNITS) and abs(round(value, decimals(value) if unit else 0)) >= 1000:
        value, unit = value / 1000, unit + 1
    return f"{value:.{decimals(value)}f}{_UNITS[unit]}" if unit else str(number)


def size(number: int) -> str:
    """Bytes in binary units with one decimal: 512 B, 12.3 MiB."""
    value, unit = float(number), 0
    while unit + 1 < len(_BYTES) and abs(round(value, 1 if unit else 0)) >= 1024:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_BYTES[unit]}" if unit else f"{number} B"


def percent(before: float, after: float) -> str:
    """The change from `before` to `after` with its sign: "+25.6 %", "-3.0 %", "0 %"; "new" where nothing was."""
    if before == after:
        return "0 %"
    return f"{(after - before) / before * 100:+.1f} %" if before else "new"


def share(part: float, whole: float) -> str:
    """What part of the whole: "92.1 %"; "-" where the whole is nothing."""
    return f"{part / whole * 100:.1f} %" if whole else "-"


def change(before: int, after: int, show: Callable[[int], str] = count) -> str:
    """ "36.9K => 54.6K", or one figure where nothing changed."""
    return show(before) if before == after else f"{show(before)} => {show(after)}"


def small(value: float) -> str:
    """A drift or a tolerance: "0", "3.1e-07", "0.0123", "nan"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"


def seconds(value: float) -> str:
    """ "0.4 ms", "12 ms", "3.41 s"."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.1f} ms" if value < 0.01 else f"{value * 1000:.0f} ms"


def shape(dims: Sequence[int]) -> str:
    """ "1x3x224x224"; "scalar" for a tensor without dimensions."""
    return "x".join(str(d) for d in dims) or "scalar"


def arrow(before: str, after: str) -> str:
    """ "56x56>28x28", or one of the two where they are equal."""
    return before if before == after else f"{before}>{after}"


def kernel(site: Site) -> str:
    """ "3x3", with whatever is not the default: "3x3/2 g32 d2"."""
    parts = [shape(site.kernel)]
    if site.stride != (1, 1):
        parts[0] += "/" + pair(site.stride)
    if site.groups != 1:
        parts.append(f"g{site.groups}")
    if site.dilation != (1, 1):
        parts.append("d" + pair(site.dilation))
    return " ".join(parts)


def pair(values: Pair) -> str:
    """ "2", or "2x1" where height and width differ."""
    return str(values[0]) if values[0] == values[1] else shape(values)


def conv(site: Site) -> str:
    """ "conv 3x3/2 128>128 56x56>28x28": kernel, channels and sizes of a convolution."""
    name = "conv" if site.op == "conv2d" else plain(site.op)
    return f"{name} {kernel(site)} {channels(site)} {sizes(site)}"


def channels(site: Site) -> str:
    """ "64>256": channels in and out."""
    return f"{site.in_channels}>{site.out_channels}"


def sizes(site: Site) -> str:
    """ "56x56>28x28": height and width in and out."""
    return arrow(shape(site.in_shape[2:]), shape(site.out_shape[2:]))


def place(site: Site) -> str:
    """ "3.0": stage and block, "3" outside blocks, "-" on no path to the output."""
    if site.stage is None:
        return "-"
    return str(site.stage) if site.block is None else f"{site.stage}.{site.block}"


def options(values: Mapping[str, Any]) -> str:
    """ "heads=4 window=7", by name, so that a plan reads the same before and after it was saved."""
    return " ".join(f"{plain(str(key))}={_value(values[key])}" for key in sorted(values))


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_value(v) for v in value) + "]"
    return plain(str(value))


def plain(text: str) -> str:
    """`text` on one line, its control characters shown as escapes (newline as ``\\n``)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def plural(number: int, word: str) -> str:
    """ "1 block", "2 blocks"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
