"""Comfy's IMAGE, a tensor [b, h, w, 3] of 0 to 1, from files and to files. Pillow and numpy are the host's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BESIDE = (".txt", ".jsonl")  # captions


def to_pngs(images: Any) -> list[bytes]:
    """Pictures as PNG files; the same pictures give the same bytes."""
    from PIL import Image

    found = []
    for one in images:
        array = (one.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
        Image.fromarray(array[..., :3]).save(out := io.BytesIO(), format="PNG", compress_level=1)
        found.append(out.getvalue())
    return found


def open_picture(data: bytes) -> Any:
    """A picture of Pillow's, in colour."""
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def as_images(pictures: Sequence[Any]) -> Any:
    """Pictures as one IMAGE; those of another size than the first are fitted to it. Without any, a black one."""
    import numpy
    import torch
    from PIL import Image

    if not pictures:
        return torch.zeros(1, 64, 64, 3)
    fitted = [one if one.size == pictures[0].size else one.resize(pictures[0].size, Image.Resampling.LANCZOS) for one in pictures]
    return torch.from_numpy(numpy.stack([numpy.asarray(one, dtype=numpy.float32) / 255 for one in fitted]))


def files_in(folder: Path) -> list[Path]:
    """The pictures of a folder and of those in it, with captions; nothing hidden. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name a whole path, or one below ComfyUI's folder input")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (*KINDS, *BESIDE)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not any(path.suffix.lower() in KINDS for path in found):
        raise ValueError(f"there is no picture in {folder}; the studio reads {', '.join(KINDS)}")
    return found
