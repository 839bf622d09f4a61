"""Where everything is, as one value: what a host's settings and the environment say."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Each field that the environment may set, and its variable: who starts a UI from a script has the last word
VARIABLES = {"python": "PERSONALIZE_PYTHON", "url": "PERSONALIZE_URL", "workspace": "PERSONALIZE_WORKSPACE",
             "package": "PERSONALIZE_PACKAGE", "token": "PERSONALIZE_TOKEN", "index": "PERSONALIZE_TORCH_INDEX"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the plugin goes by. `""` always stands for: find out."""

    home: Path  # the plugin's own folder; the environment is made below it
    python: str = ""  # an interpreter that has personalize, instead of a private environment
    url: str = ""  # a service that runs already, here or elsewhere
    token: str = ""  # of that service
    workspace: str = ""  # where jobs, datasets and adapters are kept
    package: str = ""  # what is installed: a folder, a wheel, or what pip understands
    index: str = ""  # where torch is installed from; "default": where pip looks by itself
    port: int = 0  # of the service; 0: any that is free
    devices: tuple[str, ...] = ()  # where jobs run; (): every GPU, else the CPU
    folders: tuple[str, ...] = ()  # of the host, that the studio may name: base models, where adapters are kept
    names: tuple[str, ...] = ()  # host names by which browsers reach the host, beside addresses and this machine's own

    def with_environment(self, environ: Mapping[str, str] = os.environ) -> Settings:
        """The same, with what the environment says over it."""
        given: dict[str, Any] = {field: environ.get(name, "").strip() for field, name in VARIABLES.items()}
        return replace(self, **{field: value for field, value in given.items() if value})

    @property
    def place(self) -> Path:
        """The workspace."""
        return Path(self.workspace).expanduser().absolute() if self.workspace else default_workspace()

    @property
    def environment(self) -> Path:
        """The private environment."""
        return self.home / "environment"

    @property
    def interpreter(self) -> Path:
        """The Python that runs the service, whether it is there or not."""
        if self.python:
            return find_python(self.python)
        return self.environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def source(self) -> str:
        """What would be installed: what is named, a wheel beside the plugin, or the checkout that it lies in; "" for nothing."""
        if self.package:
            return self.package
        wheels = sorted(self.home.glob("personalize-*.whl"), key=lambda path: path.stat().st_mtime)
        checkout = self.home.resolve().parent.parent
        is_ours = (checkout / "pyproject.toml").is_file() and (checkout / "personalize" / "version.py").is_file()
        return str(wheels[-1]) if wheels else str(checkout) if is_ours else ""


def find_python(named: str) -> Path:
    """The interpreter that somebody named: a file, an environment's folder, or a command of the PATH."""
    named = named.strip("\"'")  # as paths are copied from Windows' Explorer
    path = Path(named).expanduser().absolute()
    inside = next((path / one for one in ("bin/python", "Scripts/python.exe", "python.exe") if (path / one).is_file()), path)
    is_command = os.path.basename(named) == named and not path.exists()
    return Path(shutil.which(named) or path) if is_command else inside


def default_workspace(environ: Mapping[str, str] = os.environ) -> Path:
    """The workspace that `personalize` takes where none is named, in the user's data directory: so all UIs share it."""
    if sys.platform == "win32":
        data = Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        data = Path.home() / "Library" / "Application Support"
    else:
        data = Path(environ.get("XDG_DATA_HOME", "").strip() or Path.home() / ".local" / "share")
    return data / "personalize" / "workspace"
