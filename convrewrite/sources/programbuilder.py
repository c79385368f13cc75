"""From the document of an exported program to the module: checks, convolutions as modules, scopes nested again."""

from __future__ import annotations

import operator
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import SourceError
from convrewrite.exportedfile import DTYPES
from convrewrite.plans import digest
from convrewrite.sources.exportedgraph import Document
from convrewrite.sources.program import Device, Of, Own, Program, Step, class_of

_NAME = re.compile(r"aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
_WORDED = {"padding", "mode", "approximate", "rounding_mode", "indexing", "equation", "side"}
"""Arguments that are a word by nature. An operator that takes any other text (a file's name) is refused."""
_ARITHMETIC = {"add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "getitem"}
_ARITHMETIC |= {"eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"}
_CONVOLUTIONS: dict[str, Any] = {
    f"aten.{name}.{overload}": getattr(nn.functional, name)
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
    for overload in ("default", "padding", "input")
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_CALL = "call:"
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda name: _DTYPES[name],
    "memory_format": lambda name: {str(f).removeprefix("torch."): f for f in _FORMATS}[name],
    "device": lambda name: Device(),
    "float": float,
}


def module_of(document: Document, *, where: str) -> Program:
    """The module that `document` describes, with tensors of zeros.

    Raises:
        SourceError: an operator is not known here, or is none of those that only compute.
    """
    try:
        return _Builder(document, where).build()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"the exported program is damaged ({type(error).__name__}: {str(error)[:80]})"
        raise SourceError(what, where=where) from error


class _Builder:
    def __init__(self, document: Document, where: str) -> None:
        self.document, self.where = document, where
        self._check()
        self.convs = _modules(document)
        self.inner: dict[str, Program] = {}
        self.steps = [self._calling(step) for step in document["steps"]]
        self.readers: dict[str, set[int]] = defaultdict(set)
        for i, step in enumerate(self.steps):
            for name in _found(list(step["with"].values()), "of"):
                self.readers[name].add(i)
        for name in _found(document["outputs"], "of"):
            self.readers[name].add(len(self.steps))

    def build(self) -> Program:
        root = self._scope("", range(len(self.steps)), list(self.document["inputs"]), self.document["outputs"])
        for path in sorted(self.inner, key=lambda p: p.count(".")):
            _place(root, path, self.inner[path])
        for path, numbers in self.convs.items():
            _place(root, path, _conv(numbers, self.document["tensors"], path))
        made: dict[str, Tensor] = {}
        for path, note in self.document["tensors"].items():
            made[path] = made[note["same"]] if "same" in note else _blank(note)
            holder, name = _holder(root, path)
            if note["parameter"]:
                holder.register_parameter(name, made[path])  # type: ignore[arg-type]
            else:
                holder.register_buffer(name, made[path])
        root.signature, root.document = digest(self.document), self.document
        root.fixed_batch = bool(self.document["fixed_batch"])
        return root

    def _check(self) -> None:
        """A document may be a stranger's: it names tensors of its own, and holds no text but an operator's word."""
        for step in self.document["steps"]:
            for key, value in step["with"].items():
                word = isinstance(value, str) and key in _WORDED
                if not word and (text := next(_texts(value), None)) is not None:
                    what = f"the exported program gives '{step['does']}' the text '{text[:40]}'"
                    raise SourceError(what, where=self.where, fix="rewrite the model that it was exported from")
            if str(step["does"]).startswith(_CALL):
                raise ValueError(f"step {step['does']}")
            unknown = set(_found(list(step["with"].values()), "own")) - set(self.document["tensors"])
            if unknown:
                raise KeyError(min(unknown))

    def _calling(self, step: Mapping[str, Any]) -> Mapping[str, Any]:
        """The step, or if it is a convolution that a module of its own can be, the call of that module."""
        path = _conv_path(step)
        if path not in self.convs:
            return step
        around = [inside for inside in step["in"] if inside != path]
        return {**step, "does": _CALL + path, "with": {"0": step["with"]["input"]}, "in": around}

    def _scope(self, path: str, numbers: Sequence[int], takes: list[str], result: Any) -> Program:
        """The steps of those numbers as one module; what belongs to a module within is called there."""
        keys = [self._child(path, self.steps[i]["in"]) for i in numbers]
        runs = [(key, [i for i, _ in run]) for key, run in groupby(zip(numbers, keys, strict=True), lambda p: p[1])]
        times = Counter(key for key, _ in runs)
        steps: list[tuple[list[str], Step]] = []
        for key, run in runs:
            if key is not None and times[key] == 1 and self._nests(key, run):
                steps.append(self._nested(path, key, run))
            else:
                steps.extend((_found(list(self.steps[i]["with"].values()), "of"), self._step(path, i)) for i in run)
        last = {name: n for n, (reads, step) in enumerate(steps) for name in (*step.gives, *reads) if name}
        kept = set(_found(result, "of"))
        done: dict[int, list[str]] = defaultdict(list)
        for name, n in last.items():
            if name not in kept:
                done[n].append(name)
        final = [replace(step, done=tuple(done[n])) for n, (_, step) in enumerate(steps)]
        name = self.document["classes"].get(path) or self.document["class"]
        return class_of(name, len(takes))(takes, final, self._value(result, path))

    def _child(self, path: str, inside: Sequence[str]) -> str | None:
        """The module next within the one at `path` that the step comes from."""
        below = inside[inside.index(path) + 1 :] if path in inside else []
        return below[0] if below and (not path or below[0].startswith(f"{path}.")) else None

    def _nests(self, key: str, run: Sequence[int]) -> bool:
        """True if the steps hold a convolution, and all tensors and modules that they use lie below `key`."""
        used = [name for i in run for name in _found(list(self.steps[i]["with"].values()), "own")]
        called = [self.steps[i]["does"].removeprefix(_CALL) for i in run if self.steps[i]["does"].startswith(_CALL)]
        convs = called or [i for i in run if self.steps[i]["does"] in _CONVOLUTIONS]
        return bool(convs) and key not in self.convs and all(n.startswith(f"{key}.") for n in (*used, *called))

    def _nested(self, path: str, key: str, run: Sequence[int]) -> tuple[list[str], Step]:
        made = [name for i in run for name in self.steps[i]["gives"] if name]
        reads = [name for i in run for name in _found(list(self.steps[i]["with"].values()), "of")]
        takes = [name for name in dict.fromkeys(reads) if name not in made]
        gives = [name for name in made if self.readers[name] - set(run)]
        single = len(gives) == 1
        result: Any = {"of": gives[0]} if single else {"tuple": [{"of": name} for name in gives]}
        self.inner[key] = self._scope(key, run, takes, result)
        args = tuple(Of(name) for name in takes)
        return takes, Step(_below(key, path), args, (), tuple(gives), not single)

    def _step(self, path: str, number: int) -> Step:
        step = self.steps[number]
        name, given = step["does"], {key: self._value(value, path) for key, value in step["with"].items()}
        gives = tuple(step["gives"])
        if name.startswith(_CALL):
            return Step(_below(name.removeprefix(_CALL), path), tuple(given.values()), (), gives, several=False)
        does, order = self._operator(name)
        leading = 0
        while leading < min(len(order), len(given)) and order[leading] in given:
            leading += 1
        args = tuple(given.pop(key) for key in order[:leading])
        return Step(does, args, tuple(given.items()), gives, bool(step["several"]))

    def _operator(self, name: str) -> tuple[Callable[..., Any], Sequence[str]]:
        """The function, and the names of the arguments that it takes by position."""
        if name in _CONVOLUTIONS:
            transposed = "transpose" in name
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            return _CONVOLUTIONS[name], order[:5] if transposed else order
        kind, _, rest = name.partition(".")
        if kind == "operator" and rest in _ARITHMETIC:
            return getattr(operator, rest), ("0", "1")
        found = _NAME.fullmatch(name)
        packet = getattr(torch.ops.aten, found.group(1), None) if found else None
        overload = getattr(packet, found.group(2), None) if found and packet is not None else None
        if not isinstance(overload, torch._ops.OpOverload):
            raise SourceError(f"the exported program calls '{name}', which torch here does not know", where=self.where)
        return overload, [a.name for a in overload._schema.arguments if not a.kwarg_only]

    def _value(self, value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [self._value(each, path) for each in value]
        if not isinstance(value, dict):
            return value
        kind, found = next(iter(value.items()))
        if kind == "of":
            return Of(found)
        if kind == "own":
            return Own(_below(found, path))
        if kind in ("tuple", "list"):
            items = [self._value(each, path) for each in found]
            return tuple(items) if kind == "tuple" else items
        if kind in ("dict", "ordered"):
            pairs = {key: self._value(each, path) for key, each in found.items()}
            return OrderedDict(pairs) if kind == "ordered" else pairs
        return _CONSTANTS[kind](found)


def _modules(document: Document) -> dict[str, dict[str, Any]]:
    """Path -> numbers of the 2-D convolutions that a module can be: no other step uses their tensors."""
    calls: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    users: Counter[str] = Counter()
    for step in document["steps"]:
        users.update(set(_found(list(step["with"].values()), "own")))
        path = _conv_path(step)
        if path:
            calls[path].append(step)
    found = {}
    for path, steps in calls.items():
        numbers = [{k: v for k, v in step["with"].items() if k != "input"} for step in steps]
        wanted = {f"{path}.weight"} | ({f"{path}.bias"} if numbers[0].get("bias") else set())
        below = {key for key in document["tensors"] if key.startswith(f"{path}.")}
        notes = [document["tensors"].get(key, {}) for key in wanted]
        own = all(note.get("parameter") and "same" not in note for note in notes) and below == wanted
        same = {note.get("same") for note in document["tensors"].values()} & wanted
        if own and not same and all(n == numbers[0] for n in numbers) and {users[k] for k in wanted} == {len(steps)}:
            found[path] = numbers[0]
    return found


def _conv_path(step: Mapping[str, Any]) -> str:
    """The module that holds the weight (and bias) of a 2-D convolution; "" of any other step, and of loose tensors."""
    if not step["does"].startswith("aten.conv2d."):
        return ""
    weight, bias = step["with"]["weight"], step["with"].get("bias")
    key = weight.get("own", "") if isinstance(weight, dict) else ""
    path = str(key).removesuffix(".weight")
    return path if path != key and bias in (None, {"own": f"{path}.bias"}) else ""


def _conv(numbers: Mapping[str, Any], tensors: Mapping[str, Any], path: str) -> nn.Conv2d:
    out, inner, *kernel = tensors[f"{path}.weight"]["shape"]
    groups = numbers.get("groups", 1)
    return nn.Conv2d(
        inner * groups,
        out,
        (kernel[0], kernel[1]),
        stride=_pair(numbers.get("stride", 1)),
        padding=numbers["padding"] if isinstance(numbers.get("padding"), str) else _pair(numbers.get("padding", 0)),
        dilation=_pair(numbers.get("dilation", 1)),
        groups=groups,
        bias=bool(numbers.get("bias")),
        device="meta",
    )


def _pair(value: Any) -> tuple[int, int]:
    items = value if isinstance(value, list) else [value]
    return int(items[0]), int(items[-1])


def _blank(note: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES[note["dtype"]]
    blank = torch.zeros(torch.empty(note["shape"], device="meta").shape, dtype=dtype)
    return nn.Parameter(blank, requires_grad=dtype.is_floating_point) if note["parameter"] else blank


def _holder(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that the last part of the path is to be registered in, made where there is none."""
    *parts, name = path.split(".")
    for part in parts:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    return root, name


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    holder, name = _holder(root, path)
    holder.add_module(name, module)


def _below(path: str, scope: str) -> str:
    return path.removeprefix(f"{scope}.") if scope else path


def _found(value: Any, kind: str) -> list[str]:
    """All names of one kind in a value of the document."""
    if isinstance(value, list):
        return [name for each in value for name in _found(each, kind)]
    if isinstance(value, dict):
        return [n for k, v in value.items() for n in ([v] if k == kind and isinstance(v, str) else _found(v, kind))]
    return []


def _texts(value: Any) -> Iterator[str]:
    """Texts that stand among the values themselves."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
