"""An average of the weights over the steps, which is often better than the weights of any one step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Averaged:
    """Exponential moving average of a model: avg += (1 - d) (weights - avg).

    d = min(decay, (1 + t) / (10 + t)) at update t, so that the random start is soon forgotten. Floating-point
    buffers (batch statistics) are averaged too; ``anneal`` and counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(requires_grad=False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        new = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not name.endswith("anneal"):
                value.lerp_(new[name].to(value.dtype), 1 - decay)
            else:
                value.copy_(new[name])
