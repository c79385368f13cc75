"""What a law looks at: the original, the rewritten model, and their outputs on one fixed batch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from convrewrite import graphs
from convrewrite.capture import light_copy
from convrewrite.plans import Plan
from convrewrite.reports import Drift, TensorFate
from convrewrite.sites import Site
from convrewrite.stands import stand_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative drift that rounding explains, by dtype."""


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
        return TOLERANCE.get(self.dtype, 1e-5)

    def by_parts(self, mode: str) -> tuple[float, float] | None:
        """The drift taken apart: (worst of the blocks that hold a convolution, all the rest); None if there are none.

        Each such block gives its output and hands on that of the convolution whose place it took, on the same input.
        So the first number is what the blocks do, each against its convolution, and the second what would be left if
        they did nothing: a network may make any amount of rounding larger, but has no rounding to start from then.
        """
        held = {e.id: e.path for e in self.plan.edits if e.how == "holds the conv"}
        old, new = (light_copy(m).train(mode == "train") for m in (self.original, self.rewritten))
        worst, seen = [0.0], set()

        def beside(conv: nn.Module) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def compare(module: nn.Module, args: Any, y: Tensor) -> Tensor:
                wanted: Tensor = conv(*args)
                worst.append(_relative(wanted, y))
                return wanted

            return compare

        for module in new.modules():
            stand = stand_of(module)
            if stand is not None and stand.edit in held:
                seen.add(stand.edit)
                path = held[stand.edit]
                conv = graphs.convolution(old, path) if ":" in path else old.get_submodule(path)
                module.register_forward_hook(beside(conv))
        if not held or seen != set(held):
            return None
        with torch.no_grad(), seeded(), quiet():
            rest = _drift(mode, self.outputs[mode][0], new(*self.example)).max_relative
        return max(worst), rest

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
    cosine = 1.0 if torch.equal(left, right) else _cosine(left, right)
    first = pairs[0]
    agreement = None
    if first[0].dim() == 2 and first[0].shape[1] > 1:
        agreement = float((first[0].argmax(1) == first[1].argmax(1)).double().mean())
    relative = gap / scale if scale else (0.0 if gap == 0 else float("inf"))
    return Drift(mode, relative, cosine, agreement)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of vectors of any length; `cosine_similarity` takes one below 1e-8, as untrained networks give, for longer."""
    tops = a.abs().max(), b.abs().max()
    if not all(tops):
        return 0.0
    a, b = a / tops[0], b / tops[1]
    return float(a @ b / (a.norm() * b.norm()))


def _relative(wanted: Tensor, y: Tensor) -> float:
    """max |y - wanted| / max |wanted|; infinite where that is not a number."""
    scale, gap = (float(t.detach().double().abs().max()) if t.numel() else 0.0 for t in (wanted, y - wanted))
    relative = gap / scale if scale else (0.0 if gap == 0 else float("inf"))
    return relative if relative == relative else float("inf")
