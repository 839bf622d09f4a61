"""The pocket world: deterministic pictures, true captions, held-out combinations."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from itertools import islice, pairwise

import numpy as np
import pytest

from tools.pocket import world
from tools.pocket.world import Scene

BASE = Scene("cat", "red", "medium", "middle", "meadow", "plain", 3)
SAMPLE = list(islice(world.scenes(11), 400))
VOCABULARY = {
    "object": world.OBJECTS,
    "colour": tuple(world.COLOURS),
    "size": world.SIZES,
    "place": world.PLACES,
    "background": world.BACKGROUNDS,
    "style": world.STYLES,
}


def pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(world.render(scene, size), np.float32)


def distance(a: Scene, b: Scene) -> float:
    """Mean absolute difference of two pictures, 0..255."""
    return float(np.abs(pixels(a) - pixels(b)).mean())


@pytest.mark.parametrize("style", world.STYLES + world.UNSEEN_STYLES)
def test_the_same_scene_gives_the_same_bytes_and_another_seed_does_not(style):
    scene = replace(BASE, style=style)
    assert world.render(scene).tobytes() == world.render(scene).tobytes()
    assert distance(scene, replace(scene, seed=4)) > 1


@pytest.mark.parametrize("style", world.STYLES + world.UNSEEN_STYLES)
@pytest.mark.parametrize("size", [48, 64, 128])
def test_a_picture_is_rgb_of_the_size_asked(style, size):
    picture = world.render(replace(BASE, style=style), size)
    assert picture.mode == "RGB" and picture.size == (size, size)


@pytest.mark.parametrize("style", world.STYLES)
def test_the_picture_does_not_depend_on_the_resolution(style):
    scene = replace(BASE, style=style)
    large = pixels(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - pixels(scene)).mean() < 3


@pytest.mark.parametrize("factor", VOCABULARY)
def test_every_value_appears_in_training_and_changes_the_picture(factor):
    assert {getattr(s, factor) for s in SAMPLE} == set(VOCABULARY[factor])
    pictures = [replace(BASE, **{factor: value}) for value in VOCABULARY[factor]]
    assert all(distance(a, b) > 1 for a, b in pairwise(pictures))


def test_every_value_meets_most_of_the_others_in_training():
    for factor in ("colour", "background", "style"):
        rare = np.array([[world._rare(factor, o, v) for v in VOCABULARY[factor]] for o in world.OBJECTS])
        assert 0.05 < rare.mean() < 0.1 and rare.mean(0).max() <= 0.25 and rare.mean(1).max() <= 0.25


def test_held_out_combinations_are_disjoint_from_training():
    held = list(islice(world.scenes(11, held_out=True), 200))
    assert all(map(world.is_held_out, held)) and not any(map(world.is_held_out, SAMPLE))
    assert list(islice(world.scenes(11), 5)) == SAMPLE[:5] != list(islice(world.scenes(12), 5))


WORDS = {
    "object": {v: (v,) for v in world.OBJECTS},
    "colour": {v: (v,) for v in world.COLOURS},
    "size": world.SIZE_WORDS,
    "place": world.PLACE_WORDS,
    "background": world.BACKGROUND_WORDS,
    "style": {name: world.STYLE_WORDS[name] for name in world.STYLES},
}


def said(text: str, factor: str) -> set[str]:
    """The values of a factor that a caption names."""
    text = f" {text.replace(',', ' ')} "
    return {value for value, words in WORDS[factor].items() if any(f" {w} " in text for w in words)}


def test_captions_never_contradict_the_picture():
    factors = [f.name for f in fields(Scene) if f.name in WORDS]
    for k, scene in enumerate(SAMPLE * 3):
        text = world.caption(scene, k)
        for factor in factors:
            assert said(text, factor) <= {getattr(scene, factor)}, (text, factor, scene)
        assert said(text, "object") and (scene.style == "plain" or said(text, "style"))
        assert text == text.lower() and len(text.split()) <= 20 and not set(text.split()) & set(world.TRIGGERS)


def test_captions_vary_in_length_and_wording():
    texts = [world.caption(scene, k) for k, scene in enumerate(SAMPLE)]
    bare = [t for t in texts if not any(said(t, f) for f in ("size", "place", "background"))]
    assert 0.13 < len(bare) / len(texts) < 0.3
    assert len({world.caption(BASE, k) for k in range(50)}) > 25
    assert world.caption(BASE, 5) == world.caption(BASE, 5)


def test_a_given_name_or_style_stands_in_the_caption():
    for k in range(30):
        text = world.caption(replace(BASE, subject="scarf cat"), k, name="zwx cat", style="vok style")
        assert "zwx cat" in text and "vok style" in text and "red" not in text.split()


@pytest.mark.parametrize("name", world.SUBJECTS)
def test_a_subject_is_an_individual_of_its_class(name):
    subject = world.SUBJECTS[name]
    scene = replace(BASE, object=subject.class_name, size="large")
    assert subject.class_name in world.OBJECTS
    mine = pixels(replace(scene, subject=name))
    assert min(np.abs(mine - pixels(replace(scene, colour=colour))).mean() for colour in world.COLOURS) > 4
    assert distance(replace(scene, subject=name), replace(scene, subject=name, colour="blue", object="cup")) == 0


def test_a_render_is_fast():
    start = time.process_time()
    for scene in SAMPLE[:100]:
        world.render(scene)
    spent = (time.process_time() - start) * 10
    print(f"{spent:.2f} ms a picture")
    assert spent < 15  # about 2 ms on an idle core
