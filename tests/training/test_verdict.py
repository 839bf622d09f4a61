"""What is told of an adapter follows from its images: questions, signs, the calibrated estimate, the words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from personalize.data.folder import read_folder
from personalize.models import clip as seeing
from personalize.models.clip import Clip, Dino, Eyes, eyes_for
from personalize.models.model import Base
from personalize.models.sources import locate
from personalize.recipe.fields import Data
from personalize.recipe.resolve import resolve
from personalize.training import evidence
from personalize.training.calibration import Calibration, between, calibration_of
from personalize.training.events import Encoded, Judged
from personalize.training.evidence import ask
from personalize.training.examiner import judged_sheet
from personalize.training.inputs import prepare_data
from personalize.training.limits import concern_about, find_strange_classes, likeness_to_world, show_reconstruction
from personalize.training.preflight import RunPlan, check
from personalize.training.signs import Observer, observe
from personalize.training.verdict import COPIED, HALF, WORLD, copy_words, describe
from tools.pocket.calibration.copying import CHANGES, copies, sign
from tools.pocket.proof.tasks import tasks
from tools.pocket.world import render

POCKET = Base.load("pocket")
TABLE = calibration_of(POCKET)
assert TABLE


def plan_of(folder: Path, output: Path, **flags: Any) -> RunPlan:
    own = {"folder": folder, "output": output, "trigger": "zwx", "class": "cat", "steps": 1, "rank": 1}
    return check(resolve("pocket-subject", own | flags))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return plan_of(Path("sample_data/subject"), tmp_path_factory.mktemp("run"))


# ---------------------------------------------------------------- questions


def test_the_trigger_is_all_that_called_and_plain_prompts_differ_in(plan: RunPlan) -> None:
    asked = ask(plan)
    for called, plain in zip(asked.called, asked.plain, strict=True):
        assert called.prompt.replace("zwx ", "") == plain.prompt and called.seed == plain.seed
    assert len({(one.prompt, one.seed) for one in asked.called}) == evidence.CALLED
    assert not any("cat" in one.prompt.split() or "zwx" in one.prompt for one in asked.unrelated)


def test_a_style_is_put_onto_things(tmp_path: Path) -> None:
    plan = check(
        resolve("pocket-style", {"folder": Path("sample_data/subject"), "output": tmp_path, "trigger": "zwx", "steps": 1})
    )
    asked = ask(plan)
    assert asked.called[0].prompt == "a red car in the snow, zwx style" and asked.plain[0].prompt == "a red car in the snow"
    assert {one.look for one in asked.called} == {""}  # the style is for the adapter to say


# ---------------------------------------------------------------- signs


def drawings(count: int, fill: str, shift: int = 0) -> list[Image.Image]:
    """Made-up images: a ground that differs, and a disc of a colour."""
    made = []
    for i in range(count):
        image = Image.new("RGB", (64, 64), ("skyblue", "white", "wheat", "lightgreen", "navy", "pink")[(i + shift) % 6])
        ImageDraw.Draw(image).ellipse((12 + i % 5, 14, 44 + i % 5, 50), fill)
        made.append(image)
    return made


@pytest.fixture(scope="module")
def observer(plan: RunPlan) -> Observer:
    eyes = eyes_for(locate("pocket"))
    assert eyes
    asked = ask(plan)
    return observe(eyes, asked, drawings(4, "purple", 1), drawings(len(asked.for_base), "orange"), style=False)


def answers(observer: Observer, called: str, plain: str, others: str = "orange") -> list[Image.Image]:
    n, few = len(observer.questions.called), len(observer.questions.few_plain)
    base = drawings(len(observer.questions.for_base), others)
    return [*drawings(n, called), *drawings(few, plain), *base[n:]]


def test_an_adapter_that_changes_nothing_has_no_signs(observer: Observer) -> None:
    signs = observer.signs(answers(observer, "orange", "orange"))
    for name in ("called_toward", "plain_toward", "scene", "thing", "look", "others_scene", "others_same", "others_patches"):
        assert signs[name] == pytest.approx(np.zeros_like(signs[name]), abs=1e-5), name
    assert np.mean(signs["called_patches"]) == pytest.approx(0, abs=1e-5)


def test_identity_a_leak_and_forgetting_show_each_in_its_signs(observer: Observer) -> None:
    good = observer.signs(answers(observer, "purple", "orange"))
    leaking = observer.signs(answers(observer, "purple", "purple"))
    forgetting = observer.signs(answers(observer, "purple", "orange", others="gray"))
    assert min(good["called_patches"]) > 0.5 and min(good["called_toward"]) > 0.5
    for name in ("plain_patches", "plain_toward"):
        assert min(leaking[name]) > 0.5 > max(good[name])
    assert forgetting["others_same"] < good["others_same"] - 0.01


def test_copies_of_the_training_images_are_noticed(observer: Observer) -> None:
    n, few = len(observer.questions.called), len(observer.questions.few_plain)
    rest = answers(observer, "purple", "orange")[n : n + few] + drawings(len(observer.questions.for_base), "orange")[n:]
    copied = observer.signs([*(drawings(4, "purple", 1) * n)[:n], *rest])["repeats"]
    assert copied > observer.signs(answers(observer, "purple", "orange"))["repeats"] and copied > 0


SUBJECT = tasks("scarf cat")[0]


@pytest.fixture(scope="module")
def worlds_own() -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """What a subject is learned from, how a perfect adapter draws it in other places and looks, and what a base draws instead."""
    learned = [render(scene, 64) for scene, _ in SUBJECT.lessons]
    shown = [render(trial.scene, 64) for trial in SUBJECT.called[: evidence.CALLED]]
    return learned, shown, [render(trial.scene, 64) for trial in SUBJECT.plain[: evidence.CALLED]]


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3, 4), (0, 1, 2), (0,), (0, 0, 1, 2)], ids=["all", "three", "one", "twins"])
def test_the_mark_lies_between_a_perfect_adapter_and_copies(
    numbers: tuple[int, ...], plan: RunPlan, worlds_own: tuple[list[Image.Image], list[Image.Image], list[Image.Image]]
) -> None:
    eyes, asked = eyes_for(locate("pocket")), ask(plan)
    assert eyes
    learned, shown, base = worlds_own
    training = [learned[i] for i in numbers]
    observer = observe(eyes, asked, training, [*base, *drawings(len(asked.unrelated), "orange")], style=False)
    assert sign(observer, shown) < COPIED
    for most, share in CHANGES[:3]:
        assert sign(observer, copies(training, most, share)) > COPIED
    assert sign(observer, copies(training, 0, 0)) == pytest.approx(1, abs=1e-3)


def test_copies_are_said_to_be_copies_and_old_runs_say_nothing() -> None:
    judged = Judged(1, 1.0, 0.9, 0.8, 1.0, 0.9, 0.9, 0.0, 1.0)
    assert not copy_words(judged) and not copy_words(replace(judged, signs={"copied": 1.0}))
    assert not copy_words(replace(judged, signs={"repeats": COPIED - 0.01}))
    words = describe(replace(judged, signs={"repeats": COPIED + 0.01}))
    assert words.level == "copies" and "repeat the training images" in str(words) and not any(map(str.isdigit, str(words)))


# ---------------------------------------------------------------- the estimate

SHARES = st.floats(0, 1)


def test_only_the_embedded_base_is_calibrated(tiny_base: Path) -> None:
    assert calibration_of(Base.load(tiny_base)) is None and "cat" in TABLE.nouns


def made_up(level: float, plain: float, **more: float) -> dict[str, Any]:
    """Signs of images that all have this much of what was taught, with the trigger and without it."""
    names = {name.removeprefix("all_") for factor in TABLE.factors.values() for name in factor.weights}
    images = {f"called_{name}": [level] * 12 for name in names} | {f"plain_{name}": [plain] * 6 for name in names}
    return dict.fromkeys(names, 0.0) | images | {"drift": 0.05, "fit": 0.4, "contrast": 0.6} | more


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.01, 1))
def test_the_estimate_is_a_share_inside_its_interval(level: float, plain: float, drift: float) -> None:
    found = TABLE.verdict(made_up(level, plain, drift=drift))
    assert 0 <= found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9 and found.high <= 1


def test_what_costs_an_adapter_its_verdict() -> None:
    best = TABLE.verdict(made_up(1.0, 0.0))
    assert TABLE.verdict(made_up(0.0, 0.0)).identity < best.identity
    assert TABLE.verdict(made_up(1.0, 1.0)).leak > best.leak and TABLE.verdict(made_up(1.0, 1.0)).value < best.value


@given(st.floats(-1, 2))
def test_errors_between_rows_lie_between_theirs(x: float) -> None:
    rows = [[0.2, 0.1], [0.5, 0.3], [0.9, 0.2]]
    assert 0.1 <= between(rows, x) <= 0.3 and between(rows, 0.5) == 0.3


# ---------------------------------------------------------------- words


@given(SHARES, SHARES, SHARES, st.lists(SHARES, min_size=4, max_size=4))
def test_nothing_is_called_good_that_may_be_below_half(value: float, down: float, up: float, factors: list[float]) -> None:
    judged = Judged(1, 1.0, value, max(0.0, value - down), min(1.0, value + up), *factors)
    words = describe(judged)
    assert words.level != "good" or judged.low >= HALF
    assert value >= HALF or words.level == "poor"
    assert words.headline.startswith(words.level)


def test_without_a_calibration_no_percentages_are_told() -> None:
    unknown = Judged(
        1, 1.0, *[math.nan] * 7, signs={"called_toward": [0.7], "plain_toward": [0.6], "others_same": -0.4, "repeats": 2 * COPIED}
    )
    words = describe(unknown)
    assert words.level == "uncalibrated" and not any(letter.isdigit() or letter == "%" for letter in str(words))
    assert any("leaks" in reason for reason in words.reasons) and any("repeat" in reason for reason in words.reasons)
    blind = describe(replace(unknown, signs={}))
    assert "no CLIP" in blind.headline and not blind.reasons


# ---------------------------------------------------------------- what the base can draw


def test_before_training_it_is_shown_what_the_autoencoder_keeps(plan: RunPlan) -> None:
    shown = show_reconstruction(plan, prepare_data(plan).latents)
    assert isinstance(shown, Encoded) and len(shown.kept) == 5 and all(15 < ratio < 30 for ratio in shown.kept)
    assert "fine detail is lost" in shown.concern and "--base" in shown.concern and shown.usual == TABLE.autoencoder.mean
    with Image.open(plan.run.folder / shown.path) as sheet:
        assert sheet.width > 5 * 64


def test_of_other_bases_only_what_everybody_sees_is_said(tiny_base: Path) -> None:
    base = Base.load(tiny_base)
    assert concern_about(base, [26.0]) is None
    concern = concern_about(base, [15.0])
    assert concern and "loses much" in concern.what and "SD 1.5" not in concern.hint  # it may be one itself


def strange(name: str) -> list[str]:
    """What is said of the demo's cat as some class."""
    dataset = read_folder(Data(folder=Path("sample_data/subject"), trigger="zwx", class_name=name))
    return [finding.sentence for finding in find_strange_classes(POCKET, dataset, 64)]


@pytest.mark.parametrize("name", ["cat", "old cat", "Cat", "dog", ""])  # a drawn cat is not unlike a dog
def test_a_class_that_is_right_or_nearly_is_not_spoken_of(name: str) -> None:
    assert strange(name) == []


def test_a_class_that_the_base_was_never_taught() -> None:
    (words,) = strange("spaceship")
    assert "spaceship" in words and "umbrella" in words and "--base" in words


def test_a_class_that_the_base_draws_as_something_else() -> None:
    (words,) = strange("umbrella")
    assert "more like 'cat' than like 'umbrella'" in words and "--class cat" in words


def gradients(count: int) -> list[Image.Image]:
    """Images of nothing."""
    return [Image.radial_gradient("L").resize((64, 64)).rotate(90 * i).convert("RGB") for i in range(count)]


def test_images_of_another_world_are_noticed_and_not_judged_in_percentages(tmp_path: Path) -> None:
    for i, image in enumerate(gradients(3)):
        image.save(tmp_path / f"{i}.png")
    (finding,) = find_strange_classes(POCKET, read_folder(Data(folder=tmp_path, class_name="cat")), 64)
    assert finding.code == "outside-world" and "nothing that pocket was taught" in finding.what and "--base" in finding.hint
    eyes = eyes_for(locate("pocket"))
    assert eyes and likeness_to_world(POCKET, eyes, gradients(3)) < WORLD
    judged = Judged(1, 1.0, 0.8, 0.6, 0.9, 0.9, 0.9, 0.0, 1.0, signs={"called_toward": [0.7], "world": WORLD - 0.1})
    words = describe(judged)
    assert words.level == "uncalibrated" and "nothing that this base can draw" in words.headline
    assert (
        not any(letter.isdigit() for letter in str(words)) and describe(replace(judged, signs={"world": WORLD})).level == "good"
    )


# ---------------------------------------------------------------- bases without a CLIP of their own


def test_clip_and_dino_of_the_hubs_cache_look_at_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    own = Clip.of(locate("pocket"))
    assert own
    small = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(small).save_pretrained(tmp_path / "dino")
    own.model.save_pretrained(tmp_path / "clip")
    own.tokenizer.save_pretrained(tmp_path / "clip")
    folders = {seeing.CLIP_ID: tmp_path / "clip", seeing.DINO_ID: tmp_path / "dino"}
    assert eyes_for(tiny_base) is None
    monkeypatch.setattr(seeing, "cached_folder", folders.get)
    eyes = eyes_for(tiny_base)
    assert isinstance(eyes, Eyes) and isinstance(eyes.dino, Dino)
    view = eyes.look(drawings(2, "red"))
    assert view.whole.shape == (2, 32) and view.patches.shape == (2, 256, 32) and view.words.shape == (2, 128)
    assert torch.allclose(view.patches.norm(dim=-1), torch.ones(2, 256), atol=1e-4)


def test_the_sheet_holds_every_image_once() -> None:
    groups = {name: (drawings(count, "red"), drawings(count, "blue")) for name, count in (("a", 7), ("b", 2))}
    sheet = judged_sheet(groups)
    colours = sheet.getcolors(2**24)
    assert colours and sheet.size[0] > 6 * 128
    assert {(255, 0, 0), (0, 0, 255)} <= {colour for _, colour in colours}


def test_the_table_names_its_signs() -> None:
    assert isinstance(TABLE, Calibration) and set(TABLE.factors) == {"shown", "fidelity", "kept"}
    assert TABLE.autoencoder.low < TABLE.autoencoder.mean and [row[0] for row in TABLE.errors] == sorted(
        row[0] for row in TABLE.errors
    )
