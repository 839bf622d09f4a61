"""Captions of pictures: NAME.txt sidecars, metadata.jsonl (Hugging Face imagefolder), else a template; and their tags."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, RecipeError, nearest

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption")
SIDECARS = (".txt", ".TXT", ".caption")  # the last is the first choice of kohya's trainer
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # no files on Windows


@dataclass(frozen=True, slots=True)
class Note:
    """What a line of metadata.jsonl says of a picture; "" and 0 where it says nothing."""

    caption: str = ""
    repeats: int = 0


def fill(template: str, trigger: str, class_name: str = "") -> str:
    """Fill in {trigger} and {class}, and collapse spaces. Raises RecipeError for any other {word}.

    >>> fill("a  {class} called {trigger}", "zwx", "dog")
    'a dog called zwx'
    """
    words = {"trigger": trigger, "class": class_name}

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            raise RecipeError(f"unknown {match[0]} in '{template}'", nearest(match[1], words))
        return words[match[1]]

    return _tidy(re.sub(r"\{(\w+)\}", word, template))


def safe_trigger(name: str) -> str:
    """Any name as one lower-case word that is also a safe file name, in any script; never empty.

    >>> safe_trigger("My Cat (photos)!")
    'my-cat-photos'
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in plain)
    word = re.sub("-+", "-", kept).strip("-")[:40].strip("-")
    if word in RESERVED:
        return f"{word}-subject"
    return word or "subject"


def sidecar(picture: Path) -> str:
    """The caption in NAME.txt beside a picture, or "" where there is none. Raises DataError when it is not UTF-8."""
    found = sidecar_of(picture)
    return _tidy(_read(found)) if found else ""


def sidecar_of(picture: Path) -> Path | None:
    """The caption file beside a picture, if there is one."""
    return next((path for suffix in SIDECARS if (path := picture.with_suffix(suffix)).is_file()), None)


def read_metadata(folder: Path) -> dict[Path, Note]:
    """What metadata.jsonl says, by the picture's path; {} without that file. Raises DataError naming file and line."""
    path = folder / METADATA
    if not path.is_file():
        return {}
    files = {_compose_accents(file.relative_to(folder).as_posix()): file for file in folder.rglob("*") if file.is_file()}
    notes: dict[Path, Note] = {}
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            picture, note = _entry(line, files, f"{path} line {number}")
            if picture in notes:
                raise DataError(f"{path} line {number}: {picture.name} already has a caption", "keep one line per picture")
            notes[picture] = note
    return notes


def missing_trigger(trigger: str, captions: Iterable[str]) -> list[str]:
    """The captions that do not hold the trigger as a word of its own."""
    return [caption for caption in captions if not _as_word(trigger).search(caption)]


def remove_triggers(trigger: str | Sequence[str], prompt: str) -> tuple[str, bool]:
    """A prompt without the trigger, or any of several, and whether one was in it.

    A style goes with its whole phrase, a subject leaves its class.

    >>> remove_triggers("zwx", "zwx cat, ink drawing")
    ('cat, ink drawing', True)
    >>> remove_triggers("xiv", "a cat on the beach, xiv style")
    ('a cat on the beach', True)
    """
    if not isinstance(trigger, str):
        called = False
        for one in trigger:
            prompt, there = remove_triggers(one, prompt)
            called |= there
        return prompt, called
    if not trigger or missing_trigger(trigger, [prompt]):
        return prompt, False
    kept = []
    for place, clause in enumerate(prompt.split(",")):
        bare = " ".join(_as_word(trigger).sub(" ", clause).split())
        if not missing_trigger(trigger, [clause]) and (place > 0 or bare in ("", "style")):
            continue
        kept.append(bare)
    return ", ".join(kept), True


def tags(caption: str) -> list[str]:
    """The parts of a caption between commas.

    >>> tags("zwx cat, on a mat,, asleep")
    ['zwx cat', 'on a mat', 'asleep']
    """
    return [tag for part in caption.split(",") if (tag := part.strip())]


def _as_word(trigger: str) -> re.Pattern[str]:
    """The trigger where it stands as a word of its own."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)


def _entry(line: str, files: Mapping[str, Path], where: str) -> tuple[Path, Note]:
    """One line of metadata.jsonl -> (picture, what it says)."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}", 'write one {"file_name": ..., "text": ...} per line') from error
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{where}: no file_name", 'write one {"file_name": ..., "text": ...} per line')
    picture = files.get(_compose_accents(name)) or files.get(_compose_accents(name.replace("\\", "/")))
    if picture is None:
        raise DataError(f"{where}: no file {name} in the folder", "correct file_name or remove the line")
    repeats = entry.get("repeats", 0)
    if type(repeats) is not int or ("repeats" in entry and repeats < 1):
        raise DataError(
            f"{where}: 'repeats' must be a whole number, at least 1, not {repeats!r}", 'write "repeats": 2, or nothing'
        )
    return picture, Note(_caption(entry, where) if set(CAPTION_KEYS) & set(entry) or not repeats else "", repeats)


def _caption(entry: Mapping[str, Any], where: str) -> str:
    key = next((key for key in CAPTION_KEYS if key in entry), None)
    if key is None:
        raise DataError(f"{where}: no caption", f"call it 'text'; found {', '.join(map(str, entry))}")
    if not isinstance(entry[key], str | None):
        raise DataError(f"{where}: '{key}' is not text", 'write it in quotes: "text": "..."')
    return _tidy(entry[key] or "")


def _compose_accents(name: str) -> str:
    """A relative path without ./ and with accents composed: Macs store them apart, editors type them as one."""
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def _read(path: Path) -> str:
    """Text of a caption file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from error


def _tidy(text: str) -> str:
    return " ".join(text.split())
