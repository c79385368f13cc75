"""What every kind of source offers, and how a model is built: seeded, and without weights where none are needed."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convrewrite.errors import SourceError
from convrewrite.registry import Registry
from convrewrite.sites import Shape

Recipe = dict[str, Any]
"""Plain data from which a kind builds the same architecture again: ``kind``, ``name``, ``options``."""


@dataclass(frozen=True)
class Request:
    """What a user asks for beside the model's name.

    Attributes:
        weights: names weights of a zoo, never a file.
        options: for the model's builder, from ``NAME?key=value&key=value``.
    """

    num_classes: int | None = None
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """The options, with the number of classes among them if one was asked for."""
        head = {} if self.num_classes is None else {"num_classes": self.num_classes}
        return {**self.options, **head}


class SourceKind(Protocol):
    """One place that models come from. Kinds are asked in ascending `order` who knows a name."""

    order: int

    def find(self, spec: str) -> str | None:
        """The name this kind knows the model by, or None if `spec` is none of its own."""

    def names(self) -> Sequence[str]:
        """Names to suggest when one is misspelt."""

    def recipe(self, name: str, request: Request) -> Recipe:
        """``name`` and ``options`` for `build`. Reads no file of weights and no network."""

    def build(self, recipe: Recipe) -> nn.Module:
        """The architecture with fresh weights, in train mode, on the CPU."""

    def example(self, recipe: Recipe, model: nn.Module, weights: str | None) -> Shape:
        """(N, C, H, W) of the input that the model was made for."""

    def pretrained(self, recipe: Recipe, weights: str) -> Mapping[str, Tensor]:
        """State dict of the named weights; may download."""

    def recognise(self, model: nn.Module) -> Iterator[Recipe]:
        """Recipes that may build what `model` was before it was rewritten, likeliest first."""


@runtime_checkable
class OwnWeights(Protocol):
    """A kind whose models may lie beside their weights, which are then loaded unless others are asked for."""

    def own_weights(self, name: str) -> str | None:
        """The weights to load when none are named, or None for random ones."""


SOURCES: Registry[SourceKind] = Registry("source", package="convrewrite.sources")


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters start as ``torch.empty``: send those to the meta device, so that random numbers cost nothing.

    Everything else stays on the CPU, because constructors compute with tensors (RegNet's widths,
    stochastic depth rates), which ``torch.device("meta")`` would break.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None and "out" not in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build(make: Callable[[], nn.Module], *, seed: int, meta: bool) -> nn.Module:
    """Call `make` with the random state seeded, and leave that state as it was.

    Args:
        meta: return the model on the meta device; its weights are allocated only if its constructor
            cannot do without their values.
    """
    with _seeded(seed):
        if not meta:
            return make()
        try:
            with warnings.catch_warnings(), _EmptyOnMeta():
                warnings.simplefilter("ignore")
                model = make()
        except Exception:  # it computes with its weights; a real fault shows again in the real build
            model = make()
        return model.to("meta")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Generators of devices that were never used are left alone: seeding them would start them.
    cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """``NAME?key=value&key=value`` as the name and the options; values are JSON where they can be, else text.

    Raises:
        SourceError: what follows the question mark is no list of options.
    """
    name, mark, tail = spec.partition("?")
    options: dict[str, Any] = {}
    for part in tail.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not (equals and key.isidentifier() and value) or key in options:
            fix = "write 'name?key=value&key=value', each key once"
            raise SourceError(f"'{part}' is no option of a model", where=spec, fix=fix)
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}  # as they are spelt in Python
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def require(package: str, extra: str, *, title: str | None = None) -> None:
    """Say which extra of ours brings a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SourceError(f"{title or package} is not installed", fix=f"pip install 'convrewrite[{extra}]'")


def default_example(model: nn.Module) -> Shape:
    """(N, C, H, W) from the model's own timm-style configuration, else 224 x 224 with its first conv's channels."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if isinstance(size, tuple | list) and len(size) == 3:
            return (1, *(int(n) for n in size))
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return (1, channels, 224, 224)


def one_line(error: BaseException) -> str:
    """``ValueError: first line of the message``, cut to a readable length."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def head_mismatch(name: str, of_weights: int, wanted: int) -> SourceError:
    """The error for weights whose classifier has another number of classes than was asked for."""
    return SourceError(
        f"the weights classify {of_weights} classes, but --num-classes {wanted} was asked for",
        where=name,
        fix=f"drop --num-classes, or give weights trained with {wanted} classes",
    )
