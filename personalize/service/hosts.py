"""Image UIs on this machine: the folders in which they look for adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE = "folders.json"  # of a workspace: folders that the plugins of image UIs let the service know
# Where each keeps its adapters, below its own folder
PLACES = {"models/Lora": "A1111 or Forge", "models/loras": "ComfyUI", "Models/Lora": "Stability Matrix"}
# What people's installations are called, below their home folder
USUAL = ("stable-diffusion-webui", "stable-diffusion-webui-forge", "stable-diffusion-webui-reForge",
         "webui_forge_cu121_torch231/webui", "ComfyUI", "Documents/ComfyUI",
         "ComfyUI_windows_portable/ComfyUI", "StabilityMatrix")  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A folder that an image UI reads adapters from."""

    name: str
    folder: Path


def hosts_in(folders: Iterable[Path]) -> list[Host]:
    """The image UIs that folders are, or the folders of adapters that they are themselves."""
    found: dict[Path, Host] = {}
    for folder in folders:
        for place, name in PLACES.items():
            inside = folder / place
            if is_folder(inside):
                found.setdefault(inside.resolve(), Host(name, inside))
            elif folder.name == Path(place).name and is_folder(folder):
                found.setdefault(folder.resolve(), Host(name, folder))
    return list(found.values())


def usual_hosts(home: Path) -> list[Path]:
    """The folders of adapters of image UIs that lie where they usually do."""
    return [host.folder for host in hosts_in(home / name for name in USUAL)]


def registered_folders(workspace: Path) -> tuple[Path, ...]:
    """The folders of image UIs whose plugins share this workspace: those with adapters and base models. Read anew each time."""
    try:
        given = json.loads((workspace / FILE).read_text(encoding="utf-8"))
        return tuple(path for path in map(Path, given) if path.is_absolute() and path.is_dir())
    except (OSError, ValueError, TypeError):
        return ()


def is_folder(path: Path) -> bool:
    """Whether a folder is there, spelt as it is: some disks do not mind about capitals."""
    try:
        return path.is_dir() and path.name in {one.name for one in path.parent.iterdir()}
    except OSError:
        return False
