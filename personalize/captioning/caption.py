"""Captions of a folder of pictures, written beside those that have none: which, in which words, and as it happens."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.captions import fill, tags
from ..data.dataset import Concept
from ..data.folder import concepts_of
from ..data.images import load_whole
from ..data.sidecars import caption_file, write_caption, written_caption
from ..errors import BaseModelError, DataError, OutputError
from ..families.notation import escape
from ..pictures.files import Contents, look_into, printable_name
from ..pictures.galleries import advice_without_pictures, galleries
from ..recipe.fields import Data
from .captioner import Say

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "{trigger}"
LARGEST = 2048  # pixels along a side that a captioner is shown
LATER, PLAIN = "[trigger]", r"\[trigger\]"  # which training fills in: as it is written, and as `fill` leaves it alone


@dataclass(frozen=True)
class Wording:
    """What becomes of a captioner's words. `prefix` stands first: {trigger} and {class} are filled in now, [trigger] later."""

    prefix: str = PREFIX
    without: tuple[str, ...] = ()  # tags that are left out
    max_words: int | None = None  # behind the prefix

    def caption(self, said: str, concept: Concept) -> str:
        r"""A caption as training reads it: brackets are plain ones. "" where nothing was said.

        >>> Wording(max_words=4).caption("a red cat, on a (big) mat", Concept("zwx"))
        'zwx, a red cat'
        >>> Wording("[trigger]", ("1girl",)).caption("1girl, ganyu (genshin impact)", Concept("zwx"))
        '[trigger], ganyu \\(genshin impact\\)'
        """
        said = "".join(letter if letter.isprintable() else " " for letter in said)
        unwanted = {plain_tag(tag) for tag in self.without}
        whole = tags(escape(said))
        kept = [tag for tag in whole if plain_tag(tag) not in unwanted]
        kept = shorten(kept, self.max_words) if self.max_words else kept
        text = ", ".join(kept) if kept != whole else escape(" ".join(said.split()))  # 1,000 stays one number
        first = self.first(concept)
        return (f"{first} {text}" if first.endswith((",", ".", ":")) else f"{first}, {text}" if first else text) if text else ""

    def first(self, concept: Concept) -> str:
        """The prefix. Raises RecipeError for an unknown {word} in it."""
        return fill(self.prefix.replace(LATER, PLAIN), concept.trigger, concept.class_name).replace(PLAIN, LATER)


def plain_tag(tag: str) -> str:
    """A tag in the spelling in which tags are compared."""
    return " ".join(tag.casefold().replace("_", " ").replace("\\", "").split())


def shorten(clauses: Sequence[str], words: int) -> list[str]:
    """The first clauses, whole, that have at most so many words; of one that is longer, its first words.

    >>> shorten(["a red cat", "on a mat", "asleep"], 6), shorten(["a red cat on a mat"], 3)
    (['a red cat', 'on a mat'], ['a red cat'])
    """
    kept, left = [], words
    for clause in clauses:
        if (count := len(clause.split())) > left:
            break
        kept.append(clause)
        left -= count
    return kept or [" ".join(clause.split()[:words]) for clause in clauses[:1]]


# ---------------------------------------------------------------- which pictures


@dataclass(frozen=True)
class Uncaptioned:
    """A picture that is to get a caption."""

    path: Path
    concept: Concept
    beside: Contents


@dataclass(frozen=True)
class Work:
    """What is to be done in a folder: how many pictures keep their captions, and what is left out and why."""

    todo: tuple[Uncaptioned, ...]
    kept: int
    left_out: tuple[tuple[Path, str], ...]


def find_work(data: Data, overwrite: bool = False, write: bool = True) -> Work:
    """The pictures that training would read from a folder, of those without a caption; of all, with `overwrite`.

    Raises DataError for a folder without pictures or with metadata that cannot be read, OutputError for one that cannot be
    written to.
    """
    found, beside = galleries(data.folder), functools.cache(look_into)
    if not found:
        raise DataError(f"there are no pictures in {data.folder}", advice_without_pictures(look_into(data.folder)))
    todo, left_out, files, kept = list[Uncaptioned](), list[tuple[Path, str]](), dict[Path, Path](), 0
    for concept, gallery in zip(concepts_of(data, found), found, strict=True):
        left_out += gallery.contents.left_out
        for path in gallery.pictures:
            contents = beside(path.parent)
            try:
                if not overwrite and written_caption(gallery, path, contents):
                    kept += 1
                    continue
            except DataError as error:
                left_out.append((path, f"{error.what}: --overwrite replaces it"))
                continue
            if (other := files.setdefault(caption_file(path, contents), path)) != path:
                left_out.append((path, f"its caption is that of {other.name}: rename one of them"))
                continue
            todo.append(Uncaptioned(path, concept, contents))
    for folder in {one.path.parent for one in todo} if write else ():
        if not os.access(folder, os.W_OK):
            raise OutputError(f"cannot write to {folder}", "change its permissions; --dry-run only prints")
    return Work(tuple(todo), kept, tuple(left_out))


# ---------------------------------------------------------------- as it happens


@dataclass(frozen=True)
class Caption:
    """A picture was captioned; `file` is None where that was only tried, or where nothing was clear."""

    path: Path
    text: str
    file: Path | None


@dataclass(frozen=True)
class Skip:
    """A picture cannot be captioned."""

    path: Path
    why: str


def write_captions(
    todo: Sequence[Uncaptioned], say: Say, wording: Wording, batch: int = 1, write: bool = True
) -> Iterator[Caption | Skip]:
    """Caption pictures, so many at once; each caption is on the disk before it is told. Raises OutputError."""
    for first in range(0, len(todo), batch):
        opened = list[tuple[Uncaptioned, "Image.Image"]]()
        for one in todo[first : first + batch]:
            try:
                opened.append((one, open_small(one.path)))
            except DataError as error:
                yield Skip(one.path, error.what.removeprefix(f"{one.path}: "))
        said = say_all(say, [image for _, image in opened])
        for (one, _), words in zip(opened, said, strict=True):
            text = wording.caption(words, one.concept)
            yield Caption(one.path, text, write_caption(one.path, text, one.beside) if text and write else None)


def open_small(path: Path) -> Image.Image:
    """A picture as training sees it, not larger than a captioner needs. Raises DataError."""
    image = load_whole(path)
    image.thumbnail((LARGEST, LARGEST))
    return image


def say_all(say: Say, images: Sequence[Image.Image]) -> list[str]:
    """What is said of images. Raises BaseModelError where the device has too little memory."""
    import torch

    try:
        return say(images) if images else []
    except torch.OutOfMemoryError as error:
        hint = "a smaller --batch-size" if len(images) > 1 else "--device cpu, or a smaller captioner"
        raise BaseModelError(f"the device has too little memory for {len(images)} at once", hint) from error


def printable(path: Path, root: Path) -> str:
    """A picture's name below its folder."""
    return printable_name(path.relative_to(root).as_posix())
