"""Captions of pictures: what files say, else a template; triggers in them, and tags."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import RecipeError, nearest
from ..families.notation import escape, plain_text
from ..pictures.metadata import read_text

PLACEHOLDER = re.compile(r"(?<!\\)(?:\{(trigger|class)\}|\[(trigger|class)\])", re.IGNORECASE)
GROUP = re.compile(r"(?<!\\)\((?:\\.|[^\\()]|\((?:\\.|[^\\()])*\))*\)|(?<!\\)[\[{](?:\\.|[^\\\[\]{}])*[\]}]")
EMPTY = re.compile(r"\(\s*(?::[\d.]+\s*)?\)")  # what is left of (zwx:1.2) without zwx
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # no files on Windows


def fill(template: str, trigger: str, class_name: str = "") -> str:
    r"""Fill in {trigger} and {class} (or [trigger], as ai-toolkit writes it) as plain text, and collapse spaces.

    Raises RecipeError for any other {word}.

    >>> fill("a  {class} called {trigger}", "zwx_(dog)", "dog")
    'a dog called zwx_\\(dog\\)'
    """
    words = {"trigger": trigger, "class": class_name}
    for match in re.finditer(r"(?<!\\)\{(\w+)\}", template):
        if match[1].lower() not in words:
            raise RecipeError(f"unknown {match[0]} in '{template}'", nearest(match[1], words))
    return _tidy(_fill_known(template, words))


def fill_caption(caption: str, trigger: str, class_name: str = "") -> str:
    r"""A caption that somebody wrote, with its placeholders filled in; the trigger in it is plain text, brackets and all.

    >>> fill_caption("[trigger] the {small} dog", "zwx"), fill_caption("zwx_(dog) on a (red) mat", "zwx_(dog)")
    ('zwx the {small} dog', 'zwx_\\(dog\\) on a (red) mat')
    """
    if escape(trigger) != trigger:
        caption = re.sub(re.escape(trigger), lambda match: escape(match[0]), caption, flags=re.IGNORECASE)
    return _tidy(_fill_known(caption, {"trigger": trigger, "class": class_name}))


def _fill_known(text: str, words: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: escape(words[(match[1] or match[2]).lower()]), text)


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
    """The captions, or prompts, that do not hold the trigger as a word of its own, as the encoder reads them."""
    return [caption for caption in captions if not _as_word(trigger).search(plain_text(caption))]


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
    for place, clause in enumerate(clauses(prompt)):
        bare = " ".join(EMPTY.sub("", _as_word(escape(trigger)).sub(" ", clause)).split())
        if not missing_trigger(trigger, [clause]) and (place > 0 or bare in ("", "style")):
            continue
        kept.append(bare)
    return ", ".join(kept), True


def tags(caption: str) -> list[str]:
    """The parts of a caption between commas.

    >>> tags("zwx cat, on a mat,, asleep")
    ['zwx cat', 'on a mat', 'asleep']
    """
    return [tag for part in clauses(caption) if (tag := part.strip())]


def clauses(caption: str) -> list[str]:
    """What stands between commas, those inside brackets left alone; brackets without a partner are text.

    >>> clauses("zwx, (red, blue:1.2), :(, on a mat")
    ['zwx', ' (red, blue:1.2)', ' :(', ' on a mat']
    """
    inside = [range(match.start(), match.end()) for match in GROUP.finditer(caption)]
    cuts = [i for i, letter in enumerate(caption) if letter == "," and not any(i in one for one in inside)]
    return [caption[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(caption)], strict=True)]


def _as_word(trigger: str) -> re.Pattern[str]:
    """The trigger where it stands as a word of its own."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)


def _tidy(text: str) -> str:
    return " ".join(text.split())
