"""Choosing: the same questions for every checkpoint, the best one becomes the adapter, and what is recorded tells why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small_recipe

from personalize.adapters.adapter import Adapter
from personalize.data.captions import remove_triggers
from personalize.errors import RecipeError
from personalize.recipe.fields import Recipe
from personalize.reports.metrics import evidence
from personalize.reports.run.read import read_run
from personalize.reports.run.selection import selection
from personalize.training import selection as choosing
from personalize.training.events import Chosen, Event, Fold, Scored, Started
from personalize.training.events import Sample as Drawn
from personalize.training.inputs import prepare_data
from personalize.training.loop import train
from personalize.training.preflight import RunPlan, check
from personalize.training.rundir import Run
from personalize.training.selection import (
    STRENGTHS,
    Exam,
    Figures,
    called_for,
    prepare_exam,
    prompts_without_trigger,
    score,
    strengths,
)
from personalize.tuning.attach import Attached, attach

pytestmark = pytest.mark.usefixtures("short_exam")
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(narrow_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The small recipe, in a run folder of its own, with a choice at its end."""
    output = tmp_path_factory.mktemp("choose")
    small = partial(small_recipe, narrow_base, pictures, choose="best")
    return lambda name="run", **flags: small(**{"output": output / name, **flags})


def run(recipe: Recipe, **options: Any) -> list[Event]:
    return list(train(recipe, **options))


def told(events: list[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def folder_of(recipe: Recipe) -> Path:
    assert recipe.output
    return recipe.output


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: delta.delta() for name, delta in Adapter.load(path).deltas.items()}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- the questions


@pytest.fixture(scope="module")
def examined(make: Make) -> Iterator[tuple[RunPlan, Attached, Exam]]:
    """A job, a fresh adapter on its base, and the exam of it."""
    job = check(make("examined", rank=4))
    with attach(job.base, job.recipe.adapter) as attached:
        yield job, attached, prepare_exam(job, prepare_data(job).latents, None, attached)


def nudge(attached: Attached, size: float) -> None:
    """Give a fresh adapter an effect."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in attached.parameters()["unet"].items():
            if name.endswith("up"):
                parameter.copy_(size * torch.randn(parameter.shape, generator=rng))


def test_a_fresh_adapter_has_learned_nothing_and_moved_nothing(examined: tuple[RunPlan, Attached, Exam]) -> None:
    found = examined[2].figures()
    assert (found.fit, found.validation, found.drift, found.contrast) == (pytest.approx(0, abs=1e-5),) * 2 + (0, 0)


def test_the_same_questions_get_the_same_answers_and_strength_counts(examined: tuple[RunPlan, Attached, Exam]) -> None:
    job, attached, exam = examined
    nudge(attached, 0.02)
    once = exam.figures()
    assert exam.figures() == once and once.drift > 0
    again = prepare_exam(job, prepare_data(job).latents, None, attached)
    assert torch.equal(again.called.latents, exam.called.latents) and torch.equal(again.off[2], exam.off[2])
    with attached.at(0.5):
        assert 0 < exam.figures().drift < once.drift
    with attached.off():
        assert exam.figures().drift == 0
    nudge(attached, 0)


def test_noise_depends_on_the_picture_and_not_on_its_neighbours(make: Make, examined: tuple[RunPlan, Attached, Exam]) -> None:
    job, attached, exam = examined
    alone = replace(job, dataset=replace(job.dataset, examples=job.dataset.examples[2:3]))
    rows = prepare_exam(alone, prepare_data(alone).latents, None, attached).called.latents
    assert torch.equal(rows, exam.called.latents[-len(rows) :])  # of pictures 0 and 2
    other = replace(job, recipe=job.recipe.model_copy(update={"seed": 1}))
    assert not torch.equal(prepare_exam(other, prepare_data(job).latents, None, attached).called.latents, exam.called.latents)


def test_as_many_rows_are_asked_as_the_constants_say(examined: tuple[RunPlan, Attached, Exam]) -> None:
    job, _, exam = examined
    times, few = len(choosing.TIMES), len(choosing.FEW)
    assert [len(sheet.t) for sheet in (exam.called, exam.bare, exam.others)] == [2 * times, 2 * few, 2 * few]
    assert exam.batch == 4 * job.recipe.batch_size
    assert len(set(exam.called.t.tolist())) == times


def test_no_prompt_of_the_drift_has_the_trigger(examined: tuple[RunPlan, Attached, Exam]) -> None:
    job, _, exam = examined
    assert prompts_without_trigger(job) == ["a cat", "a house"] and not any(
        remove_triggers("zwx", prompt)[1] for prompt in prompts_without_trigger(job)
    )
    assert not any(remove_triggers("zwx", prompt)[1] for prompt in exam.bare.prompts)
    assert all(remove_triggers("zwx", prompt)[1] for prompt in exam.called.prompts)


def test_contrast_is_none_for_a_collapsed_adapter_and_whole_for_one_that_needs_its_trigger() -> None:
    change = torch.ones(2, 1, 2, 2)
    assert called_for(change, change) == 0 and called_for(change, 2 * change) == 0
    assert called_for(change, 0 * change) == 1 and called_for(0 * change, 0 * change) == 0
    assert called_for(change, change / 4) == pytest.approx(0.75)


def test_learning_raises_the_score_and_drift_lowers_it() -> None:
    plain = Figures(0.5, 0.5, 0.05, 0.5)
    assert score(replace(plain, fit=0.6)) > score(plain) > score(replace(plain, drift=0.1))
    assert score(replace(plain, validation=-0.5)) < score(plain)


@given(
    st.dictionaries(st.sampled_from([0.25, 0.5, 0.75, 1.25, 1.5]), st.floats(-2, 1), min_size=1),
    st.floats(-2, 1),
    st.floats(0, 0.5),
)
def test_the_preferred_strength_lies_in_a_range_around_the_best(others: dict[float, float], one: float, close: float) -> None:
    scores = others | {1.0: one}
    low, preferred, high = strengths(scores, close)
    best = max(scores.values())
    assert min(scores) <= low <= preferred <= high <= max(scores)
    assert any(low - 1e-9 <= strength <= high + 1e-9 and value == best for strength, value in scores.items())
    assert all(value >= best - close - 1e-6 for strength, value in scores.items() if low <= strength <= high)
    wide = strengths(scores, close + 0.3)
    assert wide[0] <= low and wide[2] >= high
    assert preferred == 1.0 or not low <= 1.0 <= high


# ---------------------------------------------------------------- the choice


@pytest.fixture(scope="module")
def hasty(make: Make) -> tuple[Recipe, list[Event]]:
    """A run whose rate ruins it: its first checkpoint is the best one."""
    recipe = make("hasty", lr=0.05, warmup=0, schedule="constant", steps=6, checkpoint_every=1, clip=0)
    return recipe, run(recipe)


def test_the_best_checkpoint_becomes_the_adapter_and_all_are_kept(hasty: tuple[Recipe, list[Event]]) -> None:
    recipe, events = hasty
    scores = {event.step: event.score for event in told(events, Scored) if event.strength == 1}
    (chosen,) = told(events, Chosen)
    assert list(scores) == [1, 2, 3, 4, 5, 6] and chosen.among == 6
    assert chosen.step == chosen.best < 6
    assert chosen.best == max(step for step in scores if scores[step] >= max(scores.values()) - choosing.EQUAL)
    adapter, kept = folder_of(recipe) / "zwx.safetensors", folder_of(recipe) / "checkpoints"
    assert same(adapter, kept / f"zwx-{chosen.step:06}.safetensors") and not same(adapter, kept / "zwx-000006.safetensors")
    said = Adapter.load(adapter).metadata
    assert said["personalize.step"] == said["ss_steps"] == str(chosen.step)
    sidecar = json.loads((folder_of(recipe) / "zwx.json").read_text())
    assert sidecar["preferred weight"] == chosen.weight and f"{chosen.step} steps" in sidecar["notes"]


def test_the_chosen_one_is_examined_at_other_strengths(hasty: tuple[Recipe, list[Event]]) -> None:
    (chosen,) = told(hasty[1], Chosen)
    others = [event for event in told(hasty[1], Scored) if event.strength != 1]
    assert [event.strength for event in others] == list(STRENGTHS) and {event.step for event in others} == {chosen.step}
    assert chosen.low <= chosen.weight <= chosen.high
    assert sorted(others, key=lambda event: event.strength)[0].drift < others[-1].drift


@pytest.mark.slow
def test_the_last_one_is_taken_where_that_is_asked_for_without_training_again(
    make: Make, hasty: tuple[Recipe, list[Event]]
) -> None:
    recipe, events = hasty
    (first,) = told(events, Chosen)
    asked = recipe.choosing.model_copy(update={"choose": "last"})
    again = run(recipe.model_copy(update={"choosing": asked}))
    (chosen,) = told(again, Chosen)
    assert (chosen.step, chosen.best) == (6, first.best)
    assert same(folder_of(recipe) / "zwx.safetensors", folder_of(recipe) / "checkpoints" / "zwx-000006.safetensors")
    back = run(recipe)
    assert told(back, Chosen) == [first] and told(back, Scored) == told(events, Scored)


def test_nothing_is_scored_where_nothing_is_to_be_chosen(plain_run: Recipe) -> None:
    kinds = {record["event"] for record in Run(folder_of(plain_run), "zwx").history()}
    assert "saved" in kinds and not kinds & {"scored", "chosen"}


def test_a_run_without_checkpoints_still_gets_its_strengths(make: Make) -> None:
    events = run(make("single", checkpoint_every=0, steps=1))
    (chosen,) = told(events, Chosen)
    assert (chosen.step, chosen.among) == (1, 1) and len(told(events, Scored)) == 1 + len(STRENGTHS)


def test_what_was_chosen_is_what_the_report_and_the_figures_show(make: Make) -> None:
    flags = {"sample_prompts": ["a {trigger} {class}", "a {class}"], "sample_seeds": [0], "sample_every": 0}
    recipe = make("shown", lr=0.05, warmup=0, schedule="constant", clip=0, steps=3, checkpoint_every=1, **flags)
    events = run(recipe)
    (chosen,) = told(events, Chosen)
    assert chosen.step < 3
    assert [event.step for event in told(events, Drawn)] == [0, 0, 3, 3, chosen.step, chosen.step]
    found = evidence(folder_of(recipe))
    path = folder_of(recipe) / "samples" / f"{chosen.step:06}-a-zwx-cat-s0.png"
    with Image.open(path) as picture:
        assert found.with_trigger[0].adapter.tobytes() == picture.convert("RGB").tobytes()
    page = selection(read_run(folder_of(recipe)))
    assert page and page.step == chosen.step and [row[0] for row in page.rows if row[2]] == [chosen.step]
    assert len(page.rows) == 3 and len(page.panels) == 2 and "validation" not in page.heads


# ---------------------------------------------------------------- pictures that are not learned


def test_pictures_that_are_held_back_are_not_learned_and_tell_the_validation(make: Make) -> None:
    events = run(make("held", holdout="2.png", steps=2))
    (started,), (chosen,) = told(events, Started), told(events, Chosen)
    assert [Path(image["path"]).name for image in started.images] == ["0.png", "1.png", "3.png"]
    assert chosen.judged_by == "1 held-back picture" and chosen.validation != chosen.fit
    assert started.recipe["holdout"] == ["2.png"]


@pytest.mark.parametrize("asked", [["3.png", "0.png"], "2", 2, "0.png,3.png"])
def test_pictures_are_held_back_by_name_or_number(make: Make, asked: Any) -> None:
    job = check(make("names", holdout=asked))
    assert len(job.held) == 2 and len(job.dataset.examples) == 2
    assert not {e.path for e in job.held} & {e.path for e in job.dataset.examples}
    if asked not in ("2", 2):
        assert {e.path.name for e in job.held} == {"0.png", "3.png"}


@pytest.mark.parametrize(
    ("asked", "words"), [("cat.png", "no picture cat.png"), ("4", "nothing is left"), ("9", "nothing is left")]
)
def test_what_cannot_be_held_back_is_said_first(make: Make, asked: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check(make("wrong", holdout=asked))


@pytest.mark.slow
def test_leave_one_out_trains_without_each_picture_and_then_with_all(make: Make) -> None:
    recipe = make("folds", leave_one_out=2, steps=2, checkpoint_every=1)
    events = run(recipe)
    folds, (chosen,), (started,) = told(events, Fold), told(events, Chosen), told(events, Started)
    assert [(fold.number, fold.of, fold.pictures) for fold in folds] == [(1, 2, ["0.png"]), (2, 2, ["2.png"])]
    assert len(started.images) == 4 and chosen.judged_by == "pictures left out in turn (2 trainings)"
    own = [json.loads(line) for line in (folder_of(recipe) / "folds" / "01" / "events.jsonl").read_text().splitlines()]
    assert [len(record["images"]) for record in own if record["event"] == "started"] == [3]
    left = [read_run(folder_of(recipe) / "folds" / name).scored for name in ("01", "02")]
    mean = sum(next(r["validation"] for r in rows if r["step"] == chosen.step and r["strength"] == 1) for rows in left) / 2
    assert chosen.validation == pytest.approx(mean)
    assert same(folder_of(recipe) / "zwx.safetensors", folder_of(recipe) / "checkpoints" / f"zwx-{chosen.step:06}.safetensors")


@pytest.mark.parametrize("flags", [{"holdout": "1"}, {"choose": "none"}])
def test_what_excludes_leave_one_out_is_refused(make: Make, flags: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        make(leave_one_out=2, **flags)
