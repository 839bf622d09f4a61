"""A step in two halves: one process or two, the same run folder to the byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from personalize.cli.app import run
from personalize.inference.events import Cancelled, Picture, Progress
from personalize.inference.request import Request
from personalize.inference.session import Session
from personalize.models.model import Base
from personalize.models.processes import VARIABLE, Copy
from personalize.recipe.fields import Recipe
from personalize.training import halves, loop
from personalize.training.events import Event, Step, SteppedDown, Stopped
from personalize.training.fleet import train_fleet
from personalize.training.loop import train

pytestmark = [
    pytest.mark.usefixtures("short_exam"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies processes"),
]
Make = Callable[..., Recipe]
TIMES = {"time", "seconds", "peak_bytes", "versions", "output"}


@pytest.fixture(autouse=True)
def all_copies_end(one_thread: None) -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Copy]:
    """Every copy that is made from now on; two processes share the work, as on a machine with two cores."""
    monkeypatch.setenv(VARIABLE, "2")
    monkeypatch.setattr(halves, "cores", lambda: 2)
    made: list[Copy] = []
    real = Copy.__enter__
    monkeypatch.setattr(Copy, "__enter__", lambda self: (made.append(self), real(self))[1])
    return made


def contents(folder: Path) -> dict[str, Any]:
    """All files of a run folder; of its events, what does not tell the time."""
    files: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".png", ".safetensors") and path.name != "state.safetensors"
    }
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return files | {"events": [plain(json.loads(line)) for line in lines]}


def plain(record: Any) -> Any:
    """A record without what differs from run to run."""
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items() if key not in TIMES}
    return record


EVERYTHING = {
    "sample_prompts": ("a {trigger} {class}",),
    "steps": 4,
    "choose": "best",
    "checkpoint_every": 2,
    "sample_every": 2,
    "batch_size": 3,
    "sample_seeds": (0, 1, 2),
}


MORE = {"text_encoder_lr": 1e-4, "dropout": 0.1, "accumulate": 2, "prior": "images"}


DCO = {"prior": "dco", "steps": 2, "rank": 4, "rank_by_timestep": 0.5}


HALF = {"prior": "output", "precision": "bfloat16", "steps": 2, "sample_seeds": (0,)}


@pytest.mark.parametrize("flags", [{"prior": "output"}, DCO, MORE, HALF], ids=str)
def test_one_process_and_two_leave_the_same(make: Make, tmp_path: Path, copies: list[Copy], flags: dict[str, Any]) -> None:
    two = make(**EVERYTHING | flags)
    assert two.output
    list(train(two))
    assert len(copies) > 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        one = make(**EVERYTHING | flags | {"output": tmp_path / "one"})
        made = len(copies)
        list(train(one))
    assert len(copies) == made and contents(two.output) == contents(tmp_path / "one")


def test_a_fleet_too(make: Make, tmp_path: Path, copies: list[Copy]) -> None:
    few = EVERYTHING | {"choose": "none", "sample_seeds": (0,)}

    def recipes(name: str) -> list[Recipe]:
        return [make(**few | {"output": tmp_path / name / str(i), "seed": i, "steps": 2 + i}) for i in range(2)]

    list(train_fleet(recipes("two")))
    assert copies
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        list(train_fleet(recipes("one")))
    for i in range(2):
        assert contents(tmp_path / "two" / str(i)) == contents(tmp_path / "one" / str(i))


def test_an_interrupted_run_goes_on_in_another_number_of_processes(make: Make, tmp_path: Path, copies: list[Copy]) -> None:
    flags = EVERYTHING | {"choose": "none", "sample_seeds": (0,)}
    list(train(make(**flags | {"output": tmp_path / "whole"})))
    events = train(make(**flags))
    for event in events:
        if isinstance(event, Step) and event.step == 3:
            break
    events.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        list(train(make(**flags)))
    for path in ("zwx.safetensors", "checkpoints/zwx-000004.safetensors", "zwx.png"):
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_ctrl_c_while_the_other_half_is_waited_for_saves_the_state(
    make: Make, copies: list[Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, here = 0, os.getpid()

    def interrupt() -> None:
        nonlocal asked
        asked += os.getpid() == here
        if asked == 3:
            raise KeyboardInterrupt

    real = halves.take_gradients
    monkeypatch.setattr(halves, "take_gradients", lambda leaves: (interrupt(), real(leaves))[1])
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        events.extend(train(make(steps=4, accumulate=2)))
    recipe = make(steps=4, accumulate=2)
    monkeypatch.setattr(halves, "take_gradients", real)
    started, *_ = list(train(recipe))
    assert started.resumed == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("flags", [{"accumulate": 2}, {"prior": "output"}], ids=str)
def test_a_run_that_gives_way_begins_with_a_new_copy(
    make: Make, copies: list[Copy], monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    real, failed = loop.gradients, False

    def once(*args: Any, **options: Any) -> Any:
        nonlocal failed
        values = real(*args, **options)
        if not failed:
            failed = True
            raise torch.OutOfMemoryError("out of memory")
        return values

    monkeypatch.setattr(loop, "gradients", once)
    events = list(train(make(**{"steps": 2, **flags})))
    assert any(isinstance(event, SteppedDown) for event in events)
    assert sum("share" not in copy.main.__qualname__ and "of_all" not in copy.main.__qualname__ for copy in copies) == 2
    assert not any(isinstance(event, Stopped) for event in events)


def test_two_processes_draw_what_one_does_and_can_be_stopped(narrow_base: Path, copies: list[Copy]) -> None:
    session = Session(Base.load(narrow_base))
    requests = [Request("a cat", seed, 2) for seed in range(9)]

    def drawn() -> dict[int, bytes]:
        return {one.number: one.image.tobytes() for one in session.draw(requests) if isinstance(one, Picture)}

    two = drawn()
    assert list(two) == list(range(9)) and len(copies) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        assert drawn() == two and len(copies) == 1
    events = []
    for event in session.draw(requests):
        events.append(event)
        if isinstance(event, Progress) and event.numbers[0] == 4:  # what the copy does
            session.cancel()
    assert isinstance(events[-1], Cancelled) and events[-1].numbers == (4, 5, 6, 7, 8)
    assert not multiprocessing.active_children()


def test_the_command_shares_what_it_draws(narrow_base: Path, copies: list[Copy], tmp_path: Path) -> None:
    words = ["generate", "a cat", "--base", str(narrow_base), "--steps", "1", "--seeds", "0,1,2,3,4", "--output", str(tmp_path)]
    assert run(words) == 0 and len(copies) == 1 and len(list(tmp_path.glob("*.png"))) == 5
