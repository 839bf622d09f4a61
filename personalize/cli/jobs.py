"""`personalize jobs`: the queue of a workspace, read and changed; whether a server runs it or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import JobError, PersonalizeError
from ..text import duration, plain
from .group import Commands
from .messages import answer, echo, print_error, strict
from .values import PATH

if TYPE_CHECKING:
    from ..jobs import Job, Store

WIDTH = 34  # letters of a name in the list
PAUSE = 0.1  # seconds between two looks at a job that is followed

workspace_option = click.option(
    "--workspace", type=PATH, metavar="DIR", help="[default: $PERSONALIZE_WORKSPACE, or one in the user's data directory]"
)
ids = click.argument("ids", metavar="JOB...", nargs=-1, required=True)
one_id = click.argument("id", metavar="JOB")


@click.group(cls=Commands, invoke_without_command=True, short_help="The queue: what runs, what waits, what became of it.")
@workspace_option
@click.option("--state", "states", multiple=True, metavar="NAME", help="only those: queued, running, paused, failed, ...")
@click.option("--kind", "kinds", multiple=True, metavar="NAME", help="only those: train, generate, merge, ...")
@click.option("--limit", type=click.IntRange(1), help="at most so many")
@click.pass_context
def jobs(ctx: click.Context, workspace: Path | None, states: tuple[str, ...], kinds: tuple[str, ...], limit: int | None) -> int:
    """List the jobs of a workspace: those that run, those that wait in the order in which they will be taken, and the others.

    \b
      personalize jobs add train photos/rex --class dog
      personalize jobs pause 1f3a
      personalize jobs run

    A server runs the queue for as long as it lives; without one, `personalize jobs run` works it off. JOB is an id, or the first
    letters of one.
    """
    ctx.obj = workspace
    return list_jobs(open_store(None), states, kinds, limit) if ctx.invoked_subcommand is None else 0


def open_store(workspace: Path | None) -> Store:
    """The jobs of a workspace: that of the command, that of the group before it, or the default one. Raises OutputError."""
    from ..jobs import Store, Workspace

    context = click.get_current_context(silent=True)
    return Store(Workspace(workspace or (context.find_object(Path) if context else None)))


def list_jobs(store: Store, states: tuple[str, ...], kinds: tuple[str, ...], limit: int | None) -> int:
    """Print a line for each job."""
    from ..jobs.engine import is_served

    found = store.list(states=states or None, kinds=kinds or None, limit=limit)
    served = is_served(store.workspace.root)
    answer(workspace=store.workspace.root, served=served, jobs=[job_record(job) for job in found])
    for job in found:
        echo(line_of(job))
    if not found:
        echo(f"no jobs in {store.workspace.root}; personalize jobs add train FOLDER queues one")
    elif not served and any(job.state == "queued" for job in found):
        echo("no server runs this queue: personalize jobs run works it off")
    return 0


def job_record(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    record: dict[str, Any] = strict(job)
    return record


def line_of(job: Job) -> str:
    """A job in a line: id, kind, name, and how it stands."""
    name = plain(job.name)
    name = name if len(name) <= WIDTH else name[: WIDTH - 3] + "..."
    return f"{job.id}  {job.kind:<11} {name:<{WIDTH}}  {standing(job)}"


def standing(job: Job) -> str:
    """How a job stands, in words."""
    progress = job.progress
    far = f"{progress['done']} of {progress['total']}" if progress.get("total") else ""
    if job.state == "running":
        left = f", {duration(progress['eta'])} left" if progress.get("eta") else ""
        wish = f", {WISHES[job.asked]}" if job.asked else ""
        return ", ".join(filter(None, ["running", progress.get("doing", ""), far])) + left + wish
    if job.state == "failed" and job.error:
        return f"failed: {plain(job.error['message'])}"
    if job.state == "queued":
        first = f", after {job.needs}" if job.needs else ""
        return "queued" + (f", priority {job.priority}" if job.priority else "") + first + (f", {far} done" if far else "")
    return job.state + (f", {far}" if far and job.state != "succeeded" else "")


WISHES = {"pause": "about to pause", "cancel": "about to be cancelled", "keep": "about to stop and keep what it has"}


@jobs.command()
@one_id
@workspace_option
def show(id: str, workspace: Path | None) -> int:
    """Everything about a job: settings, where it stands, what it made, and why it failed."""
    store = open_store(workspace)
    job = store.get(id)
    answer(job=job_record(job))
    echo(line_of(job))
    echo(f"writes to   {job.folder}")
    for key, value in job.settings.items():
        echo(f"setting     {key} = {plain(str(value))}")
    for key, value in (job.result or {}).items():
        if isinstance(value, str | int | float) and value != "":
            echo(f"result      {key} = {plain(str(value))}")
    if job.error:
        echo(f"error       {plain(job.error['message'])}" + (f" ({plain(job.error['hint'])})" if job.error["hint"] else ""))
        for line in job.error["log"].splitlines()[-12:]:
            echo(f"            {plain(line)}")
    echo(f"log         {store.workspace.log(job.id)}")
    return 0


@jobs.command()
@one_id
@workspace_option
def log(id: str, workspace: Path | None) -> int:
    """What a job has printed."""
    store = open_store(workspace)
    text = store.log(id, letters=1 << 20)
    answer(log=text)
    for line in text.splitlines():
        echo(plain(line, 4000))
    return 0


@jobs.command()
@one_id
@click.option("--after", type=click.IntRange(0), default=0, help="only those behind this number")
@workspace_option
def events(id: str, after: int, workspace: Path | None) -> int:
    """What happened to a job so far, a line of JSON for each event."""
    import json

    found = open_store(workspace).events(id, after)
    answer(events=[{"number": number, **record} for number, record in found])
    for number, record in found:
        echo(json.dumps({"number": number, **record}))
    return 0


@jobs.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@workspace_option
@click.option("--job-name", default="", metavar="TEXT", help="what it is called in the list")
@click.option("--priority", type=int, default=0, help="higher ones are taken first")
@click.option("--after", metavar="JOB", help="not before this one has succeeded")
@click.argument("kind")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def add(kind: str, words: tuple[str, ...], workspace: Path | None, job_name: str, priority: int, after: str | None) -> int:
    """Queue what a command does: `personalize jobs add merge A.safetensors B.safetensors --rank 16`.

    KIND is train, batch, generate, dataset, merge, resize, convert, extract, bake, interpolate or doctor; the arguments are those
    of that command. Without --output, a job writes into the workspace.
    """
    from .work import settings_of

    job = open_store(workspace).add(kind, settings_of(kind, words), name=job_name, priority=priority, after=after)
    answer(job=job_record(job))
    echo(f"{job.id}  {job.kind} {plain(job.name)} is queued, and will write to {job.folder}")
    return 0


@jobs.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@workspace_option
@click.option("--job-name", metavar="TEXT", help="what it is called in the list")
@click.option("--priority", type=int, help="higher ones are taken first")
@one_id
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def edit(id: str, words: tuple[str, ...], workspace: Path | None, job_name: str | None, priority: int | None) -> int:
    """Change a job that waits: `personalize jobs edit 1f3a --steps 500`; what is not named stays."""
    from .work import settings_of

    store = open_store(workspace)
    job = store.get(id)
    settings = {**job.settings, **settings_of(job.kind, words)} if words else None
    return tell_standing(store.edit(job.id, settings=settings, priority=priority, name=job_name))


def tell_standing(*found: Job) -> int:
    """Say how jobs stand now."""
    answer(jobs=[job_record(job) for job in found])
    for job in found:
        echo(line_of(job))
    return 0


def to_each(do: Callable[[Store, str], Job], ids: tuple[str, ...], workspace: Path | None) -> int:
    """Do something to each job; one that cannot keeps none of the others from it."""
    store, code, found = open_store(workspace), 0, []
    for id in ids:
        try:
            found.append(do(store, id))
        except JobError as error:
            code = print_error(error)
    return tell_standing(*found) or code


@jobs.command()
@ids
@workspace_option
def pause(ids: tuple[str, ...], workspace: Path | None) -> int:
    """Let jobs rest; one that is running saves its state first."""
    return to_each(lambda store, id: store.pause(id), ids, workspace)


@jobs.command()
@ids
@workspace_option
def resume(ids: tuple[str, ...], workspace: Path | None) -> int:
    """Queue paused jobs again; a training goes on where it stands."""
    return to_each(lambda store, id: store.resume(id), ids, workspace)


@jobs.command()
@ids
@workspace_option
def cancel(ids: tuple[str, ...], workspace: Path | None) -> int:
    """End jobs. What they wrote stays."""
    return to_each(lambda store, id: store.cancel(id), ids, workspace)


@jobs.command()
@ids
@workspace_option
def requeue(ids: tuple[str, ...], workspace: Path | None) -> int:
    """Queue jobs that are over once more; a training goes on where it stands."""
    return to_each(lambda store, id: store.requeue(id), ids, workspace)


@jobs.command()
@one_id
@click.option("--before", metavar="JOB", help="the one that is to come after it [default: behind all others]")
@workspace_option
def move(id: str, before: str | None, workspace: Path | None) -> int:
    """Change the order of the queue."""
    return tell_standing(open_store(workspace).move(id, before))


@jobs.command()
@one_id
@click.argument("word", metavar="sample|save|stop|keep")
@workspace_option
def tell(id: str, word: str, workspace: Path | None) -> int:
    """Ask a training to draw its samples now, to save now, to pause, or to stop and keep the adapter of where it stands."""
    return tell_standing(open_store(workspace).tell(id, word))


@jobs.command()
@one_id
@workspace_option
def follow(id: str, workspace: Path | None) -> int:
    """Wait for the end of a job, and say what goes on."""
    store = open_store(workspace)
    job, said = store.get(id), ""
    while not (job.ended or job.state == "paused"):
        if (now := line_of(job)) != said:
            said = now
            echo(now)
        time.sleep(PAUSE)
        job = store.get(job.id)
    tell_standing(job)
    return 0 if job.state == "succeeded" else 2


@jobs.command()
@click.option(
    "--device", "devices", multiple=True, metavar="cpu|cuda:N", help="where; can be repeated [default: all GPUs, or cpu]"
)
@workspace_option
def run(devices: tuple[str, ...], workspace: Path | None) -> int:
    """Work off the queue here, without a server, until nothing waits. Ctrl-C leaves what runs in the queue, its state saved."""
    from ..jobs import Engine
    from ..jobs.engine import devices_here

    store = open_store(workspace)
    said: dict[str, str] = {}
    before = {job.id for job in store.list() if job.ended}
    try:
        with Engine(store.workspace, devices or devices_here()):
            while True:
                found = [job for job in store.list() if job.id not in before]
                for job in found:
                    if (now := line_of(job)) != said.get(job.id):
                        said[job.id] = now
                        echo(now)
                if not any(job.state == "running" or (job.state == "queued" and can_run(store, job)) for job in found):
                    break
                time.sleep(PAUSE)
    except KeyboardInterrupt:
        raise click.Abort from None
    found = [store.get(job.id) for job in found]
    answer(jobs=[job_record(job) for job in found])
    return 2 if any(job.state == "failed" for job in found) else 0


def can_run(store: Store, job: Job) -> bool:
    """Whether a queued job waits for nothing but its turn."""
    try:
        return job.needs is None or store.get(job.needs).state in ("queued", "running", "succeeded")
    except PersonalizeError:
        return False
