"""`train` and `batch` where a server runs: they queue what they were asked for, and follow it as if they did it themselves.

A job that is there for the same run folder is taken up again, so that the same command goes on, as it does without a server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import JobError, OutputError, PersonalizeError
from ..lock import is_held
from .messages import answer, echo, strict
from .values import PATH

if TYPE_CHECKING:
    from ..jobs import Job, Store

PAUSE = 0.1  # seconds between two looks at the job
SILENCE = 2.0  # seconds without an event after which it is asked whether the server still lives

Command = TypeVar("Command", bound=Callable[..., Any])


def queue_options(command: Command) -> Command:
    """Options of commands that a server may do."""
    queue = click.option(
        "--queue/--no-queue", default=None, help="only queue it, or do it here [default: queue and follow it, if a server runs]"
    )
    workspace = click.option("--workspace", type=PATH, metavar="DIR", help="whose server [default: as for `personalize jobs`]")
    return queue(workspace(command))


def queue_of(queue: bool | None, workspace: Path | None) -> Store | None:
    """The queue to which work goes; None where it is done here. Raises OutputError where a named workspace has no server."""
    from ..jobs.workspace import default_place

    place = (workspace or default_place()).expanduser()
    if queue is False:
        return None
    if not queue and not is_held(place):
        if workspace:
            raise OutputError(f"no server runs {workspace}", "--queue leaves it there for the next one, --no-queue trains here")
        return None
    from ..jobs import Store, Workspace

    return Store(Workspace(place))


def enqueue(store: Store, kind: str, settings: Mapping[str, Any], output: Path, stay: bool) -> Job:
    """The job that does this: one that waits or rests for the same folder, brought up to date, or a new one.

    With `stay`, the terminal goes on to follow it.
    """
    settings = {key: value for key, value in strict(dict(settings)).items() if value not in (None, [], False)}
    settings["output"] = str(output.absolute())
    job = next(
        (one for one in store.list(states=("running", "queued", "paused"), kinds=[kind]) if same_place(one.folder, output)), None
    )
    if job is None:
        job = store.add(kind, settings)
    elif job.state != "running":
        store.edit(job.id, settings=settings)
        job = store.resume(job.id)
    what = "Ctrl-C pauses it" if stay else f"personalize jobs follow {job.id}"
    echo(f"job      {job.id} of the server in {store.workspace.root} ({what})")
    answer(job=job.id, workspace=store.workspace.root)
    return job


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths are one place."""
    return one.absolute().resolve() == other.absolute().resolve()


def events_of(store: Store, job: Job, read: Callable[[Mapping[str, Any]], Any]) -> Generator[Any, None, str]:
    """What `read` makes of the records of a job's newest attempt, until it is over or rests; returns its state then.

    Who stops reading pauses the job. Raises PersonalizeError where it fails, OutputError where the server ends.
    """
    number, seen = begin_of_attempt(store, job), time.monotonic()
    try:
        while True:
            job = store.get(job.id)  # before its events: what ended it is among them
            for last, record in store.events(job.id, number):
                number, seen = last, time.monotonic()
                if (event := read(record)) is not None:
                    yield event
            if job.ended or job.state == "paused":
                break
            if time.monotonic() - seen > SILENCE and not is_held(store.workspace.root):
                raise OutputError(f"the server of {store.workspace.root} has ended", f"job {job.id} waits for the next one")
            time.sleep(PAUSE)
    except (GeneratorExit, KeyboardInterrupt):
        with contextlib.suppress(JobError):  # it is over
            store.pause(job.id)
        while store.get(job.id).state == "running" and is_held(store.workspace.root):
            time.sleep(PAUSE)
        raise
    if job.error:
        raise PersonalizeError(job.error["message"], job.error["hint"])
    return job.state


def begin_of_attempt(store: Store, job: Job) -> int:
    """The number of the event behind which a running job's attempt begins, or of the last one of a job that waits."""
    numbers = [0]
    for number, record in store.events(job.id):
        if job.state != "running" or record.get("state") == "running":
            numbers.append(number)
    return numbers[-1]
