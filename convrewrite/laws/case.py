"""What a law looks at: the original, the rewritten model, and their outputs on one fixed batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from convrewrite.capture import light_copy
from convrewrite.plans import Plan
from convrewrite.reports import Drift, TensorFate
from convrewrite.sites import Site

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative drift that rounding explains, by dtype."""

OTHER_SUMS = 10
"""Times that, where blocks hold convolutions: they sum in another order, and layers behind make rounding larger. A
ResNet-50 itself drifts by 2e-5 to 7e-5 in float32 from channels first to channels last, or to float64."""


@dataclass
class Case:
    """One rewrite under examination; nothing here changes either model.

    Attributes:
        example: real tensors on the model's device, batch of at least two.
        tensors: every tensor's fate. replan: plans again on the rewritten model and returns what it would edit.
        again: applies the same plan to the original a second time.
    """

    original: nn.Module
    rewritten: nn.Module
    plan: Plan
    sites: tuple[Site, ...]
    example: tuple[Any, ...]
    tensors: tuple[TensorFate, ...]
    moved: Mapping[str, tuple[str, ...]]
    replan: Any
    again: Any

    @cached_property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.original.parameters() if p.is_floating_point()), torch.float32)

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.dtype, 1e-5) * (OTHER_SUMS if self.holding else 1)

    @property
    def holding(self) -> bool:
        """True if a block holds the convolution that it replaced."""
        return any(e.how == "holds the conv" for e in self.plan.edits)

    def amplified(self, mode: str) -> float:
        """Relative drift of the original itself if the convolutions that blocks hold rounded a little differently.

        Their outputs get noise of a hundredth of the dtype's tolerance, about one rounding; batch statistics of small
        maps can make a thousand times as much of it.
        """
        twin = light_copy(self.original).train(mode == "train")
        generator = torch.Generator().manual_seed(0)  # its own: the model's random numbers stay those of the outputs
        size = TOLERANCE.get(self.dtype, 1e-5) / 100

        def rounded(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return y + y.abs().max() * size * torch.randn(y.shape, generator=generator).to(y)

        held = [e.path for e in self.plan.edits if e.how == "holds the conv" and ":" not in e.path]
        for path in held:
            twin.get_submodule(path).register_forward_hook(rounded)
        with torch.no_grad(), seeded(), quiet():
            return _drift(mode, self.outputs[mode][0], twin(*self.example)).max_relative

    @property
    def exact(self) -> bool:
        """True if every edit claims an exact start."""
        return all(e.start == "exact" for e in self.plan.edits)

    @cached_property
    def outputs(self) -> dict[str, tuple[Any, Any]]:
        """mode -> (original's output, rewritten's output), same seed."""
        return {
            mode: tuple(self.run(m, training=mode == "train") for m in (self.original, self.rewritten))
            for mode in ("eval", "train")
        }

    def run(self, model: nn.Module, *, training: bool) -> Any:
        """Output on a copy that shares the parameters, so that batch statistics stay as they are."""
        twin = light_copy(model).train(training)
        with torch.no_grad(), seeded(), quiet():
            return twin(*self.example)

    def drift(self) -> tuple[Drift, ...]:
        """How far apart the outputs are in both modes."""
        return tuple(_drift(mode, old, new) for mode, (old, new) in self.outputs.items())


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random numbers from a fixed seed; the caller's generators are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A user's model may warn; the laws are not the place to repeat it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a nested output, in a fixed order."""
    return [t for t in tree_flatten(_plain(output))[0] if isinstance(t, Tensor)]


def _plain(output: Any) -> Any:
    """Named tuples and mappings as plain containers."""
    if isinstance(output, tuple):
        return tuple(_plain(v) for v in output)
    if isinstance(output, list):
        return [_plain(v) for v in output]
    if isinstance(output, Mapping):
        return {k: _plain(v) for k, v in output.items()}
    return output


def _drift(mode: str, old: Any, new: Any) -> Drift:
    pairs = [(a, b) for a, b in zip(tensors_of(old), tensors_of(new), strict=False) if a.shape == b.shape]
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs if a.is_floating_point()]
    if not pairs:
        return Drift(mode, 0.0, 1.0)
    scale = max(float(a.abs().max()) if a.numel() else 0.0 for a, _ in pairs)
    gap = max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)
    left, right = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
    cosine = 1.0 if torch.equal(left, right) else float(nn.functional.cosine_similarity(left, right, dim=0))
    first = pairs[0]
    agreement = None
    if first[0].dim() == 2 and first[0].shape[1] > 1:
        agreement = float((first[0].argmax(1) == first[1].argmax(1)).double().mean())
    relative = gap / scale if scale else (0.0 if gap == 0 else float("inf"))
    return Drift(mode, relative, cosine, agreement)
