"""`personalize presets`: the partial recipes that came along, each with what it is for and why it is as it is."""

from __future__ import annotations

import click

from .messages import answer, echo


@click.command(short_help="List and explain the presets.")
@click.argument("name", required=False)
def presets(name: str | None) -> int:
    """List the presets, or explain the one called NAME: what it is for, why it is as it is, and what it sets.

    A path to a .toml file of your own works too, here and with --preset.
    """
    from ..recipe.about import about, settings_of
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
