"""`personalize jobs`, and `train` where a server runs: seen from a terminal and from a program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serving

from personalize.cli import run
from personalize.cli.progress import RunView
from personalize.jobs import Job, Store, Workspace
from personalize.training.events import Step

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_workspace(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(workspace.root))


def tell(capsys: Capture, *words: str, code: int = 0) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert run(["jobs", *words]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return err if code else out


def answer(capsys: Capture, *words: str) -> dict[str, Any]:
    """What it tells a program."""
    return dict(json.loads(tell(capsys, *words, "--json")))


def test_the_queue_from_a_terminal(store: Store, capsys: Capture, tmp_path: Path) -> None:
    assert f"no jobs in {store.workspace.root}" in tell(capsys)
    a, b, c = (store.add("count", {"name": name, "steps": 1}).id for name in ("a", "b", "c" * 50))
    told = tell(capsys)
    assert [line.split()[:3] for line in told.splitlines()[:2]] == [[a, "count", "a"], [b, "count", "b"]]
    assert "ccc..." in told and "no server runs this queue: personalize jobs run works it off" in told
    assert "paused" in tell(capsys, "pause", a[:6], b) and "queued" in tell(capsys, "resume", a)
    tell(capsys, "move", c, "--before", a)
    assert [line.split()[0] for line in tell(capsys).splitlines()[:3]] == [c, a, b]
    assert [line.split()[0] for line in tell(capsys, "--state", "paused").splitlines()] == [b]
    assert "priority 4" in tell(capsys, "edit", "--priority", "4", "--job-name", "new", a) and store.get(a).name == "new"
    assert f"job {c} is queued and cannot be queued again" in tell(capsys, "requeue", c, code=2)
    assert "cancelled" in tell(capsys, "cancel", b) and "queued" in tell(capsys, "requeue", b)
    assert "there is no job 'nope'" in tell(capsys, "show", "nope", code=2)
    assert "a job that does count cannot sample" in tell(capsys, "tell", a, "sample", code=2)
    assert "no job is ever 'qeued' (did you mean queued?)" in tell(capsys, "--state", "qeued", code=2)
    shown = tell(capsys, "show", a)
    assert "setting     steps = 1" in shown and f"log         {store.workspace.log(a)}" in shown
    assert json.loads(tell(capsys, "events", a).splitlines()[0])["state"] == "queued" and tell(capsys, "log", a) == ""
    other = tmp_path / "other"
    for words in (
        ("--workspace", str(other)),
        ("pause", "x", "--workspace", str(other)),
        ("--workspace", str(other), "show", "x"),
    ):
        assert str(other) in tell(capsys, *words, code=0 if len(words) == 2 else 2)


def test_one_that_cannot_keeps_none_of_the_others_from_it(store: Store, capsys: Capture) -> None:
    job = store.add("count", {})
    assert "there is no job 'nope'" in tell(capsys, "pause", "nope", job.id, code=2) and store.get(job.id).state == "paused"


def test_the_queue_for_a_program(store: Store, capsys: Capture) -> None:
    job = store.add("count", {"steps": 2}, metadata={"who": "me"})
    found = answer(capsys)
    assert (found["command"], found["ok"], found["served"], found["workspace"]) == (
        "jobs",
        True,
        False,
        str(store.workspace.root),
    )
    (record,) = found["jobs"]
    assert record["id"] == job.id and record["settings"] == {"steps": 2} and record["metadata"] == {"who": "me"}
    assert (
        answer(capsys, "pause", job.id)["jobs"][0]["state"] == "paused" and answer(capsys, "show", job.id)["job"]["asked"] == ""
    )
    capsys.readouterr()
    assert run(["jobs", "show", "nope", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "NoSuchJobError"


def test_a_command_is_queued_as_it_is_typed(store: Store, capsys: Capture, pictures: Path) -> None:
    words = [str(pictures), "--class", "cat", "--steps", "3", "--no-flip", "--sample-prompts", "a", "--sample-prompts", "b"]
    told = answer(capsys, "add", "--priority", "2", "train", *words)["job"]
    typed = {"folder": str(pictures), "class": "cat", "steps": "3", "flip": False, "sample_prompts": ["a", "b"]}
    assert told["settings"] == typed and told["priority"] == 2 and told["folder"] == str(store.workspace.runs / "zwx")
    edited = answer(capsys, "edit", told["id"], "--steps", "5")["jobs"][0]
    assert edited["settings"] == typed | {"steps": "5"}
    behind = answer(capsys, "add", "--after", told["id"], "dataset", str(pictures))["job"]
    assert behind["needs"] == told["id"] and f"after {told['id']}" in tell(capsys)
    assert "No such option '--stpes'" in tell(capsys, "edit", told["id"], "--stpes", "5", code=2)
    assert "there is no 'trian' among the jobs (did you mean train?)" in tell(capsys, "add", "trian", "x", code=2)


@pytest.mark.usefixtures("counting_workers")
def test_a_queue_is_worked_off_here(store: Store, capsys: Capture) -> None:
    good, bad, rests = (store.add("count", {"steps": 2, "fail_at": at}) for at in (9, 2, 9))
    store.pause(rests.id)
    assert tell(capsys, "run", "--device", "cpu", code=2) == "" and [store.get(one.id).state for one in (good, bad, rests)] == [
        "succeeded", "failed", "paused",
    ]  # fmt: skip
    assert "failed: this cannot be counted" in tell(capsys) and "error       this cannot be counted" in tell(
        capsys, "show", bad.id
    )
    assert "counting from 0" in tell(capsys, "log", good.id) and "succeeded" in tell(capsys, "follow", good.id)


def test_train_is_done_by_a_server_and_shown_here(
    store: Store,
    wait: Callable[..., Job],
    narrow_base: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Ctrl-C pauses the job, and the same command goes on with it."""
    quick = ["--rank", "1", "--batch-size", "1", "--sample-seeds", "0", "--sample-prompts", "a", "--sample-steps", "1"]
    quick += ["--base", str(narrow_base), "--class", "cat", "--choose", "none", "--checkpoint-every", "0", "--warmup", "0"]
    words = ["train", str(pictures), *quick, "--output", str(tmp_path / "run")]
    assert run([*words, "--steps", "2", "--queue"]) == 0  # where nobody runs it yet
    (job,) = store.list()
    assert job.state == "queued" and job.folder == tmp_path / "run" and not job.folder.exists()
    with serving.Server(store.workspace) as server:
        with monkeypatch.context() as patch:
            patch.setattr(RunView, "show", interrupt_at_step)
            assert run([*words, "--steps", "9"]) == 130
        (job,) = store.list()
        assert job.state == "paused" and job.settings["steps"] == "9"
        assert "To go on, type the same command again" in capsys.readouterr().out
        assert run([*words, "--steps", "9", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["adapter"] == str(tmp_path / "run" / "zwx.safetensors") and told["steps"] == 9 and told["job"] == job.id
        assert store.get(job.id).state == "succeeded" and [one.id for one in store.list()] == [job.id]
        server.end()
    assert run([*words, "--steps", "9", "--workspace", str(store.workspace.root)]) == 2
    assert "no server runs" in capsys.readouterr().err


def interrupt_at_step(view: RunView, event: Any) -> None:
    """What somebody does who presses Ctrl-C at the first step."""
    view._tell(event)
    if isinstance(event, Step):
        raise KeyboardInterrupt
