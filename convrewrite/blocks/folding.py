"""A number per channel that multiplies a map and one that is added to it, folded into what comes before."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.sites import ConvSpec

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


@dataclass(frozen=True)
class Affine:
    """y -> scale y + shift, channel by channel: what a batch norm is in eval mode. Both (C,), in float64."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of_norm(cls, norm: Norm) -> Affine:
        """Of a batch norm with running statistics, as it computes in eval mode."""
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -norm.running_mean.detach().double() * scale
        return cls(scale, shift if norm.bias is None else shift + norm.bias.detach().double())

    def of(self, factor: Tensor) -> Affine:
        """The same of a map that is multiplied by `factor` (C,) first."""
        return Affine(self.scale * factor, self.shift)

    def weight(self, weight: Tensor) -> nn.Parameter:
        """A weight (C, ...) whose output is scaled; computed in float64, returned in its own dtype."""
        scaled = weight.detach().double() * self.scale.view(-1, *[1] * (weight.dim() - 1))
        return frozen(scaled.to(weight.dtype))

    def bias(self, bias: Tensor | None, like: Tensor) -> nn.Parameter:
        """The bias of the same; one that was absent counts as 0. In the dtype of `like`."""
        value = self.shift if bias is None else bias.detach().double() * self.scale + self.shift
        return frozen(value.to(like.dtype))


def frozen(value: Tensor) -> nn.Parameter:
    """A parameter with a copy of the values, which is not trained."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


def is_plain(conv: nn.Module) -> bool:
    """Whether it is a convolution that convolves with its parameter `weight` as it is, so that the weight can change.

    Not so: subclasses of their own forward (weight standardisation), parametrizations and weight norm.
    """
    if not isinstance(conv, nn.Conv2d):
        return False
    plain = type(conv)._conv_forward is nn.Conv2d._conv_forward and type(conv).forward is nn.Conv2d.forward
    return plain and isinstance(conv._parameters.get("weight"), nn.Parameter)


def fold(conv: nn.Conv2d, after: Affine) -> None:
    """Change `conv`, in place, so that it computes what `after` makes of its output."""
    conv.bias, conv.weight = after.bias(conv.bias, conv.weight), after.weight(conv.weight)


def followed(conv: nn.Conv2d, after: Affine | None) -> nn.Conv2d:
    """A copy of `conv` that computes what `after` makes of its output."""
    twin = copy.deepcopy(conv)
    if after is not None:
        fold(twin, after)
    return twin


def largest(*weights: Tensor | None) -> float:
    """Largest absolute value in all of them; None is no weight."""
    found = [float(w.detach().abs().max()) for w in weights if w is not None and w.numel()]
    return max(found, default=0.0)


def conv_of(spec: ConvSpec, weight: Tensor, bias: Tensor | None, *, like: Tensor) -> nn.Conv2d:
    """The convolution that `spec` describes, with this weight and bias, in eval mode, not to be trained.

    Args:
        weight: (C_out, C_in / groups, kh, kw). like: has the device and dtype that the convolution is to have.
    """
    left, right, top, bottom = spec.padding
    same = left != right or top != bottom  # only padding="same" of an even kernel pads so
    with torch.device("meta"):
        conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            (weight.shape[2], weight.shape[3]),
            spec.stride,
            "same" if same else (top, left),
            spec.dilation,
            spec.groups,
            bias=False,
            padding_mode=spec.padding_mode,  # type: ignore[arg-type]  # a str in ConvSpec
        )
    conv.weight = frozen(weight.to(like))
    conv.bias = None if bias is None else frozen(bias.to(like))
    return conv.eval()
