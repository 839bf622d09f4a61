"""Captions of pictures: what files say, else a template; triggers in them, and tags."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import RecipeError, nearest
from ..pictures.metadata import read_text

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # no files on Windows


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


def read_caption(file: Path) -> str:
    """The caption in a file. Raises DataError when it is not UTF-8."""
    return _tidy(read_text(file))


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


def _tidy(text: str) -> str:
    return " ".join(text.split())
