"""The benchmark that holds this tree against a commit."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from personalize.errors import RecipeError
from tools.bench import quick

ONCE = argparse.Namespace(against="HEAD", rounds=1, only=["start"])
here_is_git = subprocess.run(["git", "-C", quick.HERE, "rev-parse"], capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not here_is_git, reason="a checkout is held against its commits")


def worktrees() -> int:
    listed = subprocess.run(["git", "-C", quick.HERE, "worktree", "list"], check=True, capture_output=True, text=True)
    return len(listed.stdout.splitlines())


def test_a_row_is_timed_in_both_trees(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = worktrees()
    monkeypatch.setattr(quick, "ROWS", {"start": quick.Row("--version")})
    quick.main(ONCE)
    title, *numbers = capsys.readouterr().out.splitlines()[0].split(" | ")
    assert title == "start" and all(float(number) > 0 for number in numbers) and worktrees() == before


def test_commits_and_commands_that_are_none_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"--against nothing-like-it: .*invalid reference"):
        quick.main(argparse.Namespace(**vars(ONCE) | {"against": "nothing-like-it"}))
    before = worktrees()
    monkeypatch.setattr(quick, "ROWS", {"start": quick.Row("nothing")})
    with pytest.raises(RecipeError, match=r"nothing failed in .*No such command"):
        quick.main(ONCE)
    assert worktrees() == before


def test_what_a_smaller_command_takes_is_taken_off_and_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quick, "ROWS", {"step": quick.Row("long", "short", 4)})
    monkeypatch.setattr(
        quick, "cost", lambda tree, command, out: quick.Cost(18.0, 9.0, 0) if command == "long" else quick.Cost(2.0, 1.0, 0)
    )
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(quick, "markdown", lambda heads, rows: said.extend(rows) or "")
    quick.main(argparse.Namespace(**vars(ONCE) | {"only": ["step"]}))
    assert said == [("step", "2.00", "2.00", "1.00", "4.00", "4.00", "1.00")]


def test_rows_ask_for_as_many_as_they_share_among() -> None:
    image = quick.ROWS["image"]
    assert len(image.command.split("--seeds ")[1].split()[0].split(",")) == image.parts
    for row in (quick.ROWS["step"], quick.ROWS["fleet's step"]):
        more, less = (int(command.split("--steps ")[1].split()[0]) for command in (row.command, row.less))
        assert more - less == row.parts
