"""The tracer: enters a module only if convolutions live in it, and decides by the shapes at hand."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from convrewrite.blocks.base import Block
from convrewrite.errors import CaptureError
from convrewrite.sources.examples import tensors_in
from convrewrite.tracing.inside import holds_convs
from convrewrite.tracing.regions import CONVS


class MustEnterError(Exception):
    """Tracing has to begin again and enter a module that was thought to be of no interest."""


@dataclass(frozen=True)
class Given:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def values(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def named(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The positional arguments with the names of their parameters; those of ``*args`` are numbered."""
        parameters = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(names) < len(self.args):
            rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
            if rest is None:
                what = f"forward takes {len(names)} inputs, the example has {len(self.args)}"
                raise CaptureError(what, where=type(module).__name__)
            names += [f"{rest}_{i}" for i in range(len(self.args) - len(names))]
        return list(zip(names, self.args, strict=False))

    def missing(self, module: nn.Module) -> str | None:
        """The first parameter without a default that is not given."""
        named = {name for name, _ in self.named(module)} | set(self.kwargs)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(module.forward).parameters.values()
        return next(
            (p.name for p in parameters if p.default is p.empty and p.kind not in kinds and p.name not in named), None
        )


class _Sized(fx.Proxy):
    """A proxy whose length is known where its node can be computed, for ``list(x.chunk(2, 1))``."""

    def __len__(self) -> int:
        value = self.tracer.value_of(self.node)  # type: ignore[attr-defined]
        return len(value) if isinstance(value, (tuple, list, Tensor)) else super().__len__()


class Tracer(fx.Tracer):
    """Enters a module only if a convolution lives in it; remembers which module was open when tracing failed."""

    def __init__(
        self,
        stay: dict[nn.Module, str],
        functional: set[nn.Module],
        given: Given,
        unpacked: set[nn.Module] | None = None,
    ) -> None:
        super().__init__(param_shapes_constant=False)
        self.stay, self.functional, self.given = stay, functional, given
        self.inputs: list[Any] = []
        self._values: dict[fx.Node, Any] = {}
        self.open: list[nn.Module] = []
        self.calls: list[tuple[str, tuple[fx.Node, ...], fx.Node]] = []
        self._entered: dict[nn.Module, bool] = {}
        self.unpacked = set() if unpacked is None else unpacked

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001 - the signature is that of fx
        concrete_args: Any = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the tensors that are given; all other arguments are what they are in this very call.

        fx would make a proxy of an argument that is left out, which is not None and takes the wrong branch, and of
        ``*args`` and ``**kwargs``, which cannot be passed on.
        """
        args = tuple(self._input(name, value) for name, value in self.given.named(self.root))
        kwargs = {name: self._input(name, value) for name, value in self.given.kwargs.items()}
        return (lambda root: root_fn(root, *args, **kwargs)), [self.root]

    def _input(self, name: str, value: Any) -> Any:
        if next(tensors_in(value), None) is None:
            return value
        self.inputs.append(value)
        proxy = self.create_proxy("placeholder", name, (), {})
        self._values[proxy.node] = value
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on shapes is decided by the shapes at hand; one on values cannot be."""
        value = self.value_of(obj.node)
        return bool(value) if isinstance(value, (bool, int, float)) else super().to_bool(obj)

    def value_of(self, node: fx.Node) -> Any:
        """What the node gives on the inputs at hand (meta tensors or zeros), None where that cannot be said."""
        try:
            with _untraced(), torch.no_grad():
                return self._computed(node)
        except Exception:  # a condition on values, a module that does not run on its own
            return None

    def _computed(self, node: fx.Node) -> Any:
        needed = _needed(node)
        for earlier in self.graph.nodes:  # in order, so that nothing is computed twice and recursion stays flat
            if earlier in needed and earlier not in self._values:
                self._values[earlier] = self._run(earlier)
        return self._values[node]

    def _run(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: self._values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: self._values[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        found: Any = self.root
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found(*args, **kwargs) if node.op == "call_module" else found

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m not in self._entered:
            self._entered[m] = m not in self.stay and (m in self.unpacked or holds_convs(m, self.functional))
        return not self._entered[m]

    def iter(self, obj: fx.Proxy) -> Any:
        """A module that returns several tensors must be entered, for how many they are is not known otherwise."""
        node = obj.node
        while node.target is operator.getitem:
            node = node.all_input_nodes[0]
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if not isinstance(module, (*CONVS, Block)) and module not in self.stay and module not in self.unpacked:
                self.unpacked.add(module)
                raise MustEnterError
        value = self.value_of(obj.node)
        if isinstance(value, (tuple, list)):
            items: Any = obj
            return iter([items[i] for i in range(len(value))])
        return super().iter(obj)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.open.append(m)
        out = super().call_module(m, forward, args, kwargs)
        self.open.pop()  # not in a finally: after an error the innermost open module must be known
        if isinstance(out, fx.Proxy) and not self.is_leaf_module(m, ""):
            inputs = tuple(a.node for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy))
            self.calls.append((self.path_of_module(m), inputs, out.node))
        return out


def _needed(node: fx.Node) -> set[fx.Node]:
    """The node and all that it depends on."""
    found, open_ = {node}, [node]
    while open_:
        for earlier in open_.pop().all_input_nodes:
            if earlier not in found:
                found.add(earlier)
                open_.append(earlier)
    return found


@contextmanager
def _untraced() -> Iterator[None]:
    """Modules run as ever while a trace is open: fx patches the class ``nn.Module`` for that time."""
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__ = _symbolic_trace._orig_module_call  # type: ignore[method-assign]
    nn.Module.__getattr__ = _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched  # type: ignore[method-assign]
