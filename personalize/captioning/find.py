"""Where a captioner is: `pocket`, a folder, or a repository of the Hugging Face hub; and of which kind it is.

What is on this machine is never asked for again. Pickles are not downloaded, and not opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import BaseModelError
from ..formats.header import PICKLES
from ..models.sources import CONFIG, NAMED, hub_errors, is_hub_id, read_json
from ..registry import table
from .captioner import Captioner
from .tagger import ONNX, TAGS

DEFAULT = "pocket"
EXAMPLE = "Salesforce/blip-image-captioning-large"  # a hub id that is an image-to-text model, for hints
SMALL = (".json", ".txt", ".model", ".jinja")  # endings of what models have beside their weights
WEIGHTS = ".safetensors"
REVISION = re.compile(r"[\w./-]+")


def find_captioner(name: str, revision: str | None = None, download: bool = True) -> tuple[Captioner, Path]:
    """The row and the folder of a captioner; a hub id that is not cached is downloaded, if it may be.

    Raises BaseModelError for a name that is nothing, and for a model of no known kind.
    """
    folder = locate_captioner(name, revision, download)
    for row in table("captioners").values():
        if row.recognise(folder):
            return row, folder
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise BaseModelError(f"{name} has only pickled weights ({pickles[0]})", "take one with .safetensors, or convert them")
    what = f"{name} is no captioner: no image-to-text model of transformers, no tagger"
    raise BaseModelError(what, f"a folder with {CONFIG}, or with {ONNX} and {TAGS}; or a hub id such as {EXAMPLE}")


def locate_captioner(name: str, revision: str | None = None, download: bool = True) -> Path:
    """The folder that a captioner's name stands for. Raises BaseModelError."""
    path = NAMED.get(name, Path(name).expanduser())
    if path.is_file() and path.suffix in (".onnx", WEIGHTS):
        path = path.parent
    if path.is_dir():
        return path
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(f"{name} is a pickle, which can run code when opened", "take a folder with .safetensors or .onnx")
    if is_hub_id(name):
        return from_hub(name, revision, download)
    hint = f"{DEFAULT}, a folder, or a hub id such as {EXAMPLE}"
    raise BaseModelError(f"there is no captioner called {name}: no such folder", hint)


def from_hub(name: str, revision: str | None = None, download: bool = True) -> Path:
    """The folder of a hub repository in the cache, downloaded if need be. Raises BaseModelError."""
    from huggingface_hub import list_repo_files, snapshot_download

    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise BaseModelError(f"there is no revision {revision!r}", "name a branch, a tag or a commit")
    if found := cached_snapshot(name, revision):
        return found
    with hub_errors(name, download):
        files = files_to_download(list_repo_files(name, revision=revision))
        if files:
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    raise BaseModelError(f"{name} has neither {WEIGHTS} nor {ONNX} with {TAGS}", "take another captioner: pickles are not opened")


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder of a repository whose captioner is in the cache as a whole; None for any other."""
    from huggingface_hub import try_to_load_from_cache

    probes = (try_to_load_from_cache(name, file, revision=revision) for file in (CONFIG, TAGS))
    folder = next((Path(probe).parent for probe in probes if isinstance(probe, str)), None)
    return folder if folder and has_weights(folder) else None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds all that is opened of a captioner: a download may have been interrupted."""
    index = folder / f"model{WEIGHTS}.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in set(read_json(index).get("weight_map", {}).values()))
    return any(folder.glob(f"*{WEIGHTS}")) or ((folder / ONNX).is_file() and (folder / TAGS).is_file())


def files_to_download(files: Iterable[str]) -> list[str]:
    """What to download of a repository: a tagger's two files, or safetensors with what lies beside them; [] for neither.

    >>> files_to_download(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
    ['config.json', 'model.safetensors']
    >>> files_to_download(["config.json", "model.onnx", "model.safetensors", "selected_tags.csv"])
    ['config.json', 'model.onnx', 'selected_tags.csv']
    """
    top = [file for file in files if "/" not in file]
    if {ONNX, TAGS} <= set(top):
        return [file for file in top if file in (CONFIG, ONNX, TAGS)]
    if not any(file.endswith(WEIGHTS) for file in top):
        return []
    return [file for file in top if file.endswith((WEIGHTS, *SMALL))]


def captioners_at_hand(folders: Iterable[Path] = ()) -> Iterator[str]:
    """Names of the captioners on this machine: what came along, below some folders, and in the hub's cache."""
    yield DEFAULT
    for folder in folders:
        for path in sorted([folder, *folder.glob("*"), *folder.glob("*/*")]):
            if path.is_dir() and is_captioner(path):
                yield str(path)
    yield from cached_captioners()


def cached_captioners() -> list[str]:
    """Hub ids of the captioners in the cache."""
    from huggingface_hub import constants

    found = (path.name.split("--")[1:] for path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")))
    names = ("/".join(parts) for parts in found if len(parts) == 2)
    return [name for name in names if (folder := cached_snapshot(name)) and is_captioner(folder)]


def is_captioner(folder: Path) -> bool:
    """Whether a folder holds a captioner's files; weights are not opened."""
    try:
        return has_weights(folder) and any(row.recognise(folder) for row in table("captioners").values())
    except BaseModelError:  # a config that cannot be read
        return False
