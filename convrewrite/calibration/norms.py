"""Batch-norm statistics measured again on the rewritten model, and kept only if that brings it closer to the original.

It rescues fits that shift the activations' statistics, and does harm after an anchored fit of a weak block; so
the held-out images decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.calibration.agreement import Agreement, agreement, batches, outputs
from convrewrite.calibration.watching import resting


@dataclass(frozen=True)
class Norms:
    """What came of it.

    Attributes:
        changed: state-dict keys whose values are new; () if the old statistics were put back.
        before, after: agreement on the held-out images with the old and with the new statistics.
    """

    changed: tuple[str, ...]
    before: Agreement
    after: Agreement


def re_estimate(model: nn.Module, fit: Tensor, held_out: Tensor, wanted: list[Tensor]) -> Norms | None:
    """Measure all batch norms of `model` again; None where it has none with statistics.

    Args:
        fit: images to measure on. held_out: images to decide on. wanted: the original's `outputs` on those.
    """
    norms = {p: m for p, m in model.named_modules() if _measurable(m)}
    if not norms:
        return None
    before = agreement(wanted, outputs(model, held_out))
    kept = {path: {k: b.clone() for k, b in norm.named_buffers()} for path, norm in norms.items()}
    with resting(model):
        momenta = {path: norm.momentum for path, norm in norms.items()}
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for batch in batches(fit, model):
            if len(batch) > 1:
                model(batch)
        for path, norm in norms.items():
            norm.momentum = momenta[path]
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.copy_(kept[path]["num_batches_tracked"])
    after = agreement(wanted, outputs(model, held_out))
    if after.divergence < before.divergence:
        keys = [f"{path}.{name}" for path in norms for name in ("running_mean", "running_var")]
        return Norms(tuple(keys), before, after)
    with torch.no_grad():
        for path, norm in norms.items():
            for name, buffer in norm.named_buffers():
                buffer.copy_(kept[path][name])
    return Norms((), before, after)


def _measurable(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
