"""Named individuals and looks: made-up words that mean something, as a trigger does once it is learned.

Real captions are full of names that CLIP has met a few times. A base that never met one learns to read past every strange
word, and then a trigger cannot be heard (seen: `zwx` moved the text's states a quarter as far as `red` did).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from .art_canvas import pick
from .art_individuals import invent_individual
from .art_looks import invent_look
from .art_styles import Style
from .art_subjects import Subject
from .world import COLOURS, OBJECTS, TRIGGERS

SOMEBODIES, SCHOOLS = 150, 60  # how many individuals and looks have a name
ONSETS = [
    "b", "bl", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m",
    "n", "p", "qu", "r", "s", "sk", "t", "v", "w", "y", "z",
]  # fmt: skip
VOWELS = ["a", "e", "i", "o", "u", "oo", "ai"]
CODAS = ["b", "ck", "f", "g", "k", "lp", "m", "nd", "p", "rk", "sh", "t", "x", "zz"]
TAKEN = {*TRIGGERS, *OBJECTS, *COLOURS}
Thing = TypeVar("Thing")


class Somebody(NamedTuple):
    """A named individual: the same object, colours and markings in every picture."""

    name: str
    object: str
    colour: str
    looks: Subject


class School(NamedTuple):
    """A named look."""

    name: str
    look: Style


def made_up_word(rng: np.random.Generator) -> str:
    """A syllable or two that mean nothing, or a few letters that nobody can say."""
    if rng.random() < 0.4:
        return "".join(pick(rng, "abcdefghijklmnopqrstuvwxyz") for _ in range(int(rng.integers(3, 6))))
    return "".join(pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(int(rng.integers(1, 3)))) + pick(rng, CODAS)


def _things_with_names(count: int, seed: int, make: Callable[[str, np.random.Generator], Thing]) -> tuple[Thing, ...]:
    """`count` things with different names, each a function of its number."""
    found: dict[str, Thing] = {}
    while len(found) < count:
        rng = np.random.default_rng([seed, len(found)])
        name = made_up_word(rng)
        while name in TAKEN or name in found:
            name = made_up_word(rng)
        found[name] = make(name, rng)
    return tuple(found.values())


@functools.cache
def somebodies() -> tuple[Somebody, ...]:
    """All named individuals; every one has something on."""

    def make(name: str, rng: np.random.Generator) -> Somebody:
        thing, colour = pick(rng, OBJECTS), pick(rng, COLOURS)
        looks = invent_individual(rng, thing, colour, COLOURS)
        while not looks.marks:
            looks = invent_individual(rng, thing, colour, COLOURS)
        return Somebody(name, thing, colour, looks)

    return _things_with_names(SOMEBODIES, 81, make)


@functools.cache
def schools() -> tuple[School, ...]:
    """All named looks."""
    return _things_with_names(SCHOOLS, 82, lambda name, rng: School(name, invent_look(rng, COLOURS)[0]))
