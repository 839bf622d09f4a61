"""Tables of what varies, name => row: adapter kinds, model families, objectives, optimizers, trackers, backends, captioners,
kinds of jobs.

A built-in row and one from another package come in by the same door: "module:attribute", imported when it is first used.
Packages declare theirs as entry points of the group `personalize.TABLE`:

    [project.entry-points."personalize.optimizers"]
    sophia = "my_package.sophia:SOPHIA"
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError, nearest

BUILT_IN: dict[str, dict[str, str]] = {
    "kinds": {
        "lora": "personalize.adapters.kinds.lora:LORA",
        "dora": "personalize.adapters.kinds.dora:DORA_KIND",
        "lora+sparse": "personalize.adapters.kinds.sparse:SPARSE",
        "loha": "personalize.adapters.kinds.loha:LOHA",
        "lokr": "personalize.adapters.kinds.lokr:LOKR",
        "oft": "personalize.adapters.kinds.oft:OFT",
        "glora": "personalize.adapters.kinds.glora:GLORA",
        "ia3": "personalize.adapters.kinds.ia3:IA3",
        "full": "personalize.adapters.kinds.full:FULL",
        "norm": "personalize.adapters.kinds.full:NORM",
    },
    "families": {  # in the order in which they are recognised
        "pocket": "personalize.families.pocket:POCKET",
        "sd1": "personalize.families.sd:SD1",
        "sd2": "personalize.families.sd:SD2",
        "sdxl": "personalize.families.sdxl:SDXL",
        "sdxl-refiner": "personalize.families.sdxl:REFINER",
        "sd35-large": "personalize.families.sd3:LARGE",
        "sd3": "personalize.families.sd3:SD3",  # whose layers are among those of the next
        "sd35-medium": "personalize.families.sd3:MEDIUM",
    },
    "objectives": {
        "none": "personalize.training.objectives.denoise:Denoising",
        "images": "personalize.training.objectives.prior:ClassImages",
        "output": "personalize.training.objectives.prior:ClassOutput",
        "dco": "personalize.training.objectives.dco:Consistency",
    },
    "optimizers": {
        "adamw": "personalize.training.rules:ADAMW",
        "adamw8bit": "personalize.training.rules:ADAMW_8BIT",
        "prodigy": "personalize.training.rules:PRODIGY",
        "adafactor": "personalize.training.rules:ADAFACTOR",
        "lion": "personalize.training.rules:LION",
        "schedulefree": "personalize.training.rules:SCHEDULE_FREE",
        "came": "personalize.training.rules:CAME",
    },
    "trackers": {
        "tensorboard": "personalize.training.trackers:TENSORBOARD",
        "wandb": "personalize.training.trackers:WANDB",
    },
    "backends": {"local": "personalize.backends.local:LOCAL"},
    "captioners": {  # in the order in which a folder is asked for its kind
        "pocket": "personalize.captioning.pocket:POCKET",
        "tagger": "personalize.captioning.tagger:TAGGER",
        "image-to-text": "personalize.captioning.image_to_text:IMAGE_TO_TEXT",
    },
    "jobs": {  # each does what the command of its name does
        "train": "personalize.cli.work:TRAIN",
        "batch": "personalize.cli.work:BATCH",
        "generate": "personalize.cli.work:GENERATE",
        "dataset": "personalize.cli.work:DATASET",
        "caption": "personalize.cli.work:CAPTION",
        "merge": "personalize.cli.work:MERGE",
        "resize": "personalize.cli.work:RESIZE",
        "convert": "personalize.cli.work:CONVERT",
        "extract": "personalize.cli.work:EXTRACT",
        "bake": "personalize.cli.work:BAKE",
        "interpolate": "personalize.cli.work:INTERPOLATE",
        "doctor": "personalize.cli.work:DOCTOR",
    },
}


class Table(Mapping[str, Any]):
    """A table: names cost nothing, a row is imported when it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: dict[str, Any] = dict(BUILT_IN[name])
        self._rows |= {point.name: point.value for point in entry_points(group=f"personalize.{name}")}

    def __getitem__(self, name: str) -> Any:
        """A row. Raises RecipeError for a name that is none, naming the nearest."""
        row = self._rows.get(name)
        if row is None:
            self.check(name)
        if isinstance(row, str):
            module, _, attribute = row.partition(":")
            row = self._rows[name] = getattr(importlib.import_module(module), attribute)
        return row

    def check(self, name: str) -> None:
        """Raise RecipeError for a name that is none, naming the nearest."""
        if name not in self._rows:
            raise RecipeError(f"there is no {name!r} among the {self.name}", nearest(name, self._rows))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, row: Any) -> None:
        """Put a row in, for this process: an object, or "module:attribute"."""
        self._rows[name] = row

    def remove(self, name: str) -> None:
        """Take a row out again."""
        del self._rows[name]


@functools.cache
def table(name: str) -> Table:
    """A table by its name: kinds, families, objectives, optimizers, trackers, backends, captioners or jobs.

    >>> list(table("optimizers"))[:2]
    ['adamw', 'adamw8bit']
    """
    return Table(name)
