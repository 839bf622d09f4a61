"""A content-addressed cache of tensors on disk: what is found there is exactly what computing it again would give."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError
from ..io import atomic
from ..lock import wait_for

PATIENCE = 60.0  # seconds for one picture or caption of another process


def cache_folder() -> Path:
    """$PERSONALIZE_CACHE, else ~/.cache/personalize (a temporary folder for users without a home)."""
    if chosen := os.environ.get("PERSONALIZE_CACHE"):
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".cache" / "personalize"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "personalize"


def key(**parts: object) -> str:
    """sha256 of everything that decides a value, given as plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recall(name: str, compute: Callable[[], dict[str, Tensor]], warnings: list[str]) -> dict[str, Tensor]:
    """The tensors stored under a key, or else computed and stored.

    What another process is computing is waited for, though not for ever: to compute it twice does no harm. A damaged file is
    computed again and a folder that cannot be written is done without. Each of these appends one warning.
    """
    path = cache_folder() / name[:2] / f"{name}.safetensors"
    if (found := _find(path, warnings)) is not None:
        return found
    with wait_for(path.with_suffix(".lock"), PATIENCE) as holder:
        if holder:
            _warn(warnings, f"waited for what another run puts into the cache ({holder})")
        found = _find(path, warnings)
        return _compute(path, compute, warnings) if found is None else found


def _find(path: Path, warnings: list[str]) -> dict[str, Tensor] | None:
    """What a file holds; None if it is not there, or damaged."""
    try:
        return _read(path) if path.is_file() else None
    except (OSError, SafetensorError, ValueError) as error:
        _warn(warnings, f"the cache file {path} is damaged and was made anew ({error})")
        return None


def _compute(path: Path, compute: Callable[[], dict[str, Tensor]], warnings: list[str]) -> dict[str, Tensor]:
    """Compute tensors and store them."""
    tensors = {part: tensor.detach().cpu().contiguous() for part, tensor in compute().items()}
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, {"sha256": fingerprint(tensors)})
    except (OutputError, SafetensorError, OSError) as error:
        why = getattr(error.__cause__, "strerror", None) or error
        _warn(warnings, f"nothing is cached: {cache_folder()} cannot be written ({why})")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        checksum = (file.metadata() or {}).get("sha256")
    if fingerprint(tensors) != checksum:
        raise ValueError("its checksum differs")
    return tensors


def _warn(warnings: list[str], text: str) -> None:
    if text not in warnings:
        warnings.append(text)
