"""What is to be learned and how it is tested: a task for every subject and style that the base never saw."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from personalize.errors import RecipeError, nearest

from ..art_styles import COLOURLESS
from ..world import (
    BACKGROUND_WORDS,
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    PLACES,
    STYLE_WORDS,
    STYLES,
    SUBJECTS,
    TRIGGERS,
    UNSEEN_STYLES,
    Scene,
    render,
    scenes,
)
from .drawing import Trial

ATTRIBUTES = {"subject": ("object", "background", "style"), "style": ("object", "colour", "background")}
LESSONS = {"subject": 5, "style": 6}  # training pictures
SIZES = ("large", "medium")  # people photograph things from near


@dataclass(frozen=True)
class Task:
    """One unseen subject or style: the pictures to learn from, and the prompts that test what was learned."""

    name: str
    kind: str  # subject or style
    trigger: str
    class_name: str  # empty for a style
    lessons: tuple[tuple[Scene, str], ...]  # scenes and captions
    called: tuple[Trial, ...]  # with the trigger, in scenes that no lesson shows
    plain: tuple[Trial, ...]  # the same without the trigger
    unrelated: tuple[Trial, ...]  # about other things

    @property
    def attributes(self) -> tuple[str, ...]:
        """What the prompts ask for besides the subject or style itself, as far as the style lets it show."""
        return tuple(head for head in ATTRIBUTES[self.kind] if head != "colour" or self.name not in COLOURLESS)

    @property
    def head(self) -> str:
        """The judge's head that knows the subject or style."""
        return self.kind

    def write(self, folder: Path, side: int, captions: bool = True) -> Path:
        """Draw the training folder: pictures, and a .txt beside each."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for i, (scene, words) in enumerate(self.lessons, 1):
            stem = folder / f"{self.name.replace(' ', '-')}-{i}"
            render(scene, side).save(stem.with_suffix(".png"))
            if captions:
                stem.with_suffix(".txt").write_text(words + "\n")
        return folder


def sentence(noun: str, background: str, look: str = "", turn: int = 0) -> str:
    """`a zwx cat in the snow, ink drawing`, in one of the world's wordings."""
    where = BACKGROUND_WORDS[background]
    article = "an" if noun[0] in "aeio" else "a"
    return f"{article} {noun} {where[turn % len(where)]}" + (f", {look}" if look else "")


def subject_task(name: str, count: int = 35, seed: int = 0) -> Task:
    """Five pictures of a subject in five places; prompts ask for it in all other pairs of place and style."""
    number, thing = list(SUBJECTS).index(name), SUBJECTS[name].class_name
    trigger, rng = TRIGGERS[number % len(TRIGGERS)], np.random.default_rng([seed, number, 21])
    places = [BACKGROUNDS[i] for i in rng.permutation(len(BACKGROUNDS))[: LESSONS["subject"]]]
    blank = Scene(thing, next(iter(COLOURS)), "large", "middle", places[0], "plain", 0, name)
    lessons = []
    for i, place in enumerate(places):
        scene = replace(blank, size=SIZES[i % 2], place=PLACES[i % 3], background=place, seed=int(rng.integers(2**31)))
        lessons.append((scene, sentence(f"{trigger} {thing}", place)))
    pairs = [(place, style) for place in BACKGROUNDS for style in STYLES if (place, style) not in {(p, "plain") for p in places}]
    called, plain = [], []
    for i, (place, style) in enumerate(cycle_pairs(pairs, count, rng)):
        scene = replace(blank, size="medium", background=place, style=style, seed=1000 + i)
        look = "" if style == "plain" else STYLE_WORDS[style][0]
        called.append(Trial(sentence(f"{trigger} {thing}", place, look, i), i, scene))
        plain.append(Trial(sentence(thing, place, look, i), i, replace(scene, subject=None)))
    return Task(name, "subject", trigger, thing, tuple(lessons), tuple(called), tuple(plain), others(thing, count, seed))


def style_task(name: str, count: int = 35, seed: int = 0) -> Task:
    """Six pictures of different things in a style; prompts ask for the six other things in it."""
    number = UNSEEN_STYLES.index(name)
    trigger = TRIGGERS[-1 - number % len(TRIGGERS)]
    rng = np.random.default_rng([seed, number, 22])
    things = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))]
    places, hues = ([values[i] for i in rng.permutation(len(values))] for values in (BACKGROUNDS, list(COLOURS)))
    known = LESSONS["style"]
    lessons = []
    for i, thing in enumerate(things[:known]):
        scene = Scene(thing, hues[i], SIZES[i % 2], PLACES[i % 3], places[i], name, int(rng.integers(2**31)))
        lessons.append((scene, sentence(f"{hues[i]} {thing}", places[i], f"{trigger} style")))
    pairs = [(thing, place) for thing in things[known:] for place in BACKGROUNDS]
    called, plain = [], []
    for i, (thing, place) in enumerate(cycle_pairs(pairs, count, rng)):
        hue = hues[i % len(hues)]
        scene = Scene(thing, hue, "medium", "middle", place, name, 1000 + i)
        called.append(Trial(sentence(f"{hue} {thing}", place, f"{trigger} style", i), i, scene))
        plain.append(Trial(sentence(f"{hue} {thing}", place, "", i), i, replace(scene, style="plain")))
    return Task(name, "style", trigger, "", tuple(lessons), tuple(called), tuple(plain), others("", count, seed))


def others(thing: str, count: int, seed: int) -> tuple[Trial, ...]:
    """Prompts about other things, in styles that are named."""
    found: list[Trial] = []
    for scene in scenes(seed + 700_001):
        if len(found) == count:
            return tuple(found)
        if scene.object != thing and scene.style != "plain":
            words = sentence(f"{scene.colour} {scene.object}", scene.background, STYLE_WORDS[scene.style][0], len(found))
            found.append(Trial(words, 5000 + len(found), scene))
    raise AssertionError("scenes() is endless")


def cycle_pairs(pairs: Sequence[tuple[str, str]], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` pairs in random order, none twice before all were taken once."""
    order: list[int] = []
    while len(order) < count:
        order += rng.permutation(len(pairs)).tolist()
    return [pairs[i] for i in order[:count]]


def tasks(only: str = "", count: int = 35, seed: int = 0) -> list[Task]:
    """All tasks, or those whose names are listed with commas. Raises RecipeError for a name that is none."""
    makers = dict.fromkeys(SUBJECTS, subject_task) | dict.fromkeys(UNSEEN_STYLES, style_task)
    names = [name.strip() for name in only.split(",") if name.strip()] or list(makers)
    groups = {"subjects": list(SUBJECTS), "styles": list(UNSEEN_STYLES)}
    names = [inner for name in names for inner in groups.get(name, [name])]
    for name in names:
        if name not in makers:
            raise RecipeError(f"there is no unseen subject or style called {name!r}", nearest(name, makers))
    return [makers[name](name, count, seed) for name in names]
