"""As much of ComfyUI as the pack asks for: written anew from what the real server 0.3.64 does, for tests without any of its code.

V3's `io` keeps what a schema was told; `ProgressBar` raises when somebody has pressed Cancel, as the real one does.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACK = Path(__file__).resolve().parents[2] / "webui_ext" / "comfyui"
NAME = "custom_nodes_comfyui"  # the real one makes a name of the whole path
TYPES = ("String", "Int", "Float", "Boolean", "Combo", "Image", "Model", "Clip", "Hooks")
# What each class of V3 takes beside id, optional and tooltip
TAKES = {"String": {"default", "multiline"}, "Int": {"default", "min", "max"}, "Float": {"default", "min", "max"},
         "Boolean": {"default"}, "Combo": {"default", "options"}}  # fmt: skip


class Interrupted(Exception):
    """What Cancel raises in the host."""


class Socket:
    """An input or output of V3, as it was told."""

    def __init__(self, kind: str, id: str, **told: Any) -> None:
        extra = told.keys() - {"optional", "tooltip", "display_name"} - TAKES.get(kind, set())
        if extra:
            raise TypeError(f"{kind} takes no {extra}")
        self.kind, self.id, self.told = kind, id, told


def type_named(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        Input=lambda id, **told: Socket(kind, id, **told),
        Output=lambda id=None, **told: Socket(kind, id, **told),
    )


class Hidden(str, enum.Enum):
    unique_id = "UNIQUE_ID"


class ComfyNode:
    """The base of V3's nodes; the real one sets `hidden` before it runs one."""

    hidden = SimpleNamespace(unique_id="1")


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyExtension:
    """The base of V3's extensions."""


class Host:
    """What happened in the host, and what it has."""

    def __init__(self, root: Path) -> None:
        self.root, self.interrupted = root, False
        self.progress: list[tuple[int, int, Any]] = []
        self.said: list[str] = []
        self.routes: list[tuple[str, str, Any]] = []
        self.freed = 0
        for name in ("loras", "checkpoints"):
            (root / "models" / name).mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise Interrupted

    def files(self, kind: str) -> list[str]:
        return sorted(path.name for path in (self.root / "models" / kind).iterdir())


def modules(host: Host, v3: bool) -> dict[str, types.ModuleType]:
    """The host's modules by name."""
    names = ["comfy", "comfy.utils", "comfy.sd", "comfy.hooks", "comfy.model_management", "server", "folder_paths"]
    found = {name: types.ModuleType(name) for name in [*names, *(["comfy_api", "comfy_api.latest"] if v3 else [])]}

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            host.check()
            host.progress.append((value, total, preview))

    def route(method: str, path: str) -> Any:
        return lambda handler: host.routes.append((method, path, handler))

    def full_path(kind: str, name: str) -> str:
        path = host.root / "models" / kind / name
        if not path.is_file():
            raise FileNotFoundError(name)
        return str(path)

    said = SimpleNamespace(send_progress_text=lambda text, _: host.said.append(text), routes=SimpleNamespace(route=route))
    vars(found["server"]).update(PromptServer=SimpleNamespace(instance=said))
    vars(found["folder_paths"]).update(
        get_folder_paths=lambda kind: [str(host.root / "models" / kind)],
        get_filename_list=host.files,
        get_full_path_or_raise=full_path,
        get_input_directory=lambda: str(host.root / "input"),
        get_temp_directory=lambda: str(host.root / "temp"),
    )
    vars(found["comfy.utils"]).update(ProgressBar=ProgressBar)
    vars(found["comfy.model_management"]).update(
        throw_exception_if_processing_interrupted=host.check,
        unload_all_models=lambda: setattr(host, "freed", host.freed + 1),
        soft_empty_cache=lambda: None,
    )
    if v3:
        io = SimpleNamespace(**{name: type_named(name) for name in TYPES}, Custom=type_named, Hidden=Hidden, ComfyNode=ComfyNode,
                             NodeOutput=NodeOutput, Schema=lambda **told: SimpleNamespace(**told))  # fmt: skip
        vars(found["comfy_api.latest"]).update(io=io, ComfyExtension=ComfyExtension)
        vars(found["comfy_api"]).update(latest=found["comfy_api.latest"])
    for name, module in found.items():
        if "." in name:
            setattr(found[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    return found


@contextlib.contextmanager
def loaded(root: Path, v3: bool = True) -> Iterator[tuple[Any, Host]]:
    """Inside, the pack is loaded by its path, as ComfyUI does it; and the host that it sees."""
    host = Host(root)
    before = dict(sys.modules)
    sys.modules.update(modules(host, v3))
    if not v3:
        sys.modules["comfy_api"] = None  # type: ignore[assignment]  # import raises
    try:
        spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py")
        assert spec and spec.loader
        sys.modules[NAME] = pack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        yield pack, host
    finally:
        bridge = sys.modules.get(f"{NAME}.personalize_comfyui.studio")
        if bridge:
            bridge.bridge.close()
        for name in [one for one in sys.modules if one.split(".")[0] in (NAME, "comfy", "comfy_api", "server", "folder_paths")]:
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]
