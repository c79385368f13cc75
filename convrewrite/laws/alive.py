"""Law `alive`: output and gradients are finite, and the loss reaches every new parameter that it can reach."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convrewrite.capture import light_copy
from convrewrite.laws import LAWS
from convrewrite.laws.case import Case, quiet, seeded, tensors_of
from convrewrite.reports import LawResult


@LAWS.register("alive")
def alive(case: Case) -> LawResult:
    """One forward and backward in train mode on a copy that shares the parameters.

    Where the loss did not reach a site's convolution (an auxiliary head whose output is only used with labels), it need
    not reach what stands there now.
    """
    twin = light_copy(case.rewritten).train()
    named = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    if not named:
        return LawResult("alive", "skipped", "no parameter requires a gradient")
    with torch.enable_grad(), seeded(), quiet():
        outputs = [t for t in tensors_of(twin(*case.example)) if t.is_floating_point()]
        if not all(bool(torch.isfinite(t).all()) for t in outputs):
            return LawResult("alive", "broken", "the output is not finite")
        grads: tuple[Tensor | None, ...] = (None,) * len(named)
        if any(t.requires_grad for t in outputs):
            loss = torch.stack([_loss(t) for t in outputs if t.requires_grad]).sum()
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    unused = _unused_before(case)
    idle = {e.id for e in case.plan.edits if e.action == "replace" and f"{e.path}.weight" in unused}
    waived = {t.name for t in case.tensors if t.source in unused or t.edit in idle}
    for name, grad in zip(named, grads, strict=True):
        if grad is None and name not in waived:
            return LawResult("alive", "broken", f"no gradient reaches {name}")
        if grad is not None and not bool(torch.isfinite(grad).all()):
            return LawResult("alive", "broken", f"the gradient of {name} is not finite")
    return LawResult("alive", "held", f"finite gradients in {sum(g is not None for g in grads)} parameters")


def _loss(output: Tensor) -> Tensor:
    """A loss whose gradient is not the same for all outputs."""
    flat = output.float().flatten()
    return (flat * torch.linspace(-1, 1, flat.numel(), device=flat.device)).sum() + flat.square().mean()


def _unused_before(case: Case) -> set[str]:
    """Parameters that the original did not use either."""
    twin: nn.Module = light_copy(case.original).train()
    named = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    if not named:
        return set()
    with torch.enable_grad(), seeded(), quiet():
        outputs = [t for t in tensors_of(twin(*case.example)) if t.requires_grad]
        if not outputs:
            return set(named)
        loss = torch.stack([t.float().sum() for t in outputs]).sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n for n, g in zip(named, grads, strict=True) if g is None}
