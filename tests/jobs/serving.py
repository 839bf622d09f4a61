"""An engine in a process of its own, which can be killed: `python serving.py WORKSPACE WORKER`, until its stdin ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import counting

from personalize.jobs import Engine, Workspace, engine

HERE = Path(__file__).parent


class Server:
    """That process; it holds the workspace as soon as it is made, and is killed at the end of the `with` block at the latest."""

    def __init__(self, workspace: Workspace, worker: str = engine.WORKER) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
        command = [sys.executable, str(HERE / "serving.py"), str(workspace.root), worker]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        """End it, as a server ends."""
        self.process.communicate(timeout=120)
        assert self.process.returncode == 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


if __name__ == "__main__":
    if sys.argv[2] != engine.WORKER:
        engine.WORKER = sys.argv[2]
        counting.add_rows()
    with Engine(Workspace(sys.argv[1])):
        print("ready", flush=True)
        sys.stdin.read()
