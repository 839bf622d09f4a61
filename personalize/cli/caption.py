"""`personalize caption`: captions written by a model, beside the pictures of a folder that have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError
from .listening import report
from .messages import answer, print_warning
from .train import SettingsCommand
from .values import PATH

if TYPE_CHECKING:
    from ..captioning.caption import Caption, Skip, Wording, Work
    from ..captioning.captioner import Manner
    from ..recipe.fields import Data
    from ..recipe.settings import Setting
    from .view import View

SETTINGS = ("trigger", "class")  # those of the recipe that matter here
BATCH = 4  # pictures at a time


class CaptionCommand(SettingsCommand):
    """A command with an option for the settings of the recipe that say what a folder's pictures are called."""

    def has_option(self, setting: Setting) -> bool:
        return setting.name in SETTINGS


@click.command(cls=CaptionCommand, short_help="Write captions beside the pictures that have none.")
@click.argument("folder", type=PATH)
@click.option("--with", "model", default="pocket", show_default=True, metavar="CAPTIONER",
              help="what writes them: 'pocket' (drawings of its own world), a folder or hub id of an image-to-text model of "
                   "transformers (BLIP, GIT, BLIP-2, Florence-2, LLaVA, ...), or of a tagger (WD, or a classifier)")  # fmt: skip
@click.option("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
@click.option("--overwrite", is_flag=True, help="also write those that there are anew")
@click.option("--dry-run", is_flag=True, help="print what would be written, and write nothing")
@click.option("--prefix", default="{trigger}", show_default=True, metavar="TEXT",
              help="what every caption begins with; {trigger} and {class} are filled in, [trigger] is left for training to "
                   "fill in, '' for nothing")  # fmt: skip
@click.option("--without", multiple=True, metavar="TAGS", help="tags that are left out, such as '1girl,solo'; can be repeated")
@click.option("--max-words", type=click.IntRange(1), help="most words behind the prefix; tags stay whole")
@click.option("--prompt", metavar="TEXT", help="what an image-to-text model is asked, or how its sentence begins")
@click.option("--threshold", type=click.FloatRange(0, 1), show_default="0.35 for tags, 0.7 for pocket",
              help="how likely a tag must be, or a phrase of pocket's")  # fmt: skip
@click.option("--character-threshold", type=click.FloatRange(0, 1), show_default="0.85",
              help="how likely a WD tagger's names of characters must be")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=BATCH, show_default=True, help="pictures at a time")
@click.option("--device", metavar="auto|cpu|cuda", show_default="auto", help="where a tagger or an image-to-text model computes")
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), show_default="auto",
              help="of an image-to-text model (auto: bfloat16 on a GPU that has it)")  # fmt: skip
def caption(folder: Path, model: str, batch_size: int, dry_run: bool, overwrite: bool, **options: Any) -> int:
    """Write a caption beside every picture in FOLDER that has none: NAME.txt, which training reads.

    What was written stays: the same command goes on where it was stopped.
    """
    from ..captioning.caption import find_work
    from ..captioning.find import find_captioner
    from .view import View, terminal

    data, wording, manner = order_of(folder, options)
    work = find_work(data, overwrite, write=not dry_run)
    row, place = find_captioner(model, options["revision"])
    manner = row.fill(manner)
    told = Told(folder, work)
    with View(terminal(), "", f"loading {model}") as view:
        report({}, 0, len(work.todo), view.doing)
        if work.todo:
            follow(view, told, row.open(place, manner), wording, batch_size, write=not dry_run)
    return told.finish(view, dry_run, model)


def order_of(folder: Path, options: dict[str, Any]) -> tuple[Data, Wording, Manner]:
    """What the command asks for, checked as far as it can be without the model. Raises RecipeError."""
    from ..captioning.caption import Wording
    from ..captioning.captioner import Manner
    from ..data.dataset import Concept
    from ..recipe.fields import Data

    data = Data(folder=folder, **{name: value for name in SETTINGS if (value := options.get(name)) is not None})
    without = tuple(tag.strip() for text in options["without"] for tag in text.split(",") if tag.strip())
    manner = Manner(**{name: options[name] for name in ("prompt", "threshold", "character_threshold", "device", "precision")})
    wording = Wording(options["prefix"], without, options["max_words"])
    wording.first(Concept(""))
    return data, wording, manner


def check_caption(values: dict[str, Any]) -> None:
    """Raise what is wrong with the settings of a job; a captioner of the hub may be downloaded when it begins."""
    from ..captioning.caption import find_work
    from ..captioning.find import cached_snapshot, find_captioner
    from ..models.sources import is_hub_id

    data, _, manner = order_of(values["folder"], values)
    find_work(data, values["overwrite"])
    name, revision = values["model"], values["revision"]
    if not is_hub_id(name) or cached_snapshot(name, revision):
        find_captioner(name, revision, download=False)[0].fill(manner)


def follow(view: View, told: Told, say: Any, wording: Wording, batch: int, write: bool) -> None:
    """Caption, and show it as it happens."""
    from ..captioning.caption import write_captions

    todo = told.work.todo
    view.begin("captioning")
    bar = view.bar.add_task(view.doing, total=len(todo))
    if view.console.is_terminal:
        view.bar.start()
    for done, event in enumerate(write_captions(todo, say, wording, batch, write), 1):
        record = told.add(event)
        view.print(told.line(event))
        view.bar.update(bar, completed=done)
        report(record, done, len(todo), "captioning")


class Told:
    """What became of the pictures so far."""

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work = folder, work
        self.captions = list[dict[str, Any]]()
        self.left_out = [{"picture": self.name(path), "why": why} for path, why in work.left_out]

    def name(self, path: Path) -> str:
        from ..captioning.caption import printable

        return printable(path, self.folder)

    def add(self, event: Caption | Skip) -> dict[str, Any]:
        """Keep what happened; returns it as a record."""
        from ..captioning.caption import Skip

        if isinstance(event, Skip):
            self.left_out.append({"picture": self.name(event.path), "why": event.why})
            return {"event": "left_out", **self.left_out[-1]}
        self.captions.append({"picture": self.name(event.path), "caption": event.text, "file": event.file})
        return {"event": "caption", "picture": self.name(event.path), "caption": event.text}

    def line(self, event: Caption | Skip) -> str:
        """What happened, for a person."""
        from ..captioning.caption import Skip

        if isinstance(event, Skip):
            return f"{self.name(event.path)}  left out: {event.why}"
        return f"{self.name(event.path)}  {event.text or '(nothing is clear: no caption)'}"

    def finish(self, view: View, dry_run: bool, model: str) -> int:
        """Say how it ended; returns the exit code. Raises DataError where no picture could be read."""
        from ..captioning.find import DEFAULT, EXAMPLE

        said = sum(bool(one["caption"]) for one in self.captions)
        unclear, kept, total = len(self.captions) - said, self.work.kept, len(self.work.todo)
        answer(captions=self.captions, written=0 if dry_run else said, unclear=unclear, kept=kept, left_out=self.left_out,
               captioner=model, dry_run=dry_run)  # fmt: skip
        for path, why in self.work.left_out:
            print_warning(f"left out {self.name(path)}: {why}")
        parts = [f"{said} caption{'s' * (said != 1)} {'would be ' * dry_run}written"]
        parts += [f"{kept} kept as they were (--overwrite writes them anew)"] * bool(kept)
        parts += [f"{len(self.left_out)} left out"] * bool(self.left_out) + [f"{unclear} unclear"] * bool(unclear)
        view.print(", ".join(parts))
        if unclear and model == DEFAULT:
            what = f"{DEFAULT} knows drawings of its own world alone: for photographs, --with names another captioner"
            print_warning(f"{what}, such as {EXAMPLE}")
        if total and not self.captions:
            why = "; ".join(f"{one['picture']}: {one['why']}" for one in self.left_out[:3])
            raise DataError(f"none of the {total} pictures in {self.folder} can be read", why)
        return 0
