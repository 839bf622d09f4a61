"""What every section of the recipe is: validated, immutable, and with errors that name the right place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic._internal._model_construction import ModelMetaclass  # of BaseModel: it has no public name

from ..errors import RecipeError, nearest


def _at_commas(value: Any) -> Any:
    """`a,b` as (a, b), also inside a list: what a shell or a quick line of TOML gives."""
    items = value if isinstance(value, list | tuple) else [value]
    return [piece for item in items for piece in (item.split(",") if isinstance(item, str) else [item])]


AtCommas = BeforeValidator(_at_commas)


def is_off(value: Any) -> bool:
    """Whether a setting that came later is off: it is left out of what is written, and old files stay the same."""
    return not value


def equals(default: Any) -> Callable[[Any], bool]:
    """Whether such a setting has its default."""
    return lambda value: bool(value == default)


AnyPart = TypeVar("AnyPart", bound="Part")


class Called(ModelMetaclass):
    """What Python code gets wrong in a call is a RecipeError that names the right place."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if args:
            raise RecipeError(f"{cls.__name__} takes settings by name", "p.resolve(folder='photos', rank=4)")
        try:
            return super().__call__(**values)
        except ValidationError as error:
            raise explain_call(cls, error) from None


class Part(BaseModel, metaclass=Called):
    """A section of the recipe. Unknown keys are errors; values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True, allow_inf_nan=False)

    whole: ClassVar[type[BaseModel]]  # the recipe, whose sections parts are: what belongs elsewhere is told where

    def __setattr__(self, name: str, value: Any) -> None:
        raise RecipeError(f"a recipe cannot be changed: {name}", f"make another one: p.resolve(start=recipe, {name}=...)")

    def model_copy(self: AnyPart, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> AnyPart:
        """A copy with other values, which are not validated. Raises RecipeError for names that are no fields."""
        for name in (update or {}).keys() - type(self).model_fields.keys():
            raise unknown_field(type(self), name)
        return super().model_copy(update=update, deep=deep)


def explain_call(part: Any, error: ValidationError) -> RecipeError:
    """The first thing that is wrong about a call, as one line."""
    *within, name = map(str, (first := error.errors()[0])["loc"])
    if first["type"] == "extra_forbidden":
        for one in within:
            part = part.model_fields[one].annotation or part
        return unknown_field(part, name)
    what = first["msg"].replace("Input should be", "must be", 1)
    return RecipeError(f"{'.'.join([*within, name])} {what}, not {first['input']!r}")


def unknown_field(part: type[BaseModel], name: str) -> RecipeError:
    """What to say of a name that is no field of a section, or of the recipe: where it belongs, or what was meant."""
    kinds = {field: info.annotation for field, info in Part.whole.model_fields.items()}
    sections = {field: kind for field, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Part)}
    homes = dict.fromkeys(kinds.keys() - sections.keys(), "")
    for field, kind in sections.items():
        homes |= {info.alias or key: field for key, info in kind.model_fields.items()}
    what = f"{part.__name__} has no setting {name!r}"
    if section := homes.get(name):
        call = f"Recipe({section}={sections[section].__name__}({name}=...))"
        return RecipeError(what, f"it is {section}.{name}: p.{call}, or p.resolve({name}=...)")
    if name in homes:
        return RecipeError(what, f"it is the recipe's own: p.Recipe({name}=...)")
    placed = {f"did you mean {own}?": f"did you mean {section}.{own}?" for own, section in homes.items() if section}
    return RecipeError(what, placed.get(meant := nearest(name, homes), meant))
