"""What training makes small: cross-entropy, the divergence from the original, the distance of features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convrewrite.data import DataError
from convrewrite.training.settings import Settings


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al. 2015, arXiv 1503.02531).

    Shape: (N, classes) both -> ().
    """
    new = F.log_softmax(student.float() / temperature, dim=1)
    old = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(new, old, reduction="batchmean", log_target=True) * temperature**2


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's variance within channels: 0 is perfect, 1 is a constant for each channel.

    Shape: (N, C, H, W) both -> ().
    """
    output, target = output.float(), target.float().detach()
    spread = (target - target.mean((0, 2, 3), keepdim=True)).square().mean()
    return (output - target).square().mean() / (spread + 1e-12)


def mixer(settings: Settings, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """mixup, CutMix or a fair draw of the two, from (images, labels) to (images, soft labels); None if both are off."""
    from torchvision.transforms import v2

    chosen: list[Any] = []
    if settings.mixup:
        chosen.append(v2.MixUp(alpha=settings.mixup, num_classes=classes))
    if settings.cutmix:
        chosen.append(v2.CutMix(alpha=settings.cutmix, num_classes=classes))
    if not chosen:
        return None
    draw = chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixed: tuple[Tensor, Tensor] = draw(images, labels.clamp(min=0))  # without labels only the images count
        return mixed

    return mix


def check_labels(labels: Tensor, indices: tuple[int, ...], classes: int, name: str) -> None:
    """Refuse labels that the model has no output for.

    Raises:
        DataError: naming the first such image.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong) == 0:
        return
    where, label = f"{name}, image {indices[int(wrong[0])]}", int(labels[wrong[0]])
    if label == -1:
        raise DataError("it has no label", where=where, fix="convrewrite distill needs none")
    raise DataError(f"the label is {label}, the model has classes 0 to {classes - 1}", where=where)


def logits_of(output: Any) -> Tensor:
    """(N, classes) from whatever a classifier returns: a tensor, one under ``logits`` or ``out``, the first of a tuple.

    Raises:
        DataError: there is no such tensor.
    """
    found = output
    for name in ("logits", "out"):
        if isinstance(output, dict) and name in output:
            found = output[name]
        elif hasattr(output, name):
            found = getattr(output, name)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise DataError(f"the model returns a {type(found).__name__}{shape}, not (N, classes)", fix="train it yourself")
    return found


def agreement(one: Tensor, other: Tensor) -> Tensor:
    """How many samples have the same most likely class."""
    return (one.argmax(1) == other.argmax(1)).sum()


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples are classified rightly."""
    return (logits.argmax(1) == labels).sum()


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy in float32 for class numbers or soft labels."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def finite(loss: Tensor) -> bool:
    """Whether a loss is a number."""
    return bool(torch.isfinite(loss.detach()))
