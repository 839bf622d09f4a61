"""The process that makes the environment: `python make.py HOME PACKAGE INDEX`. It lives no longer than who started it.

Its standard input is a pipe whose other end the host holds: it ends when the host does, however that is, or wants it to.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # embedded Pythons do not look beside a script

from personalize_studio.environment import steps, write_state
from personalize_studio.lease import alone

# What would make an installer read the host's packages, or install elsewhere
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")
running: list[subprocess.Popen[bytes]] = []


def clean_environ() -> dict[str, str]:
    """The environment of the installers: nothing of the host's Python, and nothing that would install elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in FOREIGN} | {"PYTHONUNBUFFERED": "1"}


def run(command: list[str]) -> int:
    """Run one command, with all that it starts in a group of its own."""
    print("\n$", *command, flush=True)
    flags: dict[str, Any] = {} if os.name == "nt" else {"start_new_session": True}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, env=clean_environ(), **flags) as child:
        running.append(child)
        try:
            return child.wait()
        finally:
            running.remove(child)


def end_with_host(handle: int) -> None:
    """End everything when who started this is gone, or wants it to end. Not through `sys.stdin`, whose lock outlives no exit."""
    while os.read(handle, 1):
        pass
    for child in running:
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], check=False, capture_output=True)
        else:
            os.killpg(child.pid, signal.SIGKILL)
    os._exit(1)


def make(home: Path, package: str, index: str) -> str:
    """Make the environment; "" or what went wrong."""
    todo = steps(home, package, index, shutil.which("uv"))
    for number, step in enumerate(todo):
        write_state(home, state="running", step=number, steps=len(todo), doing=step.doing, since=time.time())
        try:
            code = run(step.command)
        except OSError as error:
            return f"{step.doing}: {step.command[0]} cannot be run: {error.strerror}"
        if code:
            return f"{step.doing} ended with exit status {code}"
    return ""


def main(home: Path, package: str, index: str) -> int:
    """Make the environment, unless another process does; say in the end how it went."""
    threading.Thread(target=end_with_host, args=(0,), daemon=True).start()
    with alone(home / "environment.lock", 5) as nobody:  # others look at it for a moment
        if not nobody:
            return 1
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {platform.platform()}, Python {platform.python_version()}", flush=True)
        error = make(home, package, index)
        write_state(home, state="failed" if error else "ready", error=error, package=package)
    return bool(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
