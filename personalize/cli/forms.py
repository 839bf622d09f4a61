"""What a command takes, as JSON schema: the forms of the page and the bodies of the API are made of it.

Settings of a recipe are described by the recipe; the others by their options. `format` says what a text names: a `path`, an
`adapter` with a strength behind it, a `base`, a `captioner`, a `preset`, or a `prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import click

from ..recipe.fields import Recipe
from ..recipe.settings import settings
from .train import SettingsCommand
from .values import AdapterFile, Axis, FileSize, Side

Schema = dict[str, Any]

FORMATS = {  # what texts of these names are, wherever they stand
    "base": "base",
    "tuned": "base",
    "vae": "base",
    "model": "captioner",
    "preset": "preset",
    "prompts": "prompt",
    "sample_prompts": "prompt",
    "prior_prompts": "prompt",
}


@cache
def command_schema(command: click.Command) -> Schema:
    """A command's parameters as the schema of an object, by the names that jobs have for them."""
    parameters = [one for one in command.get_params(click.Context(command)) if one.expose_value and one.name]
    own = command.settings() if isinstance(command, SettingsCommand) else set()
    of_recipe = {name: one for name, one in recipe_schema().items() if name in own}
    properties = {one.name: parameter_schema(one, of_recipe) for one in parameters if one.name}
    required = [one.name for one in parameters if one.name and (one.required or one.name in ("folder", "prompts"))]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def parameter_schema(parameter: click.Parameter, of_recipe: Mapping[str, Schema]) -> Schema:
    """A parameter's schema: the recipe's where it is one of its settings."""
    name = parameter.name or ""
    if name in of_recipe:
        return with_format(name, of_recipe[name])
    one = type_schema(parameter.type) if not getattr(parameter, "is_bool_flag", False) else {"type": "boolean"}
    found = with_format(name, one)
    if parameter.multiple or parameter.nargs != 1:
        found = {"type": "array", "items": found}
    help_text = getattr(parameter, "help", None)
    default = plain_default(parameter)
    return found | ({"description": help_text} if help_text else {}) | ({"default": default} if default is not None else {})


def plain_default(parameter: click.Parameter) -> Any:
    """A parameter's default as JSON; None where it has none, or depends on something."""
    default = parameter.get_default(click.Context(click.Command("none")))
    return default if isinstance(default, bool | int | float | str) else None


def type_schema(kind: click.ParamType) -> Schema:
    """A type of an option."""
    if isinstance(kind, AdapterFile):
        return {"type": "string", "format": "adapter"}
    if isinstance(kind, click.Path):
        return {"type": "string", "format": "path"}
    if isinstance(kind, click.Choice):
        return {"type": "string", "enum": list(kind.choices)}
    if isinstance(kind, click.IntRange | click.FloatRange):
        limits = {"minimum": kind.min, "maximum": kind.max}
        number = "integer" if isinstance(kind, click.IntRange) else "number"
        return {"type": number} | {key: value for key, value in limits.items() if value is not None}
    if isinstance(kind, Side):
        return {"type": "string", "pattern": "^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?$"}
    if isinstance(kind, FileSize | Axis):
        return {"type": "string"}
    names = {click.INT: "integer", click.FLOAT: "number", click.BOOL: "boolean"}
    return {"type": names.get(kind, "string")}


def with_format(name: str, schema: Schema) -> Schema:
    """A schema, with what its texts name."""
    if not (what := FORMATS.get(name)):
        return schema
    if isinstance(items := schema.get("items"), Mapping):
        return schema | {"items": {**items, "format": what}}
    return schema | {"format": what}


@cache
def recipe_schema() -> Mapping[str, Schema]:
    """The schema of each setting of a recipe by its flat name."""
    whole = Recipe.model_json_schema(by_alias=True)
    found = {}
    for setting in settings().values():
        home = whole["$defs"][whole["properties"][setting.section]["$ref"].rpartition("/")[2]] if setting.section else whole
        found[setting.name] = without_titles(home["properties"][setting.name])
    return found


def without_titles(schema: Schema) -> Schema:
    """A schema without the titles that pydantic makes of names; a field that may be None is what it is otherwise."""
    plain = {key: value for key, value in schema.items() if key != "title"}
    if choices := [one for one in plain.pop("anyOf", []) if one.get("type") != "null"]:
        plain = {**choices[0], **{key: value for key, value in plain.items() if value is not None}}
    return plain
