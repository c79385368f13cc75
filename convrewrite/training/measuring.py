"""How good a model is on images that it is not trained on: loss, accuracy, agreement with the original."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from convrewrite.data.batches import Batch
from convrewrite.training.losses import agreement, correct, cross_entropy, divergence, logits_of


@torch.no_grad()
def measure(
    model: nn.Module, batches: Iterable[Batch], accelerator: Any, *, teacher: nn.Module | None, temperature: float
) -> dict[str, float]:
    """``val_loss`` and ``val_accuracy`` over labelled images, ``agreement`` with `teacher`; all processes together.

    Without labels ``val_loss`` is the divergence from the teacher. The mode of `model` is restored.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)  # images, labelled, loss, right, agreeing
    for batch in batches:
        images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        with accelerator.autocast():
            logits = logits_of(model(images)).float()
            old = None if teacher is None else logits_of(teacher(images)).float()
        count, labelled = len(images), bool((labels >= 0).all())
        sums[0] += count
        if labelled:
            sums[1] += count
            sums[2] += float(cross_entropy(logits, labels, 0.0)) * count
            sums[3] += int(correct(logits, labels))
        if old is not None:
            sums[2] += 0.0 if labelled else float(divergence(logits, old, temperature)) * count
            sums[4] += int(agreement(logits, old))
    for module, mode in modes.items():
        module.training = mode
    shared = sums.float() if accelerator.device.type == "mps" else sums
    images_, labelled_, loss, right, agreeing = accelerator.reduce(shared.to(accelerator.device), "sum").tolist()
    found = {"val_loss": loss / images_}
    if labelled_ == images_:
        found["val_accuracy"] = right / images_
    if teacher is not None:
        found["agreement"] = agreeing / images_
    return found
