"""The shape of a rule file: the one definition that validates it, describes it to editors, and is its Python form.

Values that are written in several ways (``16``, ``">=1"``, ``{min: 2}``) are types of their own with one
reader each, so that a wrong one gives one message and not one per alternative.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from convrewrite.clauses import WORDS
from convrewrite.errors import closest
from convrewrite.rulevalues import COUNT_SCHEMA, LIMIT_SCHEMA, WISHES_SCHEMA, Count, Limit, Wishes
from convrewrite.selectors.base import SELECTORS
from convrewrite.selectors.wanted import show
from convrewrite.sites import ROLES
from convrewrite.yamlfile import KeyPath, Problems, printable_line

Start = Literal["exact", "fitted", "fresh"]

_ID = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$"


def _listed(raw: Any) -> Any:
    return raw if isinstance(raw, list) else [raw]


def _written(reader: Callable[[Any], Any], schema: dict[str, Any]) -> Any:
    """The annotations of a value type with its own reader."""
    return PlainValidator(reader), PlainSerializer(lambda value: value.raw), WithJsonSchema(schema)


_MATCH: dict[str, Any] = {"type": "object", "x-convrewrite": "match"}  # becomes a $ref in json_schema()
Match = Annotated[dict[str, Any], WithJsonSchema(_MATCH)]
Matches = Annotated[
    list[dict[str, Any]],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_MATCH, {"type": "array", "items": _MATCH, "minItems": 1}]}),
]
CountValue = Annotated[Count, *_written(Count.read, COUNT_SCHEMA)]
LimitValue = Annotated[Limit, *_written(Limit.read, LIMIT_SCHEMA)]
WishesValue = Annotated[Wishes, *_written(Wishes.read, WISHES_SCHEMA)]
Names = Annotated[
    list[str],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class Shape(BaseModel):
    """Base of all parts of a rule file: unknown keys are errors, nothing is converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = Problems(type(self).__name__)
            explain(error, type(self), problems)
            problems.check()

    # Nested parts are validated without this __init__, so that all errors of a file are found at once.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Pick(Shape):
    """Which of the matching sites to take, in forward order; applied as: every/offset, first/last, limit."""

    every: int = Field(default=1, ge=1, description="Take one site of so many.")
    offset: int = Field(default=0, ge=0, description="Sites to skip at the start of each group.")
    first: int | None = Field(default=None, ge=1, description="Only the first so many of each group.")
    last: int | None = Field(
        default=None, ge=1, description="Only the last so many of each group; with first: both ends."
    )
    limit: int | None = Field(default=None, ge=1, description="At most so many sites in all.")
    per: Literal["stage", "block"] | None = Field(default=None, description="Count in each stage or block on its own.")


class Replace(Shape):
    """What takes the convolution's place: a block and its options, plain values or expressions."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    block: str = Field(min_length=1, description="Name of the block, as in `convrewrite blocks`.")

    @property
    def options(self) -> dict[str, Any]:
        """The block's options as written."""
        return dict(self.model_extra or {})


class Insert(Replace):
    """What is put into the feature map's way, and where."""

    after: Literal["here", "block", "stage"] | None = Field(
        default=None, description="After the convolution, its block or its stage."
    )
    before: Literal["here", "block"] | None = Field(default=None, description="Before the convolution or its block.")

    @model_validator(mode="after")
    def _one_place(self) -> Insert:
        if (self.after is None) == (self.before is None):
            raise ValueError("wanted exactly one of 'after' and 'before'; write 'after: here'")
        return self

    @property
    def at(self) -> Literal["after", "before"]:
        """Which of the two."""
        return "after" if self.after else "before"

    @property
    def anchor(self) -> str:
        """here, block or stage."""
        return self.after or self.before or ""


class Expect(Shape):
    """What must be true of the sites that a rule takes; anything else is an error."""

    sites: CountValue = Field(
        default=Count(">=1", 1, None), description="How many; at least one unless said otherwise."
    )
    stages: list[int] | None = Field(default=None, description="They lie in exactly these stages.")
    includes: list[str] = Field(default=[], description="Names or globs; each must be met by at least one of them.")
    excludes: list[str] = Field(default=[], description="Names or globs that none of them may meet.")


class Rule(Shape):
    """One rule: what to look for, and what to do there.

    ``Rule(id="x", match={"role": "bottleneck_spatial"}, replace={"block": "acmix", "heads": 4})``
    """

    if TYPE_CHECKING:  # mappings are taken for the nested parts, which the fields' types do not say

        def __init__(self, /, **data: Any) -> None: ...

    id: str = Field(pattern=_ID, description="Name of the rule in plans and messages.")
    title: str = Field(default="", description="What it does, for readers.")
    match: Match = Field(description="Which convolutions: all keys must fit; of a list one.")
    exclude: Matches = Field(default=[], description="Which of these to leave alone.")
    pick: Pick = Field(default=Pick(), description="Which of the matching sites to take.")
    replace: Replace | None = Field(default=None, description="The block that takes the convolution's place.")
    insert: Insert | None = Field(default=None, description="The block that is added before or after.")
    start: Start = Field(default="exact", description="How the rewritten network starts.")
    shared: Literal["error", "together"] = Field(
        default="error", description="Modules called several times: refuse, or change all calls together."
    )
    expect: Expect = Field(default=Expect(), description="What must be true of the sites it takes.")

    @model_validator(mode="after")
    def _one_action(self) -> Rule:
        if (self.replace is None) == (self.insert is None):
            raise ValueError("wanted exactly one of 'replace' and 'insert'")
        return self

    @property
    def action(self) -> Literal["replace", "insert"]:
        """Which of the two."""
        return "insert" if self.insert else "replace"

    @property
    def change(self) -> Replace:
        """What `replace` or `insert` says."""
        change = self.insert or self.replace
        assert change is not None
        return change


class RoleCorrection(Shape):
    """A role that the analysis got wrong."""

    match: Match = Field(description="Which convolutions.")
    role: str = Field(description="Their role.", json_schema_extra={"enum": list(ROLES)})

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"{show(role)} is no role; {closest(role, ROLES) or 'known: ' + ', '.join(ROLES)}")
        return role


class Budget(Shape):
    """What the rewritten network may cost; sites are dropped until it fits."""

    params: LimitValue | None = Field(default=None, description="Parameters: 30M, '+10%', {max: ...}.")
    flops: LimitValue | None = Field(default=None, description="FLOPs, 2 per multiply-add: 8G, '+10%', {max: ...}.")
    prefer: str = Field(
        default="index",
        pattern=r"^-?(flops|params|area|index|stage|out_channels)$",
        description="Which sites to keep first: those with the least of this, with '-' those with the most.",
    )


class Test(Shape):
    """A model and the sites the rules must find in it."""

    __test__ = False  # not a pytest class
    model: str = Field(min_length=1, description="As on the command line: torchvision:resnet50.")
    sites: WishesValue = Field(description="Rule id -> 16, '>=1' or a list of paths; 0: no rule finds anything.")
    start: Start | None = Field(default=None, description="Start that overrides the rules' own.")


class RuleFile(Shape):
    """A whole rule file, with what it extends already merged in."""

    if TYPE_CHECKING:  # mappings are taken for the nested parts, which the fields' types do not say

        def __init__(self, /, **data: Any) -> None: ...

    version: Literal[1] = Field(description="Version of this format.")
    name: str = Field(
        default="", pattern=r"^$|" + _ID, description="Name of the file in plans; its file name by default."
    )
    summary: str = Field(default="", description="One sentence on what it does.")
    reference: str = Field(default="", description="Paper or address it comes from.")
    extends: Names = Field(default=[], description="Rule files whose vars, selectors, roles and rules come first.")
    vars: dict[str, Any] = Field(default={}, description="Numbers and texts for expressions, as vars.NAME.")
    selectors: dict[str, Match] = Field(default={}, description="Named matches for 'use'.")
    roles: list[RoleCorrection] = Field(default=[], description="Corrections of roles, before any rule looks.")
    rules: list[Rule] = Field(default=[], description="The rules; the first that takes a site owns it.")
    budget: Budget | None = Field(default=None, description="What the rewritten network may cost.")
    expect: Expect | None = Field(default=None, description="What must be true of all sites together.")
    tests: list[Test] = Field(default=[], description="Models and the sites to be found in them.")

    @field_validator("version", mode="before")
    @classmethod
    def _whole_version(cls, version: Any) -> Any:
        return str(version) if isinstance(version, bool) else version  # True == 1

    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd but no error: selectors and variables that nothing uses."""
        return self._notes

    def where(self, rule_id: str) -> str | None:
        """``file:line`` of a rule, if the file came from text."""
        return self._places.get(rule_id)

    def to_data(self) -> dict[str, Any]:
        """Plain data that loads as an equal file."""
        return self.model_dump(exclude_defaults=True)


_MESSAGES = {
    "missing": "missing",
    "string_type": "{shown} is not text; put it in quotes",
    "int_type": "{shown} is no whole number",
    "list_type": "{shown} is no list",
    "dict_type": "{shown} is no mapping, wanted keys and values",
    "model_type": "{shown} is no mapping, wanted keys and values",
    "greater_than_equal": "{shown} is too small, the least is {ge}",
    "string_too_short": "an empty text",
    "literal_error": "{shown}, wanted {expected}",
    "string_pattern_mismatch": "{shown} is not allowed here, wanted {wording}",
}


def explain(error: ValidationError, model: type[BaseModel], problems: Problems, prefix: KeyPath = ()) -> None:
    """Note every error that pydantic found in our own words."""
    for found in error.errors(include_url=False):
        path: KeyPath = found["loc"]
        kind, context = found["type"], found.get("ctx", {})
        fix = None
        if kind == "extra_forbidden":
            known = list(_model_at(model, path[:-1]).model_fields)
            what, fix = "unknown key", closest(str(path[-1]), known) or f"known: {', '.join(known)}"
        elif kind == "value_error":
            what = str(context["error"])
        elif kind in _MESSAGES:
            what = _MESSAGES[kind].format(shown=show(found["input"]), wording=_wording(path), **context)
            if kind == "literal_error" and isinstance(found["input"], str):
                fix = closest(found["input"], re.findall(r"'([^']*)'", context["expected"]))
            elif kind == "missing" and path == ("version",):
                fix = "add 'version: 1'"
        else:
            what = printable_line(found["msg"])
        problems.add((*prefix, *path), what, fix)


def _wording(path: KeyPath) -> str:
    if path and path[-1] == "prefer":
        return "flops, params, area, index, stage or out_channels, with or without '-'"
    return "letters, digits, '_', '.' and '-', at most 80"


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The model that describes the mapping at `path`."""
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for part in get_args(annotation) if (m := _model_in(part))), None)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a rule file, for editors."""

    def placed(node: Any) -> Any:
        if isinstance(node, list):
            return [placed(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "x-convrewrite" in node:
            return {"$ref": "#/$defs/Match"} | {k: v for k, v in node.items() if k == "description"}
        return {key: placed(value) for key, value in node.items()}

    schema: dict[str, Any] = placed(RuleFile.model_json_schema())
    schema["$defs"]["Match"] = _match_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "convrewrite rule file"}


def _match_schema() -> dict[str, Any]:
    own: dict[str, Any] = {"$ref": "#/$defs/Match"}
    several = {"anyOf": [own, {"type": "array", "items": own, "minItems": 1}]}
    text = {"type": "string"}
    words: dict[str, Any] = {key: {**several, "description": doc} for key, doc in WORDS.items()}
    words["use"] = {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}], "description": WORDS["use"]}
    found = {name: {**selector.kind.schema(), "description": selector.summary} for name, selector in SELECTORS.items()}
    return {
        "type": "object",
        "description": "What to look for: all keys must fit; of a list one must.",
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {**found, **words},
    }
