"""Eyes for detail: every mark can be left out, is told where it is, and is not seen where it is smeared."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.pocket import marks
from tools.pocket.marks import FOLDER, MARKS, Eyes, draw_labelled, draw_with, marks_of
from tools.pocket.proof.drawing import renders
from tools.pocket.proof.measuring import Drawn, details
from tools.pocket.proof.tasks import tasks
from tools.pocket.world import SUBJECTS, UNSEEN_STYLES, Scene, scenes

ROOM = Scene("cat", "red", "large", "middle", "room", "plain", 3)


def scene_of(owner: str) -> Scene:
    return replace(ROOM, object=SUBJECTS[owner].class_name) if owner in SUBJECTS else ROOM


def test_every_subject_and_unseen_style_has_marks() -> None:
    assert {mark.owner for mark in MARKS} == {*SUBJECTS, *UNSEEN_STYLES}
    assert all(len(marks_of(owner)) >= 2 for owner in (*SUBJECTS, *UNSEEN_STYLES))


@pytest.mark.parametrize("number", range(len(MARKS)), ids=marks.names())
def test_a_mark_that_is_left_out_is_missed(number: int) -> None:
    owner = MARKS[number].owner
    whole, less = (np.asarray(draw_with(scene_of(owner), owner, absent), float) for absent in ([], [number]))
    assert (np.abs(whole - less).max(-1) > marks.LEAST).sum() >= 8


def test_labels_are_of_the_picture_s_own_marks_alone() -> None:
    pictures, labels = draw_labelled(60, 5)
    owners = (*SUBJECTS, *UNSEEN_STYLES)
    for row, told in enumerate(labels):
        own = set(marks_of(owners[row % len(owners)]))
        assert {i for i, value in enumerate(told.tolist()) if value >= 0} <= own
    assert pictures.shape == (60, 64, 64, 3) and {0.0, 1.0} <= set(labels.unique().tolist())


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    return Eyes.load()


def test_marks_are_seen_on_true_renders_and_not_on_plain_ones(eyes: Eyes) -> None:
    found = []
    for task in tasks(count=12):
        true, plain = renders(task.called, 64), renders(task.plain, 64)
        told = details(eyes, task, Drawn(plain, true, plain, plain, plain, true, plain))
        assert told["ceiling"] == told["value"] > 0.7, task.name  # a cut-out's shadow is faint
        assert told["floor"] < 0.4, task.name
        found.append(told["ceiling"])
    assert sum(found) / len(found) > 0.93


def test_what_is_smeared_is_not_seen(eyes: Eyes) -> None:
    stripes = next(i for i, mark in enumerate(MARKS) if (mark.owner, mark.name) == ("scarf cat", "stripes"))
    asked = [replace(scene, object="cat", size="large") for scene in islice(scenes(6), 24)]
    whole = [draw_with(scene, "scarf cat", []) for scene in asked]
    less = [draw_with(scene, "scarf cat", [stripes]) for scene in asked]
    smeared: list[Image.Image] = [marks.smear(a, b, 3.0) for a, b in zip(whole, less, strict=True)]
    seen = [eyes.share_by_mark("scarf cat", pictures)["stripes"] for pictures in (whole, smeared, less)]
    assert seen[0] > 0.85 and seen[1] < 0.3 and seen[2] < 0.15


def test_eyes_of_other_marks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text().replace("stripes", "spots"))
    with pytest.raises(ValueError, match="trains them anew"):
        Eyes.load(tmp_path)
