"""What a folder of images is read into: concepts, examples, the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing to learn: the word that calls it, what it is, its subfolder ("": the folder itself), its repeats."""

    trigger: str
    class_name: str = ""
    folder: str = ""
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Example:
    """One picture: where it is, what it is called, its bytes' sha256 and its upright size in pixels (width, height).

    `repeats` is how often it is shown for each time that others are, `concept` the number of its concept. `mask` is the file
    that says what of it is learned, the picture itself where that is its alpha channel. `caption_file` lies beside the picture,
    and `written` is what stands in it.
    """

    path: Path
    caption: str
    sha256: str
    size: tuple[int, int]
    repeats: int = 1
    concept: int = 0
    mask: Path | None = None
    mask_sha256: str = ""
    caption_file: Path | None = None
    written: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The pictures in natural order, what was odd about them, and the trigger: as given, else the folder's name made safe.

    Of several concepts, the first one's trigger is THE trigger. `skipped` tells the pictures that could not be read, and why,
    `unused` what lies in the folder and is not used, `bad_masks` the pictures that are left out as their mask is of no use.
    """

    examples: tuple[Example, ...]
    warnings: list[str]
    trigger: str
    concepts: tuple[Concept, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()
    unused: tuple[str, ...] = ()
    bad_masks: tuple[tuple[Path, DataError], ...] = ()

    @property
    def triggers(self) -> tuple[str, ...]:
        """The triggers of all concepts, each once."""
        return tuple(dict.fromkeys(concept.trigger for concept in self.concepts)) or (self.trigger,)
