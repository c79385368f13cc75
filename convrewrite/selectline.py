"""The command line's spelling of a match: ``role:bottleneck_spatial,stage:3..4,not name:layer3.0.*``.

Commas AND, ``|`` ORs values (``+`` chains the kinds of follows and precedes), ``not`` before a key negates.
Both stand for themselves inside brackets and quotes. The result is the dict that a rule file would hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from convrewrite.errors import RuleError, closest
from convrewrite.selectors.base import SELECTORS
from convrewrite.selectors.wanted import show

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_FIX = "write role:stem,kernel:3|5,not name:layer1.*"


def parse(text: str, where: str = "--select") -> dict[str, Any]:
    """The match that a line means; its values are checked where the match is used.

    Raises:
        RuleError: the line cannot be read, names an unknown key, or gives a key twice.
    """
    data: dict[str, Any] = {}
    negated: list[dict[str, Any]] = []
    for part in _split(text, ",", where):
        key, value, is_negated = _part(part, where)
        if is_negated:
            negated.append({key: value})
        elif key in data:
            raise RuleError(f"'{key}' is given twice", where=where, fix=f"write {key}:this|that for either")
        else:
            data[key] = value
    if negated:
        data["not"] = negated[0] if len(negated) == 1 else negated
    return data


def to_line(data: Mapping[str, Any], where: str = "match") -> str:
    """The line that means `data`.

    Raises:
        RuleError: it nests in a way that a line cannot say (any, all, from_end, not of several keys).
    """
    parts = []
    for key, value in data.items():
        if key == "not":
            parts += [_negated(item, where) for item in (value if isinstance(value, list) else [value])]
        elif key in ("any", "all"):
            raise RuleError(f"'{key}' cannot be said in one line", where=where, fix="use a rule file")
        else:
            parts.append(f"{key}:{_value_text(key, value, where)}")
    return ",".join(parts)


def _part(part: str, where: str) -> tuple[str, Any, bool]:
    body = part.strip()
    is_negated = body.startswith("not ")
    key, colon, value = body.removeprefix("not ").strip().partition(":")
    key = key.strip()
    if not colon or not value.strip():
        raise RuleError(f"{show(body)} is no 'key:value'", where=where, fix=_FIX)
    known = (*SELECTORS.names(), "use")
    if key not in known:
        raise RuleError(
            f"unknown key {show(key)}", where=where, fix=closest(key, known) or f"known: {', '.join(known)}"
        )
    items = [_item(key, item, where) for item in _split(value, _separator(key), where)]
    return key, items[0] if len(items) == 1 else items, is_negated


def _separator(key: str) -> str:
    return "|" if key == "use" else SELECTORS.get(key).kind.separator


def _item(key: str, text: str, where: str) -> str | int:
    """Bare digits are a number where the key takes numbers."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if not text:
        raise RuleError(f"an empty value for '{key}'", where=where, fix=_FIX)
    is_number = (
        key != "use" and not SELECTORS.get(key).kind.textual and re.fullmatch(r"0|[1-9]\d{0,17}", text, re.ASCII)
    )
    return int(text) if is_number else text


def _split(text: str, separator: str, where: str) -> list[str]:
    """Split at a separator that lies outside brackets and quotes; none means no split."""
    parts, open_brackets, quoted, skip = [""], [], False, False
    for char in text:
        if skip or (quoted and char == "\\"):
            skip = not skip
        elif char == '"':
            quoted = not quoted
        elif not quoted and char in _BRACKETS:
            open_brackets.append(_BRACKETS[char])
        elif not quoted and open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == separator and not quoted and not open_brackets:
            parts.append("")
            continue
        parts[-1] += char
    if quoted or open_brackets:
        missing = '"' if quoted else open_brackets[-1]
        raise RuleError(f"a closing '{missing}' is missing in {show(text)}", where=where, fix="put the value in quotes")
    return parts


def _negated(item: Any, where: str) -> str:
    if not isinstance(item, dict) or len(item) != 1 or "not" in item:
        raise RuleError("'not' of several keys cannot be said in one line", where=where, fix="use a rule file")
    return f"not {to_line(item, where)}"


def _value_text(key: str, value: Any, where: str) -> str:
    items = value if isinstance(value, list) else [value]
    return _separator(key).join(_item_text(key, item, where) for item in items)


def _item_text(key: str, item: Any, where: str) -> str:
    if isinstance(item, bool) or not isinstance(item, (int, float, str)):
        raise RuleError(f"{key}: {show(item)} cannot be said in one line", where=where, fix="use a rule file")
    text = str(item)
    if isinstance(item, str) and not _is_plain(key, text, where):
        return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return text


def _is_plain(key: str, text: str, where: str) -> bool:
    """Whether the bare text reads back as itself inside a whole line."""
    try:
        return (
            _item(key, text, where) == text
            and len(_split(text, _separator(key), where)) == len(_split(text, ",", where)) == 1
        )
    except RuleError:
        return False
