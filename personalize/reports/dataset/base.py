"""What the base makes of a folder's pictures before training: asked where `train` asks, in personalize/training/limits.py.

This is all of the report that needs torch. Only the base's autoencoder is read, and nothing is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import BaseModelError, DataError
from ...findings import Finding
from .measure import DatasetStats

if TYPE_CHECKING:
    from ...training.limits import Reconstruction

PIXELS = 6 * 512 * 512  # that are encoded and decoded, on a CPU some seconds each 512 x 512
FEWEST = 2  # pictures that are looked at, however large


@dataclass(frozen=True)
class BaseView:
    """What the base makes of the pictures, and what is wrong with that."""

    findings: tuple[Finding, ...]
    reconstruction: Reconstruction | None = None  # None: it could not be looked at, and a finding says why

    @property
    def line(self) -> str:
        """How much the autoencoder keeps, for a person; "" where that is not known."""
        from ...training.verdict import kept_words

        found = self.reconstruction
        return f"the base's autoencoder {kept_words(found.mean, found.usual)}" if found else ""


def look_at_base(stats: DatasetStats) -> BaseView:
    """Encode and decode some pictures with the recipe's base, and hold their classes against what it knows."""
    recipe = stats.recipe
    if not_here := why_not_here(recipe.base):
        return BaseView((not_here,))
    from ...data.latents import encode_example
    from ...models.model import Base
    from ...training.limits import SHOWN, find_strange_classes, reconstruct_some

    examples, shapes = [one.example for one in stats.images], [one.shape for one in stats.images]
    most = min(SHOWN, max(FEWEST, PIXELS // max(math.prod(shape) for shape in shapes)))
    try:
        base = Base.autoencoder_of(recipe)
        found = reconstruct_some(
            base, examples, shapes, lambda i: encode_example(base, examples[i], shapes[i], False)["mean"], most
        )
        strange = tuple(find_strange_classes(base, stats.dataset, stats.grid.side))
    except (BaseModelError, DataError) as error:
        what = f"what the base can draw of the pictures is not known: {error.what}"
        return BaseView((Finding("warning", "base-not-looked-at", what, hint=error.hint),))
    return BaseView((*([found.concern] if found.concern else []), *strange), found)


def why_not_here(base: str) -> Finding | None:
    """What is to be said of a base of the hub that is not on this machine; None for all others."""
    from ...models.sources import is_hub_id, locate

    if is_hub_id(base):
        try:
            locate(base, download=False)
        except BaseModelError:
            what = f"what {base} can draw of the pictures was not looked at, for it is not on this machine"
            return Finding("info", "base-not-looked-at", what, hint="training downloads it; after that, the same command looks")
    return None


def write_reconstruction(found: Reconstruction, sheet: Path) -> Path:
    """Write what the autoencoder makes of the pictures beside a contact sheet: NAME-autoencoder.png. Raises OutputError."""
    from ...inference.sheet import save_sheet

    return save_sheet(found.sheet, sheet.with_name(f"{sheet.stem}-autoencoder.png"))
