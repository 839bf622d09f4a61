"""Names of sample images: by prompt, seed and way of drawing. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ..text import slug


def sample_name(prompt: str, options: Mapping[str, Any], seed: int) -> str:
    """The name of a sample picture behind its step; `options` are what is drawn differently for its prompt."""
    return f"{prompt_name(prompt, {name: value for name, value in options.items() if name != 'seed'})}-s{seed}"


def drawing_of(path: str) -> str:
    """What the name of a sample picture says beside step and strength: the same for one prompt and seed, drawn in one way.

    Empty for names that are not ours.

    >>> drawing_of("samples/000050-a-rex-dog-s0.png"), drawing_of("000200-a-rex-dog-s0-x0.50.png"), drawing_of("photo.png")
    ('a-rex-dog-s0', 'a-rex-dog-s0', '')
    """
    named = re.fullmatch(r"\d{6,}-(.+?-s\d+)(?:-x\d+\.\d\d)?\.png", PurePath(path).name)
    return named[1] if named else ""


def prompt_name(prompt: str, options: Mapping[str, Any] | None = None) -> str:
    """A prompt as a part of a file's name, another one for every prompt, and for every other way to draw it.

    >>> prompt_name("a rex dog"), prompt_name("A rex dog!"), prompt_name("a rex dog", {"size": (96, 64)})
    ('a-rex-dog', 'a-rex-dog-9c2ede', 'a-rex-dog-563043')
    """
    name, more = slug(prompt), json.dumps(options, sort_keys=True) if options else ""
    if not more and prompt == name.replace("-", " "):
        return name
    return f"{name}-{hashlib.sha256((prompt + more).encode()).hexdigest()[:6]}"
