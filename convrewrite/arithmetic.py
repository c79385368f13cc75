"""What the expression language computes with: its functions and operators."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any


def _clamp(value: float, low: float, high: float) -> float:
    if low > high:
        raise ValueError(f"clamp needs low <= high, got {low} and {high}")
    return max(low, min(value, high))


def _whole(value: float, what: str) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{what} needs whole numbers, got {value}")
    return int(value)


def _gcd(first: float, second: float) -> int:
    return math.gcd(_whole(first, "gcd"), _whole(second, "gcd"))


def _round_to(value: float, step: float) -> float:
    """The multiple of `step` nearest to `value`, halves up, at least one step."""
    if step <= 0:
        raise ValueError(f"round_to needs a step above 0, got {step}")
    return max(step, math.floor(value / step + 0.5) * step)


def _divisor_near(value: float, target: float) -> int:
    """The divisor of `value` nearest to `target`; of two equally near the smaller."""
    number = _whole(value, "divisor_near")
    if not 1 <= number <= 10**9:
        raise ValueError(f"divisor_near needs a number from 1 to 10**9, got {number}")
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return min((*low, *(number // d for d in low)), key=lambda d: (abs(d - target), d))


FUNCTIONS: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "min": (2, 16, min),
    "max": (2, 16, max),
    "clamp": (3, 3, _clamp),
    "gcd": (2, 2, _gcd),
    "round_to": (2, 2, _round_to),
    "divisor_near": (2, 2, _divisor_near),
    "iff": (3, 3, lambda condition, yes, no: yes if condition else no),
}
"""Name -> (fewest arguments, most arguments, function). ``if(c, a, b)`` is another spelling of ``iff``."""

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
