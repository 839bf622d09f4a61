"""personalize's light core (adapters, formats, families), which needs torch and safetensors alone, read from where it lies.

Nothing is installed, and no folder of packages is put on the path: the package alone is loaded, from the environment of the
host if it is there, from the wheel or checkout beside the plugin, or from the private environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import zipimport
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .host import settings

NAME = "personalize"
_loading = threading.Lock()


def core(module: str) -> Any:
    """A module of the core, such as `adapters.strengths.grammar`. Raises ImportError with what to do."""
    with _loading:
        if NAME not in sys.modules and not getattr(importlib.util.find_spec(NAME), "origin", None):  # a bare folder has none
            load_package()
    return importlib.import_module(f"{NAME}.{module}")


def load_package() -> None:
    """Load the package itself. Raises ImportError."""
    for place in places():
        if place.suffix == ".whl":
            spec = zipimport.zipimporter(str(place)).find_spec(NAME)
        else:
            spec = importlib.util.spec_from_file_location(NAME, place / NAME / "__init__.py")
        if spec and spec.loader:
            sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return
    raise ImportError("strengths are read by personalize itself, and it is not there: open the tab Personalize once, "
                      "or name its wheel or folder in PERSONALIZE_PACKAGE")  # fmt: skip


def places() -> Iterator[Path]:
    """Where the package may lie: a wheel, or a folder that has it."""
    found = settings()
    if found.source.endswith(".whl") and Path(found.source).is_file():
        yield Path(found.source)
    folders = [Path(found.source)] if found.source else []
    folders += [*found.environment.glob("lib/python*/site-packages"), found.environment / "Lib" / "site-packages"]
    yield from (one for one in folders if (one / NAME / "__init__.py").is_file())
