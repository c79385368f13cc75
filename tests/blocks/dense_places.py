"""Places and builders that the tests of the map-wide blocks share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from convrewrite.blocks.base import BLOCKS, Block
from convrewrite.sites import ConvSpec, Place

SIZES = [(1, 1), (1, 4), (3, 1), (2, 2), (4, 3), (5, 5)]
NAMES = ["position_attention", "channel_attention", "dual_attention", "criss_cross", "non_local"]
Built = TypeVar("Built", bound=Block)


def inserted(channels: int, size: tuple[int, int], batch: int = 2) -> Place:
    """A place without a convolution."""
    return Place((batch, channels, *size), (batch, channels, *size))


def instead_of(c_in: int, c_out: int, size: tuple[int, int], **conv: Any) -> Place:
    """The place of a 3 x 3 convolution, padded by one unless told otherwise."""
    spec = ConvSpec(c_in, c_out, (3, 3), **{"padding": (1, 1, 1, 1), **conv})
    return Place((1, c_in, *size), (1, c_out, *spec.out_size(*size)), spec)


def awake(cls: type[Built], where: Place, **options: Any) -> Built:
    """A block in float64 and eval mode, every parameter and statistic at random, gates open."""
    torch.manual_seed(0)
    block = cls(where, cls.Options(**options)).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    for name, buffer in block.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return block


def sample(where: Place, *, seed: int = 1) -> Tensor:
    """A float64 input for a place."""
    return torch.randn(where.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_match(block: Block, x: Tensor) -> bool:
    """gradcheck of input and parameters."""
    names, parameters = zip(*block.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return result

    return bool(torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters)))


def peer(path: str, *, name: str = "") -> ModuleType:
    """A module of the authors from a checkout under $CONVREWRITE_PEERS; skips where there is none."""
    root = os.environ.get("CONVREWRITE_PEERS")
    if not root:
        pytest.skip("CONVREWRITE_PEERS is not set")
    spec = importlib.util.spec_from_file_location(name or "peer_" + Path(path).stem, Path(root) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(name: str, where: Place, **options: Any) -> str | None:
    """What the block says about a place."""
    cls = BLOCKS.get(name)
    return cls.refuse(where, cls.Options(**options))
