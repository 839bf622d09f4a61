"""The judge tells renders apart, and says nothing of noise."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools.pocket import judge as judging
from tools.pocket.art_objects import DRAWINGS
from tools.pocket.judge import HEADS, NONE, UNCLEAR, Judge, agreement, draw_labelled, impostors, labelled_scenes, truth
from tools.pocket.running import Plan
from tools.pocket.world import SUBJECTS, Scene, render, scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def examined(judge: Judge) -> dict[str, dict[str, float]]:
    return judging.examine(judge, count=300, seed=77)


@pytest.mark.parametrize("head", HEADS)
def test_right_about_renders_and_about_soft_ones_but_not_about_noise(examined: dict[str, dict[str, float]], head: str) -> None:
    assert examined["renders"][head] > 0.92
    assert examined["softened"][head] > 0.88
    assert examined["noise"][head] < (1 / len(HEADS[head]) + 0.15 if head != "subject" else 0.85)  # most pictures show nobody


def test_probabilities_and_verdicts_at_any_size(judge: Judge) -> None:
    asked = list(islice(scenes(3), 12))
    for side in (64, 128):
        pictures = [render(scene, side) for scene in asked]
        scores, verdict = judge.score(pictures), judge.verdict(pictures)
        for head, values in HEADS.items():
            assert scores[head].shape == (12, len(values))
            assert torch.allclose(scores[head].sum(-1), torch.ones(12), atol=1e-5)
        assert agreement(verdict, "object", [scene.object for scene in asked]) >= 11 / 12


def test_a_picture_is_judged_alone(judge: Judge) -> None:
    pictures = [render(scene) for scene in islice(scenes(4), 3)]
    together, alone = judge.score(pictures)["object"], judge.score(pictures[1:2])["object"]
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_truth_of_ordinary_scenes_subjects_and_colourless_styles() -> None:
    scene = Scene("cat", "red", "small", "left", "beach", "ink", 0)
    assert truth(scene)["colour"] == "red" and truth(scene)["subject"] == NONE
    known = truth(Scene("cat", "red", "small", "left", "beach", "ink", 0, "scarf cat"))
    assert known["colour"] is None and known["subject"] == "scarf cat"
    assert truth(Scene("cat", "red", "small", "left", "beach", "blueprint", 0))["colour"] is None


def test_impostors_are_drawn_and_judged_as_nobody_and_leave_no_trace(judge: Judge) -> None:
    before = dict(SUBJECTS)
    with impostors():
        near = [name for name in SUBJECTS if name not in before]
        asked = [Scene(SUBJECTS[name].class_name, "red", "large", "middle", "snow", "plain", 5, name) for name in near]
        assert all(truth(scene)["subject"] == NONE for scene in asked)
        verdict = judge.verdict([render(scene) for scene in asked])
    assert before == SUBJECTS
    assert len(near) == 3 * len(before)
    assert agreement(verdict, "subject", [NONE] * len(near)) >= 0.7


def test_blobs_and_badly_bent_things_are_unclear(judge: Judge) -> None:
    with impostors():
        blobs = [render(replace(scene, object=UNCLEAR, size="large")) for scene in islice(scenes(8), 40)]
    assert UNCLEAR not in DRAWINGS
    assert agreement(judge.verdict(blobs), "object", [UNCLEAR] * 40) >= 0.8
    whole = judging.to_pixels([render(scene) for scene in islice(scenes(8), 40)])
    _, labels = judging.disturb(whole, torch.zeros(40, len(HEADS), dtype=torch.long), torch.Generator().manual_seed(1))
    ruined = labels[:, 0] == HEADS["object"].index(UNCLEAR)
    assert 0 < ruined.sum() < 15
    said = judge.verdict(judging.bend(whole, torch.full((40,), 6.0), torch.Generator().manual_seed(2)))
    assert agreement(said, "object", [UNCLEAR] * 40) >= 0.6


def test_labels_are_told_for_every_head_and_match_the_scenes() -> None:
    pictures, labels = draw_labelled(60, seed=5)
    assert pictures.shape == (60, 64, 64, 3) and labels.shape == (60, len(HEADS))
    with impostors():
        for scene, row in zip(islice(labelled_scenes(5), 60), labels.tolist(), strict=True):
            assert HEADS["object"][row[0]] == scene.object
            assert (row[1] == -1) == (truth(scene)["colour"] is None)


def test_training_lowers_the_loss_and_resumes_and_saves(tmp_path: Path) -> None:
    pictures, labels = draw_labelled(64, seed=6)
    plan = Plan(4, batch=32, lr=4e-3, warmup=1, decay=0.7, ema=0.5, save_every=2, log_every=2)
    judge = judging.train(pictures, labels, plan, tmp_path / "work")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "work/log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    judging.save(judge, tmp_path / "judge", {"steps": 4})
    loaded = Judge.load(tmp_path / "judge")
    x = torch.zeros(2, 3, 64, 64)
    assert torch.allclose(loaded.score(x)["style"], judge.score(x)["style"], atol=0.02)
    assert (tmp_path / "judge/model.safetensors").stat().st_size < 1_000_000


def test_a_judge_of_another_world_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"heads": {"object": ["cat"]}}))
    with pytest.raises(ValueError, match="another world"):
        Judge.load(tmp_path)


def test_pictures_of_any_mode(judge: Judge) -> None:
    assert judge.score([Image.new("L", (64, 64)), Image.new("RGBA", (64, 64))])["object"].shape == (2, len(HEADS["object"]))
