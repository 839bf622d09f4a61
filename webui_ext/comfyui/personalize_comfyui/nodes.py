"""The table of nodes: what they are called, take and give, and thin functions that let the studio do the work."""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import host, pictures, training
from .apply import apply, read_strength
from .client import Client, StudioError, address
from .studio import connect
from .table import In, Node, Out, Shown
from .values import ADAPTER, DATASET, Adapters, Dataset, Use, single

Outputs = tuple[Any, ...]
SAMPLES = (host.NONE, "subject", "style")  # pictures that come along with the studio
METHODS = (
    "concat",
    "svd",
    "slerp",
    "orthogonal",
    "common",
    "tsv",
    "knots",
    "ties",
    "dare",
    "dare-ties",
    "della",
    "magnitude",
    "breadcrumbs",
)
MOST = 2**31 - 1


def text_in(name: str, default: str, tooltip: str, **options: Any) -> In:
    return In(name, "STRING", tooltip, options={"default": default, **options})


def whole_in(name: str, default: int, low: int, high: int, tooltip: str) -> In:
    return In(name, "INT", tooltip, options={"default": default, "min": low, "max": high})


def choice_in(name: str, default: str, choices: Callable[[], Sequence[str]], tooltip: str) -> In:
    return In(name, "COMBO", tooltip, choices, options={"default": default})


def flag_in(name: str, default: bool, tooltip: str) -> In:
    return In(name, "BOOLEAN", tooltip, options={"default": default})


# ---------------------------------------------------------------- Dataset


def dataset(node_id: str, *, name: str, trigger: str, folder: str, captions: str, images: Any = None, samples: str = host.NONE,
            **settings: str) -> Outputs:  # fmt: skip
    """Bring pictures to the studio: under a name with their fingerprint, so that the same ones are brought once."""
    client = connect()
    if samples != host.NONE and images is None and not folder.strip():
        found = client.post(address("api", "samples", samples))
        told = {**found["settings"], **say_settings(trigger, settings)}
        return Dataset(found["id"], told), found["pictures"]
    parts = parts_of(images, captions) if images is not None else parts_in(folder)
    title = name.strip() or "comfyui"
    made = f"{title}-{digest_of(parts)[:8]}"
    told = {"trigger": title, **say_settings(trigger, settings)}
    known = {one["id"]: one["pictures"] for one in client.get("/api/datasets")["data"]}
    if made in known:
        return Dataset(made, told), known[made]
    found = client.send("/api/datasets", [("files", name, partial(io.BytesIO, data)) for name, data in parts], name=made)
    if found["left_out"]:
        host.say(node_id, "; ".join(f"{one['name']}: {one['why']}" for one in found["left_out"][:5]))
    return Dataset(found["id"], told), found["pictures"]


def say_settings(trigger: str, settings: Mapping[str, str]) -> dict[str, str]:
    """What the node says of the pictures; what is left empty is not said."""
    return {name: text.strip() for name, text in {"trigger": trigger, **settings}.items() if text.strip()}


def parts_of(images: Any, captions: str) -> list[tuple[str, bytes]]:
    """Pictures of the workflow as files, each with its line of the captions. Raises ValueError for too many lines."""
    found = [(f"{number:04}.png", data) for number, data in enumerate(pictures.to_pngs(images), 1)]
    lines = captions.strip().splitlines() if captions.strip() else []
    if len(lines) > len(found):
        raise ValueError(f"there are {len(lines)} lines of captions for {len(found)} pictures")
    return found + [(f"{number:04}.txt", line.strip().encode()) for number, line in enumerate(lines, 1) if line.strip()]


def parts_in(folder: str) -> list[tuple[str, bytes]]:
    """The files of a folder. Raises ValueError."""
    if not folder.strip():
        raise ValueError("connect images, name a folder, or choose sample pictures")
    root = host.input_folder(folder.strip())
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in pictures.files_in(root)]


def digest_of(parts: Sequence[tuple[str, bytes]]) -> str:
    """A fingerprint of files."""
    found = hashlib.sha256()
    for name, data in parts:
        found.update(f"{name}|{len(data)}\n".encode() + data)
    return found.hexdigest()


def dataset_fingerprint(folder: Any = "", **_: Any) -> str:
    """That of the folder."""
    root = host.input_folder(folder.strip()) if isinstance(folder, str) and folder.strip() else None
    return host.stamp(pictures.files_in(root)) if root and root.is_dir() else ""


# ---------------------------------------------------------------- Train


def train(node_id: str, *, dataset: Dataset, base: str, steps: int, rank: int, seed: int, settings: str, free_memory: bool = True,
          model: Any = None, clip: Any = None) -> Outputs:  # fmt: skip
    """Train, and put what came of it on MODEL and CLIP."""
    client = connect()
    told = {**dataset.settings, "folder": dataset.id, "base": host.base_path(base), "seed": seed}
    told |= {name: value for name, value in {"steps": steps, "rank": rank}.items() if value}
    told |= read_settings(settings)
    if free_memory and client.is_here:
        host.make_room()
    job = training.wait(client, training.queue(client, "train", told), node_id)
    one = training.use_of(client, job)
    host.say(node_id, f"{one.name}: {line_about(client, one)}")
    done = apply((one,), model, clip, None, 1) if model is not None or clip is not None else None
    samples = pictures.as_images(training.last_samples(client, job))
    return (one,), done and done.model, done and done.clip, one.path, samples


def read_settings(text: str) -> dict[str, Any]:
    """Further settings, one a line: `lr = 0.0005`. Values are JSON; what is none is text. Raises ValueError."""
    found = {}
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        name, equals, value = (piece.strip() for piece in line.partition("="))
        if not (name and equals):
            raise ValueError(f"{line!r} is no setting; write NAME = VALUE, such as lr = 0.0005")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def line_about(client: Client, one: Use) -> str:
    """What an adapter is, in a line."""
    told = client.get(address("api", "adapters", one.id))
    ranks = "-".join(map(str, sorted({told["ranks"][0], told["ranks"][-1]}))) if told["ranks"] else ""
    trigger = f", trigger {told['trigger']}" if told["trigger"] else ""
    return f"{told['kind']} for {told['family']}{f', rank {ranks}' if ranks else ''}{trigger}, {told['bytes'] / 2**20:.1f} MB"


# ---------------------------------------------------------------- Load, Stack


def load(node_id: str, *, file: str, strength: str, steps: int, adapter: Adapters | None = None, model: Any = None,
         clip: Any = None, hooks: Any = None) -> Outputs:  # fmt: skip
    """Put adapters on MODEL and CLIP: those that are connected, or a file."""
    if adapter and file != host.NONE:
        raise ValueError("an adapter is connected and a file is chosen; set the file to none")
    if not adapter and file == host.NONE:
        raise ValueError("connect an adapter, or choose a file")
    uses = tuple(stronger(one, strength) for one in adapter) if adapter else (Use(host.lora_path(file), strength.strip() or "1"),)
    done = apply(uses, model, clip, hooks, steps)
    text = "\n".join(done.lines)
    host.say(node_id, text)
    return done.model, done.clip, done.hooks, uses, text


def stronger(one: Use, strength: str) -> Use:
    """An adapter at another strength: what is said here goes before what a stack says, where anything is."""
    return one if strength.strip() in ("", "1", "1.0") else Use(one.path, strength.strip(), one.id)


def load_fingerprint(file: Any = host.NONE, **_: Any) -> str:
    """That of the file."""
    return host.stamp([Path(host.lora_path(file))]) if isinstance(file, str) and file != host.NONE else ""


def stack(node_id: str, *, adapter: Adapters, strength: str, stack: Adapters = ()) -> Outputs:
    """Adapters that are used together, each at its strength."""
    read_strength(strength)
    return ((*stack, *(stronger(one, strength) for one in adapter)),)


# ---------------------------------------------------------------- Merge, Resize, Doctor, Save


def merge(node_id: str, *, adapter: Adapters, name: str, method: str, rank: int, settings: str) -> Outputs:
    """One adapter of several."""
    client = connect()
    told = {"files": [f"{known(client, one)}:{one.strength}" for one in adapter], "method": method}
    return make(client, "merge", told | ({"rank": rank} if rank else {}) | read_settings(settings), name or "merged", node_id)


def resize(node_id: str, *, adapter: Adapters, name: str, rank: int, settings: str) -> Outputs:
    """An adapter of a smaller rank."""
    client, one = connect(), single(adapter, "Resize")
    told = {"file": f"{known(client, one)}:{one.strength}"} | ({"rank": rank} if rank else {})
    return make(client, "resize", told | read_settings(settings), name or f"{one.name}-rank{rank}", node_id)


def make(client: Client, kind: str, settings: Mapping[str, Any], name: str, node_id: str) -> Outputs:
    """What a job that writes an adapter makes."""
    one = training.use_of(client, training.wait(client, training.queue(client, kind, settings, name.strip()), node_id))
    text = f"{one.name}: {line_about(client, one)}"
    host.say(node_id, text)
    return (one,), text


def known(client: Client, one: Use) -> str:
    """The studio's id of an adapter."""
    return one.id or client.find_adapter(one.path)


def doctor(node_id: str, *, adapter: Adapters) -> Shown:
    """What is right and wrong with adapters, as text and as a picture."""
    client = connect()
    told = {"files": [f"{known(client, one)}:{one.strength}" for one in adapter]}
    job = training.wait(client, training.queue(client, "doctor", told), node_id)
    at = address("api", "jobs", job["id"])
    picture = job["files"].get("picture")
    text = printed(client.read(f"{at}/log").decode(errors="replace"), (job["result"] or {}).get("picture"))
    images = pictures.as_images([pictures.open_picture(client.read(picture))] if picture else [])
    return Shown((text, images), {"text": [text]})


def printed(log: str, picture: str | None) -> str:
    """What a job's last attempt printed, without the line that names its picture.

    >>> printed("--- attempt 1, today\\nsound\\n/ws/doctor.png\\n", "/ws/doctor.png")
    'sound'
    """
    lines = log.rpartition("--- attempt ")[2].splitlines()[1:]
    return "\n".join(line for line in lines if line != picture).strip()


def save(node_id: str, *, adapter: Adapters, name: str, replace: bool = False) -> Outputs:
    """Keep an adapter where ComfyUI looks for them, with its preview and what other UIs read beside it."""
    client, one, folder = connect(), single(adapter, "Save"), host.lora_folder()
    title = name.strip().removesuffix(".safetensors") or one.name
    if Path(title).name != title:
        raise ValueError(f"{title} is no file name; subfolders are not made")
    target = folder / f"{title}.safetensors"
    is_there = target.exists() and filecmp.cmp(target, one.path, shallow=False)
    if target.exists() and not is_there and not replace:
        raise ValueError(f"{target} is another adapter; give it another name, or set replace")
    if not is_there:  # else nothing is written, so that what Load knows of it stays true
        shutil.copyfile(one.path, part := target.with_name(f".{target.name}.part"))
        part.replace(target)
    for ending in (".png", ".json"):
        beside(client, one, ending, target.with_suffix(ending))
    host.say(node_id, f"saved {target}")
    return str(target), f"{title}.safetensors"


def beside(client: Client, one: Use, ending: str, target: Path) -> None:
    """Bring what lies beside an adapter: its preview, and how image UIs use it."""
    if (file := Path(one.path).with_suffix(ending)).is_file():
        shutil.copyfile(file, target)
    elif ending == ".png" and one.id:
        try:
            client.fetch(f"{address('api', 'adapters', one.id)}/preview", target)
        except StudioError as error:
            if error.code != "not_found":  # many have none
                raise


def save_fingerprint(name: Any = "", **_: Any) -> str:
    """Whether a file of this name is there: what somebody has deleted is saved again."""
    title = name.strip().removesuffix(".safetensors") if isinstance(name, str) else ""
    return "there" if title and (host.lora_folder() / f"{title}.safetensors").exists() else ""


# ---------------------------------------------------------------- the table

ADAPTERS = In("adapter", ADAPTER, "an adapter, or several of a Stack")
STRENGTH = text_in(
    "strength", "1", "0.8; unet=0.8:te=0.5; by block 0.8:lbw=OUTD; by layer *attn2*=0.5; by step 0@0,1@0.5 or start=5:stop=10"
)
SETTINGS = text_in("settings", "", "further settings of the studio, one a line: NAME = VALUE", multiline=True)
NAME = text_in("name", "", "what the new adapter is called; empty: by what it is made of")
RESULT = (Out("adapter", ADAPTER), Out("text", "STRING"))

NODES = (
    Node("Dataset", "Dataset (personalize)", "Pictures to train on: of the workflow, of a folder, or those that come along. "
         "The same ones are brought to it once.",
         (text_in("name", "comfyui", "what the pictures are called in the studio"),
          text_in("trigger", "", "the word that shall call up what is learned; empty: the name"),
          text_in("class", "", "what it is, such as dog, if it is one thing; empty: found out, or a style"),
          text_in("folder", "", "a folder of pictures with NAME.txt captions: a whole path, or one below ComfyUI's folder input"),
          text_in("captions", "", "a line for each connected picture; empty lines: made of trigger and class", multiline=True),
          choice_in("samples", host.NONE, lambda: SAMPLES, "pictures that come along with the studio"),
          In("images", "IMAGE", "pictures of the workflow; they go before the folder", optional=True)),
         (Out("dataset", DATASET), Out("pictures", "INT")), dataset, dataset_fingerprint),
    Node("Train", "Train adapter", "Trains an adapter in the studio, with progress and samples. "
         "Cancel ends it, and the same settings go on with it.",
         (In("dataset", DATASET),
          choice_in("base", host.POCKET, host.bases, "what is trained on: pocket comes along"),
          whole_in("steps", 0, 0, 1_000_000, "0: what suits the base and the pictures"),
          whole_in("rank", 0, 0, 1024, "0: the usual"), whole_in("seed", 0, 0, MOST, "the same seed, the same adapter"),
          text_in("settings", "", "any setting of a training, one a line: lr = 0.0005, preset = low-memory", multiline=True),
          flag_in("free_memory", True, "take ComfyUI's models off the card first"),
          In("model", "MODEL", "the adapter is put on it", optional=True), In("clip", "CLIP", "and on this", optional=True)),
         (Out("adapter", ADAPTER), Out("model", "MODEL"), Out("clip", "CLIP"), Out("file", "STRING"), Out("samples",
          "IMAGE")), train),
    Node("Load", "Load adapter", "Puts adapters on MODEL and CLIP: by part, by block, and step by step as a hook, "
         "which the CLIP carries along.",
         (choice_in("file", host.NONE, host.loras, "an adapter of models/loras"), STRENGTH,
          whole_in("steps", 20, 1, 10_000, "of the sampler; curves and windows count in them"),
          In("adapter", ADAPTER, "instead of a file", optional=True), In("model", "MODEL", optional=True),
          In("clip", "CLIP", optional=True), In("hooks", "HOOKS", "further ones, that go along", optional=True)),
         (Out("model", "MODEL"), Out("clip", "CLIP"), Out("hooks", "HOOKS"), Out("adapter", ADAPTER), Out("text", "STRING")),
         load, load_fingerprint),
    Node("Stack", "Stack adapters", "Adapters that are used together, each at its own strength.",
         (ADAPTERS, STRENGTH, In("stack", ADAPTER, "what it is put on top of", optional=True)), (Out("stack", ADAPTER),), stack),
    Node("Merge", "Merge adapters", "One adapter of a stack, whatever their kinds and ranks.",
         (ADAPTERS, NAME, choice_in("method", "concat", lambda: METHODS, "concat is exact, and ranks add up"),
          whole_in("rank", 0, 0, 1024, "of the result; 0: as the method has it"), SETTINGS), RESULT, merge),
    Node("Resize", "Resize adapter", "The same adapter with a smaller rank, and what that loses.",
         (ADAPTERS, NAME, whole_in("rank", 8, 0, 1024, "0: by a setting, such as sv_fro = 0.95"), SETTINGS), RESULT, resize),
    Node("Doctor", "Adapter doctor", "What is right and wrong with adapters, how strong they are, and whether they collide.",
         (ADAPTERS,), (Out("text", "STRING"), Out("picture", "IMAGE")), doctor, is_output=True),
    Node("Save", "Save adapter", "Keeps an adapter in models/loras, with its preview.",
         (ADAPTERS, text_in("name", "", "the file's name; empty: as it is called"),
          flag_in("replace", False, "also where another one is called so")),
         (Out("path", "STRING"), Out("file", "STRING")), save, save_fingerprint, is_output=True),
)  # fmt: skip
