"""`personalize dataset`: what is in a folder of pictures, and what is wrong with it, before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..pictures.galleries import check_output
from .train import SettingsCommand, resolve_recipe
from .values import PATH

if TYPE_CHECKING:
    from ..recipe.settings import Setting

ALSO = ("base", "preset", "mask_outside")  # settings of other sections that matter here


class DatasetCommand(SettingsCommand):
    """A command with an option for each setting of the recipe that says how pictures are read."""

    def has_option(self, setting: Setting) -> bool:
        return setting.name in ALSO or (setting.section == "data" and setting.name != "folder")


@click.command(cls=DatasetCommand, short_help="Check a folder of pictures before training on it.")
@click.argument("folder", type=PATH)
@click.option("--sheet", "sheet_path", type=PATH, metavar="OUT.png", help="write a contact sheet")
@click.option("--html", "html_path", type=PATH, metavar="OUT.html", help="write everything as one page")
@click.option("--json", "for_programs", is_flag=True, help="everything as JSON, for a program")
def dataset(folder: Path, sheet_path: Path | None, html_path: Path | None, for_programs: bool, **flags: Any) -> int:
    """Check the pictures in FOLDER: their sizes and captions, what is wrong, and what to do about it.

    The settings are those of `train`; they change how the pictures are judged, never the pictures.
    """
    from ..reports import dataset as report

    if sheet_path:
        check_output(folder, sheet_path)
    stats = report.measure_dataset(resolve_recipe(folder, None, flags))
    findings = report.find_problems(stats)
    click.echo((report.as_json if for_programs else report.as_text)(stats, findings))
    for path, write in ((sheet_path, report.write_sheet), (html_path, report.write_page)):
        if path:
            click.echo(f"written  {write(stats, findings, path)}", err=for_programs)
    return 0
