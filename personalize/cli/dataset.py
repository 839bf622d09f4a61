"""`personalize dataset`: what is in a folder of pictures, and what is wrong with it, before training on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..pictures.galleries import check_output
from .messages import answer, echo
from .train import SettingsCommand, resolve_recipe
from .values import PATH

if TYPE_CHECKING:
    from ..recipe.settings import Setting

ALSO = ("base", "vae", "preset", "prior", "mask_outside")  # settings of other sections that matter here


class DatasetCommand(SettingsCommand):
    """A command with an option for each setting of the recipe that says how pictures are read."""

    def has_option(self, setting: Setting) -> bool:
        return setting.name in ALSO or (setting.section == "data" and setting.name != "folder")


@click.command(cls=DatasetCommand, short_help="Check a folder of pictures before training on it.")
@click.argument("folder", type=PATH)
@click.option("--sheet", "sheet_path", type=PATH, metavar="OUT.png", help="write a contact sheet")
@click.option("--html", "html_path", type=PATH, metavar="OUT.html", help="write everything as one page")
@click.option("--quick", is_flag=True, help="leave out what the base makes of the pictures: it is not loaded")
def dataset(folder: Path, sheet_path: Path | None, html_path: Path | None, quick: bool, **flags: Any) -> int:
    """Check the pictures in FOLDER: their sizes and captions, what is wrong, and what to do about it.

    What the base's autoencoder makes of some of them is shown with --html, and beside --sheet; no base is downloaded for it.

    The settings are those of `train`; they change how the pictures are judged, never the pictures.
    """
    from ..findings import worst_first
    from ..reports import dataset as report

    if sheet_path:
        check_output(folder, sheet_path)
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    recipe, taken_for = resolve_recipe(folder, None, flags)
    stats = report.measure_dataset(recipe, given)
    view = None if quick else report.look_at_base(stats)
    findings = worst_first([*report.find_problems(stats), *(view.findings if view else ())])
    if taken_for:
        echo(taken_for)
    echo(report.as_text(stats, findings, view))
    answer(**json.loads(report.as_json(stats, findings, view)), taken_for=taken_for, sheet=sheet_path, html=html_path)
    answer(autoencoder_sheet=None)
    written = [report.write_sheet(stats, findings, sheet_path)] if sheet_path else []
    if sheet_path and view and view.reconstruction:
        written.append(beside := report.write_reconstruction(view.reconstruction, sheet_path))
        answer(autoencoder_sheet=beside)
    if html_path:
        written.append(report.write_page(stats, findings, html_path, view))
    for path in written:
        echo(f"written  {path}")
    return 0
