"""The closed arithmetic language of option values and `where` clauses; never handed to eval.

The text is parsed by `ast.parse` and walked by a whitelist. Length, depth, exponents and magnitudes are
bounded, so that ``9**9**9`` is an error and not a hang.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convrewrite.arithmetic import ARITHMETIC, COMPARISONS, FUNCTIONS, SIGNS
from convrewrite.errors import RuleError, closest
from convrewrite.facts import FACTS
from convrewrite.sites import ROLES

Value = int | float | bool | str
Kind = Literal["truth", "number", "text", "any"]

MAX_LENGTH = 500
MAX_DEPTH = 24
MAX_EXPONENT = 64
MAX_MAGNITUDE = 10**18


class MissingFactError(RuleError):
    """An expression asks for a fact that this site does not have."""


_IF = re.compile(r"\bif(?=\s*\()")
_SPELLED_IF = "IF"  # as long as "if", so that columns stay true


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as it was written.
        names: the facts it uses; a variable as ``vars.NAME``.
        kind: what it gives: "truth", "number", "text", or "any" where a variable decides.
    """

    text: str
    names: frozenset[str]
    kind: Kind
    _tree: ast.expr = field(repr=False, compare=False)

    def value(self, facts: Mapping[str, Any]) -> Value:
        """Compute it for one site.

        Args:
            facts: name -> value as from `site_facts`; the rule file's variables under "vars".

        Raises:
            MissingFactError: a fact it needs is None. RuleError: division by zero and the like.
        """
        result: Value = _Evaluation(self.text, facts).of(self._tree)
        return result


def parse(text: str, variables: Collection[str] | None = None) -> Expression:
    """Read and check an expression.

    Args:
        variables: names known under ``vars.``; None accepts any.

    Raises:
        RuleError: one line with the expression, the column (from 1) and the closest known name.
    """
    if len(text) > MAX_LENGTH:
        raise RuleError(f"expression of {len(text)} characters, at most {MAX_LENGTH}")
    if not text.strip():
        raise RuleError("an empty expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1is 2" and "\d" are SyntaxWarnings of Python, not of ours
            tree = ast.parse(_IF.sub(_SPELLED_IF, text.strip()), mode="eval").body
    except SyntaxError as error:
        column = error.offset or len(text) + 1  # 0 where the text ends too early
        raise _complaint(text, column, error.msg.split("(")[0].strip() or "cannot be read") from None
    except (ValueError, RecursionError, MemoryError):
        raise _complaint(text, None, "cannot be read") from None
    _check(tree, text, variables, 0)
    names = frozenset(_names(tree))
    return Expression(text, names, _kind(tree), tree)


def _shown(text: str) -> str:
    """The expression as it stands in messages: one printable line, not too long."""
    clean = text if text.isprintable() else ascii(text)[1:-1]
    return f"expression '{clean if len(clean) <= 120 else clean[:117] + '...'}'"


def _complaint(text: str, offset: int | None, what: str, fix: str | None = None) -> RuleError:
    column = f", column {offset}" if offset else ""
    return RuleError(f"{_shown(text)}{column}: {what}", fix=fix)


def _check(node: ast.expr, text: str, variables: Collection[str] | None, depth: int) -> None:
    """Raise for whatever is not of the language, at its column."""
    column = getattr(node, "col_offset", 0) + 1 + len(text) - len(text.lstrip())
    if depth > MAX_DEPTH:
        raise _complaint(text, column, f"nested deeper than {MAX_DEPTH} levels")
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            if isinstance(node.value, (int, float)) and not abs(node.value) <= MAX_MAGNITUDE:
                raise _complaint(text, column, f"a number beyond {MAX_MAGNITUDE:.0e}")
        case ast.Name():
            _check_name(node.id, text, column)
        case ast.Attribute(value=ast.Name(id="vars")):
            if variables is not None and node.attr not in variables:
                fix = closest(node.attr, variables) or "declare it under 'vars:'"
                raise _complaint(text, column, f"unknown variable 'vars.{node.attr}'", fix)
        case ast.Call(func=ast.Name(), keywords=[]):
            _check_call(node, text, column)
        case ast.Compare() if all(type(op) in COMPARISONS for op in node.ops):
            _check_roles(node, text, column)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            pass
        case ast.UnaryOp() if type(node.op) in SIGNS or isinstance(node.op, ast.Not):
            pass
        case ast.BoolOp():
            pass
        case _:
            what = f"{_wording(node)} is not part of the language"
            raise _complaint(text, column, what, "use numbers, facts, + - * / // % **, comparisons, and, or, not")
    for child in _children(node):
        _check(child, text, variables, depth + 1)


def _wording(node: ast.expr) -> str:
    names = {"IfExp": "'a if c else b'", "Attribute": "an attribute", "Lambda": "lambda", "Call": "such a call"}
    return names.get(type(node).__name__, type(node).__name__)


def _check_name(name: str, text: str, column: int) -> None:
    if name in FACTS:
        return
    if name in FUNCTIONS or name == _SPELLED_IF:
        raise _complaint(text, column, f"'{name}' is a function", "give its arguments in parentheses")
    fix = closest(name, (*FACTS, *FUNCTIONS)) or f"known: {', '.join(FACTS)} and vars.NAME"
    raise _complaint(text, column, f"unknown name '{name}'", fix)


def _check_call(node: ast.Call, text: str, column: int) -> None:
    assert isinstance(node.func, ast.Name)
    name = "iff" if node.func.id == _SPELLED_IF else node.func.id
    if name not in FUNCTIONS:
        fix = closest(name, FUNCTIONS) or f"known: {', '.join(FUNCTIONS)}"
        raise _complaint(text, column, f"unknown function '{name}'", fix)
    fewest, most, _ = FUNCTIONS[name]
    if not fewest <= len(node.args) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise _complaint(text, column, f"{name} takes {wanted} arguments, got {len(node.args)}")


def _check_roles(node: ast.Compare, text: str, column: int) -> None:
    """``role == "bottlneck"`` can never be true."""
    sides = [node.left, *node.comparators]
    if not any(isinstance(side, ast.Name) and side.id == "role" for side in sides):
        return
    for side in sides:
        if isinstance(side, ast.Constant) and side.value not in ROLES:
            fix = closest(str(side.value), ROLES) or f"known: {', '.join(ROLES)}"
            raise _complaint(text, column, f"unknown role {side.value!r}", fix)


def _children(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Attribute):
        return iter(())
    if isinstance(node, ast.Call):
        return iter(node.args)
    return (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


def _names(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    if isinstance(node, ast.Attribute):
        yield f"vars.{node.attr}"
    for child in _children(node):
        yield from _names(child)


def _kind(node: ast.expr) -> Kind:
    """What the expression gives, as far as its form tells."""
    match node:
        case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()) | ast.Constant(value=bool()):
            return "truth"
        case ast.Constant(value=str()) | ast.Name(id="role"):
            return "text"
        case ast.Attribute():
            return "any"
        case ast.Call(func=ast.Name(id="iff" | "IF")):
            kinds = {_kind(branch) for branch in node.args[1:]}
            return kinds.pop() if len(kinds) == 1 else "any"
    return "number"


class _Evaluation:
    """One walk over a checked tree with one site's facts."""

    def __init__(self, text: str, facts: Mapping[str, Any]) -> None:
        self.text = text
        self.facts = facts

    def of(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self._fact(node.id, self.facts.get(node.id))
            case ast.Attribute():
                return self._fact(f"vars.{node.attr}", self.facts.get("vars", {}).get(node.attr))
            case ast.BoolOp():
                stop = isinstance(node.op, ast.Or)
                return any(self._truth(v) for v in node.values) if stop else all(self._truth(v) for v in node.values)
            case ast.UnaryOp(op=ast.Not()):
                return not self._truth(node.operand)
            case ast.UnaryOp():
                return SIGNS[type(node.op)](self._number(node.operand))
            case ast.BinOp():
                return self._binary(node)
            case ast.Compare():
                return self._compare(node)
            case ast.Call():
                return self._call(node)
        raise AssertionError(type(node))  # _check let nothing else through

    def _fact(self, name: str, value: Any) -> Value:
        if value is None:
            raise MissingFactError(f"{_shown(self.text)}: '{name}' has no value at this site")
        if not isinstance(value, (int, float, str)):
            raise RuleError(f"{_shown(self.text)}: '{name}' is neither a number nor text")
        return value

    def _truth(self, node: ast.expr) -> bool:
        value = self.of(node)
        if isinstance(value, str):
            raise RuleError(f"{_shown(self.text)}: text '{value}' used as true or false")
        return bool(value)

    def _number(self, node: ast.expr) -> int | float:
        value = self.of(node)
        if isinstance(value, str):
            raise RuleError(f"{_shown(self.text)}: text '{value}' used as a number")
        return value  # type: ignore[no-any-return]

    def _binary(self, node: ast.BinOp) -> int | float:
        left, right = self._number(node.left), self._number(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise RuleError(f"{_shown(self.text)}: exponent {right}, at most {MAX_EXPONENT}")
        return self._bounded(lambda: ARITHMETIC[type(node.op)](left, right))

    def _compare(self, node: ast.Compare) -> bool:
        left = self.of(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.of(comparator)
            if isinstance(left, str) != isinstance(right, str):
                raise RuleError(f"{_shown(self.text)}: compares text with a number ({left!r} and {right!r})")
            if not COMPARISONS[type(op)](left, right):
                return False
            left = right
        return True

    def _call(self, node: ast.Call) -> Any:
        assert isinstance(node.func, ast.Name)
        if node.func.id in ("iff", _SPELLED_IF):
            return self.of(node.args[1] if self._truth(node.args[0]) else node.args[2])
        arguments = [self._number(argument) for argument in node.args]
        return self._bounded(lambda: FUNCTIONS[node.func.id][2](*arguments))  # type: ignore[attr-defined]

    def _bounded(self, compute: Callable[[], Any]) -> int | float:
        try:
            result = compute()
        except ZeroDivisionError:
            raise RuleError(f"{_shown(self.text)}: division by zero") from None
        except (ValueError, OverflowError) as error:
            raise RuleError(f"{_shown(self.text)}: {error}") from None
        if isinstance(result, complex) or not abs(result) <= MAX_MAGNITUDE:
            raise RuleError(f"{_shown(self.text)}: a result beyond {MAX_MAGNITUDE:.0e} or not a real number")
        return result  # type: ignore[no-any-return]
