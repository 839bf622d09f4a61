"""The folder in which jobs live: one SQLite file, and a folder for each sort of thing.

WORKSPACE/jobs.sqlite       the queue, the jobs and their events
WORKSPACE/runs/NAME         run folders of training jobs          WORKSPACE/adapters   what merges, resizes, ... wrote
WORKSPACE/outputs/ID        pictures of drawing jobs              WORKSPACE/uploads, datasets   what somebody brought
WORKSPACE/logs/ID.log       what a job printed                    WORKSPACE/lanes/NAME   held by the lane's worker
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..io import disk_error

PLACE = "PERSONALIZE_WORKSPACE"  # environment variable: the workspace where none is named
FOLDERS = ("runs", "uploads", "datasets", "adapters", "outputs", "logs", "lanes")


def default_place() -> Path:
    """The workspace where none is named: $PERSONALIZE_WORKSPACE, or one in the user's data directory."""
    if place := os.environ.get(PLACE):
        return Path(place).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("personalize", appauthor=False)) / "workspace"


@dataclass(frozen=True, init=False)
class Workspace:
    """A workspace; its folders are made where they are missing. Raises OutputError where that is not possible."""

    root: Path

    def __init__(self, root: str | Path | None = None) -> None:
        object.__setattr__(self, "root", Path(root or default_place()).expanduser().absolute())
        for name in FOLDERS:
            try:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(self.root, error, "another --workspace") from error

    @property
    def database(self) -> Path:
        return self.root / "jobs.sqlite"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    def log(self, job: str) -> Path:
        """What a job printed."""
        return self.root / "logs" / f"{job}.log"

    def lane(self, name: str) -> Path:
        """The folder that the worker of a lane holds."""
        return self.root / "lanes" / name.replace(":", "-").replace("/", "-")

    def relative(self, path: Path) -> str:
        """A path as it is stored: relative where it lies inside, so that a workspace can be moved."""
        path = path.expanduser().absolute()
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
