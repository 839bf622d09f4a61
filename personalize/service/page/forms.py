"""Forms of jobs, made of the recipe and of what a job takes: names, help, bounds and defaults are theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...recipe.settings import settings
from ..errors import Refusal
from ..requests import job_schema

HOLDERS = {"": "the run", "data": "pictures and captions"}  # sections whose names do not say what is in them
TYPES = {"integer": int, "number": float}
YES = {"true": True, "false": False}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """A field of a form. `shown` is the value that counts where nothing is given."""

    name: str
    kind: str  # number, text, lines, choice
    help: str
    given: str
    shown: str
    choices: tuple[str, ...] = ()
    least: Any = None
    most: Any = None

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @property
    def step(self) -> str:
        return "1" if self.kind == "integer" else "any"


def sections(given: Values, resolved: Values, without: tuple[str, ...]) -> Iterator[tuple[str, list[Field]]]:
    """The settings of a training by the recipe's sections, but for some."""
    properties = job_schema("train")["properties"]
    by_section: dict[str, list[Field]] = {}
    for name, setting in settings().items():
        if name in properties and name not in without:
            by_section.setdefault(setting.section, []).append(field_of(name, properties[name], given, resolved))
    for section, fields in by_section.items():
        yield HOLDERS.get(section, section), fields


def field_of(name: str, schema: Mapping[str, Any], given: Values, resolved: Values) -> Field:
    """A setting as a field: its kind by its schema."""
    kind = {"array": "lines", "integer": "integer", "number": "number"}.get(schema.get("type", ""), "text")
    choices = tuple(schema.get("enum", ())) or (tuple(YES) if schema.get("type") == "boolean" else ())
    shown = resolved.get(name, schema.get("default"))
    return Field(
        name,
        "choice" if choices else kind,
        schema.get("description", ""),
        as_text(given.get(name)),
        as_text(shown),
        choices,
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )


def as_text(value: Any) -> str:
    """A value as a field holds it; lists have a line for each item.

    >>> as_text([0, 1]), as_text(True), as_text(0.004), as_text(None)
    ('0\\n1', 'true', '0.004', '')
    """
    if isinstance(value, list | tuple):
        return "\n".join(map(as_text, value))
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def read_form(form: Mapping[str, str], kind: str = "train") -> dict[str, Any]:
    """The settings that a form holds; fields that are left empty say nothing. Raises Refusal for a number that is none."""
    properties = job_schema(kind)["properties"]
    return {name: value_of(name, text, properties[name]) for name, value in form.items()
            if name in properties and (text := value.replace("\r\n", "\n").strip())}  # fmt: skip


def value_of(name: str, text: str, schema: Mapping[str, Any]) -> Any:
    """A field's text as the setting's type."""
    sort = schema.get("type")
    if sort == "array":
        return [value_of(name, line.strip(), schema.get("items", {})) for line in text.split("\n") if line.strip()]
    if sort == "boolean":
        return YES.get(text, text)
    try:
        return TYPES[sort](text) if sort in TYPES else text
    except ValueError:
        what = "a whole number" if sort == "integer" else "a number"
        raise Refusal(400, "no_number", f"{name.replace('_', ' ')} must be {what}, not {text[:40]!r}", "", name) from None
