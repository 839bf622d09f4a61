"""Trackers: each row shows a run's figures and pictures, goes on with it, and never ends it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from personalize import registry
from personalize.cli import run
from personalize.errors import RecipeError
from personalize.recipe.fields import Recipe
from personalize.training.events import Event, Finished, Judged, Scored, Step, Warned
from personalize.training.fleet import train_fleet
from personalize.training.loop import train
from personalize.training.preflight import check
from personalize.training.rundir import Run
from personalize.training.trackers import Tracker, figures_of

pytestmark = pytest.mark.usefixtures("short_exam")
Make = Callable[..., Recipe]
SHOWN = {"sample_prompts": ["{trigger} {class}"], "sample_every": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


class Memory:
    """A board that remembers what it was told."""

    def __init__(self, run: Run, recipe: Recipe, done: int) -> None:
        self.told: list[tuple[str, int]] = []
        self.closed, self.done = False, done
        BOARDS.append(self)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.told += [(name, step) for name in values]

    def picture(self, name: str, path: Path, caption: str, step: int) -> None:
        assert path.is_file()
        self.told.append((name, step))

    def text(self, name: str, text: str, step: int) -> None:
        self.told.append((name, step))

    def close(self) -> None:
        self.closed = True


class Broken(Memory):
    """One whose server is gone after the first figures."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        raise OSError("no route to host\nand more")

    def close(self) -> None:
        raise OSError("still none")


BOARDS: list[Memory] = []


@pytest.fixture
def boards() -> Iterator[list[Memory]]:
    """Two trackers that another package has added: "memory" and "broken"."""
    BOARDS.clear()
    table = registry.table("trackers")
    table.add("memory", Tracker(Memory, "json"))
    table.add("broken", Tracker(Broken, "json"))
    yield BOARDS
    table.remove("memory")
    table.remove("broken")


def steps_of(board: Memory, name: str) -> list[int]:
    return [step for told, step in board.told if told == name]


def stop_after(step: int, events: Generator[Event, None, None]) -> None:
    next(event for event in events if isinstance(event, Step) and event.step == step)
    events.close()


# ---------------------------------------------------------------- what is told


def test_an_event_gives_the_figures_that_are_known() -> None:
    step = Step(3, 0.5, 1e-3, 0.0, 2.0, 0.1)
    assert figures_of(step) == {"train/loss": 0.5, "train/lr": 1e-3, "train/grad_norm": 2.0, "train/seconds": 0.1}
    assert figures_of(Step(3, math.nan, 1e-3, 0.0, math.nan, 0.1, skipped=True, cause="loss")) == {}
    assert "train/text_encoder_lr" in figures_of(Step(3, 0.5, 1e-3, 1e-4, 2.0, 0.1))
    assert figures_of(Scored(5, 0.5, 0.1, 0.2, 0.3, 0.4, 0.5)) == {}  # of another strength: not a point over steps
    assert figures_of(Scored(5, 1.0, 0.1, math.nan, 0.3, 0.4, 0.5)).keys() == {
        "scored/fit", "scored/drift", "scored/contrast", "scored/score",
    }  # fmt: skip
    judged = figures_of(Judged(5, 0.8, 0.5, 0.4, 0.6, 0.9, 0.8, 0.1, math.nan))
    assert judged["judged/identity"] == 0.9 and "judged/kept" not in judged


def test_a_run_is_shown_from_its_first_step_to_its_last(make: Make, boards: list[Memory]) -> None:
    recipe = make(trackers=["memory"], **SHOWN)
    list(train(recipe))
    (board,) = boards
    assert steps_of(board, "train/loss") == [1, 2, 3, 4] and steps_of(board, "recipe") == [0]
    assert steps_of(board, "samples/zwx cat, seed 0") == [0, 2, 4] and board.closed and board.done == 0
    list(train(recipe))
    assert len(boards) == 1  # the run had ended: nothing is shown twice


def test_a_run_that_goes_on_is_shown_on(make: Make, boards: list[Memory]) -> None:
    recipe = make(trackers=["memory"])
    stop_after(2, train(recipe))
    list(train(recipe))
    first, second = boards
    assert first.closed and second.done == 2
    assert steps_of(first, "train/loss") + steps_of(second, "train/loss") == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_named_and_ends_nothing(make: Make, boards: list[Memory]) -> None:
    events: list[Event] = list(train(make(trackers=["broken", "memory"])))
    said = [event for event in events if isinstance(event, Warned) and "broken" in event.text]
    assert [one.text for one in said] == ["broken failed and is told nothing more: no route to host"] and said[0].step == 1
    assert isinstance(events[-1], Finished) and steps_of(boards[1], "train/loss") == [1, 2, 3, 4]
    assert ("warning", 1) in boards[1].told


def test_one_that_cannot_begin_is_named_too(make: Make, boards: list[Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError

    registry.table("trackers").add("broken", Tracker(refuse, "json"))  # type: ignore[arg-type]
    events = list(train(make(trackers=["broken"])))
    assert any(isinstance(one, Warned) and one.text.endswith("nothing more: ValueError") for one in events)
    assert isinstance(events[-1], Finished)


def test_trackers_change_nothing_about_a_run(make: Make, tmp_path: Path, boards: list[Memory]) -> None:
    plain, shown = make(output=tmp_path / "plain"), make(output=tmp_path / "shown", trackers=["memory"])
    for recipe in (plain, shown):
        list(train(recipe))
    first, second = (load_file(tmp_path / name / "zwx.safetensors") for name in ("plain", "shown"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_each_member_of_a_fleet_has_its_own_board(make: Make, tmp_path: Path, boards: list[Memory]) -> None:
    recipes = [make(output=tmp_path / name, trackers=["memory"], seed=seed) for seed, name in enumerate("ab")]
    list(train_fleet(recipes))
    assert [steps_of(board, "train/loss") for board in boards] == [[1, 2, 3, 4]] * 2


# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize("name", list(registry.table("trackers")))
def test_a_missing_package_is_told_before_anything_else(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, registry.table("trackers")[name].package, None)
    with pytest.raises(RecipeError, match=rf"--trackers {name} needs the package .* \(pip install 'personalize\[trackers\]'"):
        check(make(trackers=[name]))


def test_a_dry_run_tells_of_it_too(pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(["train", str(pictures), "--trackers", "tensorboard", "--class", "cat", "--dry-run"]) == 0
    assert "--trackers tensorboard needs the package tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["wandb,tensorboard"], ["wandb", "--trackers", "tensorboard"]])
def test_several_are_named_at_commas_or_one_by_one(pictures: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(pictures), "--class", "cat", "--dry-run", "--trackers", *words]) == 0
    assert 'trackers = ["wandb", "tensorboard"]' in capsys.readouterr().out


def test_an_unknown_tracker_is_refused_with_the_nearest(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(pictures), "--trackers", "tensorbord"]) == 2
    assert "tensorboard" in capsys.readouterr().err


def test_tensorboard_reads_what_a_run_in_two_parts_has_written(make: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make(trackers=["tensorboard"], **SHOWN)
    stop_after(3, train(recipe))
    list(train(recipe))
    assert recipe.output
    read = EventAccumulator(str(recipe.output / "tensorboard"))
    read.Reload()
    assert [one.step for one in read.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [one.step for one in read.Images("samples/zwx cat, seed 0")][-1] == 4
    list(train(recipe, fresh=True))
    again = EventAccumulator(str(recipe.output / "tensorboard"))
    again.Reload()
    assert [one.step for one in again.Scalars("train/loss")] == [1, 2, 3, 4]  # nothing of the run that was there before


def test_wandb_keeps_figures_and_pictures_and_the_id_of_a_run_that_goes_on(make: Make) -> None:
    recipe = make(trackers=["wandb"], **SHOWN)
    stop_after(3, train(recipe))
    assert recipe.output
    known = (recipe.output / "wandb/personalize-id").read_text()
    said: list[Any] = [one for one in train(recipe) if isinstance(one, Warned)]
    assert not said and (recipe.output / "wandb/personalize-id").read_text() == known
    files = sorted((recipe.output / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) == 2 and all(b"train/grad_norm" in file.read_bytes() for file in files)
    assert list((recipe.output / "wandb").glob("offline-run-*/files/media/images/samples/*.png"))
