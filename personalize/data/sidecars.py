"""The caption that somebody wrote of a picture: read as training reads it, and written where training looks for it.

`beside` is what lies in the picture's own folder, as `look_into` lists it.
"""

from __future__ import annotations

from pathlib import Path

from ..io import write_text
from ..pictures.files import SIDECARS, Contents, same_name
from ..pictures.galleries import Gallery
from .captions import read_caption


def written_caption(gallery: Gallery, picture: Path, beside: Contents) -> str:
    """What somebody wrote of a picture: beside it, else in the metadata; "" where nobody did. Raises DataError."""
    file, note = beside.caption_of(picture), gallery.notes.get(picture)
    return (read_caption(file) if file else "") or (note.caption if note else "")


def caption_file(picture: Path, beside: Contents) -> Path:
    """Where the caption of a picture is written: the file that is read, else NAME.txt; NAME.png.txt where another picture is
    called NAME too, which would read the same file."""
    if file := beside.caption_of(picture):
        return file
    twins = [one for one in beside.pictures if same_name(one.stem) == same_name(picture.stem)]
    return picture.with_name(picture.name + SIDECARS[0]) if len(twins) > 1 else picture.with_suffix(SIDECARS[0])


def write_caption(picture: Path, caption: str, beside: Contents) -> Path:
    """Write the caption of a picture, whole or not at all; returns its file. Raises OutputError."""
    return write_text(caption_file(picture, beside), " ".join(caption.split()) + "\n")
