"""Is what is told of an adapter true? Every task of the benchmark, and runs that go wrong, none of them used for calibration.

For every checkpoint: the estimate with its interval, as the report tells it, and the truth by the judge on many more images (see
`choice`). Photographs are nothing that the base can draw: the truth of a run on them is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personalize.adapters.adapter import Adapter
from personalize.io import write_text
from personalize.models.clip import eyes_for
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.training.calibration import calibration_of
from personalize.training.events import Chosen, Judged
from personalize.training.evidence import ask, draw_questions
from personalize.training.limits import likeness_to_world, training_squares
from personalize.training.loop import train
from personalize.training.preflight import check
from personalize.training.signs import MOST_TRAINING, observe
from personalize.training.verdict import describe
from personalize.tuning.attach import attach

from ..judge import Judge
from . import personalization
from .choice import spearman, truth
from .drawing import Artist, load_images, load_or_draw
from .figures import Figure, machine, markdown, publish, show_table
from .measuring import draw, mean, measure
from .tasks import Task, tasks

PRESET = "preset"
BAD: dict[str, tuple[str, dict[str, Any]]] = {  # what goes wrong => the tasks, and what is set
    "too long": ("scarf cat,neon,caped dog", {"prior": "none", "schedule": "constant", "steps": 700, "checkpoint_every": 350}),
    "too short": ("king fish,stained glass", {"steps": 40, "checkpoint_every": 20}),
    "no prior": ("pirate boat,halftone comic", {"prior": "none"}),
    "wrong captions": ("hat bird,paper cut-out", {}),
    "too hot": ("caped dog,blueprint", {"lr": 2e-2}),
    "photographs": ("scarf cat", {}),
}
WANTED: dict[str, Any] = {"choose": "best", "sample_every": 0, "sample_seeds": (), "checkpoint_every": 175}


@dataclass(frozen=True)
class Tried:
    """A run to be judged."""

    task: Task
    variant: str
    options: argparse.Namespace
    folder: Path

    def recipe(self) -> Recipe:
        """As a user's command would resolve to."""
        return personalization.recipe_of(self.task, self.options, self.folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    personalization.add_options(parser)
    parser.add_argument("--photographs", type=Path, help="a folder of photographs: without it, there is no run on such")
    parser.add_argument(
        "--truth-only", action="store_true", help="signs and truths, before there is a table; nothing is published"
    )
    parser.add_argument("--reverse", action="store_true", help="begin with the last run: a second process beside the first")
    parser.add_argument("--count", type=int, help="only so many runs")
    parser.set_defaults(pictures=48, sampler_steps=12)


def all_runs(options: argparse.Namespace, artist: Artist) -> list[Tried]:
    """The tasks with their preset, and the bad runs, in turns."""
    good = [(PRESET, task) for task in tasks(options.only, options.pictures, options.seed)]
    bad = [(name, task) for name, (names, _) in BAD.items() for task in tasks(names, options.pictures, options.seed)]
    bad = [one for one in bad if one[0] != "photographs" or options.photographs]
    pairs = [one for i in range(max(len(good), len(bad))) for one in (*good[i : i + 1], *bad[i : i + 1])]
    runs = []
    for variant, task in pairs:
        settings = WANTED | (BAD[variant][1] if variant in BAD else {})
        given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        told = argparse.Namespace(**vars(options) | {"set": [*given, *options.set]})
        folder = personalization.place_of(task, told, artist)
        runs.append(Tried(task, variant, told, folder.with_name(f"{folder.name}-{variant.replace(' ', '-')}")))
    return runs[: options.count]


def write_pictures(one: Tried, side: int) -> None:
    """The pictures that the run learns from, its captions wrong where that is tried."""
    if one.variant == "photographs":
        target = one.folder / "pictures"
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(one.options.photographs.iterdir()):
            (target / file.name).write_bytes(file.read_bytes())
        return
    task = one.task
    if one.variant == "wrong captions":
        words = f"a {task.trigger} house" if task.class_name else "a house"
        task = replace(task, lessons=tuple((scene, words) for scene, _ in task.lessons))
    task.write(one.folder / "pictures", side)


def prove(one: Tried, judge: Judge, artist: Artist) -> dict[str, Any]:
    """The record of a run: each checkpoint's signs and truth, found finished or made now; then what is told and chosen."""
    file, key = one.folder / "verdict.json", [judge.identity, one.options.pictures, one.options.seed, artist.how]
    record = json.loads(file.read_text()) if file.is_file() else {}
    recipe = one.recipe()
    if record.get("key") != key:
        if not (one.folder / "pictures").is_dir():
            write_pictures(one, artist.base.resolution)
        for _ in train(recipe.model_copy(update={"choosing": recipe.choosing.model_copy(update={"choose": "last"})})):
            pass
        rows = list(checkpoint_rows(one, judge, artist))
        record = {"name": one.task.name, "variant": one.variant, "key": key, "checkpoints": rows, "machine": machine()}
        write_text(file, json.dumps(record, indent=1) + "\n")
    return record if one.options.truth_only else choose_and_tell(record, one, artist)


def choose_and_tell(record: dict[str, Any], one: Tried, artist: Artist) -> dict[str, Any]:
    """The record with what today's table says of the images, what was chosen, and what that cost."""
    calibration, eyes, recipe = calibration_of(artist.base), eyes_for(artist.base.path), one.recipe()
    assert calibration and eyes and recipe.output
    seconds = time_choosing(recipe)
    plan = check(recipe)
    history = plan.run.history()
    scores = {r["step"]: r for r in history if r["event"] == "scored" and r["strength"] == 1}
    training = training_squares(plan, MOST_TRAINING)
    style = not one.task.class_name and one.variant != "photographs"
    observer = observe(eyes, ask(plan), training, load_images(one.folder / "evidence-base.npy"), style)
    world = 1.0 if style else likeness_to_world(artist.base, eyes, training)
    rows = []
    for row in record["checkpoints"]:
        signs = observer.signs(load_images(one.folder / f"evidence-{row['step']}.npy"))
        signs |= {name: scores[row["step"]][name] for name in ("fit", "drift", "contrast")} | {"world": world}
        told = calibration.verdict(signs)
        level = describe(Judged(row["step"], 1.0, **asdict(told), signs=signs)).level
        rows.append(row | asdict(told) | {"level": level})
    steps = sum(event["seconds"] for event in history if event["event"] == "step")
    chosen = [event for event in history if event["event"] == "chosen"][-1]
    return record | {"checkpoints": rows, "choosing": seconds, "training": steps, "chosen": chosen}


def time_choosing(recipe: Recipe) -> float | None:
    """Train; the CPU seconds between the last step's checkpoint and the choice, None for a run that was finished already."""
    began = spent = None
    for event in train(recipe):
        if isinstance(event, Chosen) and began is not None:
            spent = time.process_time() - began
        elif type(event).__name__ in ("Step", "Saved"):
            began = time.process_time()
    return spent


def checkpoint_rows(one: Tried, judge: Judge, artist: Artist) -> Iterator[dict[str, Any]]:
    """Every checkpoint: the images that it is told by are kept, and the truth is measured on more of them."""
    plan = replace(check(one.recipe()), base=artist.base)
    questions = ask(plan)
    load_or_draw(one.folder / "evidence-base.npy", lambda: draw_questions(plan, questions.for_base))
    for step, path in plan.run.checkpoints().items():
        adapter = Adapter.load(path)
        with attach(artist.base, adapter):
            load_or_draw(one.folder / f"evidence-{step}.npy", lambda: draw_questions(plan, questions.for_adapters))
        found = None if one.variant == "photographs" else measure(judge, None, one.task, draw(artist, one.task, adapter))
        true = truth(found) if found else 0.0
        print(f"{one.task.name}, {one.variant}, step {step}: truth {true:.2f}", flush=True)
        yield {"step": step, "truth": true, "measured": found}


# ---------------------------------------------------------------- figures


def figures(records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Pooled over all checkpoints of some runs, with their goals."""
    everything = [row for record in records for row in record["checkpoints"]]
    rows = [row for row in everything if row["level"] != "uncalibrated"]
    truths, values = [row["truth"] for row in rows], [row["value"] for row in rows]
    rank, rms = spearman(values, truths), math.sqrt(mean((a - b) ** 2 for a, b in zip(values, truths, strict=True)))
    inside = mean(row["low"] <= row["truth"] <= row["high"] for row in rows)
    wrong = sum(row["level"] == "good" and row["truth"] < 0.5 for row in everything)
    regret = mean(regret_of(record) for record in records)
    cost = mean(record["choosing"] / record["training"] for record in records if record["choosing"])
    return [
        Figure("rank correlation of estimate and truth, pooled", 0.0, rank, 1.0, ">= 0.9", rank >= 0.9, ""),
        Figure("error of the estimate, RMS", None, rms, None, "<= 12 points", rms <= 0.12),
        Figure("truth inside the interval of 80", None, inside, None, "70 to 90 %", 0.7 <= inside <= 0.9),
        Figure("called good with a truth below half", None, float(wrong), None, "none", wrong == 0, "checkpoints"),
        Figure("regret of the chosen checkpoint", None, regret, None, "<= 3 points", regret <= 0.03),
        Figure("choosing, share of the steps' time", None, cost, None, "<= 25 %", cost <= 0.25),
    ]


def regret_of(record: Mapping[str, Any]) -> float:
    """How much truer than the chosen checkpoint the best one is."""
    truths = {row["step"]: row["truth"] for row in record["checkpoints"]}
    return float(max(truths.values()) - truths[record["chosen"]["step"]])


HEADS = ("run", "step", "truth", "estimate", "80 of 100", "called")


def cells(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A run's rows in the table of checkpoints."""
    for row in record["checkpoints"]:
        mark = " *" if row["step"] == record["chosen"]["step"] else ""
        span = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
        told = (f"{100 * row['truth']:.0f} %", f"{100 * row['value']:.0f} %", span, row["level"])
        yield (f"{record['name']}, {record['variant']}", f"{row['step']}{mark}", *told)


def main(options: argparse.Namespace) -> None:
    """Train, judge and measure every checkpoint, publish."""
    judge, base = Judge.load(), Base.load(options.base)
    artist = Artist(base, options.work / "base-pictures", options)
    runs = all_runs(options, artist)
    records = [prove(one, judge, artist) for one in (reversed(runs) if options.reverse else runs)]
    if options.truth_only:
        return
    good = [record for record in records if record["variant"] == PRESET]
    bad = [record for record in records if record["variant"] != PRESET]
    some = {"All runs": records, "Presets": good, "Runs that go wrong": bad}
    tables = {f"{title} ({len(rows)})": figures(rows) for title, rows in some.items() if rows}
    lines = [line for record in records for line in cells(record)]
    show_table("Checkpoints", HEADS, lines)
    about = {
        "base": f"{options.base} ({artist.identity})",
        "runs": f"{len(records)}, on {machine()}; none of their subjects and styles was used for calibration",
        "truth": "identity x prompt fidelity x (1 - leak) x unrelated prompts obeyed, by the judge; of photographs 0",
        "pictures": f"{options.pictures} per figure and checkpoint for the truth, {artist.told}; the estimate rests on 24",
    }
    publish(options.to, options.name, "Is what is told of an adapter true?", about, tables, records)
    path = options.to / f"{options.name}.md"
    write_text(path, path.read_text() + "\n## Checkpoints\n\n" + markdown(HEADS, lines))
