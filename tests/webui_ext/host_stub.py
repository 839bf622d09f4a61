"""As much of A1111's `modules` as the extension's script asks for: written anew, for tests without any of its code."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class OptionInfo:
    """What A1111's settings page shows of a setting."""

    def __init__(self, default: Any, label: str, section: tuple[str, str]) -> None:
        self.default, self.label, self.section = default, label, section
        self.component: Any = None
        self.component_args: Any = None
        self.comment_after, self.restrict_api = "", False


class Options(SimpleNamespace):
    """Settings; one that nobody added has no value."""

    def add_option(self, name: str, info: OptionInfo) -> None:
        self.infos = {**getattr(self, "infos", {}), name: info}
        setattr(self, name, info.default)


class Script:
    """The class that A1111's own scripts inherit."""


def stub_modules(root: Path) -> dict[str, types.ModuleType]:
    """The modules by name. `script_callbacks.heard` holds what was registered, `sd_models.done` what happened to the model."""
    names = ("shared", "script_callbacks", "scripts", "paths_internal", "sd_models", "devices", "call_queue")
    found = {name: types.ModuleType(name) for name in ("modules", *(f"modules.{one}" for one in names))}
    shared, callbacks, models = (found[f"modules.{name}"] for name in ("shared", "script_callbacks", "sd_models"))
    given = SimpleNamespace(lora_dir=str(root / "models" / "Lora"), ckpt_dir=None, server_name=None)
    options = Options(sd_model_checkpoint="art.safetensors [0123456789]")
    vars(shared).update(OptionInfo=OptionInfo, opts=options, demo=None, cmd_opts=given)
    heard: dict[str, list[Callable[..., Any]]] = {}
    for name in ("on_ui_tabs", "on_ui_settings", "on_app_started"):
        setattr(callbacks, name, lambda function, name=name: heard.setdefault(name, []).append(function))
    vars(callbacks).update(heard=heard)
    vars(found["modules.scripts"]).update(Script=Script, AlwaysVisible=object())
    vars(found["modules.paths_internal"]).update(models_path=str(root / "models"))
    done: list[str] = []
    file = root / "models" / "Stable-diffusion" / "art.safetensors"
    vars(models).update(
        done=done,
        model_data=SimpleNamespace(sd_model=object()),
        unload_model_weights=lambda: done.append("unload"),
        send_model_to_device=lambda _: done.append("load back"),
        get_closet_checkpoint_match=lambda title: SimpleNamespace(filename=str(file)) if title else None,
    )
    vars(found["modules.devices"]).update(device=SimpleNamespace(type="cuda", index=None), torch_gc=lambda: done.append("gc"))
    vars(found["modules.call_queue"]).update(queue_lock=contextlib.nullcontext())
    for name, module in found.items():
        if name != "modules":
            setattr(found["modules"], name.rpartition(".")[2], module)
    return found


@contextlib.contextmanager
def installed(root: Path) -> Iterator[dict[str, types.ModuleType]]:
    """Inside, a host is there: its modules, and folders for adapters and checkpoints below `root`."""
    for name in ("Lora", "Stable-diffusion"):
        (root / "models" / name).mkdir(parents=True)
    stubs, before = stub_modules(root), dict(sys.modules)
    sys.modules.update(stubs)
    try:
        yield stubs
    finally:
        for name in [name for name in sys.modules if name not in before or name in stubs]:
            if name in stubs or name.startswith("personalize_a1111.studio"):
                del sys.modules[name]
