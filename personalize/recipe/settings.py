"""Fields as the world outside sees them: flat, uniquely named settings."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..errors import RecipeError, nearest
from .fields import Part, Recipe
from .one_of import OneOf


@dataclass(frozen=True)
class Setting:
    """A field of the recipe as the world outside sees it: one flat name, a flag, a type, a bound, a help text."""

    name: str
    section: str
    attribute: str
    info: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def words(self, value: Any) -> list[str]:
        """What to type for a value, as JSON has it."""
        if isinstance(value, bool):
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        return [word for one in (value if isinstance(value, list) else [value]) for word in (self.flag, str(one))]

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def type(self) -> Any:
        """The field's type without None and without the tuple around it: int, float, str, bool, Path or a Literal."""
        plain = self.info.annotation
        if get_origin(plain) in (Union, types.UnionType):
            plain = next(part for part in get_args(plain) if part is not type(None))
        item = get_args(plain)[0] if get_origin(plain) is tuple else plain
        return get_args(item)[0] if get_origin(item) is Annotated else item

    @property
    def many(self) -> bool:
        return get_origin(self.info.annotation) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        tables = [note.choices for note in _notes(self.info) if isinstance(note, OneOf)]
        return tables[0] if tables else get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def default(self) -> Any:
        """None where the default depends on the run; the help text says how."""
        return None if self.info.is_required() or self.info.default_factory else self.info.default

    @property
    def bounds(self) -> str:
        """`at least 1`, `0 to 1`, `more than 0`, `at least 0 and less than 1`, ... or an empty text."""
        limit = _limits(self.info)
        if limit.keys() == {"ge", "le"}:
            return f"{limit['ge']} to {limit['le']}"
        low = f"at least {limit['ge']}" if "ge" in limit else f"more than {limit['gt']}" if "gt" in limit else ""
        high = f"at most {limit['le']}" if "le" in limit else f"less than {limit['lt']}" if "lt" in limit else ""
        return " and ".join(filter(None, (low, high)))


def _notes(info: FieldInfo) -> list[Any]:
    """What the type of a field, or of each item of a list, is annotated with."""
    items = [note for item in get_args(info.annotation) if get_origin(item) is Annotated for note in get_args(item)[1:]]
    return [*info.metadata, *items]


def _limits(info: FieldInfo) -> dict[str, float]:
    """Bounds of a number, or of each number in a list, by name: ge, gt, le, lt."""
    items = [bound for note in _notes(info) if isinstance(note, FieldInfo) for bound in note.metadata]
    return {
        name: getattr(bound, name)
        for bound in (*info.metadata, *items)
        for name in ("ge", "gt", "le", "lt")
        if hasattr(bound, name)
    }


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Every field of the recipe by its flat name, in reading order: those of the recipe itself, then section by section."""
    parts = {name: info.annotation for name, info in Recipe.model_fields.items() if _is_part(info)}
    homes: list[tuple[str, Any]] = [("", Recipe), *parts.items()]
    found = [
        Setting(info.alias or attribute, section, attribute, info)
        for section, part in homes
        for attribute, info in part.model_fields.items()
        if not _is_part(info)
    ]
    return {setting.name: setting for setting in found}


def _is_part(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Part)


def record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able values, section by section; what is None is left out."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every value that is not None by its flat name, JSON-able."""
    return flat(record(recipe))


def flat(table: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Values by flat name from a table with or without sections. Raises RecipeError for names that are no settings."""
    sections = {setting.section for setting in settings().values()} - {""}
    values: dict[str, Any] = {}
    for key, value in table.items():
        value = value.model_dump(by_alias=True, exclude_unset=True) if isinstance(value, Part) else value
        inside = value if key in sections and isinstance(value, Mapping) else {key: value}
        for name, plain in inside.items():
            known = settings().get(name.replace("-", "_"))
            if known is None or (inside is value and known.section != key):
                where = f" in {origin}" if origin else ""
                raise RecipeError(
                    f"unknown setting {name!r}{where}",
                    nearest(name, settings()) if known is None else f"it belongs to [{known.section}]",
                )
            values[known.name] = plain
    return values


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Settings as one types them on a command line; what is None is left out.

    >>> as_words({"class": "dog", "flip": False, "targets": ["attention", "conv"]})
    ['--class', 'dog', '--no-flip', '--targets', 'attention', '--targets', 'conv']
    """
    words: list[str] = []
    for name, value in values.items():
        setting = settings()[name]
        if setting.type is bool and value is not None:
            words.append(setting.flag if value else f"--no-{setting.flag[2:]}")
        elif value is not None:
            each = value if isinstance(value, list | tuple) else [value]
            words += [word for one in each for word in (setting.flag, str(one))]
    return words
