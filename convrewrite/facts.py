"""The facts of a site under the names that expressions use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convrewrite.sites import Site

FACTS: dict[str, str] = {
    "in_channels": "channels of the input",
    "out_channels": "channels of the output",
    "kernel": "kernel size; no value where height and width differ",
    "stride": "stride; no value where height and width differ",
    "dilation": "dilation; no value where height and width differ",
    "groups": "groups of the convolution",
    "h": "height of the input",
    "w": "width of the input",
    "h_out": "height of the output",
    "w_out": "width of the output",
    "area": "h * w",
    "area_out": "h_out * w_out",
    "stage": "0 for the stem, then 1, 2, ... by resolution",
    "stage_from_end": "1 for the last stage",
    "n_stages": "number of the last stage",
    "block": "index of the block in its stage, from 0",
    "block_from_end": "1 for the last block of its stage",
    "position": "place of the convolution on its block's branch, from 1",
    "index": "place of the convolution in the whole network, from 0",
    "params": "parameters of the convolution",
    "flops": "its floating point operations, 2 per multiply-add",
    "role": "the role, as text",
}
"""Every name an expression may use, besides ``vars.NAME``."""


def site_facts(site: Site, n_stages: int = 0, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of `site` under the names that expressions use; None for what the site does not have."""
    (h, w), (h_out, w_out) = _size(site.in_shape), _size(site.out_shape)
    return {
        **{name: getattr(site, name) for name in FACTS if hasattr(site, name)},
        "kernel": _one(site.kernel),
        "stride": _one(site.stride),
        "dilation": _one(site.dilation),
        "h": h,
        "w": w,
        "h_out": h_out,
        "w_out": w_out,
        "area": h * w if h is not None and w is not None else None,
        "area_out": h_out * w_out if h_out is not None and w_out is not None else None,
        "n_stages": n_stages,
        "vars": dict(variables or {}),
    }


def _size(shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    return (shape[-2], shape[-1]) if len(shape) == 4 else (None, None)


def _one(pair: tuple[int, int]) -> int | None:
    return pair[0] if len(set(pair)) == 1 else None
