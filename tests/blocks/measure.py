"""What a block really holds in memory, to check the costs that it states."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of floating point tensors made under it that were alive at once, without those of `given`."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def calls_that_hold_their_arguments() -> Iterator[None]:
    """As after `torch.compile` in the same process: every Python call keeps its arguments alive until it returns.

    Otherwise CPython hands them over to the callee, whose ``del`` then frees them: a figure that depends on what
    ran before.
    """
    torch._dynamo.reset()
    before = torch._C._dynamo.eval_frame.set_eval_frame(False)
    try:
        yield
    finally:
        torch._C._dynamo.eval_frame.set_eval_frame(before)


@mock.patch.dict(os.environ, CONVREWRITE_BACKEND="aten")
def measured_bytes(block: nn.Module, x: Tensor) -> tuple[int, int]:
    """(peak bytes of a forward in inference, bytes kept for backward in training), without weights and input.

    Of the backend "aten", which is what stated costs describe: it is there on every machine, and holds the most.
    """
    given = [x, *block.parameters(), *block.buffers()]
    with torch.no_grad(), calls_that_hold_their_arguments(), AliveBytes(given) as alive:
        block.eval()(x)
    own = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.is_floating_point():
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block.train()(x)
    size = sum(storage.nbytes() for storage in kept.values())
    del y
    return alive.peak, size
