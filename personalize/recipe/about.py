"""What a preset is for, why it is as it is, and what it sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .resolve import load_preset


def about(path: Path) -> list[str]:
    """The paragraphs of the comment that a preset begins with; at least one, perhaps empty."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return [" ".join(paragraph.split("\n")) for paragraph in "\n".join(comment).split("\n\n")]


def settings_of(path: Path) -> dict[str, Any]:
    """What a preset sets, with what the presets behind it set; for folders of many pictures too, under [pictures.N]."""
    found: dict[str, Any] = {}
    for origin, layer in load_preset(path, pictures=10**9):
        number = origin.partition(" [")[2].rstrip("]")
        found |= {f"{number}.{key}" if number else key: value for key, value in layer.items()}
    return found
