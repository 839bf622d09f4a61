"""What drawing reports while it goes on: a session yields these, a command prints them, a server streams them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from .request import Request


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `steps` denoising steps are done, of the images whose requests have these numbers (from 0)."""

    step: int
    steps: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """The image of request `number` is finished; `request` says all that decided it, as its PNG will."""

    number: int
    request: Request
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Saved:
    """A file was written: an image, or with no `number` a contact sheet."""

    path: Path
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should know; drawing goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Drawing was cancelled; the requests with these numbers have no image. Always the last event."""

    numbers: tuple[int, ...]


Event = Progress | Picture | Saved | Notice | Cancelled


def images(events: Iterable[Event]) -> Iterator[Image.Image]:
    """The finished images alone; notices become Python warnings."""
    for event in events:
        if isinstance(event, Picture):
            yield event.image
        elif isinstance(event, Notice):
            warnings.warn(event.text, stacklevel=3)
