"""The schema of a spec file, as pydantic models: what a document and a rule may hold, and the published JSON Schema.

A pattern's own form is open here (`sparsify.spec.forms` reads it and knows the primitives); its schema is made from
the signatures of the constructors in `sparsify.patterns.PATTERNS`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from sparsify.errors import SpecError, nearest
from sparsify.patterns import PATTERNS
from sparsify.spec.forms import BLOCK, COMBINE, NOT, is_plain, parameters
from sparsify.spec.source import Source, shown

VERSION = 1

FORM = {"$comment": "Pattern"}  # becomes a reference: pydantic refuses one to a definition that isn't its own
NUMBERS = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\s*-\s*\d+)?\s*(,\s*\d+(\s*-\s*\d+)?\s*)*$"},
    ]
}
FROM_END = {
    "anyOf": [
        {"type": "integer"},
        {"type": "string", "pattern": r"^\s*-?\d+(\s*-\s*-?\d+)?\s*(,\s*-?\d+(\s*-\s*-?\d+)?\s*)*$"},
    ]
}
LAYERS = {"anyOf": [*FROM_END["anyOf"], {"type": "array", "items": FROM_END, "minItems": 1}]}
USES = {"anyOf": [*NUMBERS["anyOf"], {"type": "array", "items": NUMBERS, "minItems": 1}]}
Kind = Literal["self", "cross", "causal", "bidirectional"]
HEADS = {
    "anyOf": [
        FORM,
        {
            "type": "object",
            "patternProperties": {r"^(rest|[\d\s,-]+)$": FORM},
            "additionalProperties": False,
            "minProperties": 1,
        },
    ]
}


def _is_version(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value > VERSION:
        raise ValueError("newer")
    return None if isinstance(value, bool) else value  # True == 1 would pass for the version


class RuleModel(BaseModel):
    """One rule: which sites it is for, and the pattern of each of their heads. The first rule that matches wins."""

    model_config = ConfigDict(extra="forbid", strict=True, title="Rule")

    match: str = Field("*", min_length=1, description="a glob on the site's address, such as 'model.layers.[0-1].*'")
    layers: Annotated[Any, WithJsonSchema(LAYERS)] = Field(
        None, description="layer numbers: 3, '0-3,7', '-2' or '4--1' (from the end), or a list of those"
    )
    kind: Kind | list[Kind] | None = Field(
        None, description="'self', 'cross', 'causal' or 'bidirectional', or a list of those that hold together"
    )
    phase: Literal["prefill", "decode"] | None = Field(None, description="'prefill' or 'decode' (one query)")
    uses: Annotated[Any, WithJsonSchema(USES)] = Field(
        None, description="which uses of a module that attends more than once, from 0: 3, '0-3,7' or a list of those"
    )
    heads: Annotated[Any, WithJsonSchema(HEADS)] = Field(
        description="one pattern, or a mapping such as {0-3: dense, rest: streaming}"
    )


class DocumentModel(BaseModel):
    """A sparsify spec: named patterns, and the rules that give each head of each site its pattern."""

    model_config = ConfigDict(extra="forbid", strict=True, title="sparsify spec")

    version: Annotated[Literal[1], BeforeValidator(_is_version)] = Field(description="1, the version of this format")
    patterns: dict[str, Annotated[Any, WithJsonSchema(FORM)]] = Field({}, description="a mapping of names to patterns")
    sites: list[RuleModel] = Field(min_length=1, description="a list of rules, at least one")


def checked(value: Any, source: Source) -> DocumentModel:
    """The document's fields, with the right names and types. Raises SpecError for the first that isn't."""
    if not isinstance(value, Mapping):
        raise source.error((), f"expected a mapping with 'version', 'patterns' and 'sites', found {shown(value)}")
    try:
        return DocumentModel.model_validate(dict(value))
    except ValidationError as error:
        raise _translated(error, value, source) from None


def _translated(error: ValidationError, value: Mapping[str, Any], source: Source) -> SpecError:
    """pydantic's first complaint in the words that every other error of a spec uses."""
    found_all = error.errors(include_url=False)
    first = next(
        (e for e in found_all if e["type"] == "extra_forbidden"), found_all[0]
    )  # a typo explains what is missing
    path, kind, found = tuple(first["loc"]), first["type"], first["input"]
    model = RuleModel if path[0] == "sites" and len(path) > 1 else DocumentModel
    if kind == "extra_forbidden":
        return source.error(
            path, f"unknown field '{path[-1]}'; {nearest(str(path[-1]), model.model_fields)}", at_key=True
        )
    if kind == "missing":
        return source.error(path[:-1], f"the field '{path[-1]}' is missing: {_allowed(model, path)}")
    if kind == "value_error" and path == ("version",):
        return source.error(
            path, f"version {found} is newer than the version {VERSION} that this sparsify reads; upgrade it"
        )
    if path[-1:] == ("[key]",):
        return source.error(path[:-2], f"a pattern's name must be text, found {shown(found)}")
    if len(path) == 2 and path[0] == "sites":
        return source.error(path, f"expected a rule such as {{match: '*', heads: dense}}, found {shown(found)}")
    field = path[:3] if model is RuleModel else path[:1]
    return source.error(field, f"expected {_allowed(model, field)}, found {shown(_at(value, field))}")


def _allowed(model: type[BaseModel], path: tuple[str | int, ...]) -> str:
    return str(model.model_fields[str(path[-1])].description)


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec file."""
    found = DocumentModel.model_json_schema()
    found["$defs"] = {"Pattern": _pattern_schema(), **found.get("$defs", {})}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_referring(found)}


def _referring(part: Any) -> Any:
    if isinstance(part, list):
        return [_referring(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("$comment") == FORM["$comment"]:
        return {key: value for key, value in part.items() if key != "$comment"} | {"$ref": "#/$defs/Pattern"}
    return {key: _referring(value) for key, value in part.items()}


def _pattern_schema() -> dict[str, Any]:
    names = [name for name in PATTERNS if is_plain(name)]
    fields = {name: _primitive_schema(name) for name in PATTERNS if parameters(name)}
    block = {
        "type": "integer",
        "minimum": 1,
        "description": "puts sinks, window and column_stride in blocks of so many keys",
    }
    lists = {"type": "array", "items": FORM, "minItems": 1}
    return {
        "description": "a pattern: a name, a mapping of primitives (their union), or all, any, not",
        "anyOf": [
            {"type": "string", "description": f"the name of a pattern of this file, or one of {', '.join(names)}"},
            {"enum": names},
            {
                "type": "object",
                "properties": {**fields, BLOCK: block},
                "additionalProperties": False,
                "minProperties": 1,
            },
            *(
                {"type": "object", "properties": {key: lists}, "required": [key], "additionalProperties": False}
                for key in COMBINE
            ),
            {"type": "object", "properties": {NOT: FORM}, "required": [NOT], "additionalProperties": False},
        ],
    }


def _primitive_schema(name: str) -> dict[str, Any]:
    """Its one-argument shorthand, or a mapping of its fields, by the constructor's annotations."""
    hints = typing.get_type_hints(PATTERNS[name])
    allowed = parameters(name)
    types = {key: _type_schema(hints.get(key, Any)) for key in allowed}
    required = [key for key, p in allowed.items() if p.default is p.empty]
    whole = {"type": "object", "properties": types, "required": required, "additionalProperties": False}
    short = [types[next(iter(allowed))]] if len(required) <= 1 else []
    line = (inspect.getdoc(PATTERNS[name]) or name).splitlines()[0]
    return {"description": line, "anyOf": [*short, whole]}


def _type_schema(hint: Any) -> dict[str, Any]:
    return {key: part for key, part in TypeAdapter(hint).json_schema().items() if key != "title"}
