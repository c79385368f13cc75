"""Put a block before or after a module, without a wrapper: class, keys, attributes and hooks stay as they were.

The module's class is exchanged for a subclass of itself that calls the block; the block is a child under a
reserved name, hidden from containers that iterate over their children in ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from convrewrite.errors import EditError
from convrewrite.stands import mark_inserted

NAMES = {"before": "convrewrite_before", "after": "convrewrite_after"}


def insert(module: nn.Module, block: nn.Module, *, at: str, rule: str, path: str) -> None:
    """Make `module` compute ``block(module(x))`` (at="after") or ``module(block(x))`` (at="before"), in place."""
    name = NAMES[at]
    if name in module._modules:
        raise EditError(f"a block was inserted {at} this module already", where=path)
    base = type(module)
    module.__class__ = base if issubclass(base, _Inserted) else _inserted_class(base)
    module.add_module(name, block)
    mark_inserted(module, at, rule)


class _Inserted:
    """Mixin of the exchanged classes."""

    _modules: dict[str, nn.Module | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = self._modules.get("convrewrite_before")
        after = self._modules.get("convrewrite_after")
        if before is not None:
            args = (before(args[0]), *args[1:])
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return out if after is None else after(out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = next(c for c in type(self).__mro__[1:] if c not in (_Inserted, _HiddenChildren))
        return _rebuild, (base,), self.__dict__


class _HiddenChildren:
    """For containers: iteration shows the children that were there before."""

    _modules: dict[str, nn.Module | None]

    def _shown(self) -> dict[str, Any]:
        return {k: v for k, v in self._modules.items() if k not in NAMES.values()}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shown() if isinstance(self, nn.ModuleDict) else self._shown().values())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> Any:
        return self._shown().keys()

    def items(self) -> Any:
        return self._shown().items()

    def values(self) -> Any:
        return self._shown().values()


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _inserted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` that calls inserted blocks; one per class, so that types compare equal."""
    if base in _CLASSES:
        return _CLASSES[base]
    hides = issubclass(base, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    mixins = (_Inserted, _HiddenChildren) if hides else (_Inserted,)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    _CLASSES[base] = type(base.__name__, (*mixins, base), names)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _inserted_class(base)
    return cls.__new__(cls)
