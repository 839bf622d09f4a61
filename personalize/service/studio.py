"""What all routes share: the workspace of one service and everything in it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..jobs import Engine, Job, Store, Workspace
from .datasets import Datasets
from .errors import Refusal
from .files import Files
from .hosts import Host, hosts_in, registered_folders
from .library import Library
from .live import Live
from .options import Options
from .paths import Places
from .uploads import remove_leftovers
from .votes import Votes
from .watch import Watch

DAY = 86_400  # seconds


@dataclass(frozen=True)
class Studio:
    """A workspace as a service has it. `engine` is None where another process runs the jobs, or nobody does."""

    options: Options
    workspace: Workspace
    store: Store
    live: Live
    watch: Watch
    datasets: Datasets
    files: Files
    library: Library
    votes: Votes
    places: Places
    engine: Engine | None = None

    @classmethod
    def open(cls, options: Options, lanes: tuple[str, ...] = ()) -> Studio:
        """The studio of a workspace, whose jobs run on the devices `lanes`. Raises OutputError where the disk refuses."""
        workspace = Workspace(options.workspace)
        store = Store(workspace)
        return cls(
            options,
            workspace,
            store,
            Live(store),
            Watch(store),
            Datasets(workspace, options.folders, options.limits),
            Files(workspace.uploads),
            Library(workspace),
            Votes(workspace),
            Places(workspace.root, options.folders),
            Engine(workspace, lanes) if lanes else None,
        )

    @property
    def hosts(self) -> list[Host]:
        """The image UIs that an adapter can be sent to."""
        return hosts_in((*self.folders, *self.options.hosts))

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders outside of the workspace that requests may name."""
        return (*self.options.folders, *registered_folders(self.workspace.root))

    @property
    def targets(self) -> Places:
        """The folders that adapters may be copied to."""
        return Places(self.workspace.root, (*self.options.folders, *self.options.hosts))

    def remove_leftovers(self) -> None:
        """Remove what crashes and clients left half done: only while no other service has the workspace."""
        remove_leftovers(self.workspace.uploads)
        self.files.remove_old_uploads(time.time() - self.options.limits.days * DAY)

    def check_unused(self, path: Path) -> None:
        """Raise Refusal where a job that is not over reads a folder or file, which must not go away then."""
        for job in self.store.list(states=("queued", "running", "paused")):
            if {str(path), str(path.resolve())} & texts_in(job):
                hint = f"wait for job {job.id}, or cancel it"
                raise Refusal(409, "in_use", f"job {job.id} needs it and is {job.state}", hint)


def texts_in(job: Job) -> set[str]:
    """All texts in a job's settings; of an adapter with a strength behind it, also the path alone."""
    found: set[str] = set()
    for value in job.settings.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                found |= {text, text.rpartition("=")[2].partition(".safetensors")[0] + ".safetensors"}
    return found
