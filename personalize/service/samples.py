"""The sample pictures that come along, for who has none at hand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from .errors import not_found
from .studio import Studio
from .uploads import Incoming

PACKAGE = Path(__file__).parents[1]
FOLDER = PACKAGE / "sample_data" if (PACKAGE / "sample_data").is_dir() else PACKAGE.parent / "sample_data"  # wheel, or clone


@dataclass(frozen=True)
class Sample:
    """A folder of sample pictures, and what a training of it is told."""

    name: str
    title: str
    about: str
    settings: dict[str, str]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def pictures(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.png"))


SAMPLES = (
    Sample("subject", "scarf-cat", "one thing: a blue cat with a red scarf", {"trigger": "zwx", "class": "cat"}),
    Sample("style", "stained-glass", "a style: the look of stained glass", {"trigger": "xiv"}),
)


def samples() -> list[Sample]:
    """Those that are there."""
    return [one for one in SAMPLES if one.folder.is_dir()]


def sample_named(name: str) -> Sample:
    """One of them. Raises Refusal."""
    for one in samples():
        if one.name == name:
            return one
    raise not_found("sample", name)


def take(here: Studio, sample: Sample) -> str:
    """The dataset of a sample's pictures, which is made where it is not there; returns its id."""
    if sample.title in here.datasets.ids():
        return sample.title
    with contextlib.ExitStack() as files:
        paths = sorted(path for path in sample.folder.iterdir() if path.is_file())
        incoming = [Incoming(path.name, files.enter_context(path.open("rb"))) for path in paths]
        return here.datasets.create(sample.title, incoming)[0]
