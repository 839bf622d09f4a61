"""The backend that trains in this process, many runs in the same passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..recipe.fields import Recipe
from ..training.fleet import train_fleet
from .backend import Numbered


class Local:
    """Trains here and now."""

    def run(self, recipes: Sequence[Recipe], *, fresh: bool = False, together: int | None = None) -> Iterator[Numbered]:
        """As `train_fleet`."""
        yield from train_fleet(recipes, fresh=fresh, together=together)


LOCAL = Local()
