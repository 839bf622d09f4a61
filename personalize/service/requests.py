"""What requests say -> settings of jobs: ids become paths, paths stay inside, and what only the command line has is left out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.describe import describe
from ..adapters.strengths.grammar import split
from ..errors import RecipeError, nearest
from ..inference.prompts import parse, tag_name
from ..jobs.store import kind_of
from ..recipe.lines import file_named
from ..recipe.resolve import from_json, presets
from ..registry import table
from ..text import plain
from .errors import Refusal, not_found
from .library import Adapter
from .paths import file_name
from .studio import Studio

Schema = dict[str, Any]

# What names a place to write, or a file that names others: jobs write where the workspace has room for them
LEFT_OUT = {
    "origin", "dry_run", "replay", "listed", "lora_dir", "embedding_dir", "sheet_path", "html_path", "words", "picture", "output",
    "queue", "workspace",
}  # fmt: skip
NEEDED = ("files", "folder", "prompts")  # which a command may get in another way
FILES = ("merge", "resize", "convert", "extract")  # kinds whose `output` is the name of an adapter
STEPS, SIDE, COUNT = 1000, 4096, 64  # most steps and pixels of a picture, and pictures of a request


@cache
def job_schema(kind: str) -> Schema:
    """The settings of a kind of job over HTTP."""
    schema = kind_of(kind).schema()
    properties = {name: one for name, one in schema["properties"].items() if name not in LEFT_OUT}
    if kind in FILES:
        properties["output"] = {
            "type": "string",
            "description": "name of the adapter [default: of what it is made]",
        }
    required = [name for name in properties if name in schema["required"] or name in NEEDED]
    return schema | {"properties": properties, "required": required}


def kinds() -> list[str]:
    """All kinds of jobs."""
    return list(table("jobs"))


def job_settings(studio: Studio, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a job as the store takes them. Raises Refusal, and RecipeError, which names the nearest of an unknown one."""
    if kind not in table("jobs"):
        raise RecipeError(f"there is no kind of job called {plain(kind, 80)!r}", nearest(kind, table("jobs")))
    properties = job_schema(kind)["properties"]
    settings = {}
    for name, value in given.items():
        name = name.replace("-", "_")
        if name not in properties:
            raise RecipeError(f"unknown setting {plain(name, 80)!r}", nearest(name, properties))
        settings[name] = inside(studio, name, value, properties[name])
    if missing := next((name for name in job_schema(kind)["required"] if settings.get(name) in (None, [], "")), ""):
        raise Refusal(400, "missing", f"{missing} is missing", properties[missing].get("description", ""), missing)
    if kind in FILES and isinstance(output := settings.get("output"), str):
        settings["output"] = str(new_adapter(studio, output))
    if kind == "generate":
        settings = drawing_settings(studio, settings)
    return settings


def inside(studio: Studio, name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """A value whose paths are true places inside of the workspace. Raises Refusal for those that are not."""
    if isinstance(value, list):
        return [inside(studio, name, one, schema.get("items", schema)) for one in value]
    if isinstance(items := schema.get("items"), Mapping):  # a single one where there may be many
        schema = items
    if not isinstance(value, str):
        return value
    check_text(value, name)
    what = schema.get("format")
    if what == "path":
        return str(find_path(studio, value, name))
    if what == "adapter":
        return adapter_text(studio, value, name)
    if what == "base":
        return studio.places.confine_base(value)
    if what == "captioner":
        return studio.places.confine_captioner(value)
    if what == "preset" and value not in presets():
        raise RecipeError(f"there is no preset {plain(value, 80)!r}", nearest(value, presets()))
    if what == "prompt" and file_named(value):
        raise Refusal(400, "file_prompt", f"{plain(value, 80)} names a file", "send the prompts themselves", name)
    return value


def check_text(value: str, name: str) -> None:
    """Raise Refusal for what no file and no prompt can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        value = "\0"
    if "\0" in value:
        raise Refusal(400, "no_text", f"{name} is no text", "send UTF-8, without NUL", name)


def find_path(studio: Studio, value: str, name: str) -> Path:
    """What a text names: a dataset, a file or an adapter by its id, else a path inside."""
    if value in studio.datasets.ids():
        return studio.datasets.folder(value)
    if re.fullmatch(r"file-[0-9a-f]{16}", value):
        file = studio.files.get(value)
        return studio.datasets.folder(file.dataset) if file.dataset else studio.files.content(value)
    if adapter := adapter_by_id(studio, value):
        return adapter.path
    path = studio.places.confine(value, name)
    if not path.exists():
        raise not_found("file or folder", value)
    return path


def adapter_text(studio: Studio, value: str, name: str) -> str:
    """`[NAME=]ID[:STRENGTH]`, or a path instead of the id, as the command line has it."""
    called, _, rest = value.partition("=")
    if not (rest and re.fullmatch(r"[^:/\\<>]+", called)):
        called, rest = "", value
    head, colon, strength = rest.partition(":")
    if adapter := adapter_by_id(studio, head):
        path, ending = str(adapter.path), colon + strength
    else:
        text, weighting = split(rest)
        path = str(studio.places.confine(text, name))
        ending = "" if text == rest else f":{weighting}"
    return f"{called}={path}{ending}" if called else f"{path}{ending}"


def adapter_by_id(studio: Studio, id: str) -> Adapter | None:
    """An adapter of the library."""
    return studio.library.get(id) if re.fullmatch(r"[0-9a-f]{16}", id) else None


def new_adapter(studio: Studio, name: str) -> Path:
    """Where an adapter of this name is written. Raises Refusal for a name that is taken."""
    path = studio.workspace.adapters / f"{file_name(name.removesuffix('.safetensors'))}.safetensors"
    if path.exists():
        raise Refusal(409, "exists", f"there is an adapter called {path.stem}", "give it another name", "output")
    return path


def drawing_settings(studio: Studio, settings: dict[str, Any]) -> dict[str, Any]:
    """What `generate` gets: prompts may name every adapter of the workspace, and the base that one names must be inside."""
    check_work(settings)
    for path in adapters_used(studio, settings.get("stack"), settings.get("prompts")):
        for base in bases_in(path):
            studio.places.confine_base(base)
    return settings | {"lora_dir": str(studio.workspace.root)}


def check_work(settings: Mapping[str, Any]) -> None:
    """Raise Refusal for more than a request may ask for."""
    steps, count = settings.get("steps"), settings.get("count")
    if isinstance(steps, int) and steps > STEPS:
        raise Refusal(400, "too_many", f"{steps} steps", f"at most {STEPS}", "steps")
    if isinstance(count, int) and count > COUNT:
        raise Refusal(400, "too_many", f"{count} pictures", f"at most {COUNT}", "count")
    if any(int(side) > SIDE for side in re.findall(r"\d+", str(settings.get("size") or ""))[:2] if len(side) < 100):
        raise Refusal(400, "too_large", f"{settings['size']} pixels", f"at most {SIDE} along a side", "size")


def adapters_used(studio: Studio, stack: Any, prompts: Any) -> Iterator[Path]:
    """The adapter files of a request: those it names, and those that the tags in its prompts do."""
    for text in stack if isinstance(stack, list) else [stack] if isinstance(stack, str) else []:
        called, _, rest = text.partition("=")
        yield Path(split(rest if rest and "/" not in called else text)[0])
    texts = prompts if isinstance(prompts, list) else [prompts]
    tags = {tag_name(use.name) for text in texts if isinstance(text, str) for use in parse(text)[1]}
    for one in studio.library.all(checkpoints=True) if tags else ():
        if {tag_name(one.path.stem), tag_name(one.description.metadata.get("ss_output_name", ""))} & tags:
            yield one.path


def bases_in(path: Path) -> list[str]:
    """The base, and the VAE of another, that an adapter says it was trained on: they would be loaded to draw with it."""
    with contextlib.suppress(RecipeError):  # of another version
        if text := describe(path).metadata.get("personalize.recipe"):
            recipe = from_json(text)
            return [recipe.base, *([recipe.vae] if recipe.vae else [])]
    return []
