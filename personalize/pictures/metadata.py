"""What metadata.jsonl, metadata.csv (Hugging Face imagefolder) and captions.txt say of the pictures of a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import all_files, is_picture, same_name

JSON_LINES, TABLE, LIST = "metadata.jsonl", "metadata.csv", "captions.txt"
FILES = (JSON_LINES, TABLE, LIST)  # the first that is there is read
CAPTION_KEYS = ("text", "caption")
BETWEEN = ("\t", "|", ": ", ":", ", ", ",", " ")  # a picture's name and its caption in captions.txt
LINE = 'write one {"file_name": ..., "text": ...} per line'
TABLE_HINT = "call the columns file_name,text in its first line"


@dataclass(frozen=True, slots=True)
class Note:
    """What a line says of a picture; "" and 0 where it says nothing."""

    caption: str = ""
    repeats: int = 0


def metadata_file(folder: Path) -> Path | None:
    """The file that speaks of all pictures of a folder, if there is one."""
    return next((path for name in FILES if (path := folder / name).is_file()), None)


def read_metadata(folder: Path) -> dict[Path, Note]:
    """What it says, by the picture's path; {} without one. Raises DataError naming file and line."""
    path = metadata_file(folder)
    if path is None:
        return {}
    exact = {file.relative_to(folder).as_posix(): file for file in all_files(folder)}
    files = {same_name(name): file for name, file in exact.items()} | exact
    if path.name == LIST:
        return _list(read_text(path), files)
    notes: dict[Path, Note] = {}
    for where, entry in (_json_lines if path.name == JSON_LINES else _rows)(path):
        picture, note = _note(entry, files, where)
        if picture in notes:
            raise DataError(f"{where}: {picture.name} already has a caption", "keep one line per picture")
        notes[picture] = note
    return notes


def read_text(path: Path) -> str:
    """Text of a caption file, with or without a byte-order mark. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, entry) of metadata.jsonl."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        where = f"{path} line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}", LINE) from error


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, entry) of metadata.csv, whose first line names the columns."""
    lines = csv.DictReader(read_text(path).splitlines(keepends=True))
    for row in lines:
        entry: dict[str, Any] = {key: value for key, value in row.items() if key is not None}
        if (repeats := entry.get("repeats")) is not None:
            entry["repeats"] = int(repeats) if repeats.isdecimal() else repeats
        yield f"{path} line {lines.line_num}", {key: value for key, value in entry.items() if value != "" or key != "repeats"}


def _list(text: str, files: Mapping[str, Path]) -> dict[Path, Note]:
    """captions.txt: a picture's name, something between, its caption. {} unless every line begins so: then it is another file."""
    notes = {}
    for line in filter(str.strip, text.splitlines()):
        pieces = ((name.strip(), said) for between in BETWEEN for name, found, said in [line.partition(between)] if found)
        known = ((files.get(name) or files.get(same_name(name)), said) for name, said in pieces)
        entry = next(((path, said) for path, said in known if path and is_picture(path)), None)
        if entry is None:
            return {}
        notes[entry[0]] = Note(" ".join(entry[1].split()))
    return notes


def _note(entry: Any, files: Mapping[str, Path], where: str) -> tuple[Path, Note]:
    """One entry -> (picture, what it says)."""
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{where}: no file_name", TABLE_HINT if f"/{TABLE} line" in where else LINE)
    spellings = [name, name.replace("\\", "/")]
    picture = next(filter(None, (files.get(key) for one in spellings for key in (one, same_name(one)))), None)
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
    return " ".join((entry[key] or "").split())
