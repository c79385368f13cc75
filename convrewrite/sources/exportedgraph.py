"""The graph of an exported program as a short document: plain data, from which `sources.program` builds a module.

The document is part of the recipe that a saved folder holds, so it is checked again when it is built: every operator is
one of torch's `aten` namespace, and none takes a text that could name a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from convrewrite.errors import SourceError
from convrewrite.exportedfile import DTYPES, ExportedFile, TensorNote

Document = dict[str, Any]
"""``class``; ``inputs``: name -> shape; ``tensors``: name -> what it is; ``steps``; ``classes``: path -> class name;
``outputs``: a tree. A value is a number, or ``{"of": NAME}``, ``{"own": TENSOR}``, ``{"dtype": NAME}`` and the like."""

_ATEN = "torch.ops.aten."
_ARITHMETIC = "_operator."
_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
_CHECKS = ("aten._assert_scalar.", "aten.sym_constrain_range", "aten._assert_tensor_metadata.", "aten._assert_async.")
_PLAIN = {
    "aten._native_batch_norm_legit_no_training.default": "aten.batch_norm.default",
    "aten.max_pool2d_with_indices.default": "aten.max_pool2d.default",
}
"""Operators of the core set whose first output is that of an everyday one."""
_GATHERED = {"builtins.tuple": "tuple", "builtins.list": "list", "builtins.dict": "dict"}
_GATHERED["collections.OrderedDict"] = "ordered"


def document_of(file: ExportedFile, where: str) -> Document:
    """The program in `file`.

    Raises:
        SourceError: it does what cannot be written so (control flow, custom operators, nested inputs), or is damaged.
    """
    try:
        return _Reader(file, where).document()
    except SourceError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"not a readable exported program ({type(error).__name__}: {str(error)[:80]})"
        raise SourceError(what, where=where, fix="export the model again") from error


class _Reader:
    def __init__(self, file: ExportedFile, where: str) -> None:
        self.file, self.where = file, where
        module = file.program["graph_module"]
        self.graph, self.signature = module["graph"], module["signature"]
        self.calls = module["module_call_graph"]
        self.values: dict[str, Any] = {}
        self.read: set[str] = set()
        _walk([[node["inputs"] for node in self.graph["nodes"]], self.graph["outputs"]], self.read.add)

    def document(self) -> Document:
        tensors, inputs = self._inputs()
        classes: dict[str, str] = {}
        steps = [step for node in self.graph["nodes"] if (step := self._step(node, classes)) is not None]
        return {
            "class": classes.get("", "ExportedProgram"),
            "inputs": inputs,
            "tensors": tensors,
            "fixed_batch": self._fixed_batch(inputs, steps),
            "steps": steps,
            "classes": classes,
            "outputs": self._outputs(),
        }

    def _inputs(self) -> tuple[dict[str, Any], dict[str, list[int]]]:
        tensors: dict[str, Any] = {}
        inputs: dict[str, list[int]] = {}
        for spec in self.signature["input_specs"]:
            kind, found = next((k, v) for k, v in spec.items() if v is not None)
            if kind in ("parameter", "buffer", "tensor_constant"):
                name = found[f"{kind}_name"]
                tensors[name] = self._tensor(name, kind, tensors)
                self.values[found["arg"]["name"]] = {"own": name}
            elif kind == "user_input" and "as_tensor" in found["arg"]:
                name = found["arg"]["as_tensor"]["name"]
                inputs[name] = [self._size(n) for n in self.graph["tensor_values"][name]["sizes"]]
                self.values[name] = {"of": name}
            elif kind == "constant_input" or (kind == "user_input" and "as_none" in found["arg"]):
                raise self._refused("it takes an input that is no tensor")
            else:
                raise self._refused(f"it holds a {kind.replace('_', ' ')}")
        self._check_flat(inputs)
        return tensors, inputs

    def _fixed_batch(self, inputs: Mapping[str, list[int]], steps: list[dict[str, Any]]) -> bool:
        """True if a step names a shape that begins with the size of the batch (a size that varies is no number)."""
        batch = next(iter(inputs.values()))[:1]
        given = (step["with"].get(key) for step in steps for key in ("size", "shape"))
        return any(isinstance(size, list) and size[:1] == batch for size in given)

    def _check_flat(self, inputs: Mapping[str, Any]) -> None:
        """Inputs in lists or dictionaries would need the classes that they came in."""
        args, kwargs = _spec(self.calls[0]["signature"]["in_spec"])["children_spec"]
        given = [*args["children_spec"], *kwargs["children_spec"]]
        if not inputs or len(given) != len(inputs) or any(each["type"] is not None for each in given):
            raise self._refused("its inputs are not plain tensors")

    def _tensor(self, name: str, kind: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
        note = self.file.weights.get(name) or self.file.constants.get(name)
        if note is None:
            raise self._refused(f"'{name}' is missing from the file")
        found = {
            "shape": list(note.shape),
            "dtype": str(note.dtype).removeprefix("torch."),
            "parameter": kind == "parameter",
        }
        same = next((other for other in earlier if self._shared(other, note)), None)
        return found if same is None else {**found, "same": same}

    def _shared(self, other: str, note: TensorNote) -> bool:
        return bool(note.shape) and (self.file.weights.get(other) or self.file.constants.get(other)) == note

    def _size(self, size: Mapping[str, Any]) -> int:
        """Of a size that varies, the one that it was exported with."""
        if "as_int" in size:
            return int(size["as_int"])
        return int(size["as_expr"]["hint"]["as_int"])

    def _step(self, node: Mapping[str, Any], classes: dict[str, str]) -> dict[str, Any] | None:
        name = self._operator(node["target"])
        if name.startswith(_CHECKS):
            return None
        numbered = name.startswith("operator.")
        args = {str(i) if numbered else g["name"]: self._value(g["arg"]) for i, g in enumerate(node["inputs"])}
        outputs, several = self._names(node["outputs"])
        if name in _PLAIN and not set(outputs[1:]) & self.read:
            name, outputs, several = _PLAIN[name], outputs[:1], False
            args = {**args, "training": False, "cudnn_enabled": False} if "batch_norm" in name else args
        if name == "aten.convolution.default":
            name, args = self._convolution(args)
        for output in outputs:
            self.values[output] = {"of": output}
        inside = _stack(node.get("metadata") or {}, classes)
        return {"gives": outputs, "several": several, "does": name, "with": args, "in": inside}

    def _operator(self, target: str) -> str:
        if target.startswith(_ATEN):
            return target.removeprefix("torch.ops.")
        if target.startswith(_ARITHMETIC):
            return target.removeprefix("_")
        short = target.removeprefix("torch.ops.")
        raise self._refused(f"it calls '{short}', which is not one of torch's own operators on tensors")

    def _convolution(self, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The general convolution of the core set as the one of its kind."""
        planes = len(args["stride"])
        kept = {key: args[key] for key in ("input", "weight", "bias", "stride", "padding", "dilation", "groups")}
        if args["transposed"]:
            kept["output_padding"] = args["output_padding"]
            return f"aten.conv_transpose{planes}d.{'input' if planes > 1 else 'default'}", kept
        return f"aten.conv{planes}d.default", kept

    def _names(self, outputs: list[Mapping[str, Any]]) -> tuple[list[str], bool]:
        """(names of what a node gives, whether it gives them as a sequence)."""
        if len(outputs) == 1 and "as_tensors" in outputs[0]:
            return [each["name"] for each in outputs[0]["as_tensors"]], True
        return [self._output(each) for each in outputs], len(outputs) > 1

    def _output(self, output: Mapping[str, Any]) -> str:
        kind, value = next(iter(output.items()))
        if kind in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float"):
            return str(value.get("name") or value["as_name"])
        if kind == "as_none":
            return ""
        raise self._refused(f"an operator gives {kind[3:].replace('_', ' ')}")

    def _value(self, arg: Mapping[str, Any]) -> Any:
        kind, value = next(iter(arg.items()))
        if kind in _READ:
            return _READ[kind](self, value)
        what = "control flow or a wrapped region" if kind in ("as_graph", "as_operator") else kind[3:].replace("_", " ")
        raise self._refused(f"it holds {what}")

    def named(self, name: str) -> Any:
        return self.values[name]

    def symbol(self, value: Mapping[str, Any]) -> Any:
        return self.values[value["as_name"]] if "as_name" in value else next(iter(value.values()))

    def _outputs(self) -> Any:
        kinds = {next(k for k, v in spec.items() if v is not None) for spec in self.signature["output_specs"]}
        if kinds - {"user_output"}:
            raise self._refused("it returns updated buffers or a loss beside its result")
        leaves = [self._value(each) for each in self.graph["outputs"]]
        return self._tree(_spec(self.calls[0]["signature"]["out_spec"]), leaves)

    def _tree(self, spec: Mapping[str, Any], leaves: list[Any]) -> Any:
        if spec["type"] is None:
            return leaves.pop(0)
        kind = _GATHERED.get(spec["type"])
        if kind is None:
            raise self._refused(f"it returns a {spec['type']}")
        items = [self._tree(child, leaves) for child in spec["children_spec"]]
        if kind in ("tuple", "list"):
            return {kind: items}
        return {kind: dict(zip(json.loads(spec["context"]), items, strict=True))}

    def _refused(self, what: str) -> SourceError:
        fix = "rewrite the model that it was exported from, and export the result (--emit exported)"
        return SourceError(f"this exported program cannot be read: {what}", where=self.where, fix=fix)


def _spec(text: str) -> Any:
    """The outermost node of a tree of containers; the text is a version and the node."""
    return json.loads(text)[1]


def _stack(metadata: Mapping[str, str], classes: dict[str, str]) -> list[str]:
    """Paths of the modules whose forward the node comes from, the model's own ("") first."""
    found: list[str] = []
    for entry in (metadata.get("nn_module_stack") or "").split(";"):
        parts = entry.split(",")
        if len(parts) == 3 and "@" not in parts[1]:
            classes[parts[1]] = parts[2].rpartition(".")[2]
            found.append(parts[1])
        elif len(parts) == 3:  # a second call of the same module
            break
    return found


def _walk(value: Any, note: Callable[[str], None]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("name", "as_name") and isinstance(inner, str):
                note(inner)
            _walk(inner, note)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, note)


_READ: dict[str, Callable[[_Reader, Any], Any]] = {
    "as_none": lambda reader, value: None,
    "as_tensor": lambda reader, value: reader.named(value["name"]),
    "as_tensors": lambda reader, value: [reader.named(each["name"]) for each in value],
    "as_optional_tensor": lambda reader, value: reader._value(value),
    "as_optional_tensors": lambda reader, value: [reader._value(each) for each in value],
    "as_int": lambda reader, value: int(value),
    "as_ints": lambda reader, value: [int(each) for each in value],
    "as_float": lambda reader, value: _number(value),
    "as_floats": lambda reader, value: [_number(each) for each in value],
    "as_bool": lambda reader, value: bool(value),
    "as_bools": lambda reader, value: [bool(each) for each in value],
    "as_string": lambda reader, value: str(value),
    "as_sym_int": lambda reader, value: reader.symbol(value),
    "as_sym_ints": lambda reader, value: [reader.symbol(each) for each in value],
    "as_sym_float": lambda reader, value: reader.symbol(value),
    "as_sym_bool": lambda reader, value: reader.symbol(value),
    "as_scalar_type": lambda reader, value: {"dtype": str(DTYPES[value]).removeprefix("torch.")},
    "as_memory_format": lambda reader, value: {"memory_format": _FORMATS[value]},
    "as_layout": lambda reader, value: None,  # strided, the only one that a dense tensor has
    "as_device": lambda reader, value: {"device": "that of the input"},
}


def _number(value: Any) -> Any:
    """JSON has no infinity; torch writes it as text."""
    number = float(value)
    return number if abs(number) < float("inf") else {"float": str(number)}
