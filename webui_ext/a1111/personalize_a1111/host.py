"""What A1111 and its forks are asked: settings, folders, the checkpoint, who is logged in. Imported when asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from personalize_studio import Settings

HOME = Path(__file__).resolve().parent.parent
SECTION = ("personalize", "Personalize")
# name: (default, label, what is said beside it)
OPTIONS: dict[str, tuple[Any, str, str]] = {
    "personalize_workspace": ("", "Workspace", "where all is kept; empty: a folder of yours that all UIs share"),
    "personalize_python": ("", "Python", "one that has personalize; empty: a private environment, which the tab makes"),
    "personalize_package": ("", "What is installed", "a folder or wheel of personalize; empty: what lies beside this extension"),
    "personalize_url": ("", "Running service", "such as http://127.0.0.1:8765; empty: one is started on demand"),
    "personalize_port": (0, "Port", "of the service that is started; 0: any that is free"),
    "personalize_devices": ("", "Devices", "where jobs run, such as cuda:0, cuda:1 or cpu; empty: every GPU, else the CPU"),
    "personalize_unload": (True, "Make room", "this UI's model leaves the card while a training runs on it"),
    "personalize_load_back": (True, "Load back", "and comes back when no training runs any more"),
    "personalize_names": ("", "Host names", "further names by which browsers reach this UI over plain http, separated by commas"),
}  # fmt: skip
# What these name is run, is written to, or gets pictures
FOR_OWNERS = ("personalize_workspace", "personalize_python", "personalize_package", "personalize_url")


def add_options() -> None:
    """Add the settings to the host's page of settings."""
    from modules import shared

    for name, (default, label, info) in OPTIONS.items():
        option = shared.OptionInfo(default, label, section=SECTION)
        if name == "personalize_port":
            import gradio

            option.component, option.component_args = gradio.Number, {"precision": 0}
        option.comment_after += f"<span class='info'>({info})</span>"
        if name in FOR_OWNERS:
            option.restrict_api = True
        shared.opts.add_option(name, option)


def option(name: str) -> Any:
    """A setting as it is now. Who reaches the UI from elsewhere must not name what is run: A1111 itself has that rule."""
    from modules import shared

    default = OPTIONS[name][0]
    if name in FOR_OWNERS and getattr(shared.cmd_opts, "disable_extension_access", False):
        return default
    value = getattr(shared.opts, name, default)
    return default if value is None else value


def settings() -> Settings:
    """What the plugin goes by: the host's settings, and the environment's over them."""
    texts = {name: str(option(f"personalize_{name}")).strip() for name in ("workspace", "python", "package", "url")}
    devices, names = (
        tuple(one.strip() for one in str(option(f"personalize_{name}")).split(",") if one.strip())
        for name in ("devices", "names")
    )
    found = Settings(
        HOME, port=int(option("personalize_port")), devices=devices, folders=folders(), names=(*names, *own_names()), **texts
    )
    return found.with_environment()


def own_names() -> tuple[str, ...]:
    """Names that the host was started with: of --server-name, and of gradio's tunnel."""
    from urllib.parse import urlsplit

    from modules import shared

    share = urlsplit(str(getattr(shared.demo, "share_url", None) or "")).hostname
    return tuple(name for name in (getattr(shared.cmd_opts, "server_name", None), share) if name)


def folders() -> tuple[str, ...]:
    """Where the host keeps adapters and checkpoints, as far as these folders are there."""
    from modules import shared
    from modules.paths_internal import models_path

    given = [getattr(shared.cmd_opts, name, None) for name in ("lora_dir", "ckpt_dir")]
    places = [given[0] or Path(models_path, "Lora"), given[1], Path(models_path, "Stable-diffusion")]
    return tuple(dict.fromkeys(str(Path(place).absolute()) for place in places if place and Path(place).is_dir()))


def checkpoint() -> str:
    """The checkpoint that the host draws with; "" for none, and for one that could run code when opened."""
    from modules import sd_models, shared

    match = getattr(sd_models, "get_closet_checkpoint_match", lambda _: None)  # spelt so there
    info = match(getattr(shared.opts, "sd_model_checkpoint", None) or "")
    path = str(getattr(info, "filename", "") or "")
    return str(Path(path).absolute()) if path.endswith(".safetensors") else ""


def networks() -> Any:
    """The host's module that lists LoRAs; None before it is loaded."""
    return sys.modules.get("networks")


def find_lora(name: str) -> str:
    """The file of a LoRA that the host lists by a name; "" for none."""
    known = getattr(networks(), "available_networks", {}).get(name)
    if known:
        return str(Path(known.filename).absolute())
    found = (path for folder in folders() for path in Path(folder).rglob("*.safetensors") if path.stem == name)
    return str(next(found, ""))


def refresh_loras() -> None:
    """Let the host look for LoRAs again."""
    if hasattr(networks(), "list_available_networks"):
        networks().list_available_networks()


def may_enter(scope: dict[str, Any]) -> bool:
    """Whether who asks is logged in, where the host was started with --gradio-auth."""
    app: Any = scope.get("app")
    if getattr(app, "auth", None) is None:
        return True
    from starlette.requests import Request

    user = next((route.endpoint for route in app.routes if getattr(route, "path", "") in ("/user", "/user/")), None)
    return user is not None and user(Request(scope)) is not None
