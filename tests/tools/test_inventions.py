"""What pretraining invents besides the named world: endless, told truly, and never what the benchmark keeps unseen."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tools.pocket import art_individuals, names, pool, world
from tools.pocket.art_canvas import shades
from tools.pocket.art_looks import invent_look
from tools.pocket.world import COLOURS, DRAWINGS, Scene

pytestmark = pytest.mark.slow

SCENE = Scene("cat", "red", "large", "middle", "meadow", "plain", 3)


def picture(scene: Scene = SCENE, **drawn: object) -> np.ndarray:
    return np.asarray(world.render(scene, 64, **drawn), float)


def test_individuals_are_reproducible_and_never_twice():
    def invent(seed: int) -> np.ndarray:
        return picture(individual=art_individuals.invent_individual(np.random.default_rng(seed), "cat", "red", COLOURS))

    pictures = [invent(seed) for seed in range(12)]
    assert np.array_equal(pictures[5], invent(5))
    assert len({p.tobytes() for p in pictures}) == 12


def test_looks_are_reproducible_and_never_twice():
    def invent(seed: int) -> np.ndarray:
        return picture(look=invent_look(np.random.default_rng(seed), COLOURS)[0])

    pictures = [invent(seed) for seed in range(12)]
    assert np.array_equal(pictures[5], invent(5))
    assert len({p.tobytes() for p in pictures}) == 12


@pytest.mark.parametrize("thing", DRAWINGS)
@pytest.mark.parametrize("kind", art_individuals.MARKINGS)
def test_a_marking_that_is_told_is_drawn(thing: str, kind: str):
    make, hooks = art_individuals.MARKINGS[kind]
    scene = Scene(thing, "red", "large", "middle", "meadow", "plain", 3)
    for hook in set(hooks):
        marks = {hook: make(np.random.default_rng(4), (0, 255, 0))}
        individual = world.Subject(thing, "", shades(COLOURS["red"]), marks)
        assert np.abs(picture(scene, individual=individual) - picture(scene)).max() > 60


def test_what_is_said_of_an_individual_is_its_class_and_its_colours():
    for seed in range(60):
        individual = art_individuals.invent_individual(np.random.default_rng(seed), "bird", "blue", COLOURS)
        words = individual.looks.replace(" an ", " a ").split()
        assert words[0] == "blue" and "bird" in words
        assert set(words) <= {"bird", "with", "and", "a", *COLOURS, *art_individuals.MARKINGS}


def test_a_pool_keeps_the_named_world_and_adds_inventions():
    rng = np.random.default_rng(0)
    told = [pool.draw_one(scene, 7, 64, rng)[1] for scene in islice(world.scenes(5), 400)]
    individuals = sum(" with a" in words or " stripes" in words or " dots" in words for words in told)
    assert 60 < individuals < 240
    assert not any(name in words for words in told for name in world.UNSEEN_STYLES)


def test_names_are_spelled_apart_and_are_no_triggers():
    for count, things in ((names.SOMEBODIES, names.somebodies()), (names.SCHOOLS, names.schools())):
        called = {one.name for one in things}
        assert len(called) == len(things) == count and not called & {*world.TRIGGERS, *world.OBJECTS, *world.COLOURS}


def test_a_name_means_the_same_individual_or_look_wherever_it_comes():
    one, same = (names._things_with_names(3, 81, lambda name, rng: (name, rng.random())) for _ in range(2))
    assert one == same
    who = names.somebodies()[0]
    assert not np.array_equal(
        picture(replace(SCENE, object=who.object), individual=who.looks), picture(replace(SCENE, object=who.object))
    )


def test_a_pool_calls_the_named_by_their_names():
    rng, who, looks = np.random.default_rng(0), names.somebodies(), names.schools()
    told = [pool.draw_one(scene, 7, 64, rng)[1] for scene in islice(world.scenes(5), 600)]
    called = [words for words in told if any(f"{one.name} {one.object}" in words for one in who)]
    styled = [words for words in told if any(f"{one.name} style" in words for one in looks)]
    assert 45 < len(called) < 150 and 30 < len(styled) < 100
