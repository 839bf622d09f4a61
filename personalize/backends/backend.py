"""The interface of backends, and events as lines of JSON, for runs that another process or machine trains.

python -m my_worker < recipes.json | ...     # writes `to_line(number, event)` for each event
for line in output: number, event = from_line(line)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .. import registry
from ..errors import TrainingError
from ..recipe.fields import Recipe
from ..training import events
from ..training.events import Event, event_record

Numbered = tuple[int, Event]  # number of the recipe, and an event of its run


class Backend(Protocol):
    """A row of `registry.table("backends")`: it trains an adapter for each of many recipes, here or elsewhere."""

    def run(self, recipes: Sequence[Recipe], *, fresh: bool = False, together: int | None = None) -> Iterator[Numbered]:
        """Train all to their ends: (number of the recipe, event of its run), each run's events in their order.

        With `fresh`, nothing goes on from what the run folders hold. At most `together` runs share one pass through a base.
        A run that fails says so with `Failed`, and the others go on. Closing the iterator stops all runs with their states saved.
        """
        ...


def get_backend(name: str = "local") -> Backend:
    """A backend by its name. Raises RecipeError for one that there is not."""
    backend: Backend = registry.table("backends")[name]
    return backend


def to_line(number: int, event: Event) -> str:
    """An event of a run as one line of strict JSON."""
    return json.dumps({"number": number} | event_record(event), ensure_ascii=False, allow_nan=False)


def from_line(line: str) -> Numbered:
    """What `to_line` wrote. Raises TrainingError for anything else."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        record = None
    event = events.parse(record) if isinstance(record, dict) else None
    if event is None or not isinstance(number := record.get("number"), int):
        raise TrainingError(f"a backend sent what is no event: {line[:80]!r}", "is the same version installed there?")
    return number, event
