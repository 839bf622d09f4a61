"""Jobs that survive: a queue in one SQLite file, worked off by child processes.

job.py        a job as a value                        workspace.py  where everything of a workspace lies
database.py   the SQLite file: schema, transactions   store.py      all that is asked of jobs
kind.py       what a kind of job is: a row of the table `jobs`; the rows are commands, in cli/work.py
worker.py     the child process that runs jobs        engine.py     starts, watches and replaces workers
"""

from .engine import Engine
from .job import Job
from .store import Store
from .workspace import Workspace

__all__ = ["Engine", "Job", "Store", "Workspace"]
