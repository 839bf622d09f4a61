"""Backends: every row trains runs and tells their events, and another process can train as well as this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from personalize import registry
from personalize.adapters.adapter import Adapter
from personalize.backends.backend import Numbered, from_line, get_backend, to_line
from personalize.errors import RecipeError, TrainingError
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import to_toml
from personalize.training import events
from personalize.training.events import Encoded, Failed, Finished, Saved, Shared, Started, Step

pytestmark = pytest.mark.skipif(not hasattr(events, "parse"), reason="events.parse comes with the reports")

WORKER = """
import json, sys
from pathlib import Path
from personalize.backends.backend import get_backend, to_line
from personalize.recipe.resolve import resolve
asked = json.load(sys.stdin)
recipes = [resolve(flags={"preset": preset, "output": output}) for preset, output in asked["recipes"]]
for number, event in get_backend().run(recipes, fresh=asked["fresh"], together=asked["together"]):
    print(to_line(number, event), flush=True)
"""


class ChildProcess:
    """Trains in a child process, and reads its events as lines."""

    def run(self, recipes: Sequence[Recipe], *, fresh: bool = False, together: int | None = None) -> Iterator[Numbered]:
        asked: dict[str, Any] = {"recipes": [], "fresh": fresh, "together": together}
        for recipe in recipes:
            assert recipe.output
            preset = recipe.output.parent / f"{recipe.output.name}.toml"
            preset.write_text(to_toml(recipe))
            asked["recipes"].append([str(preset), str(recipe.output)])
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", WORKER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
            assert child.stdin and child.stdout
            child.stdin.write(json.dumps(asked))
            child.stdin.close()
            for line in child.stdout:
                yield from_line(line)
        assert child.returncode == 0


@pytest.fixture(autouse=True)
def child() -> Iterator[None]:
    """A row added at run time, beside those that come along."""
    registry.table("backends").add("child", ChildProcess())
    yield
    registry.table("backends").remove("child")


@pytest.fixture
def make(make: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """2 steps of 1 image, in a run folder of its own."""
    return lambda name, **flags: make(**{"output": tmp_path / name, "steps": 2, "batch_size": 1, **flags})


@pytest.mark.parametrize("name", [*registry.table("backends"), pytest.param("child", marks=pytest.mark.slow)])
def test_every_backend_trains_many_and_tells_what_happens(make: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    recipes = [make("a"), make("b", seed=1), make("c", folder=tmp_path / "empty")]
    found: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for number, event in get_backend(name).run(recipes):
        found[number].append(event)
    for number in (0, 1):
        fleet = [Shared] if number == 0 else []  # told once, of its first
        assert [type(event) for event in found[number]] == [*fleet, Started, Encoded, Step, Step, Saved, Saved, Finished]
        assert [event.step for event in found[number] if isinstance(event, Step)] == [1, 2]
        output = recipes[number].output
        assert output and Adapter.load(output / "zwx.safetensors").deltas
    assert [type(event) for event in found[2]] == [Failed] and "empty" in found[2][0].message
    again = list(get_backend(name).run(recipes[:2]))
    assert [(type(event), event.again) for _, event in again if isinstance(event, Finished)] == [(Finished, True)] * 2
    fresh = list(get_backend(name).run(recipes[:1], fresh=True))
    assert isinstance(fresh[0][1], Started) and fresh[0][1].resumed == 0


def test_lines_hold_events_exactly() -> None:
    for event in (
        Saved(3, "checkpoints/zwx-000003.safetensors"),
        Step(1, 0.1 + 0.2, 1e-3, 0.0, 1 / 3, 0.5, [7], [0.25]),
        Failed(0, "é"),
    ):
        assert from_line(to_line(4, event)) == (4, event)


@pytest.mark.parametrize("line", ["", "not JSON", "[]", '{"event": "saved"}', '{"number": 1, "event": "unheard of"}'])
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(TrainingError, match="no event"):
        from_line(line)


def test_a_backend_that_there_is_not() -> None:
    with pytest.raises(RecipeError, match=r"lokal.*local"):
        get_backend("lokal")
