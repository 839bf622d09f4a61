"""Is the checkpoint that was chosen the best one? Runs that train too long, with the preset and without its brakes.

The truth of a checkpoint is one number: identity (share of pictures with the trigger that the judge recognises) x prompt
fidelity x (1 - leak) x unrelated prompts obeyed, the two in the middle and the last as shares of what is possible. It is 1 for an
adapter that draws its subject wherever it is asked for, as it is asked for, and nowhere else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from personalize.adapters.adapter import Adapter
from personalize.io import write_text
from personalize.models.model import Base
from personalize.recipe.fields import Recipe
from personalize.training.events import Chosen, Saved
from personalize.training.loop import train
from personalize.training.rundir import Run

from ..judge import Judge
from . import personalization
from .drawing import Artist
from .figures import Figure, machine, markdown, publish, share, show_table
from .measuring import draw, mean, measure
from .tasks import Task, tasks

TUNED = (
    "scarf cat",
    "king fish",
    "neon",
    "stained glass",
)  # what drift costs in the score was set by these, with and without prior
OTHERS = ("caped dog", "pirate boat", "paper cut-out")
UNBRAKED = "caped dog,scarf cat,neon"  # those that are trained without their brakes, too
VARIANTS: dict[str, dict[str, Any]] = {"preset": {}, "no prior": {"prior": "none", "schedule": "constant"}}
LONG = {"steps": 700, "checkpoint_every": 100, "choose": "best"}  # twice a subject's preset


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    personalization.add_options(parser)
    parser.add_argument("--no-prior", default=UNBRAKED, help="names of those that are also trained without a prior")
    parser.set_defaults(only=",".join((*OTHERS, *TUNED)), pictures=16, sampler_steps=12)


def variant_of(options: argparse.Namespace, variant: str) -> argparse.Namespace:
    """The options with a variant's settings, which `--set` can change."""
    given = [f"{name}={json.dumps(value)}" for name, value in (LONG | VARIANTS[variant]).items()]
    return argparse.Namespace(**vars(options) | {"set": [*given, *options.set]})


def prove_choice(task: Task, variant: str, options: argparse.Namespace, judge: Judge, artist: Artist) -> dict[str, Any]:
    """The record of a run: what was chosen, and the score and the truth of every checkpoint. Found finished, or made now."""
    told = variant_of(options, variant)
    folder = personalization.place_of(task, told, artist)
    file, key = folder / "choice.json", [judge.identity, options.pictures, options.seed, artist.how]
    before = json.loads(file.read_text()) if file.is_file() else {}
    if before.get("key") == key and not options.fresh:
        return before
    recipe = personalization.recipe_of(task, told, folder)
    task.write(folder / "pictures", artist.base.resolution, not options.no_captions)
    choosing = time_choosing(recipe, options.fresh)
    assert recipe.output
    run = Run(recipe.output, task.trigger)
    history = run.history()
    chosen = [record for record in history if record["event"] == "chosen"][-1]
    scores = {r["step"]: r for r in history if r["event"] == "scored" and r["strength"] == 1}
    rows = []
    for step, path in run.checkpoints().items():
        found = measure(judge, None, task, draw(artist, task, Adapter.load(path)))
        rows.append({"step": step, "score": scores[step], "truth": truth(found), "measured": found})
        told_so_far = f"score {scores[step]['score']:.3f}, truth {rows[-1]['truth']:.3f}"
        print(f"{task.name}, {variant}, step {step}: {told_so_far}", flush=True)
    record: dict[str, Any] = {
        "name": task.name,
        "kind": task.kind,
        "variant": variant,
        "key": key,
        "chosen": chosen,
        "checkpoints": rows,
    }
    training = sum(r["seconds"] for r in history if r["event"] == "step")
    record |= {"choosing": choosing or before.get("choosing"), "training": training, "machine": machine()}
    write_text(file, json.dumps(record, indent=1) + "\n")
    return record


def time_choosing(recipe: Recipe, fresh: bool) -> float | None:
    """Train; the seconds that choosing took, None for a run that was finished already."""
    began, spent = 0.0, None
    for event in train(recipe, fresh=fresh):
        if isinstance(event, Chosen):
            spent = time.perf_counter() - began
        elif isinstance(event, Saved):  # the last checkpoint, and after the choice the adapter
            began = time.perf_counter()
    return spent


def truth(found: Mapping[str, Any]) -> float:
    """Identity x fidelity x (1 - leak) x unrelated prompts obeyed, each as a share of what is possible, at most 1."""
    identity, drift = found["identity"], found["drift"]
    shares = (
        share(identity["value"], identity["ceiling"]),
        found["fidelity"]["value"],
        1 - found["leak"]["value"],
        share(drift["value"], drift["base"]),
    )
    return math.prod(min(1.0, part) for part in shares)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing theirs; 0 where one side is all the same.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    x, y = (np.array([(sum(v < u for v in values) + sum(v <= u for v in values)) / 2 for u in values]) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return round(float((x * y).sum()) / size, 12) if size else 0.0


HEADS = ("run", "chosen", "rank correlation", "truth: chosen", "last", "mean", "best", "strengths", "choosing / training")


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """A run's figures: rank correlation, and the truth of the chosen, the last, the best and the mean checkpoint."""
    rows = record["checkpoints"]
    truths = {row["step"]: row["truth"] for row in rows}
    return {
        "correlation": spearman([row["score"]["score"] for row in rows], list(truths.values())),
        "chosen": truths[record["chosen"]["step"]],
        "last": truths[max(truths)],
        "mean": mean(truths.values()),
        "best": max(truths.values()),
        "cost": record["choosing"] / record["training"] if record["choosing"] else math.nan,
    }


def cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A run's row in the table of runs."""
    found, chosen = summary(record), record["chosen"]
    truths = (f"{100 * found[key]:.0f} %" for key in ("chosen", "last", "mean", "best"))
    strengths = f"{chosen['low']:g} to {chosen['high']:g}"
    cost = f"{100 * found['cost']:.0f} %" if record["choosing"] else "–"
    return f"{record['name']}, {record['variant']}", str(chosen["step"]), f"{found['correlation']:.2f}", *truths, strengths, cost


def figures(records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The means over runs of one variant. The floor is a checkpoint drawn by lot, the ceiling the best one."""
    found = [summary(record) for record in records]
    over = {key: mean(value for one in found if math.isfinite(value := one[key])) for key in found[0]}
    better = over["chosen"] >= over["last"]
    return [
        Figure("rank correlation of score and truth", 0.0, over["correlation"], 1.0, unit=""),
        Figure("truth of the chosen checkpoint", over["mean"], over["chosen"], over["best"], "at least the last one's", better),
        Figure("truth of the last checkpoint", over["mean"], over["last"], over["best"]),
        Figure("regret of the chosen", None, over["best"] - over["chosen"], None),
        Figure("regret of the last", None, over["best"] - over["last"], None),
    ] + ([Figure("choosing, share of the training's time", None, over["cost"], None)] if over["cost"] else [])


def main(options: argparse.Namespace) -> None:
    """Train, choose, measure every checkpoint, publish."""
    chosen = tasks(options.only, options.pictures, options.seed)
    judge, base = Judge.load(), Base.load(options.base)
    artist = Artist(base, options.work / "base-pictures", options)
    unbraked = [name.strip() for name in options.no_prior.split(",")]
    runs = [(task, variant) for variant in VARIANTS for task in chosen if variant == "preset" or task.name in unbraked]
    records = [prove_choice(task, variant, options, judge, artist) for task, variant in runs]
    tables = {f"All runs ({len(records)}, means)": figures(records)}
    for variant, tuned in itertools.product(VARIANTS, (False, True)):
        if rows := [one for one in records if one["variant"] == variant and (one["name"] in TUNED) == tuned]:
            whose = "runs that the score was tuned on" if tuned else "other runs"
            tables[f"{variant.capitalize()}, {whose} ({len(rows)}, means)"] = figures(rows)
    lines = [cells(record) for record in records]
    show_table("Runs", HEADS, lines)
    about = {
        "base": f"{options.base} ({artist.identity})",
        "runs": f"{len(runs)}, {LONG['steps']} steps, a checkpoint every {LONG['checkpoint_every']}; on {machine()}",
        "no prior": "the preset without prior preservation, at a constant rate: what trains too long forgets and leaks",
        "truth": "identity x prompt fidelity x (1 - leak) x unrelated prompts obeyed, by the judge",
        "pictures": f"{options.pictures} per figure and checkpoint, {artist.told}",
        "tuned": f"what drift costs in the score, on {', '.join(TUNED)}; the presets, in other scenes, on these and two more",
    }
    publish(options.to, options.name, "How good the chosen checkpoint is", about, tables, records)
    path = options.to / f"{options.name}.md"
    parts = ["## Runs\n", markdown(HEADS, lines), "## Checkpoints\n", markdown(*checkpoints(records))]
    write_text(path, path.read_text() + "\n".join(parts))


def checkpoints(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of a table of all checkpoints: score / truth, the chosen one marked."""
    steps = [row["step"] for row in records[0]["checkpoints"]]

    def cell(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
        mark = " *" if row["step"] == record["chosen"]["step"] else ""
        return f"{row['score']['score']:.2f} / {100 * row['truth']:.0f} %{mark}"

    rows = [(f"{one['name']}, {one['variant']}", *(cell(one, row) for row in one["checkpoints"])) for one in records]
    return ("score / truth at step", *map(str, steps)), rows
