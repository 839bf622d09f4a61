"""What ComfyUI is asked: folders, files, how to say how far a node is. Its modules are imported when they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..personalize_studio import Settings

HOME = Path(__file__).resolve().parent.parent
FILE = "settings.json"  # beside the plugin: the fields of Settings that a user wants otherwise
FIELDS = ("python", "url", "token", "workspace", "package", "index", "port", "devices", "names")
NONE = "none"  # in lists of files
POCKET = "pocket"  # the embedded base


def settings() -> Settings:
    """What the plugin goes by: settings.json, and the environment's variables over it."""
    try:
        given = json.loads((HOME / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        given = {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{HOME / FILE} cannot be read: {error}") from error
    if not isinstance(given, dict) or (unknown := given.keys() - set(FIELDS)):
        what = f"has no setting {min(unknown)!r}" if isinstance(given, dict) else "is no JSON object"
        raise ValueError(f"{HOME / FILE} {what}; its settings are {', '.join(FIELDS)}")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Settings(HOME, folders=folders(), **fields).with_environment()


def folders() -> tuple[str, ...]:
    """Where ComfyUI keeps adapters and checkpoints, as far as these folders are there; where new adapters go is the first."""
    import folder_paths

    places = [*folder_paths.get_folder_paths("loras"), *folder_paths.get_folder_paths("checkpoints")]
    return tuple(dict.fromkeys(str(Path(place).absolute()) for place in places if Path(place).is_dir()))


def lora_folder() -> Path:
    """Where adapters are saved: the first of ComfyUI's folders for them."""
    import folder_paths

    place = Path(folder_paths.get_folder_paths("loras")[0]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    return place


def loras() -> list[str]:
    """The adapter files that ComfyUI lists, and `none` before them."""
    import folder_paths

    return [NONE, *(name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors"))]


def lora_path(name: str) -> str:
    """Where such a file lies. Raises FileNotFoundError."""
    import folder_paths

    return str(folder_paths.get_full_path_or_raise("loras", name))


def bases() -> list[str]:
    """What a training can begin with: the embedded base, and ComfyUI's checkpoints that cannot run code when opened."""
    import folder_paths

    return [POCKET, *(name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(".safetensors"))]


def base_path(name: str) -> str:
    """A base as the studio takes it."""
    import folder_paths

    return POCKET if name == POCKET else str(folder_paths.get_full_path_or_raise("checkpoints", name))


def input_folder(name: str) -> Path:
    """A folder of pictures: an absolute one, or one below ComfyUI's own folder for inputs."""
    import folder_paths

    return Path(folder_paths.get_input_directory(), Path(name).expanduser())


def temporary() -> Path:
    """Where files lie until ComfyUI starts again."""
    import folder_paths

    place = Path(folder_paths.get_temp_directory()).absolute() / "personalize"
    place.mkdir(parents=True, exist_ok=True)
    return place


def check_interrupted() -> None:
    """Raise what ComfyUI wants to have raised when somebody has pressed Cancel."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def progress(node_id: str) -> Callable[[int, int, Any], None]:
    """A function of (done, total, a PIL picture or None) that shows how far a node is; it raises when Cancel was pressed."""
    import comfy.utils

    try:
        bar = comfy.utils.ProgressBar(1, node_id=node_id)
    except TypeError:  # of hosts older than V3
        bar = comfy.utils.ProgressBar(1)
    return lambda done, total, picture: bar.update_absolute(done, total, ("JPEG", picture, 512) if picture is not None else None)


def say(node_id: str, text: str) -> None:
    """Show a line of text on a node, where the host can."""
    from server import PromptServer

    if hasattr(PromptServer.instance, "send_progress_text"):
        PromptServer.instance.send_progress_text(text, node_id)


def make_room() -> None:
    """Take the models off the card: they come back by themselves when they are needed."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def stamp(paths: Sequence[Path]) -> str:
    """A fingerprint of files, by their names, sizes and times; the same as long as nobody writes there."""
    found = hashlib.sha256()
    for path in sorted(paths):
        state = path.stat() if path.exists() else None
        found.update(f"{path}|{state and state.st_size}|{state and state.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()
