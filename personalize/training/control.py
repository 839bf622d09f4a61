"""A word to a run that goes on: a file `control` in its folder, which the run reads and removes between two steps.

echo sample > runs/rex/control      # or: personalize tell runs/rex sample
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..errors import OutputError, RecipeError, nearest
from ..io import disk_error
from ..lock import is_held
from ..text import command_line

CONTROL = "control"
WORDS = {
    "sample": "draw the sample pictures",
    "save": "save a checkpoint and the state",
    "stop": "save the state and stop; the same command goes on",
}


def tell(folder: Path, word: str) -> None:
    """Leave a word for the run that goes on in a folder. Raises RecipeError for an unknown one, OutputError where none is."""
    if word not in WORDS:
        raise RecipeError(f"a run does not understand {word!r}", nearest(word, WORDS))
    if not is_held(folder):
        if not (folder / "events.jsonl").is_file():
            raise OutputError(f"there is no run in {folder}", "give the folder that personalize train writes")
        raise OutputError(
            f"no run goes on in {folder}",
            f"{command_line('personalize', 'finish', folder)} makes an adapter of where a stopped one stands",
        )
    try:
        with (folder / CONTROL).open("a", encoding="utf-8") as control:
            control.write(word + "\n")
    except OSError as error:
        raise disk_error(folder / CONTROL, error) from error


def take_words(folder: Path) -> list[str]:
    """The words that somebody left in a folder, which are gone then; none where there are none yet."""
    path = folder / CONTROL
    try:
        words = path.read_text(encoding="utf-8", errors="replace").lower().split()
    except OSError:  # nearly always: it is not there
        return []
    if words:
        with contextlib.suppress(OSError):
            path.unlink()
    return words
