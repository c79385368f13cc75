"""The kinds of values a selector can want: numbers, sizes, one of some words, names with globs, chains, expressions."""

from __future__ import annotations

import fnmatch
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convrewrite import expressions
from convrewrite.errors import ConvrewriteError, closest
from convrewrite.selectors.base import Wanted, WrongValueError
from convrewrite.yamlfile import printable

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER = r"(\d{1,18}(?:\.\d{1,9})?)([KMGT]?)"
_RANGE = re.compile(rf"{_NUMBER}\s*\.\.\s*{_NUMBER}", re.ASCII)
_COMPARED = re.compile(rf"(>=|<=|!=|>|<|=|)\s*{_NUMBER}", re.ASCII)
_BY = re.compile(r"(\d{1,9})\s*x\s*(\d{1,9})", re.ASCII)
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def show(raw: Any) -> str:
    """A wrong value as it stands in messages."""
    return f"'{printable(raw)}'" if isinstance(raw, str) else printable(repr(raw))


def one_or_list(raw: Any, read: Callable[[Any], Wanted]) -> Wanted:
    """A list is an OR of its items; an empty one is an error."""
    if not isinstance(raw, list):
        return read(raw)
    if not raw:
        raise WrongValueError("an empty list can never match; give at least one value")
    items = [read(item) for item in raw]
    return Wanted(" or ".join(item.text for item in items), lambda value: any(item.fits(value) for item in items))


def _or_list(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _known(raw: Any, known: Sequence[str], what: str) -> str:
    if not isinstance(raw, str) or raw not in known:
        hint = closest(raw, known) if isinstance(raw, str) else None
        raise WrongValueError(f"{show(raw)} is no {what}; {hint or 'known: ' + ', '.join(known)}")
    return raw


@dataclass(frozen=True)
class Numbers:
    """``3``, ``[3, 5]``, ``3..4``, ``>=2``, ``<=2``, ``>2``, ``<2``, ``!=2``, and words such as ``depthwise``.

    Args:
        minimum: the least value there is; a wish below it is an error.
        words: word -> name of the value that stands for it in `fits` (see `read`).
        scaled: whether ``1.5M`` is a number (K, M, G, T).
        pair: values are (height, width); a number or comparison must hold for both, ``1x7`` is allowed.
        from_end: ``{from_end: 1}`` is allowed; values are then (from the start, from the end).
    """

    minimum: int = 1
    words: tuple[str, ...] = ()
    scaled: bool = False
    pair: bool = False
    from_end: bool = False
    textual = False
    separator = "|"

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """See `Kind.read`. With `words`, `fits` takes (number, set of the words that are true of the site)."""
        return one_or_list(raw, self._item)

    def _item(self, raw: Any) -> Wanted:
        if self.from_end and isinstance(raw, dict):
            return self._from_end(raw)
        text, fits = self._text_and_test(raw)
        if self.from_end or (self.words and text not in self.words):
            return Wanted(text, lambda value: value[0] is not None and fits(value[0]))
        return Wanted(text, fits)

    def _from_end(self, raw: dict[str, Any]) -> Wanted:
        if list(raw) != ["from_end"]:
            raise WrongValueError("wanted {from_end: N}")
        inner = Numbers(1).read(raw["from_end"], {})
        return Wanted(f"{inner.text} from the end", lambda value: value[1] is not None and inner.fits(value[1]))

    def _text_and_test(self, raw: Any) -> tuple[str, Callable[[Any], bool]]:
        if isinstance(raw, str) and raw in self.words:
            return raw, lambda value: raw in value[1]
        if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
            raise WrongValueError(f"{show(raw)} is no number; {self._fix()}")
        text = str(raw).strip()
        if self.pair and (found := _BY.fullmatch(text)):
            both = (self._at_least(int(found[1])), self._at_least(int(found[2])))
            return text, lambda value: tuple(value) == both
        low, high, test = self._range(text) or self._comparison(text)
        if high is not None and high < max(low, self.minimum):
            raise WrongValueError(f"{show(raw)} can never match; the least value is {self.minimum}")
        return text, self._for_pairs(text, test)

    def _for_pairs(self, text: str, test: Callable[[Any], bool]) -> Callable[[Any], bool]:
        if not self.pair:
            return test
        if text.startswith("!="):  # 1x3 is not 3
            return lambda value: any(map(test, value))
        return lambda value: all(map(test, value))

    def _range(self, text: str) -> tuple[float, float | None, Callable[[Any], bool]] | None:
        found = _RANGE.fullmatch(text)
        if not found:
            return None
        low, high = self._number(found[1], found[2]), self._number(found[3], found[4])
        if high < low:
            raise WrongValueError(f"'{text}' is an empty range; write '{found[3]}{found[4]}..{found[1]}{found[2]}'")
        return low, high, lambda value: bool(low <= value <= high)

    def _comparison(self, text: str) -> tuple[float, float | None, Callable[[Any], bool]]:
        found = _COMPARED.fullmatch(text)
        if not found:
            hint = closest(text, self.words) if self.words else None
            raise WrongValueError(f"{show(text)} is no number; {hint or self._fix()}")
        sign, number = found[1], self._number(found[2], found[3])
        test = _COMPARISONS[sign]
        highest = {"": number, "=": number, "<=": number, "<": number - 1}.get(sign)
        return 0, highest, lambda value: bool(test(value, number))

    def _number(self, digits: str, suffix: str) -> float:
        if (suffix or "." in digits) and not self.scaled:
            raise WrongValueError(f"'{digits}{suffix}' is no whole number; {self._fix()}")
        return float(digits) * _SUFFIXES[suffix] if self.scaled else int(digits)

    def _at_least(self, number: int) -> int:
        if number < self.minimum:
            raise WrongValueError(f"{number} can never match; the least value is {self.minimum}")
        return number

    def _fix(self) -> str:
        forms = ["3", "[3, 5]", "'3..5'", "'>=3'", "'<=3'", "'!=3'"]
        forms += ["'1x7'"] if self.pair else ["'1.5M'"] if self.scaled else []
        return f"write {', '.join((*forms, *self.words))}"

    def schema(self) -> dict[str, Any]:
        """See `Kind.schema`."""
        number = r"\d+(\.\d+)?[KMGT]?" if self.scaled else r"\d+"
        forms = [rf"(>=|<=|!=|>|<|=)?\s*{number}", rf"{number}\s*\.\.\s*{number}", *self.words]
        forms += [r"\d+\s*x\s*\d+"] if self.pair else []
        options: list[dict[str, Any]] = [
            {"type": "number" if self.scaled else "integer", "minimum": self.minimum},
            {"type": "string", "pattern": rf"^\s*({'|'.join(forms)})\s*$"},
        ]
        if self.from_end:
            item = Numbers(1).schema()
            options.append({"type": "object", "properties": {"from_end": item}, "required": ["from_end"]})
            options[-1]["additionalProperties"] = False
        return _or_list({"anyOf": options})


@dataclass(frozen=True)
class OneOf:
    """One of some words, or a list of them."""

    known: tuple[str, ...]
    what: str
    textual = True
    separator = "|"

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """See `Kind.read`."""
        return one_or_list(raw, self._item)

    def _item(self, raw: Any) -> Wanted:
        word = _known(raw, self.known, self.what)
        return Wanted(word, lambda value: bool(value == word))

    def schema(self) -> dict[str, Any]:
        """See `Kind.schema`."""
        return _or_list({"enum": list(self.known)})


@dataclass(frozen=True)
class Names:
    """A plain name is exact; one with ``*``, ``?`` or ``[`` is a glob, as is ``glob:``; ``re:`` must match in full.

    `fits` takes the names a site goes by: one is enough.
    """

    textual = True
    separator = "|"

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """See `Kind.read`."""
        return one_or_list(raw, self._item)

    def _item(self, raw: Any) -> Wanted:
        if not isinstance(raw, str):
            raise WrongValueError(f"{show(raw)} is not text; put it in quotes")
        if not raw or not raw.isprintable() or raw != raw.strip():
            raise WrongValueError(f"{show(raw)} is no name; write a module path, a glob or 're:...'")
        test = name_test(raw)
        return Wanted(raw, lambda value: any(map(test, value)))

    def schema(self) -> dict[str, Any]:
        """See `Kind.schema`."""
        return _or_list({"type": "string", "minLength": 1})


def name_test(pattern: str) -> Callable[[str], bool]:
    """Whether a name fits an exact name, a glob or ``re:``; raises WrongValueError for a broken pattern."""
    if pattern.startswith("re:"):
        text = pattern.removeprefix("re:")
    elif pattern.startswith("glob:") or any(c in pattern for c in "*?["):
        text = fnmatch.translate(pattern.removeprefix("glob:"))
    else:
        return lambda name: name == pattern
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "[[" is a FutureWarning of re
            compiled = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise WrongValueError(f"{show(pattern)} is no regular expression: {printable(str(error))}") from None
    return lambda name: compiled.fullmatch(name) is not None


@dataclass(frozen=True)
class Chain:
    """The kind of one operation, or a list of kinds, nearest first: ``[batch_norm, relu]``."""

    textual = True
    separator = "+"

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """See `Kind.read`. `fits` takes the kinds seen, nearest first."""
        kinds = raw if isinstance(raw, list) else [raw]
        if not kinds:
            raise WrongValueError("an empty chain says nothing; give at least one kind of operation")
        for kind in kinds:
            if not isinstance(kind, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
                raise WrongValueError(f"{show(kind)} is no kind of operation; write conv2d, batch_norm, relu, add, ...")
        chain = tuple(kinds)
        return Wanted(", ".join(chain), lambda value: tuple(value[: len(chain)]) == chain)

    def schema(self) -> dict[str, Any]:
        """See `Kind.schema`."""
        return _or_list({"type": "string", "pattern": "^[a-z][a-z0-9_]*$"})


@dataclass(frozen=True)
class Condition:
    """An expression that is true or false. `fits` takes the facts of a site."""

    textual = True
    separator = ""

    def read(self, raw: Any, variables: Mapping[str, Any]) -> Wanted:
        """See `Kind.read`."""
        if not isinstance(raw, str):
            raise WrongValueError(f"{show(raw)} is no expression; write it as text, such as 'out_channels % 32 == 0'")
        try:
            expression = expressions.parse(raw, variables)
        except ConvrewriteError as error:
            raise WrongValueError(str(error)) from None
        if expression.kind not in ("truth", "any"):
            raise WrongValueError(
                f"{show(raw)} gives a {expression.kind}, wanted true or false; compare it with something"
            )
        return Wanted(raw, lambda facts: bool(expression.value(facts)))

    def schema(self) -> dict[str, Any]:
        """See `Kind.schema`."""
        return {"type": "string", "minLength": 1, "maxLength": expressions.MAX_LENGTH}
