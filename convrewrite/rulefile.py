"""Rule files from text, paths, dicts or Rule objects: read, merged with what they extend, and checked as a whole."""

from __future__ import annotations

import importlib.util
import keyword
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from convrewrite import expressions
from convrewrite.clauses import Compiler
from convrewrite.errors import ConvrewriteError, RuleError, closest
from convrewrite.ruleschema import Rule, RuleFile, explain, json_schema
from convrewrite.selectors.wanted import name_test, show
from convrewrite.yamlfile import KeyPath, Problems, load, printable, read

__all__ = [
    "Rule",
    "RuleFile",
    "Source",
    "builtin_names",
    "json_schema",
    "load_rules",
    "parse_rules",
    "path_of",
    "resolve_options",
    "template",
]

Source = str | Path | Mapping[str, Any] | RuleFile | Rule | Sequence[Rule]

MAX_EXTENDS = 16
_NUMERIC = {"int": int, "float": float, "bool": bool}
_VARIABLE = re.compile(r"\bvars\.([A-Za-z_]\w*)")


def load_rules(source: Source) -> RuleFile:
    """A checked rule file.

    Args:
        source: name of a built-in file ("acmix", "acmix.yaml" where no such file is here), a path, a
            mapping as it would stand in YAML, a RuleFile, a Rule, or a list of Rules.

    Raises:
        RuleError: a line for everything that is wrong.
    """
    if isinstance(source, (str, Path)):
        file = _load_path(path_of(source), ())
    elif isinstance(source, RuleFile):
        file = source if source._places else _check(_plain(source.to_data(), "rules"), Problems("rules"), Path(), ())
    elif isinstance(source, Mapping):
        file = _check(_plain(source, "rules"), Problems("rules"), Path(), ())
    else:
        rules = [source] if isinstance(source, Rule) else source
        if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
            raise RuleError("rules are a name, a path, a mapping, a RuleFile or a list of Rule objects")
        data = [rule.model_dump(exclude_defaults=True) for rule in rules]
        file = _check(_plain({"version": 1, "rules": data}, "rules"), Problems("rules"), Path(), ())
    if not file.rules:
        raise RuleError("no rules", where=file.name, fix="add one under 'rules:'")
    return file


def parse_rules(text: str, name: str = "rules.yaml", folder: Path | None = None) -> RuleFile:
    """Read and check the text of a rule file; it may have no rules, to be extended by others.

    Args:
        name: of the file, for messages. folder: where paths under `extends` start; here by default.

    Raises:
        RuleError: a line for everything that is wrong, ``file:line: key: what; what to do``.
    """
    data, lines = load(text, name)
    return _check(data, Problems(name, lines), folder or Path(), ())


def path_of(source: str | Path) -> Path:
    """The file that a name or path means; see `load_rules`."""
    return _find(source, Path())


def builtin_names() -> list[str]:
    """Names of the rule files that come with convrewrite."""
    return list(_builtins().names())


@cache
def _builtins() -> ModuleType:
    """The package of built-in rule files; in a checkout that is not installed, its folder beside this package."""
    spec = importlib.util.find_spec("convrewrite.rules")
    if spec is None:
        folder = Path(__file__).resolve().parents[1] / "rules"
        spec = importlib.util.spec_from_file_location("convrewrite.rules", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _find(source: str | Path, folder: Path) -> Path:
    """The file that a name or path means."""
    text = str(source)
    stem = text.removesuffix(".yaml").removesuffix(".yml")
    known = builtin_names()
    if isinstance(source, str) and source in known:
        return Path(_builtins().path(source))
    try:
        if (folder / text).is_file():
            return folder / text
    except (OSError, ValueError):  # too long, or a NUL in it
        pass
    if stem in known:
        return Path(_builtins().path(stem))
    fix = _using(stem) or closest(stem, known) or f"give a path, or one of the built-in files: {', '.join(known)}"
    raise RuleError(f"no rule file '{printable(text)}'", fix=fix)


def _using(block: str) -> str | None:
    """The built-in files that put a block of that name in, for a block that was given where a rule file belongs."""
    used = []
    for name in builtin_names():
        actions = [rule.replace or rule.insert for rule in load_rules(name).rules]
        used += [name] if any(action and action.block == block for action in actions) else []
    return f"that is a block, used by the rule files {', '.join(used)}" if used else None


def _load_path(path: Path, chain: tuple[Path, ...]) -> RuleFile:
    resolved = path.resolve()
    if resolved in chain:
        names = " > ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
        raise RuleError(f"extends itself: {names}", where=str(path))
    if len(chain) >= MAX_EXTENDS:
        raise RuleError(f"extends more than {MAX_EXTENDS} files deep", where=str(path))
    name = path.name if path.parent == Path(_builtins().path("")).parent else str(path)
    data, lines = load(read(path), name)
    stem = re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem).lstrip("_.-")[:80]
    data.setdefault("name", stem or "rules")
    return _check(data, Problems(name, lines), path.parent, (*chain, resolved))


def _plain(data: Any, name: str, path: str = "", depth: int = 0) -> Any:
    """A copy as YAML would give it: tuples become lists; anything that is not plain data is a RuleError."""
    if depth > 40:
        raise RuleError("nested deeper than 40 levels", where=name)
    if isinstance(data, Mapping):
        if wrong := next((key for key in data if not isinstance(key, str)), None):
            raise RuleError(f"the key {show(wrong)} is not text", where=name)
        return {key: _plain(value, name, f"{path}.{key}".lstrip("."), depth + 1) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(item, name, f"{path}[{index}]", depth + 1) for index, item in enumerate(data)]
    if data is None or isinstance(data, (bool, int, str)) or (isinstance(data, float) and math.isfinite(data)):
        return data
    raise RuleError(f"{printable(path)}: {show(data)} is not plain data", where=name, fix="use numbers, text and lists")


def _check(data: dict[str, Any], problems: Problems, folder: Path, chain: tuple[Path, ...]) -> RuleFile:
    """Check one file's own data, merge in what it extends, and give the file; raises all problems at once."""
    data.setdefault("name", "rules")
    try:
        RuleFile.model_validate(data)
    except ValidationError as error:
        explain(error, RuleFile, problems)
    bases = _bases(data, problems, folder, chain)
    merged = _merged(data, bases)
    used = _check_matches(data, merged, problems)
    _check_vars(data, problems)
    _check_rules(data, merged, problems)
    problems.check()
    file = RuleFile.model_validate(merged)
    for base in bases:
        file._places.update(base._places)
    file._places.update({rule["id"]: problems.where(("rules", i)) for i, rule in enumerate(data.get("rules", []))})
    file._notes = tuple(_unused(data, used, problems)) if data.get("rules") else ()
    return file


def _bases(data: dict[str, Any], problems: Problems, folder: Path, chain: tuple[Path, ...]) -> list[RuleFile]:
    extends = data.get("extends", [])
    found = []
    for index, name in enumerate(extends if isinstance(extends, list) else [extends]):
        if not isinstance(name, str):
            continue  # told already
        try:
            found.append(_load_path(_find(name, folder), chain))
        except ConvrewriteError as error:
            for line in str(error).splitlines():
                problems.add(("extends", index), line)
    return found


def _merged(data: dict[str, Any], bases: Sequence[RuleFile]) -> dict[str, Any]:
    """The file's own data over that of its bases; a rule with a base's id takes that one's place."""
    merged = {key: value for key, value in data.items() if key != "extends"}
    inherited = [base.to_data() for base in bases]
    for key in ("vars", "selectors"):
        own = _dict(data.get(key))
        merged[key] = {k: v for part in (*(_dict(base.get(key)) for base in inherited), own) for k, v in part.items()}
    merged["roles"] = [item for part in (*inherited, data) for item in _list(part.get("roles"))]
    base_rules = {rule["id"]: rule for base in inherited for rule in _list(base.get("rules"))}
    own_rules = _list(data.get("rules"))
    own_by_id = {_id(rule): rule for rule in own_rules}
    merged["rules"] = [own_by_id.get(rule_id, rule) for rule_id, rule in base_rules.items()]
    merged["rules"] += [rule for rule in own_rules if _id(rule) not in base_rules]
    return merged


def _id(rule: Any) -> str | None:
    """The id of a rule, if it has one that can be."""
    rule_id = rule.get("id") if isinstance(rule, dict) else None
    return rule_id if isinstance(rule_id, str) else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_matches(data: dict[str, Any], merged: dict[str, Any], problems: Problems) -> set[str]:
    """Check every match of this file; the names of the selectors that its rules and roles use."""
    for name in _dict(data.get("selectors")):
        Compiler(problems, merged["selectors"], merged["vars"]).named(name)
    used: set[str] = set()
    for key in ("roles", "rules"):
        for index, item in enumerate(_list(data.get(key))):
            compiler = Compiler(problems, merged["selectors"], merged["vars"])
            if isinstance(item, dict) and isinstance(item.get("match"), dict):
                compiler.match(item["match"], (key, index, "match"))
            if isinstance(item, dict) and isinstance(item.get("exclude"), (dict, list)):
                compiler.matches(item["exclude"], (key, index, "exclude"))
            used |= compiler.used
    return used


def _check_vars(data: dict[str, Any], problems: Problems) -> None:
    for name, value in _dict(data.get("vars")).items():
        if not name.isidentifier() or keyword.iskeyword(name):
            problems.add(("vars", name), "not a name that expressions can use", "write letters, digits and '_'")
        if not isinstance(value, (int, float, str)):
            problems.add(("vars", name), f"{show(value)} is neither a number nor text")


def _check_rules(data: dict[str, Any], merged: dict[str, Any], problems: Problems) -> None:
    """What only shows across rules: ids given twice, patterns that cannot be read, tests of unknown rules."""
    seen: dict[str, int] = {}
    for index, rule in enumerate(_list(data.get("rules"))):
        if rule_id := _id(rule):
            if rule_id in seen:
                problems.add(("rules", index, "id"), f"'{printable(rule_id)}' is rules[{seen[rule_id]}] already")
            seen.setdefault(rule_id, index)
        _check_patterns(_dict(_dict(rule).get("expect")), ("rules", index, "expect"), problems)
    _check_patterns(_dict(data.get("expect")), ("expect",), problems)
    known = {rule_id for rule in merged["rules"] if (rule_id := _id(rule))}
    for index, test in enumerate(_list(data.get("tests"))):
        for rule_id in _dict(_dict(test).get("sites")):
            if rule_id not in known:
                fix = closest(rule_id, known) or f"known: {', '.join(sorted(known)) or 'none'}"
                problems.add(("tests", index, "sites", rule_id), "no rule of this id", fix)


def _check_patterns(expect: dict[str, Any], path: KeyPath, problems: Problems) -> None:
    for key in ("includes", "excludes"):
        for index, pattern in enumerate(_list(expect.get(key))):
            try:
                name_test(pattern) if isinstance(pattern, str) else None
            except ValueError as error:
                problems.add((*path, key, index), str(error))


def _unused(data: dict[str, Any], used: set[str], problems: Problems) -> list[str]:
    """Selectors and variables of this file that nothing in it uses: typing errors, mostly."""
    mentioned = set(_VARIABLE.findall(repr({key: value for key, value in data.items() if key != "vars"})))
    odd = [("selectors", name, "no rule") for name in _dict(data.get("selectors")) if name not in used]
    odd += [("vars", name, "no expression") for name in _dict(data.get("vars")) if name not in mentioned]
    return [f"{problems.where((key, name))}: {key}.{name} is used by {what}" for key, name, what in odd]


def resolve_options(raw: Mapping[str, Any], fields: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a block for one site.

    Args:
        raw: as written in the rule. fields: option -> kind; text given for "int", "float" or "bool" is
            an expression, anything else is left to the block. facts: of the site, from `facts.site_facts`.

    Raises:
        RuleError: an unknown option, or an expression that gives no such value.
    """
    resolved: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in fields:
            fix = closest(name, fields) or f"known: {', '.join(fields) or 'none'}"
            raise RuleError(f"unknown option '{printable(name)}'", fix=fix)
        is_expression = isinstance(value, str) and fields[name] in _NUMERIC
        resolved[name] = _computed(name, value, fields[name], facts) if is_expression else value
    return resolved


def _computed(name: str, text: str, kind: str, facts: Mapping[str, Any]) -> Any:
    try:
        value = expressions.parse(text, facts.get("vars", {})).value(facts)
    except ConvrewriteError as error:
        raise RuleError(f"option '{name}': {error}") from None
    if kind == "float" and not isinstance(value, (bool, str)):
        return float(value)
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not _NUMERIC[kind]:
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise RuleError(f"option '{name}': expression {show(text)} gives {show(value)}, wanted {wanted}")
    return value


_TEMPLATE = """\
# A rule file of convrewrite. `convrewrite rules test FILE` runs its tests, `convrewrite plan MODEL --rules FILE`
# shows what it would do.
version: 1
name: {name}
summary: What this file does, in one sentence.
rules:
  - id: bottleneck-3x3
    match: {{role: bottleneck_spatial, kernel: 3, groups: 1}} # all keys must fit; of a list one; all, any, not nest
    # exclude: {{name: "layer1.*"}}
    # pick: {{every: 2, per: stage}} # every, offset, first, last, limit
    replace: {{block: acmix, heads: 4, window: 7}} # or insert: {{block: ..., after: here}}
    start: exact # exact, fitted or fresh
    expect: {{sites: ">=1"}} # the default: matching nothing is an error
tests:
  - {{model: "torchvision:resnet50", sites: {{bottleneck-3x3: 16}}}}
  - {{model: "torchvision:vgg16", sites: 0}}
"""


def template(name: str) -> str:
    """The text of a new rule file called `name`, valid as it stands."""
    text = _TEMPLATE.format(name=name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,79}", name) else "''")
    if "name: ''" in text:
        raise RuleError(f"'{printable(name)}' is no name for a rule file", fix="use letters, digits, '_' and '-'")
    parse_rules(text, name)  # also refuses names that YAML reads as something else ("yes")
    return text
