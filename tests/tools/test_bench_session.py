"""The benchmark of sessions: each stack is drawn with in a session that does not know it, and again in one that does."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from personalize.inference import stacks
from tools.bench import session


def test_stacks_are_timed_new_and_again(
    narrow_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    monkeypatch.setattr(stacks, "attach", lambda *own, attach=stacks.attach: made.append(len(own[1])) or attach(*own))
    session.main(argparse.Namespace(base=str(narrow_base), rank=1, many=2, rounds=1))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[:4]]
    assert [title for title, *_ in rows] == ["none", "one", "2", "one that moves"]
    assert made == [1, 2, 1] and all(float(step) > 0 for *_, step in rows)
