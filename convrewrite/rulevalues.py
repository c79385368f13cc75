"""Values of a rule file that are written in several ways, one type and one reader each: counts, limits, wishes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from convrewrite.selectors.wanted import show

_COUNT = re.compile(r"\s*(>=|<=|=|)\s*(\d{1,9})\s*|\s*(\d{1,9})\s*\.\.\s*(\d{1,9})\s*", re.ASCII)
_LIMIT = re.compile(r"\s*([+-]?)(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT%]?)\s*", re.ASCII)
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Count:
    """How many sites: ``16``, ``">=1"``, ``"2..6"`` or ``{min: 2, max: 6}``.

    Attributes:
        raw: as written. least, most: both inclusive; most is None where there is no upper limit.
    """

    raw: Any
    least: int
    most: int | None

    def fits(self, number: int) -> bool:
        """Whether `number` is as wanted."""
        return self.least <= number and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        if self.most is None:
            return f">={self.least}"
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"

    @classmethod
    def read(cls, raw: Any) -> Count:
        """Read plain data; raises ValueError."""
        if isinstance(raw, Count):
            return raw
        least, most = _bounds(raw)
        if most is not None and most < least:
            raise ValueError(f"{show(raw)} can never be met")
        return cls(raw, least, most)


def _bounds(raw: Any) -> tuple[int, int | None]:
    wrong = ValueError(f"{show(raw)} is no number of sites; write 16, '>=1', '2..6' or {{min: 2, max: 6}}")
    if isinstance(raw, dict):
        whole = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in raw.values())
        if not raw or not set(raw) <= {"min", "max"} or not whole:
            raise wrong
        return raw.get("min", 0), raw.get("max")
    found = None if isinstance(raw, bool) or not isinstance(raw, (int, str)) else _COUNT.fullmatch(str(raw))
    if not found:
        raise wrong
    if found[3]:
        return int(found[3]), int(found[4])
    number = int(found[2])
    return (number, None) if found[1] == ">=" else (0, number) if found[1] == "<=" else (number, number)


@dataclass(frozen=True)
class Limit:
    """The most a network may cost: ``30M``, ``"+10%"`` over the original, or ``{max: ...}`` with one of these.

    Attributes:
        raw: as written. absolute: parameters or FLOPs, or None. relative: 0.1 for +10 %, or None.
    """

    raw: Any
    absolute: float | None
    relative: float | None

    def most(self, before: int) -> float:
        """The highest value allowed where the original has `before`."""
        if self.absolute is not None:
            return self.absolute
        assert self.relative is not None
        return before * (1 + self.relative)

    @classmethod
    def read(cls, raw: Any) -> Limit:
        """Read plain data; raises ValueError."""
        if isinstance(raw, Limit):
            return raw
        inner = raw["max"] if isinstance(raw, dict) and list(raw) == ["max"] else raw
        plain = not isinstance(inner, bool) and isinstance(inner, (int, float, str))
        found = _LIMIT.fullmatch(str(inner)) if plain else None
        if not found or (found[1] != "") != (found[3] == "%"):
            raise ValueError(f"{show(raw)} is no limit; write 30M, '+10%' or {{max: 30M}}")
        number = float(found[1] + found[2])
        if found[3] == "%":
            if number < -100:
                raise ValueError(f"{show(raw)} can never be met")
            return cls(raw, None, number / 100)
        return cls(raw, number * _SCALE[found[3]], None)


@dataclass(frozen=True)
class Wish:
    """What a test wants of one rule: a `Count`, or exactly these module paths."""

    raw: Any
    count: Count | None
    paths: tuple[str, ...] = ()

    @classmethod
    def read(cls, raw: Any) -> Wish:
        """Read plain data; raises ValueError."""
        if not isinstance(raw, list):
            return cls(raw, Count.read(raw))
        if not all(isinstance(path, str) and path for path in raw):
            raise ValueError(f"{show(raw)} is no list of module paths")
        return cls(raw, None, tuple(raw))


@dataclass(frozen=True)
class Wishes:
    """What a test wants of every rule. `of` is None for a bare ``0``: no rule matches anything."""

    raw: Any
    of: tuple[tuple[str, Wish], ...] | None

    def rule(self, rule_id: str) -> Wish | None:
        """The wish for one rule, or None if the test says nothing about it."""
        if self.of is None:
            return Wish(0, Count.read(0))
        return dict(self.of).get(rule_id)

    @classmethod
    def read(cls, raw: Any) -> Wishes:
        """Read plain data; raises ValueError."""
        if isinstance(raw, Wishes):
            return raw
        if isinstance(raw, int) and not isinstance(raw, bool) and raw == 0:
            return cls(raw, None)
        if not isinstance(raw, dict) or not raw:
            raise ValueError(f"{show(raw)} says nothing of any rule; write {{rule-id: 16}}, or 0 for none at all")
        return cls(raw, tuple((str(key), Wish.read(value)) for key, value in raw.items()))


COUNT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": rf"^({_COUNT.pattern})$"},
        {
            "type": "object",
            "properties": {"min": {"type": "integer", "minimum": 0}, "max": {"type": "integer", "minimum": 0}},
            "minProperties": 1,
            "additionalProperties": False,
        },
    ]
}
_LIMIT_VALUE: dict[str, Any] = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": rf"^({_LIMIT.pattern})$"}]
}
LIMIT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        *_LIMIT_VALUE["anyOf"],
        {"type": "object", "properties": {"max": _LIMIT_VALUE}, "required": ["max"], "additionalProperties": False},
    ]
}
WISHES_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"const": 0},
        {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"anyOf": [*COUNT_SCHEMA["anyOf"], {"type": "array", "items": {"type": "string"}}]},
        },
    ]
}
