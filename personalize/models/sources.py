"""Where a base is: one that came along, a diffusers folder, a single .safetensors file, or a repository of the Hugging Face hub.

What is on this machine is never asked for again; only a hub id that is not in the cache yet is downloaded, safetensors alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import BaseModelError
from ..families.names import DENOISERS, FAMILIES, PARTS, TEXT_PARTS
from ..formats.header import PICKLES
from ..text import first_line

NAMED = {"pocket": Path(__file__).parents[1] / "pocket" / "weights"}  # bases that came along
CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
TEXTS = {part: part.replace("text_encoder", "tokenizer") for part in TEXT_PARTS}  # text encoder => its tokenizer's folder
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/(?P<file>.+\.safetensors))?")


def locate(name: str | Path, download: bool = True) -> Path:
    """The folder or .safetensors file that a base's name stands for; a hub id that is not cached is downloaded, if it may be.

    Raises BaseModelError for pickles, for other files, and for names that are nothing.
    """
    path = NAMED.get(str(name), Path(name).expanduser())
    if path.is_dir():
        return path
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(
            f"{name} is a pickle, which can run code when opened", "take the .safetensors of the same model, sites offer both"
        )
    if path.is_file():
        if path.suffix.lower() == ".safetensors":
            return path
        raise BaseModelError(f"{name} is no base", "give a diffusers folder or a .safetensors checkpoint")
    if str(name) in NAMED:
        raise BaseModelError(f"the weights of {name} are missing: there is no folder {path}", "reinstall, or name another --base")
    if is_hub_id(str(name)):
        return from_hub(str(name), download)
    raise BaseModelError(
        f"there is no base called {name}: no such folder or file",
        f"choose from {', '.join(NAMED)}, or give a diffusers folder, a .safetensors checkpoint or a hub id such as OWNER/NAME",
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub: OWNER/NAME or OWNER/NAME/FILE.safetensors, and nothing of this machine."""
    path = Path(name).expanduser()
    return bool(HUB_ID.fullmatch(name)) and not path.exists() and not path.parent.is_dir()


def from_hub(name: str, download: bool = True) -> Path:
    """The folder (or, for OWNER/NAME/FILE.safetensors, the file) of a hub repository in the cache, downloaded if need be."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download, try_to_load_from_cache

    repo, file = "/".join(name.split("/")[:2]), HUB_ID.fullmatch(name)["file"]  # type: ignore[index]
    probes = (try_to_load_from_cache(repo, name) for name in ([file] if file else [f"{one}/{CONFIG}" for one in DENOISERS]))
    found = next((probe for probe in probes if isinstance(probe, str)), None)
    if found and (file or is_whole(Path(found).parents[1])):
        return Path(found) if file else Path(found).parents[1]
    with hub_errors(name, download):
        if file:
            return Path(hf_hub_download(repo, file))
        return Path(snapshot_download(repo, allow_patterns=files_to_download(list_repo_files(repo))))


@contextlib.contextmanager
def hub_errors(name: str, download: bool = True) -> Iterator[None]:
    """Around a download: raises BaseModelError where there is to be none, and for whatever goes wrong."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import logging

    if not download:
        raise BaseModelError(f"{name} is not in the cache")
    if constants.HF_HUB_OFFLINE:
        raise BaseModelError(f"{name} is not in the cache, and HF_HUB_OFFLINE is set", "unset it, or give a folder")
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, ValueError)  # OSError, and its HTTP library's root
    logging.set_verbosity_error()  # its retries say in many lines what we say in one
    try:
        yield
    except failures as error:
        why = first_line(error)
        raise BaseModelError(f"{name} cannot be had from the hub: {why}", "is the name right, and the network there?") from error


def is_whole(folder: Path) -> bool:
    """Whether a diffusers folder has all its parts, and weights in each: a download may have been interrupted."""
    parts = [denoiser_in(folder), "vae", *(part for part in TEXTS if (folder / part).is_dir())]
    return not missing(folder) and all(any((folder / part).glob("*.safetensors")) for part in parts)


def files_to_download(files: Iterable[str]) -> list[str]:
    """What to download of a repository: configs, tokenizers, and each part's safetensors once, in half precision if offered.

    >>> files_to_download(["unet/config.json", "unet/model.safetensors", "unet/model.fp16.safetensors", "unet/model.bin"])
    ['unet/config.json', 'unet/model.fp16.safetensors']
    """
    parts = {*PARTS, "vae", *TEXTS.values(), "scheduler"}
    inside = [file for file in files if file.split("/")[0] in parts]
    halves = {file.split("/")[0] for file in inside if ".fp16." in file}
    chosen = []
    for file in inside:
        part, weights = file.split("/")[0], ".safetensors" in file
        plain = fnmatch.fnmatch(file, "*.json") or fnmatch.fnmatch(file, "*.txt")
        if (weights and (".fp16." in file) == (part in halves)) or (plain and not weights and ".index." not in file):
            chosen.append(file)
    return chosen + [file for file in files if file == "model_index.json"]


def denoiser_in(folder: Path) -> str:
    """The part of a diffusers folder that denoises; that of most families, if there is none."""
    return next((part for part in DENOISERS if (folder / part).is_dir()), DENOISERS[0])


def missing(folder: Path) -> list[str]:
    """What a diffusers folder lacks, by file; tells nothing about weights."""
    texts = [text for text in TEXTS if (folder / text).is_dir()] or [FAMILIES[0].texts[0].part]
    needed = {
        denoiser_in(folder): CONFIG,
        "vae": CONFIG,
        "scheduler": SCHEDULER,
        **dict.fromkeys(texts, CONFIG),
        **{TEXTS[text]: "tokenizer_config.json" for text in texts},
    }
    return [f"{part}/{file}" for part, file in needed.items() if not (folder / part / file).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BaseModelError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read: {first_line(error)}") from error
