"""YAML text to plain data with the line of every key; what is not plain and small is one clear line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from convrewrite.errors import RuleError

KeyPath = tuple[str | int, ...]

MAX_CHARACTERS = 200_000
MAX_NODES = 20_000
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"


@dataclass
class Problems:
    """Collects everything that is wrong with one file, to be told at once.

    Attributes:
        name: the file as users know it. lines: line of every key path, if it came from text.
    """

    name: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, path: KeyPath, what: str, fix: str | None = None) -> None:
        """Note one problem at `path`."""
        line = self.line(path)
        where = f"{self.name}:{line}" if line else self.name
        key = dotted(path)
        what = escaped(f"{key}: {what}" if key else what)
        self.found.append((line, str(RuleError(what, where=where, fix=escaped(fix) if fix else fix))))

    def line(self, path: KeyPath) -> int:
        """Line of `path`, or of the nearest key above it; 0 if the data came from no text."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def where(self, path: KeyPath) -> str:
        """``file:line`` of `path`."""
        line = self.line(path)
        return f"{self.name}:{line}" if line else self.name

    def check(self) -> None:
        """Raise one RuleError with a line per problem, in file order, if there is any."""
        if self.found:
            lines = [text for _, text in sorted(self.found, key=lambda item: item[0])]
            raise RuleError("\n".join(dict.fromkeys(lines)))


def dotted(path: KeyPath) -> str:
    """``rules[0].match.kernel``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}" if text else printable(part)
    return text


def escaped(text: str) -> str:
    """`text` on one line, with whatever a terminal would not show written as an escape."""
    return text if text.isprintable() else ascii(text)[1:-1]


def printable(text: str) -> str:
    """`text` as it may stand in a message: one line, not too long."""
    clean = escaped(text)
    return clean if len(clean) <= 80 else clean[:77] + "..."


def read(path: Path) -> str:
    """The text of a file; a missing, unreadable or binary one is a RuleError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RuleError(f"cannot be read: {(error.strerror or 'error').lower()}", where=str(path)) from None
    except ValueError:  # a NUL in the name
        raise RuleError("not a file name", where=printable(str(path))) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RuleError("not UTF-8 text", where=f"{path}:{line}") from None


def load(text: str, name: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Read one YAML mapping.

    Args:
        name: of the file, for messages.

    Returns:
        (data, lines): dicts, lists, strings, ints, floats, bools and None; and for every key path
        ("rules", 0, "match") the line, from 1, on which its key or list item stands.

    Raises:
        RuleError: ``name:line: what``, for anything that is not a mapping of plain data.
    """
    if len(text) > MAX_CHARACTERS:
        raise RuleError(f"{len(text)} characters, at most {MAX_CHARACTERS}", where=name)
    node = _compose(text, name)
    if node is None:
        raise RuleError("the file is empty", where=f"{name}:1", fix="a rule file starts with 'version: 1'")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a plain value"
        raise RuleError(f"the file holds {kind}, wanted keys and values", where=f"{name}:{_line(node)}")
    reader = _Reader(name)
    data = reader.mapping(node, ())
    return data, reader.lines


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = yaml.SafeLoader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RuleError("a character that YAML does not allow", where=f"{name}:{line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        what = error.problem or error.context or "cannot be read"
        if "'\\t'" in what:
            raise RuleError("a tab where YAML wants spaces", where=where, fix="indent with spaces") from None
        if error.context and error.problem:
            what = f"{error.problem} ({error.context})"
        raise RuleError(f"not YAML: {printable_line(what)}", where=where) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\U99999999" is a bare ValueError in PyYAML
        raise RuleError(f"not YAML: {printable_line(str(error))}", where=name) from None
    except RecursionError:
        raise RuleError(f"nested deeper than {MAX_DEPTH} levels", where=name) from None


def printable_line(text: str) -> str:
    """A foreign message as one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Reader:
    """Turns composed nodes into data; counts them, since an alias can stand for a whole tree."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self._nodes = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(node, f"more than {MAX_NODES} values once its anchors are expanded")
        if len(path) > MAX_DEPTH:  # also ends an anchor that contains itself
            raise self._error(node, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return list(self._items(node, path))
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if node.tag != f"{_TAG}map":
            raise self._tag(node)
        self.lines.setdefault(path, _line(node))
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in data:
                first = self.lines[(*path, key)]
                raise self._error(key_node, f"the key '{printable(key)}' is given twice, first in line {first}")
            self.lines[(*path, key)] = _line(key_node)
            data[key] = self.value(value_node, (*path, key))
        return data

    def _items(self, node: yaml.SequenceNode, path: KeyPath) -> Iterator[Any]:
        if node.tag != f"{_TAG}seq":
            raise self._tag(node)
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = _line(item)
            yield self.value(item, (*path, index))

    def _key(self, node: yaml.Node) -> str:
        if node.tag == f"{_TAG}merge":
            raise self._error(node, "'<<' is not supported", "name a match under 'selectors:' and 'use' it")
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            shown = f"'{printable(node.value)}'" if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise self._error(node, f"{shown} is not text, wanted a key", "put it in quotes")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "timestamp", "value", "merge"):  # dates are of no use here: leave them as written
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return yaml.SafeLoader.bool_values.get(text.lower(), text)
        if kind not in ("int", "float"):
            raise self._tag(node)
        if ":" in text:  # YAML 1.1 reads 56:56 as a number to the base of 60
            return text
        try:
            number = _number(kind, text)
        except (ValueError, OverflowError):
            raise self._error(node, f"'{printable(text)}' is not a number that can be used") from None
        return number

    def _tag(self, node: yaml.Node) -> RuleError:
        return self._error(node, f"the tag '{printable(node.tag)}' is not supported", "write plain data")

    def _error(self, node: yaml.Node, what: str, fix: str | None = None) -> RuleError:
        return RuleError(what, where=f"{self.name}:{_line(node)}", fix=fix)


def _number(kind: str, text: str) -> int | float:
    """A YAML 1.1 number; raises ValueError for one that is not finite or not small."""
    plain = text.replace("_", "")
    if kind == "float":
        number = float(plain)
        if not math.isfinite(number):
            raise ValueError(text)
        return number
    sign, digits = (plain[0], plain[1:]) if plain[:1] in ("+", "-") else ("", plain)
    base = 2 if digits.startswith("0b") else 16 if digits.startswith("0x") else 10
    if base == 10 and digits.startswith("0") and len(digits) > 1:
        base = 8  # YAML 1.1
    whole = int(sign + digits, base)
    if abs(whole) > 10**18:
        raise ValueError(text)
    return whole
