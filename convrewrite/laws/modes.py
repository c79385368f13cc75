"""Law `modes`: train() and eval() do what they did in the original; nothing is frozen in one mode."""

from __future__ import annotations

import torch
from torch import nn

from convrewrite.capture import light_copy
from convrewrite.laws import LAWS
from convrewrite.laws.case import Case, quiet, seeded, tensors_of
from convrewrite.reports import LawResult


@LAWS.register("modes")
def modes(case: Case) -> LawResult:
    """Flags, randomness and batch statistics of both modes."""
    for training in (True, False):
        twin = light_copy(case.rewritten).train(training)
        wrong = next((n for n, m in twin.named_modules() if m.training != training), None)
        if wrong is not None:
            return LawResult("modes", "broken", f"{wrong or 'the model'} ignores train({training})")
    wrong = _other_flag(case.original, case.rewritten)
    if wrong:
        return LawResult("modes", "broken", f"{wrong} is in another mode than in the original")
    for mode, training in (("eval", False), ("train", True)):
        before, after = (_behaviour(m, case, training=training) for m in (case.original, case.rewritten))
        if before[0] != after[0]:
            what = "random" if after[0] else "deterministic"
            return LawResult("modes", "broken", f"{mode} mode became {what}")
        # A buffer that an edit drops is the law `kept`'s affair.
        missing = {k for k in before[1] if case.moved.get(k) and not set(case.moved[k]) & after[1]}
        if missing:
            return LawResult("modes", "broken", f"{mode} mode no longer updates {sorted(missing)[0]}")
        extra = {k for k in after[1] if k in case.moved and k not in before[1]}
        if extra:
            return LawResult("modes", "broken", f"{mode} mode now updates {sorted(extra)[0]}")
    return LawResult("modes", "held", "train and eval mode as in the original")


def _behaviour(model: nn.Module, case: Case, *, training: bool) -> tuple[bool, set[str]]:
    """(two runs differ, buffers that a run updates)."""
    outs, changed = [], set()
    for seed in (0, 1):
        twin = light_copy(model).train(training)
        before = {k: v.clone() for k, v in twin.named_buffers()}
        with torch.no_grad(), seeded(seed), quiet():
            outs.append(tensors_of(twin(*case.example)))
        changed |= {k for k, v in twin.named_buffers() if not torch.equal(v, before[k])}
    same = all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(*outs, strict=True))
    return not same, changed


def _other_flag(original: nn.Module, rewritten: nn.Module) -> str | None:
    flags = {n: m.training for n, m in rewritten.named_modules()}
    return next((n for n, m in original.named_modules() if flags.get(n, m.training) != m.training), None)
