"""`personalize presets`: the partial recipes that came along, each with what it is for and why it is as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .messages import answer, echo


@click.command(short_help="List and explain the presets.")
@click.argument("name", required=False)
def presets(name: str | None) -> int:
    """List the presets, or explain the one called NAME: what it is for, why it is as it is, and what it sets.

    A path to a .toml file of your own works too, here and with --preset.
    """
    from ..recipe.resolve import find_preset
    from ..recipe.resolve import presets as every_preset

    if name is None:
        rows = {one: about(path)[0] for one, path in every_preset().items()}
        for one, what in rows.items():
            echo(f"{one:<{max(map(len, rows)) + 2}}{what}")
        echo("\nexplained by `personalize presets NAME`, used by `personalize train FOLDER --preset NAME`")
        answer(presets=[{"name": one, "about": what} for one, what in rows.items()])
        return 0
    path = find_preset(name)
    settings = settings_of(path)
    echo("\n\n".join(about(path)) + "\n")
    for key, value in settings.items():
        echo(f"{key} = {value}")
    answer(presets=[{"name": name, "about": "\n\n".join(about(path)), "settings": settings}])
    return 0


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
    from ..recipe.resolve import load_preset

    found: dict[str, Any] = {}
    for origin, layer in load_preset(path, pictures=10**9):
        number = origin.partition(" [")[2].rstrip("]")
        found |= {f"{number}.{key}" if number else key: value for key, value in layer.items()}
    return found
