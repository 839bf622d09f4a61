"""`personalize dataset`: what a folder of pictures is like before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .values import PATH

ALSO = ("base", "preset", "mask_outside")  # settings of other sections that matter here


class DataCommand(click.Command):
    """A command with an option for each setting of the recipe that says how pictures are read."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from ..recipe.settings import settings
        from . import option

        wanted = [one for one in settings().values() if one.name in ALSO or (one.section == "data" and one.name != "folder")]
        known = {parameter.name for parameter in self.params}
        self.params += [option(setting) for setting in wanted if setting.name not in known]
        return super().get_params(ctx)


@click.command(cls=DataCommand, short_help="Look at a folder of pictures before training on it.")
@click.argument("folder", type=PATH)
@click.option("--sheet", "sheet_path", type=PATH, metavar="OUT.png", help="write a contact sheet")
@click.option("--html", "html_path", type=PATH, metavar="OUT.html", help="write everything as one page")
@click.option("--json", "for_programs", is_flag=True, help="everything as JSON, for a program")
def dataset(folder: Path, sheet_path: Path | None, html_path: Path | None, for_programs: bool, **flags: Any) -> int:
    """Tell what the pictures in FOLDER are like, and what to do about what is wrong with them.

    The settings are those of `train`, and change nothing here but what would be found. No picture is touched.
    """
    from ..reports import dataset as report
    from . import resolved

    stats = report.measure_dataset(resolved(folder, None, flags))
    found = report.find_problems(stats)
    click.echo((report.as_json if for_programs else report.as_text)(stats, found))
    written = [(path, write) for path, write in ((sheet_path, report.write_sheet), (html_path, report.write_page)) if path]
    for path, write in written:
        click.echo(f"written  {write(stats, found, path)}", err=for_programs)
    return 0
