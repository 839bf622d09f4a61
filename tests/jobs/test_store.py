"""The store: what can be asked of jobs in which state, their order, and a file that many use at once."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from personalize.errors import JobError, NoSuchJobError, OutputError, RecipeError
from personalize.jobs import Job, Store, Workspace, database
from personalize.jobs.leases import FAULTS, LOSSES


@pytest.fixture
def three(store: Store) -> list[Job]:
    return [store.add("count", {"name": name}) for name in "abc"]


def names(store: Store, **what: object) -> str:
    return "".join(job.name for job in store.list(**what))  # type: ignore[arg-type]


def claim(store: Store, worker: str = "w") -> Job:
    job = store.leases.claim(["count"], "cpu/long", worker)
    assert job
    return job


def test_a_job_is_what_was_asked_for(store: Store, tmp_path: Path) -> None:
    before = time.time()
    job = store.add("count", {"steps": 2}, name="mine", priority=3, metadata={"who": "me"})
    assert (job.kind, job.name, job.settings, job.priority, job.metadata) == ("count", "mine", {"steps": 2}, 3, {"who": "me"})
    assert (job.state, job.attempts, job.error, job.result, job.ended) == ("queued", 0, None, None, False)
    assert before <= job.created_at <= time.time() and job.folder == store.workspace.outputs / "count" and job.cwd == Path.cwd()
    assert store.get(job.id) == store.get(job.id[:5]) == job == Store(store.workspace).get(job.id)


def test_nothing_is_queued_that_cannot_be_done(store: Store) -> None:
    version = store.version()
    with pytest.raises(RecipeError, match="nonsense"):
        store.add("count", {"nonsense": 1})
    with pytest.raises(RecipeError, match="did you mean train"):
        store.add("trian", {})
    with pytest.raises(NoSuchJobError, match="no job 'nope'"):
        store.add("count", {}, after="nope")
    assert store.list() == [] and store.version() == version


def test_jobs_are_taken_by_priority_and_then_in_order(store: Store, three: list[Job]) -> None:
    store.add("count", {"name": "z"}, priority=1)
    assert names(store) == "zabc"
    assert "".join(claim(store).name for _ in range(4)) == "zabc" and store.leases.claim(["count"], "x", "w") is None


def test_the_order_can_be_changed_as_often_as_one_likes(store: Store, three: list[Job]) -> None:
    a, b, c = (job.id for job in three)
    for _ in range(70):  # halves between two numbers are used up after fifty
        store.move(c, before=b)
        store.move(b, before=c)
    assert names(store) == "abc"
    store.move(c, before=a)
    assert names(store) == "cab"
    store.move(c)
    assert names(store) == "abc"
    store.edit(b, priority=5)
    assert names(store) == "bac" and store.move(c, before=b).priority == 5 and names(store) == "cba"


def test_two_jobs_never_write_to_one_place(store: Store, tmp_path: Path) -> None:
    folders = [store.add("count", {}).folder.name for _ in range(3)]
    assert folders == ["count", "count-2", "count-3"]
    (store.workspace.outputs / "taken").mkdir()
    assert store.add("count", {"name": "taken"}).folder.name == "taken-2"
    first = store.add("count", {"output": str(tmp_path / "here")})
    with pytest.raises(JobError, match=f"job {first.id} writes to"):
        store.add("count", {"output": str(tmp_path / "here")})
    store.cancel(first.id)
    assert store.add("count", {"output": str(tmp_path / "here")}).folder == tmp_path / "here"


def test_what_waits_can_be_edited(store: Store, three: list[Job]) -> None:
    job = store.edit(three[0].id, settings={"steps": 9}, name="new", priority=2)
    assert (job.settings, job.name, job.priority, job.folder) == ({"steps": 9}, "new", 2, three[0].folder)
    with pytest.raises(RecipeError):
        store.edit(three[0].id, settings={"nonsense": 1})
    assert claim(store).name == "new"
    with pytest.raises(JobError, match="is running and cannot be edited"):
        store.edit(three[0].id, name="late")


@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        ("queued", {"pause": "paused", "resume": "queued", "cancel": "cancelled"}),
        ("running", {"pause": "running", "resume": None, "cancel": "running"}),
        ("paused", {"pause": "paused", "resume": "queued", "cancel": "cancelled"}),
        ("succeeded", {"requeue": "queued"}),
        ("failed", {"requeue": "queued"}),
        ("cancelled", {"cancel": "cancelled", "requeue": "queued"}),
    ],
)
def test_what_can_be_asked_in_which_state(store: Store, state: str, allowed: dict[str, str]) -> None:
    for verb in ("pause", "resume", "cancel", "requeue"):
        job = store.add("count", {})
        if state in ("paused", "cancelled"):
            getattr(store, {"paused": "pause", "cancelled": "cancel"}[state])(job.id)
        elif state != "queued":
            claim(store, job.id)
            if state != "running":
                store.leases.end(job.id, job.id, state)
        assert store.get(job.id).state == state
        if allowed.get(verb):
            after = getattr(store, verb)(job.id)
            assert after.state == allowed[verb] and (after.asked == verb) == (state == "running")
        else:
            with pytest.raises(JobError, match=f"job {job.id} is {state} and cannot"):
                getattr(store, verb)(job.id)
        assert store.get(job.id).state == (allowed.get(verb) or state)
        if store.get(job.id).state == "queued":
            store.cancel(job.id)


def test_a_pause_can_be_taken_back_before_it_happens(store: Store, three: list[Job]) -> None:
    job = claim(store)
    assert store.pause(job.id).asked == "pause" and store.resume(job.id).asked == "" and store.get(job.id).state == "running"


def test_words_are_for_trainings_that_run(store: Store, three: list[Job]) -> None:
    job = claim(store)
    with pytest.raises(JobError, match="did you mean sample"):
        store.tell(job.id, "smaple")
    with pytest.raises(JobError, match="a job that does count cannot sample"):
        store.tell(job.id, "sample")
    assert store.tell(job.id, "stop").asked == "pause"


def test_a_job_after_another_waits_for_it_and_fails_with_it(store: Store) -> None:
    first = store.add("count", {"name": "first"})
    then = store.add("count", {"name": "then"}, after=first.id, priority=9)
    last = store.add("count", {"name": "last"}, after=then.id)
    assert claim(store).id == first.id and store.leases.claim(["count"], "x", "w") is None
    store.leases.end(first.id, "w", "succeeded")
    assert claim(store).id == then.id
    store.leases.end(then.id, "w", "failed", error={"message": "no", "hint": "", "kind": "", "log": ""})
    failed = store.get(last.id)
    assert failed.state == "failed" and failed.error and f"job {then.id}, which it needs, failed" in failed.error["message"]
    with pytest.raises(JobError, match="nothing comes after it"):
        store.add("count", {}, after=then.id)
    store.requeue(then.id)
    assert store.requeue(last.id).state == "queued" and claim(store).id == then.id


def test_lists_are_filtered_and_come_in_pages(store: Store, three: list[Job]) -> None:
    store.add("glance", {"name": "d"}, metadata={"run": 'a "b"', "n": 2})
    claim(store)
    assert names(store) == "abcd" and names(store, kinds=["glance"]) == "d" and names(store, states=["running"]) == "a"
    assert (
        names(store, metadata={"run": 'a "b"'}) == "d" == names(store, metadata={"n": 2})
        and names(store, metadata={"n": 3}) == ""
    )
    assert names(store, limit=2) == "ab" and names(store, limit=2, after=three[1].id) == "cd" and names(store, states=[]) == ""
    with pytest.raises(JobError, match="did you mean running"):
        store.list(states=["runing"])
    with pytest.raises(NoSuchJobError):
        store.list(after="nope")


def test_events_are_numbered_without_a_gap_and_never_change(store: Store, three: list[Job]) -> None:
    job = claim(store)
    assert store.leases.record(job.id, "w", [{"event": "step", "step": n} for n in (1, 2)], {"done": 2, "total": 3})
    first = store.events(job.id)
    assert [number for number, _ in first] == [1, 2, 3, 4] and [record["event"] for _, record in first] == ["state"] * 2 + [
        "step"
    ] * 2
    assert store.leases.end(job.id, "w", "succeeded", result={"lines": 3}) and store.get(job.id).progress == {
        "done": 2,
        "total": 3,
    }
    assert store.events(job.id)[:4] == first and store.events(job.id, after=3, limit=1) == first[3:4]
    assert store.events(job.id, after=99) == [] and all(record["at"] > 0 for _, record in first)


def test_who_lost_a_job_changes_nothing_of_it(store: Store, three: list[Job]) -> None:
    job = claim(store, "old")
    store.leases.lose(job.id, "old", "killed", fault=False)
    assert claim(store, "new").id == job.id and store.get(job.id).attempts == 2
    before = store.events(job.id)
    assert not store.leases.record(job.id, "old", [{"event": "step"}], {}) and not store.leases.end(job.id, "old", "succeeded")
    assert store.leases.lose(job.id, "old", "killed", fault=True) == "running" and store.events(job.id) == before


@pytest.mark.parametrize(("fault", "most"), [(True, FAULTS), (False, LOSSES)])
def test_a_job_that_kills_its_workers_fails_unless_it_gets_further(
    store: Store, three: list[Job], fault: bool, most: int
) -> None:
    """Each time with one step more it may go on for ever; at the same point, no more than so often."""
    for n in range(most + 2):
        job = claim(store)
        store.leases.record(job.id, "w", [], {"done": n + 1, "total": 99})
        assert store.leases.lose(job.id, "w", "its worker crashed", fault=fault) == "queued" and job.id == three[0].id
    states = []
    for _ in range(most - 1):
        states.append(store.leases.lose(claim(store).id, "w", "its worker crashed", fault=fault))
    assert states == ["queued"] * (most - 2) + ["failed"]
    failed = store.get(three[0].id)
    assert failed.error and f"its worker crashed, {most} times in a row" in failed.error["message"]
    assert store.requeue(failed.id).error is None and store.leases.lose(claim(store).id, "w", "", fault=fault) == "queued"


@pytest.mark.parametrize(("asked", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_what_was_asked_for_is_done_when_the_worker_dies_first(store: Store, three: list[Job], asked: str, state: str) -> None:
    job = claim(store)
    getattr(store, asked)(job.id)
    assert store.leases.lose(job.id, "w", "killed", fault=False) == state and store.get(job.id).asked == ""
    other = claim(store)
    getattr(store, asked)(other.id)
    store.leases.end(other.id, "w", "queued")  # the program ended before it could
    assert store.get(other.id).state == state


# ---------------------------------------------------------------- one file, many users

ADD = """
import sys
from pathlib import Path
import counting
from personalize.jobs import Store, Workspace
counting.add_rows()
store = Store(Workspace(Path(sys.argv[1])))
for _ in range(int(sys.argv[2])):
    store.add("count", {})
    while job := store.leases.claim(["count"], "x", sys.argv[3]):
        store.leases.record(job.id, sys.argv[3], [{"event": "step", "by": sys.argv[3]}], {"done": 1})
        store.leases.end(job.id, sys.argv[3], "succeeded")
"""


def test_processes_and_threads_that_come_at_once_lose_nothing_and_take_nothing_twice(workspace: Workspace, store: Store) -> None:
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    command = [sys.executable, "-c", ADD, str(workspace.root), "20"]
    children = [subprocess.Popen([*command, f"child {n}"], env=env, stderr=subprocess.PIPE, text=True) for n in range(3)]
    with ThreadPoolExecutor(4) as threads:
        added = list(threads.map(lambda _: store.add("count", {}).id, range(40)))
    for child in children:
        said = child.communicate(timeout=60)[1]
        assert child.returncode == 0, said
    while job := store.leases.claim(["count"], "x", "here"):
        store.leases.record(job.id, "here", [{"event": "step", "by": "here"}], {"done": 1})
        store.leases.end(job.id, "here", "succeeded")
    jobs = store.list()
    assert len(jobs) == 100 and set(added) <= {job.id for job in jobs} and len({job.folder for job in jobs}) == 100
    for job in jobs:
        events = store.events(job.id)
        assert job.state == "succeeded" and job.attempts == 1 and [number for number, _ in events] == [1, 2, 3, 4]


def test_two_that_come_first_make_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(lambda _: Store(Workspace(tmp_path / "w")), range(8)))
    assert [one.list() for one in stores] == [[]] * 8


def test_a_store_is_carried_over_a_fork(store: Store) -> None:
    job = store.add("count", {})
    if (child := os.fork()) == 0:
        ok = store.get(job.id).id == job.id and store.cancel(job.id).state == "cancelled"
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0 and store.get(job.id).state == "cancelled"


def test_the_version_grows_with_every_change_and_with_nothing_else(store: Store, three: list[Job]) -> None:
    other, seen = Store(store.workspace), [store.version()]
    for change in (lambda: other.pause(three[0].id), lambda: other.add("count", {}), lambda: store.move(three[2].id)):
        change()
        seen.append(store.version())
    store.list(), store.get(three[0].id), store.events(three[0].id)
    assert seen == sorted(set(seen)) and store.version() == seen[-1]


def test_clocks_that_jump_change_no_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, now in (("a", 2e9), ("b", 1e9), ("c", 3e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        store.add("count", {"name": name})
    assert names(store) == "abc" and "".join(claim(store).name for _ in range(3)) == "abc"


def test_a_workspace_can_be_moved(store: Store, three: list[Job], tmp_path: Path) -> None:
    store.workspace.root.rename(tmp_path / "elsewhere")
    assert Store(Workspace(tmp_path / "elsewhere")).get(three[0].id).folder == tmp_path / "elsewhere" / "outputs" / "a"


# ---------------------------------------------------------------- disks that refuse


def test_a_workspace_of_another_version_is_refused_in_a_line(workspace: Workspace) -> None:
    Store(workspace)
    with sqlite3.connect(workspace.database) as connection:
        connection.execute(f"PRAGMA user_version = {database.VERSION + 1}")
    with pytest.raises(OutputError, match=rf"is a workspace of version {database.VERSION + 1}, and this program knows version"):
        Store(workspace)


def test_what_is_no_database_is_refused_in_a_line(workspace: Workspace) -> None:
    workspace.database.write_bytes(b"not SQLite" * 999)
    with pytest.raises(OutputError, match="not a database") as error:
        Store(workspace)
    assert "move the file away" in error.value.hint and workspace.database.read_bytes() == b"not SQLite" * 999


def test_a_full_disk_is_told_in_a_line_and_nothing_is_half_there(store: Store, three: list[Job]) -> None:
    with store.database.read() as rows:
        pages = rows.query("PRAGMA page_count")[0][0]
        rows.query(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutputError, match="full") as error:
            for _ in range(99):
                store.add("count", {}, metadata={"long": "x" * 4000})
        assert error.value.hint == "free some space"
        rows.query("PRAGMA max_page_count = 1000000")
    count = len(store.list())
    assert store.add("count", {"name": "after"}).state == "queued" and len(store.list()) == count + 1


def test_a_disk_that_cannot_be_written_is_told_in_a_line(store: Store, three: list[Job]) -> None:
    with store.database.read() as rows:
        rows.query("PRAGMA query_only = ON")  # SQLite says the same of a disk that is read-only, which root does not meet
    with pytest.raises(OutputError, match=r"cannot use .*jobs\.sqlite: attempt to write a readonly database"):
        store.add("count", {})
    assert names(store) == "abc"


def test_a_place_that_is_a_file_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        Workspace(tmp_path / "file")
