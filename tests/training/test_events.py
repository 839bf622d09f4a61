"""Events as JSON and back: nothing is lost, and no damaged or older record stops a reader."""

from __future__ import annotations

import doctest
import json
import math
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalize.training import events
from personalize.training.events import (
    EVENTS,
    NEEDED,
    Chosen,
    Event,
    Scored,
    Started,
    Step,
    Warned,
    event_record,
    parse,
    read_events,
)
from personalize.training.rundir import Run

VALUES: dict[type, Any] = {int: 3, float: 0.5, str: "zwx", bool: True, list: ["a"], dict: {"a": 1}}
STRANGE = st.sampled_from([*EVENTS, "", None, True, -1, 0.5, math.nan]) | st.lists(st.none() | st.integers(), max_size=3)
OPEN: dict[str, Event] = {
    "step": Step(4, math.nan, 1e-3, 0.0, math.inf, 0.2, [1, 999], [0.5, math.nan], True, "not finite"),
    "scored": Scored(4, 1.0, math.nan, -0.1, 0.2, 0.3, math.nan),
}  # fmt: skip


def example(kind: str) -> Event:
    """An event with a value in every field."""
    return EVENTS[kind](**{name: VALUES[type_] for name, type_ in events.field_types(kind).items()})


def same(a: Event, b: Event) -> bool:
    """Whether two events are equal, nan beside nan and any number that is not finite counting as equal."""
    return type(a) is type(b) and event_record(a) == event_record(b)


@pytest.mark.parametrize("kind", EVENTS)
def test_every_event_comes_back_from_json(kind: str) -> None:
    some: tuple[Event, ...] = (example(kind), OPEN.get(kind, example(kind)))
    for event in some:
        back = parse(json.loads(json.dumps(event_record(event), allow_nan=False)))
        assert back is not None and same(event, back)
    assert parse(event_record(example(kind))) == example(kind)


@pytest.mark.parametrize("kind", EVENTS)
def test_only_needed_fields_are_needed(kind: str) -> None:
    record = event_record(example(kind))
    for one in fields(EVENTS[kind]):
        for other in ({}, {one.name: None}, {one.name: object()}):
            back = parse({key: value for key, value in record.items() if key != one.name} | other)
            nullable = one.name in events.NULLABLE and other == {one.name: None}
            if one.name in NEEDED.get(kind, ()) and not nullable:
                assert back is None
            else:
                value = getattr(back, one.name)
                if one.default is not MISSING and one.default == one.default:
                    assert value == one.default
                else:
                    assert math.isnan(value) if isinstance(value, float) else not value


def test_what_is_no_event_is_none() -> None:
    strange: list[Any] = [
        None, [], 3, {}, {"event": []}, {"event": "dance"}, {"event": "error", "message": "m"}, {"event": "stopped"},
    ]  # fmt: skip
    for record in strange:
        assert parse(record) is None


def test_fields_of_another_version_are_ignored() -> None:
    assert parse({"event": "started", "mood": 3}) == Started("", {}, [], [], 0, "", "", {})
    old = {"event": "chosen", "step": 5, "best": 5, "low": 1, "high": 1.0, "judged_by": "the training pictures"}
    chosen = parse(old)
    assert isinstance(chosen, Chosen) and math.isnan(chosen.fit) and chosen.among == 0


def test_a_file_is_read_without_its_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == [] == read_events(tmp_path)  # a folder
    whole = [
        {"event": "warned", "step": 1, "text": "a\u2028b"},
        {"event": "error", "message": "full"},
        {"event": "stopped", "step": 1},
    ]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in whole]
    path.write_bytes(b"\n".join([lines[0], b"[" * 100_000, b'{"event": "dance"}', b"\xff", lines[1], lines[2], lines[0][:-3]]))
    assert read_events(path) == whole


@given(st.dictionaries(st.sampled_from(["event", "step", "path", "loss", "losses"]), STRANGE))
def test_strange_records_raise_nothing(record: dict[str, Any]) -> None:
    event = parse(record)
    assert event is None or type(event) is EVENTS[record["event"]]


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(events).failed == 0


def test_events_need_no_torch() -> None:
    code = "import sys, personalize.training.events; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "False"


def test_a_name_that_is_no_text_comes_back_from_the_diary(tmp_path: Path) -> None:
    run, event = Run(tmp_path, "zwx"), Warned(0, "skipped \udc83|\udc83`.png: its name is no UTF-8 text")
    run.record(event)
    assert [record["text"] for record in read_events(tmp_path / "events.jsonl")] == [event.text]
