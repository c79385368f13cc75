"""A copy of a model for inference, in which everything that depends on weights alone is computed beforehand.

What may be folded into what is seen by running the copy once in eval mode: a batch norm goes into the convolution or
block before it only if nothing else ever reads what lies between them. That holds where no tracer gets through, too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from convrewrite import provenance
from convrewrite.blocks.base import Block
from convrewrite.blocks.blend import Blend
from convrewrite.blocks.folding import Affine, Norm, fold, is_plain
from convrewrite.editing import exchange, move_hooks
from convrewrite.errors import EditError
from convrewrite.identity import check_module
from convrewrite.pipeline import Example, example_of, real_example
from convrewrite.sources.examples import tensors_in
from convrewrite.stands import mark, stand_of


@dataclass(frozen=True)
class Fusion:
    """One thing that `fuse` did.

    Attributes:
        path: of the convolution, block or blend. name: what stood there: a block's registry name, else the class.
        became: "convolution", "identity", "block", "sum" or "folded": the block itself, computed ahead;
            "" for what is there as before but for a batch norm.
        norm: path of the batch norm that was folded into it; "" if there was none.
    """

    path: str
    name: str
    became: str = ""
    norm: str = ""


@dataclass(frozen=True)
class Fused:
    """A fused model, what was done, and the paths of batch norms that are still there."""

    model: nn.Module
    fusions: tuple[Fusion, ...]
    norms_left: tuple[str, ...]


def fuse(model: nn.Module, *, example: Example = None) -> nn.Module:
    """A copy of `model` for inference: less work, and the same output but for rounding.

    - A batch norm goes into the convolution or block before it, if that alone feeds it.
    - A blend at 1 is its block; one whose gate and anneal are exactly 0 is its convolution; one in between keeps both,
      with their shares in the weights.
    - A block that is exactly a convolution (full-width heads without content, an attention rate of 0) becomes one; an
      inserted block whose gate is exactly 0 goes.
    - Of ACmix, fc, grouped convolution, rates and batch norm become one convolution of queries, keys and values.

    The copy is in eval mode, its parameters are frozen, and ``train()`` is refused. It is not saved: save `model`, and
    fuse what `load` returns; or export the copy.

    Args:
        model: rewritten or not. It is left as it is.
        example: inputs for the one run that shows what feeds what, as for `rewrite`; the plan's by default.

    Raises:
        EditError: the model has no weights, or does not run on `example`.
    """
    return fuse_model(model, example=example).model


def fuse_model(model: nn.Module, *, example: Example = None) -> Fused:
    """`fuse`, with an account of what was done."""
    check_module(model)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise EditError("a model without weights cannot be fused", where=type(model).__name__, fix="load its weights")
    if example is None and (note := provenance.of(model)) is not None:
        example = note.plan.input_shape or None
    twin = _copied(model)
    pairs = _pairs(twin, real_example(twin, example_of(twin, example)))
    names = {module: path for path, module in twin.named_modules()}
    fusions = [_fold_norm(twin, norm, conv, names) for conv, norm in pairs.items() if isinstance(conv, nn.Conv2d)]
    for path, module in _stages(twin):
        root, done = _replace(twin, module, path, pairs.get(module), names)
        twin, fusions = root, fusions + ([] if done is None else [done])
    left = tuple(path for path, module in twin.named_modules() if isinstance(module, Norm))
    return Fused(_sealed(twin), tuple(fusions), left)


def _copied(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise EditError(f"the model cannot be deep-copied: {error}", where=type(model).__name__) from error
    return twin.eval().requires_grad_(requires_grad=False)


def _stages(model: nn.Module) -> list[tuple[str, Block | Blend]]:
    """Every blend, and every block that lies in no other and in no blend."""
    found: list[tuple[str, Block | Blend]] = []
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, (Block, Blend)) and not inner:
            found.append((path, module))
    return found


def _fold_norm(model: nn.Module, norm: nn.Module, conv: nn.Conv2d, names: Mapping[nn.Module, str]) -> Fusion:
    """Fold a batch norm into the convolution before it."""
    assert isinstance(norm, Norm)
    fold(conv, Affine.of_norm(norm))
    exchange(model, norm, _rest_of(norm))
    return Fusion(names[conv], type(conv).__name__, norm=names[norm])


def _replace(
    model: nn.Module, old: Block | Blend, path: str, norm: nn.Module | None, names: Mapping[nn.Module, str]
) -> tuple[nn.Module, Fusion | None]:
    """Exchange a block or blend for its fused form, together with the batch norm after it if it takes that up."""
    assert norm is None or isinstance(norm, Norm)
    after = None if norm is None else Affine.of_norm(norm)
    new = old.fused(after)
    if new is None and norm is not None:
        norm, new = None, old.fused()
    if new is None:
        return model, None
    new.eval().requires_grad_(requires_grad=False)
    stand, name = stand_of(old), old.block.name if isinstance(old, Blend) else old.name
    became = _kind(new, old)
    if stand is not None and became in ("block", "sum", "folded"):
        mark(new, stand)
    move_hooks(old, new)
    model = exchange(model, old, new)
    if norm is not None:
        model = exchange(model, norm, _rest_of(norm))
    return model, Fusion(path, name, became, "" if norm is None else names[norm])


def _kind(new: nn.Module, old: Block | Blend) -> str:
    if isinstance(new, nn.Conv2d):
        return "convolution"
    if isinstance(new, nn.Identity):
        return "identity"
    if not isinstance(new, Block):
        return "sum"
    return "block" if isinstance(old, Blend) else "folded"


def _rest_of(norm: nn.Module) -> nn.Module:
    """What is left of a batch norm that was folded away: nothing, or the activation in timm's."""
    parts = [part for name in ("drop", "act") if (part := norm._modules.get(name)) is not None]
    parts = [part for part in parts if not isinstance(part, (nn.Identity, nn.Dropout))]
    if not parts:
        return nn.Identity().eval()
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts).eval()


def _is_foldable(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that computes what `Affine.of_norm` says, and that nothing watches."""
    if not isinstance(norm, Norm) or norm.running_mean is None or norm.running_var is None or _watched(norm):
        return False
    own = type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    of_timm = type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm.")
    return own or of_timm


def _watched(module: nn.Module) -> bool:
    """Whether hooks see its input or output, which would change."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pairs(model: nn.Module, example: tuple[Any, ...]) -> dict[nn.Module, nn.Module]:
    """Convolution, block or blend -> the batch norm that is the only reader of its output."""
    makers: dict[nn.Module, str] = {module: path for path, module in _stages(model)}
    makers |= {m: path for path, m in model.named_modules() if is_plain(m)}
    watch = _Watch()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # some modules write to theirs in eval mode too
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            with watch.attached(model, [m for m in makers if not _watched(m)]):
                result = model(*example)
            for buffer, value in buffers:
                buffer.copy_(value)
    except Exception as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        what = f"the model does not run on the example: {first}"
        raise EditError(what, where=type(model).__name__, fix="give inputs that fit (example=..., --input)") from error
    watch.seen(result, by=None)
    pairs = {}
    for output in watch.outputs:
        norm = output.readers[0] if len(set(output.readers)) == 1 else None
        once = watch.calls[output.maker] == 1 and norm is not None and watch.calls[norm] == 1
        if once and norm is not None and _is_foldable(norm):
            pairs[output.maker] = norm
    return pairs


@dataclass
class _Output:
    """What a module returned, and who read it: the norm that was open, or None for anybody else."""

    maker: nn.Module
    readers: list[nn.Module | None] = field(default_factory=list)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a run and which of the watched outputs it reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: list[_Output] = []
        self.calls: Counter[nn.Module] = Counter()
        self._by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._open: list[nn.Module] = []

    @contextmanager
    def attached(self, model: nn.Module, makers: Sequence[nn.Module]) -> Iterator[None]:
        """Watch `makers` and all batch norms of `model` for one run."""
        handles = [maker.register_forward_hook(self._made) for maker in makers]
        for norm in model.modules():
            if isinstance(norm, Norm):
                handles += [norm.register_forward_pre_hook(self._enter), norm.register_forward_hook(self._leave)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _made(self, module: nn.Module, args: Any, out: Any) -> None:
        self.calls[module] += 1
        if isinstance(out, Tensor) and out not in self._by_tensor:  # the innermost module that returns it
            self._by_tensor[out] = _Output(module)
            self.outputs.append(self._by_tensor[out])

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append(module)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._open.pop()
        self.calls[module] += 1

    def seen(self, value: Any, *, by: nn.Module | None) -> None:
        """Somebody reads all tensors in `value`."""
        for tensor in tensors_in(value):
            output = self._by_tensor.get(tensor)  # type: ignore[no-untyped-call]
            if output is not None:
                output.readers.append(by)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen((args, kwargs), by=self._open[-1] if self._open else None)
        return func(*args, **(kwargs or {}))


class _Sealed:
    """Mixin of the class of a fused model: the model's own class, which cannot be trained any more."""

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - the signature is torch's
        """Eval mode stays; train mode is an error."""
        if mode:
            fix = "train the model that was given to fuse()"
            raise EditError(
                "a fused model is for inference: its batch norms are gone", where=type(self).__name__, fix=fix
            )
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = next(c for c in type(self).__mro__[1:] if c is not _Sealed)
        return partial(_rebuild, base), (), self.__dict__


def _sealed(model: nn.Module) -> nn.Module:
    """`model`, of a class that refuses to be trained (a GraphModule keeps its own), and marked."""
    provenance.mark_fused(model)
    if not isinstance(model, (_Sealed, fx.GraphModule)):
        model.__class__ = _sealed_class(type(model))
    return model


def _sealed_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Sealed, base), names)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _sealed_class(base)
    return cls.__new__(cls)
