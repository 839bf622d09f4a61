"""One of the names of a table, as the type of a recipe's field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from .. import registry


@dataclass(frozen=True)
class OneOf:
    """One of the names of a table (registry.py): the flag's choices are the table's rows, those of other packages among them.

    `names` gives the choices where they are not all rows, or go by other names.
    """

    table: str
    names: Callable[[], tuple[str, ...]] | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        return self.names() if self.names else tuple(registry.table(self.table))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": list(self.choices)}

    def _check(self, value: str) -> str:
        if value not in self.choices:
            raise PydanticCustomError("literal_error", "not one of the choices")
        return value
