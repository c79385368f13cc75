"""How close the rewritten model's outputs are to the original's on images that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.calibration.watching import resting, watch
from convrewrite.laws.case import tensors_of

BATCH = 32


@dataclass(frozen=True)
class Agreement:
    """Two models' outputs on the same images.

    Attributes:
        divergence: mean KL divergence of the original's class probabilities from the other's, in nats, where the
            first output is (N, classes); else the outputs' mean square difference as a share of their variance.
        top1: share of images with the same top class; None where there are no classes.
    """

    divergence: float
    top1: float | None


def batches(images: Tensor, like: nn.Module) -> Iterator[Tensor]:
    """`images` in batches, on the device and in the dtype of the model."""
    sample = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    for batch in torch.split(images, BATCH):
        yield batch.to(device=sample.device, dtype=sample.dtype)


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The tensors of the model's output, all images together, float64 on the CPU."""
    with resting(model):
        parts = [[t.detach().double().cpu() for t in tensors_of(model(b))] for b in batches(images, model)]
    return [torch.cat(p) for p in zip(*parts, strict=True) if p[0].dim() > 0]


def agreement(old: list[Tensor], new: list[Tensor]) -> Agreement:
    """Compare what `outputs` gave for the original and for the rewritten model."""
    first, second = old[0], new[0]
    if first.dim() == 2 and first.shape[1] > 1:
        left, right = first.log_softmax(1), second.log_softmax(1)
        divergence = float((left.exp() * (left - right)).sum(1).mean())
        return Agreement(max(divergence, 0.0), float((first.argmax(1) == second.argmax(1)).double().mean()))
    apart = sum(float((a - b).square().sum()) for a, b in zip(old, new, strict=True))
    spread = sum(float((a - a.mean()).square().sum()) for a in old)
    return Agreement(apart / spread if spread else apart, None)


def site_error(
    original: nn.Module, rewritten: nn.Module, old: str, new: str, images: Tensor, *, calls: int, scale: Tensor
) -> float:
    """Mean square difference of one site's output in both models, as a share of its variance in the original.

    Args:
        old, new: the site's path in either model. scale: (O,), weights of the output channels.
    """
    error, total, square, count = 0.0, torch.zeros_like(scale), torch.zeros_like(scale), 0
    with resting(original), resting(rewritten):
        for batch in batches(images, original):
            ours = watch(rewritten, new, batch, calls=calls).outputs
            theirs = watch(original, old, batch, calls=calls).outputs
            for a, b in zip(theirs, ours, strict=True):
                y, gap = a.double().cpu(), (a.double() - b.double()).cpu()
                error += float((gap.square().sum((0, 2, 3)) * scale.square()).sum())
                total += y.sum((0, 2, 3))
                square += y.square().sum((0, 2, 3))
                count += y.shape[0] * y.shape[2] * y.shape[3]
    spread = float(((square - total.square() / count) * scale.square()).sum())
    return error / spread if spread > 0 else error
