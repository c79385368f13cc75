"""The contract of every block: what a class must offer so that rules can put it into a network."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from convrewrite.blocks.folding import Affine, followed
from convrewrite.registry import Registry
from convrewrite.sites import ConvSpec, Cost, Place

Action = Literal["replace", "insert"]


_READ_BY_MODELS = {
    "kernel_size": "kernel",
    "stride": "stride",
    "padding": "padding",
    "dilation": "dilation",
    "groups": "groups",
    "padding_mode": "padding_mode",
}


class BlockOptions(BaseModel):
    """Options of a block: one pydantic field each, with default, limits and a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(nn.Module):
    """A module that can stand where a convolution stood, or be inserted into a feature map's way.

    A subclass sets the class attributes, builds its parameters in ``__init__(place, options)`` with
    the paper's own initialisation, and computes ``forward(x)`` for x (N, C_in, H, W) of *any* H x W,
    returning (N, C_out, H_out, W_out): where it replaces a convolution, exactly the size that the
    convolution would have returned.

    Class attributes:
        Options: the pydantic model of its options.
        actions: which of "replace" and "insert" it can do.
        exact: True if the freshly built block, inserted, is the exact identity (its gate is zero).
        span: "conv" if it stands for the convolution alone, "pool" if for the straight line from there to the
            next pooling (a ResNet's conv1, bn1, relu, maxpool), where `place.out_shape` is the pooling's, "block" if
            for the whole residual block around it, whose input and output `place` then has.
        silent: parameters whose gradient is zero by construction (they cancel out of the formula).
        paper: "Author et al. year, arXiv id".
    """

    Options: ClassVar[type[BlockOptions]] = BlockOptions
    actions: ClassVar[tuple[Action, ...]] = ("replace",)
    exact: ClassVar[bool] = False
    span: ClassVar[Literal["conv", "pool", "block"]] = "conv"
    silent: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    name: ClassVar[str] = ""

    backend: str = "auto"
    """What computes the block's attention, where it has a choice; `convrewrite.set_backend` sets it."""

    def __init__(self, place: Place, options: BlockOptions) -> None:
        super().__init__()
        self.place_conv = place.conv
        self.options = options
        self.in_channels = place.in_shape[1]
        self.out_channels = place.out_shape[1]

    @classmethod
    def refuse(cls, place: Place, options: BlockOptions) -> str | None:
        """Why this block cannot stand at `place` ("64 channels not divisible by 6 heads"), or None."""
        return None

    @classmethod
    def cost(cls, place: Place, options: BlockOptions) -> Cost:
        """Analytic cost of the block at `place`: params, FLOPs (2 per multiply-add), activation bytes."""
        raise NotImplementedError(f"{cls.__name__} must define cost()")

    @classmethod
    def holds(cls, place: Place, options: BlockOptions) -> bool:
        """Whether `load_conv` makes the block at `place` compute exactly what the convolution there does."""
        return False

    def load_conv(self, conv: nn.Conv2d) -> None:
        """Take over the weights of the convolution that is replaced, so that the output stays the same."""
        raise NotImplementedError(f"{type(self).__name__} does not hold a convolution")

    def plain(self) -> nn.Conv2d | nn.Identity | None:
        """The convolution that the block computes at present, or the identity; None where it attends to anything.

        A new module with copies of the weights. What is left out is nothing, or less than rounding in float64.
        """
        return None

    def content(self) -> float | None:
        """Largest absolute weight that stands between the block and `plain`; None if no weights make it linear."""
        return None

    def folded(self, after: Affine | None) -> Block | None:
        """A new block for inference that computes ``after(self(x))``, with what depends on weights alone done before.

        None if the block ends in nothing that could take `after` up, or, without one, if nothing can be done before.
        """
        return None

    def fused(self, after: Affine | None = None) -> nn.Module | None:
        """What may stand in the block's place at inference and is less work, followed by `after` (a batch norm).

        None if there is nothing, or nothing that takes `after` up.
        """
        plain = self.plain()
        if isinstance(plain, nn.Conv2d):
            return followed(plain, after)
        if plain is not None and after is None:
            return plain
        return self.folded(after)

    def __getattr__(self, name: str) -> Any:
        """Stride, padding and the like of the convolution that stood here, since some models read them."""
        if name in _READ_BY_MODELS and (conv := self.__dict__.get("place_conv")) is not None:
            top, left = conv.padding[2], conv.padding[0]
            return (top, left) if name == "padding" else getattr(conv, _READ_BY_MODELS[name])
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"


BLOCKS: Registry[type[Block]] = Registry("block", package="convrewrite.blocks")


def register_block(name: str):  # type: ignore[no-untyped-def]
    """Class decorator: make a `Block` available to rule files as `name`."""

    def add(cls: type[Block]) -> type[Block]:
        cls.name = name
        return BLOCKS.register(name)(cls)

    return add


def summary(cls: type[Block]) -> str:
    """First sentence of the block's docstring."""
    text = inspect.getdoc(cls) or ""
    return re.split(r"(?<=\.)\s", text.replace("\n", " "), maxsplit=1)[0]


def query_grid(size: int, kernel: int, stride: int, dilation: int, pad_before: int, pad_after: int) -> tuple[int, int]:
    """Where a convolution's windows are centred along one axis.

    Returns:
        (start, count): output i of the convolution is centred on input position
        ``start + i * stride`` (rounded down for an even span); `start` is negative where
        the convolution pads beyond "same".
    """
    span = dilation * (kernel - 1) + 1
    count = (size + pad_before + pad_after - span) // stride + 1
    return (span - 1) // 2 - pad_before, count


def conv_spec(conv: nn.Conv2d) -> ConvSpec:
    """The numbers of an ``nn.Conv2d``; ``padding="same"`` is resolved as torch does (extra at the end)."""
    kernel, dilation = tuple(conv.kernel_size), tuple(conv.dilation)
    if isinstance(conv.padding, str):
        totals = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        top, left = totals[0] // 2, totals[1] // 2
        padding = (left, totals[1] - left, top, totals[0] - top)
    else:
        padding = (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])
    return ConvSpec(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=(kernel[0], kernel[1]),
        stride=(conv.stride[0], conv.stride[1]),
        padding=padding,
        dilation=(dilation[0], dilation[1]),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )


def float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 unless they are wider already (softmax and norms accumulate in it)."""
    return tuple(t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors)
