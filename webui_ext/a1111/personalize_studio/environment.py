"""A private environment for the studio: what has to be done to make it, how large it will be, and how far it is.

It is made by a process of its own (make.py), which says in HOME/environment.json how far it is, and whose installers print into
HOME/environment.log. Started again, it goes on: finished steps cost nothing, downloads that are complete lie in the cache of uv
or pip. Nothing of the host's environment is read or changed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lease import alone

EXTRAS = "serve,dataset"
OLDEST, NEWEST = (3, 11), (3, 13)  # Pythons that personalize's service runs on: A1111's own 3.10 is too old for FastAPI's
OTHER = ">=3.11,<3.14"  # the Python that uv finds, or brings, where the host's is none of them or cannot make environments
TORCH = "https://download.pytorch.org/whl/"
MEGA = 1 << 20
# By torch's build: what is downloaded and what lies on the disk afterwards, in megabytes; Linux, Python 3.11, November 2026
SIZES = {"cpu": (500, 1700), "cuda": (3000, 5700)}
SYSTEM = platform.system()
PAUSE = 0.05  # seconds between two looks
LETTERS = 6000  # of a log that are shown


@dataclass(frozen=True)
class Step:
    """One command, and what a person is told while it runs."""

    doing: str
    command: list[str]


def accelerator() -> str:
    """`cuda` where there is an NVIDIA card, else `cpu`."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") else "cpu"


def torch_index(what: str, system: str) -> str:
    """Where torch comes from, where it is not the default: Linux' default has CUDA, Windows' has not.

    >>> torch_index("cpu", "Linux"), torch_index("cuda", "Linux"), torch_index("cuda", "Windows")[-6:]
    ('https://download.pytorch.org/whl/cpu', '', '/cu128')
    """
    return {("cpu", "Linux"): TORCH + "cpu", ("cuda", "Windows"): TORCH + "cu128"}.get((what, system), "")


def can_make(version: tuple[int, ...] = sys.version_info[:2]) -> bool:
    """Whether this Python can make an environment that personalize runs in: embedded ones bring no venv."""
    return OLDEST <= version[:2] <= NEWEST and bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"))


def steps(home: Path, package: str, index: str, uv: str | None) -> list[Step]:
    """What has to be done, in order. Without uv and without venv, pip brings uv into a folder of the plugin's own."""
    place = home / "environment"
    python = str(place / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    target = f"{package}[{EXTRAS}]"  # a folder, a wheel or a name: pip and uv take extras behind each
    found = []
    if not uv and not can_make():
        uv = str(home / "uv" / "bin" / "uv")
        found += [Step("getting uv", [sys.executable, "-m", "pip", "install", "--upgrade", "--target", str(home / "uv"), "uv"])]
    if uv:
        has_python = Path(python).exists()
        found += (
            []
            if has_python
            else [Step("making an environment", [uv, "venv", "--python", sys.executable if can_make() else OTHER, str(place)])]
        )
        install = [uv, "pip", "install", "--python", python]
    else:
        found += [Step("making an environment", [sys.executable, "-m", "venv", str(place)])]
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    if index:
        found += [Step("installing torch", [*install, "--index-url", index, "torch"])]
    found += [Step("installing personalize", [*install, target])]
    return [*found, Step("trying it out", [python, "-c", "import personalize.service.serve, torch"])]


# ---------------------------------------------------------------- what the panel asks


def build_of(index: str, system: str) -> str:
    """Which of torch's builds an index leads to: `cpu` or `cuda`. The default of Linux is the one for NVIDIA cards.

    >>> build_of("", "Linux"), build_of("", "Windows"), build_of("https://download.pytorch.org/whl/cpu", "Linux")
    ('cuda', 'cpu', 'cpu')
    """
    return "cpu" if index.rstrip("/").endswith("cpu") or (not index and system != "Linux") else "cuda"


def sizes(build: str) -> tuple[int, int]:
    """What is downloaded and what lies on the disk afterwards, in bytes, roughly."""
    download, disk = SIZES[build]
    return download * MEGA, disk * MEGA


def read_state(home: Path) -> dict[str, Any]:
    """How far an installation is: `state` is "", running, failed or ready."""
    try:
        state = json.loads((home / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"state": ""}
    if state["state"] == "running" and not is_being_made(home):
        state |= {"state": "failed", "error": "it was interrupted; what is finished is kept"}
    return dict(state)


def read_tail(path: Path, letters: int = LETTERS) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - letters))
        return file.read().decode(errors="replace")
    return ""


def begin(home: Path, package: str, index: str) -> subprocess.Popen[bytes]:
    """Start making the environment. It ends with this process. Raises OSError."""
    home.mkdir(parents=True, exist_ok=True)
    write_state(home, state="running", step=0, steps=1, doing="beginning")
    command = [sys.executable, str(Path(__file__).with_name("make.py").resolve()), str(home), package, index]
    with (home / "environment.log").open("wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=home)
    while child.poll() is None and not is_being_made(home):
        time.sleep(PAUSE)
    return child


def is_being_made(home: Path) -> bool:
    """Whether a process is at it."""
    with alone(home / "environment.lock", 0) as nobody:
        return not nobody


def write_state(home: Path, **state: Any) -> None:
    """Say how far it is, all or nothing."""
    temporary = home / f"environment.json.{os.getpid()}"
    temporary.write_text(json.dumps(state), encoding="utf-8")
    os.replace(temporary, home / "environment.json")


def size_of(folder: Path) -> int:
    """The bytes of all files of a folder, which may be growing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


# What the end of a log says, and what helps
HINTS = (
    ("No space left", "make room on the disk, then go on"),
    ("not a supported wheel", "this Python is not one that personalize runs on: name another one in PERSONALIZE_PYTHON"),
    ("Requires-Python", "this Python is not one that personalize runs on: name another one in PERSONALIZE_PYTHON"),
    ("ensurepip", "this Python cannot make environments: install uv, or the package python3-venv of your system"),
    ("Could not find a version", "see whether the network is there, then go on"),
    ("Temporary failure in name resolution", "see whether the network is there, then go on"),
    ("Connection", "see whether the network is there, then go on"),
)


def hint_for(log: str) -> str:
    """What to do about an installation that failed."""
    return next((hint for words, hint in HINTS if words in log), "go on: what is finished is kept. The log says why it ended")
