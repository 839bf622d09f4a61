"""The runs to calibrate on: settings good and bad, checkpoints and strengths; the images as evidence, and the truth of each."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personalize.adapters.adapter import Adapter
from personalize.io import write_text
from personalize.recipe.resolve import resolve
from personalize.recipe.samplers import AUTO
from personalize.training.evidence import ask, draw_questions
from personalize.training.loop import train
from personalize.training.preflight import RunPlan, check
from personalize.tuning.attach import attach, weighting_of

from .. import judge as judging
from ..judge import Judge
from ..proof.drawing import Artist, load_or_draw
from ..proof.measuring import draw
from ..proof.tasks import Task, tasks
from ..running import Plan

PICTURES = 16  # of each kind tell the truth
SAMPLER_STEPS = 8
RENDERS, JUDGE_STEPS = 45_000, 1200

# What a run changes about the preset, and how often it comes up: most runs are as a user's, and some go wrong.
Settings = Mapping[str, Any]
VARIANTS: dict[str, tuple[int, Settings]] = {
    "preset": (5, {}),
    "no prior": (2, {"prior": "none", "schedule": "constant", "steps": 450}),
    "hot": (1, {"lr": 1.5e-2, "steps": 250}),
    "cold": (1, {"lr": 4e-4}),
    "short": (1, {"steps": 60}),
    "wrong captions": (1, {}),
    "small": (1, {"rank": 1, "targets": ["attention"]}),
    "by heart": (0, {"prior": "none", "schedule": "constant", "steps": 400, "choose": "last"}),  # of copying.py alone
}
STEPS = {"subject": 300, "style": 360}  # where a variant says nothing


@dataclass(frozen=True)
class Trained:
    """A run to calibrate on."""

    task: Task
    variant: str
    folder: Path

    def plan(self) -> RunPlan:
        """Its recipe, checked; the run may be finished."""
        settings = {"steps": STEPS[self.task.kind]} | dict(VARIANTS[self.variant][1])
        own = {"folder": self.folder / "pictures", "output": self.folder / "run", "trigger": self.task.trigger, "choose": "best"}
        own |= {"class": self.task.class_name} if self.task.class_name else {}
        own |= {"sample_every": 0, "sample_seeds": (), "checkpoint_every": -(-settings["steps"] // 3)}
        return check(resolve(f"pocket-{self.task.kind}", own | settings))


def all_runs(work: Path) -> list[Trained]:
    """Every invented individual and look, once; variants are dealt out in turn, so that any first part holds some of each."""
    dealt = itertools.cycle([name for i in range(5) for name, (often, _) in VARIANTS.items() if i < often])
    kinds = [tasks(kind, PICTURES) for kind in ("subjects", "styles")]
    order = [task for row in itertools.zip_longest(shuffle(kinds[0]), shuffle(kinds[1])) for task in row if task]
    return [Trained(task, variant, work / f"{task.name.replace(' ', '-')}") for task, variant in zip(order, dealt, strict=False)]


def shuffle(rows: list[Task]) -> list[Task]:
    """In an order that depends on their number only."""
    return [rows[i] for i in np.random.default_rng(16).permutation(len(rows))]


def lessons_of(one: Trained) -> Task:
    """The task as it is taught: with the captions of another class, where captions are wrong."""
    if one.variant != "wrong captions":
        return one.task
    other = {"cat": "house", "house": "cat"}.get(one.task.class_name, "cat")
    wrong = [(scene, f"a {one.task.trigger} {other}" if one.task.class_name else f"a {other}") for scene, _ in one.task.lessons]
    return replace(one.task, lessons=tuple(wrong))


def points(plan: RunPlan, number: int) -> Iterator[tuple[int, float, Path]]:
    """Which adapters of a run are looked at: checkpoints at full strength, and the chosen one at another."""
    files = plan.run.checkpoints()
    for step in files:
        yield step, 1.0, files[step]
    chosen = [record for record in plan.run.history() if record["event"] == "chosen"][-1]["step"]
    yield chosen, (0.5, 1.5, 0.75, 1.25)[number % 4], files[chosen]


def look_at(one: Trained, number: int, artist: Artist) -> None:
    """Train a run and leave, for each of its points, the denoising scores, the evidence's images and the truth's."""
    lessons_of(one).write(one.folder / "pictures", artist.base.resolution)
    plan = one.plan()
    for _ in train(plan.recipe):
        pass
    plan = replace(one.plan(), base=artist.base)
    questions = ask(plan)
    load_or_draw(one.folder / "base.npy", lambda: draw_questions(plan, questions.for_base))
    scores = {(r["step"], r["strength"]): r for r in plan.run.history() if r["event"] == "scored"}
    for step, strength, path in points(plan, number):
        name = f"{step:04}-{strength:g}"
        if (one.folder / f"{name}.json").is_file():
            continue
        began = time.process_time()
        adapter = Adapter.load(path)
        with attach(artist.base, [(adapter, strength)]):
            load_or_draw(one.folder / f"{name}.npy", lambda: draw_questions(plan, questions.for_adapters))
        middle = time.process_time()
        drawn = draw(artist, one.task, adapter.weighted(weighting_of(strength)) if strength != 1 else adapter)
        for kind in ("base", "called", "leaked", "unrelated_base", "unrelated"):
            load_or_draw(one.folder / f"{name}-{kind}.npy", functools.partial(getattr, drawn, kind))
        about = {"kind": one.task.kind, "name": one.task.name, "variant": one.variant, "step": step, "strength": strength}
        cost = {"evidence": middle - began, "truth": time.process_time() - middle}
        write_text(one.folder / f"{name}.json", json.dumps(about | {"score": scores[step, strength], "cost": cost}) + "\n")
        print(f"{one.task.name}, {one.variant}: {name} {cost['evidence']:.0f} s, {cost['truth']:.0f} s", flush=True)


def train_judge(work: Path) -> Judge:
    """The judge of this cast, trained once."""
    folder = work / "judge"
    if not (folder / "config.json").is_file():
        pictures, labels = judging.draw_labelled(RENDERS, seed=1)
        plan = Plan(JUDGE_STEPS, batch=128, lr=4e-3, warmup=50, decay=0.7, ema=0.99, weight_decay=0.05)
        judge = judging.train(pictures, labels, plan, work / "judge-state")
        judging.save(judge, folder, {"renders": RENDERS, "steps": JUDGE_STEPS, "accuracy": judging.examine(judge)})
    return Judge.load(folder)


def main() -> int:
    """Runs in order, or in the reverse order beside another process; the judge; then the fit."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.calibration", description=__doc__)
    parser.add_argument("what", choices=("judge", "runs", "fit", "copying"))
    parser.add_argument("--work", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--reverse", action="store_true", help="begin with the last run: a second process beside the first")
    parser.add_argument("--count", type=int, help="so many runs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.what == "judge":
        print(json.dumps(judging.examine(train_judge(options.work)), indent=1))
    elif options.what == "runs":
        from personalize.models.model import Base

        how = argparse.Namespace(sampler=AUTO, sampler_steps=SAMPLER_STEPS, guidance=3.0)
        artist = Artist(Base.load("pocket"), options.work / "base-pictures", how)
        chosen = list(enumerate(all_runs(options.work)))[: options.count]
        for number, one in reversed(chosen) if options.reverse else chosen:
            look_at(one, number, artist)
    elif options.what == "copying":
        from .copying import compare

        compare({one.task.name: one for one in all_runs(options.work)}, options.work)
    else:
        from .fit import fit

        fit(options.work, train_judge(options.work), {one.task.name: one for one in all_runs(options.work)})
    return 0
