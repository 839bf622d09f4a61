"""Every unseen subject and style: trained from its few pictures as a user would, then measured. What is finished is kept."""

from __future__ import annotations

import argparse
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from personalize.adapters.embedding import load_learned
from personalize.inference.sheet import contact_sheet
from personalize.io import write_text
from personalize.models.clip import Clip
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.recipe.settings import flatten
from personalize.training.events import Finished
from personalize.training.loop import train
from personalize.training.rundir import Run

from ..judge import Judge
from ..marks import Eyes
from ..world import render
from .drawing import Artist
from .figures import machine, markdown, publish, show_table
from .measuring import Drawn, details, draw, measure, summary
from .tasks import Task, tasks

SILENT = {"sample_every": 0, "sample_seeds": (), "checkpoint_every": 0, "choose": "none"}  # training alone


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--only", default="", help="names with commas, e.g. 'scarf cat,stained glass'; 'subjects', 'styles'")
    parser.add_argument("-n", "--pictures", type=int, default=35, help="pictures per figure and task")
    parser.add_argument("--preset", action="append", default=[], metavar="KIND=PRESET", help="default: KIND=pocket-KIND")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe, e.g. lr=2e-3")
    parser.add_argument("--steps", type=int, help="short for --set steps=N")
    parser.add_argument("--no-captions", action="store_true", help="leave out the .txt files: the template must do")
    parser.add_argument("--fresh", action="store_true", help="train and measure again what is finished")
    parser.add_argument("--work", type=Path, default=Path("runs/proof"), help="folder of runs and finished figures")


def recipe_of(task: Task, options: argparse.Namespace, folder: Path) -> Recipe:
    """The recipe that a user's command would resolve to, without pictures on the way."""
    preset = dict(pair.split("=", 1) for pair in options.preset).get(task.kind, f"pocket-{task.kind}")
    flags: dict[str, Any] = {"folder": folder / "pictures", "output": folder / "run", "trigger": task.trigger}
    flags |= {"class": task.class_name} if task.class_name else {}
    flags |= {"steps": options.steps} if options.steps else {}
    return resolve(preset, flags | {"base": options.base} | SILENT | dict(parse_assignment(text) for text in options.set))


def parse_assignment(text: str) -> tuple[str, Any]:
    """`lr=2e-3` => ("lr", 0.002): the value is TOML, or else a plain word."""
    name, _, value = text.partition("=")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def place_of(task: Task, options: argparse.Namespace, artist: Artist) -> Path:
    """The folder of a task's run: one per recipe and base, so that trying other settings loses nothing."""
    told = flatten(recipe_of(task, options, Path()))
    mark = hashlib.sha256(json.dumps([told, artist.identity, options.no_captions], sort_keys=True).encode()).hexdigest()[:8]
    return options.work / options.name / f"{task.name.replace(' ', '-')}-{mark}"


def train_recipe(recipe: Recipe, fresh: bool) -> dict[str, Any]:
    """Train, go on, or find it done; the adapter's path, the seconds from call to adapter, and those of the steps alone."""
    finished = [event for event in train(recipe, fresh=fresh) if isinstance(event, Finished)][-1]
    assert recipe.output
    steps = sum(record["seconds"] for record in Run(recipe.output, "").history() if record["event"] == "step")
    return {"adapter": str(recipe.output / finished.path), "seconds": finished.seconds, "step_seconds": steps}


def prove_task(
    task: Task, options: argparse.Namespace, judge: Judge, eyes: Eyes, clip: Clip | None, artist: Artist
) -> dict[str, Any]:
    """The finished record of a task: read, or trained and measured now."""
    folder = place_of(task, options, artist)
    file = folder / "figures.json"
    key = [judge.identity, eyes.identity, options.pictures, options.seed, artist.how]
    before = json.loads(file.read_text()) if file.is_file() else {}
    if before.get("key") == key and not options.fresh:
        print(f"{task.name}: already measured, {brief(before)}")
        return before
    recipe = recipe_of(task, options, folder)
    task.write(folder / "pictures", artist.base.resolution, not options.no_captions)
    about = train_recipe(recipe, options.fresh) | {"steps": recipe.steps, "machine": before.get("machine") or machine()}
    drawn = draw(artist, task, load_learned(Path(about["adapter"])))
    row(task, drawn, artist.base.resolution).save(folder / "row.png")
    record = {"name": task.name, "kind": task.kind, "trigger": task.trigger, "key": key} | about
    record |= measure(judge, clip, task, drawn) | {"details": details(eyes, task, drawn)}
    write_text(file, json.dumps(record, indent=1) + "\n")
    print(f"{task.name}: {brief(record)}", flush=True)
    return record


def brief(record: Mapping[str, Any]) -> str:
    """One line on the screen while the others go on."""
    identity, fidelity, leak = record["identity"], record["fidelity"], record["leak"]
    return (
        f"identity {identity['floor']:.2f} -> {identity['value']:.2f} of {identity['ceiling']:.2f}, "
        f"fidelity {fidelity['base']:.2f} -> {fidelity['value']:.2f}, leak {leak['value']:.2f}, {record['seconds']:.0f} s"
    )


def row(task: Task, drawn: Drawn, side: int) -> Image.Image:
    """Three training pictures, then base, adapter and truth for three prompts."""
    lessons = [render(scene, side) for scene, _ in task.lessons[:3]]
    shown = [cell for i in range(3) for cell in (drawn.base[i], drawn.called[i], drawn.true[i])]
    label = f"{task.name}: {' / '.join(trial.prompt for trial in task.called[:3])}"
    return contact_sheet(lessons + shown, 12, rows=[label], side=128)


def stack_rows(files: Sequence[Path], to: Path) -> None:
    """The tasks' rows, one above the other."""
    rows = []
    for file in files:
        with Image.open(file) as picture:
            rows.append(picture.convert("RGB"))
    sheet = Image.new("RGB", (max(line.width for line in rows), sum(line.height for line in rows)), "white")
    top = 0
    for line in rows:
        sheet.paste(line, (0, top))
        top += line.height
    to.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(to)


HEADS = (
    *("task", "identity floor", "value", "ceiling", "marks seen", "on true renders"),
    *("fidelity base", "value", "leak", "unrelated changed", "seconds"),
)


def cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A task's row in the table of tasks."""
    identity, fidelity = record["identity"], record["fidelity"]
    shares = (
        *(identity[key] for key in ("floor", "value", "ceiling")),
        *(record["details"][key] for key in ("value", "ceiling")),
    )
    shares += (fidelity["base"], fidelity["value"])
    shares += (record["leak"]["value"], record["drift"]["changed"])
    return record["name"], *(f"{100 * x:.0f} %" for x in shares), f"{record['seconds']:.0f}"


def main(options: argparse.Namespace) -> None:
    """Train, measure, publish."""
    chosen = tasks(options.only, options.pictures, options.seed)
    for task in chosen:
        recipe_of(task, options, options.work)  # a wrong setting shows before the first hour
    judge, base = Judge.load(), Base.load(options.base)
    artist = Artist(base, options.work / "base-pictures", options)
    clip, eyes = Clip.of(base.path), Eyes.load()
    records = [prove_task(task, options, judge, eyes, clip, artist) for task in chosen]
    stack_rows([place_of(task, options, artist) / "row.png" for task in chosen], options.to / f"{options.name}.png")
    show_table("Tasks", HEADS, rows := [cells(record) for record in records])
    about = {
        "base": f"{options.base} ({artist.identity})",
        "training": f"{len(chosen)} tasks, {records[0]['steps']} steps, on {records[-1]['machine']}",
        "pictures": f"{options.pictures} per figure and task, {artist.told}",
        "floor": "the base on the same prompts without the trigger",
        "ceiling": "the judge on true renders of the same scenes",
    }
    publish(options.to, options.name, "What personalization learns, keeps and costs", about, summary(records), records)
    path = options.to / f"{options.name}.md"
    write_text(path, path.read_text() + "## Tasks\n\n" + markdown(HEADS, rows))
