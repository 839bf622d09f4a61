"""CLIP's tokenizer. Single-file checkpoints hold none, so its merges (OpenAI, MIT licence) came along: nothing to download."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import Any

from ..errors import BaseModelError
from ..text import first_line

MERGES = Path(__file__).with_name("clip_merges.txt.gz")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder. Raises BaseModelError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{folder} cannot be loaded: {first_line(error)}", "is the download complete?") from error


def clip_tokenizer(pad: str = END) -> Any:
    """The tokenizer of CLIP and OpenCLIP, 49,408 tokens (Radford et al. 2021); the latter pad with `!`."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=77, pad_token=pad)


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Token => id, and the merges, which are the same for every checkpoint."""
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[:-1]]
    letters = list(byte_letters().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_letters() -> dict[int, str]:
    """Byte => the letter that stands for it in byte-level BPE (GPT-2): printable ones are themselves, and come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
