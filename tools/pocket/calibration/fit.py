"""From runs to a table: logistic regressions of the truth's four factors on the signs, and how far their product errs.

Errors are those of runs that the weights were not fitted to: each run is left out once, with all of its checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from personalize.io import write_text
from personalize.models.clip import eyes_for
from personalize.models.model import Base
from personalize.models.sources import locate
from personalize.training.calibration import FILE, Factor, signs_of_images
from personalize.training.evidence import ask
from personalize.training.signs import observe

from ..art_objects import DRAWINGS
from ..judge import Judge
from ..proof.choice import spearman, truth
from ..proof.drawing import load_images, renders
from ..proof.figures import share
from ..proof.measuring import measure
from ..proof.tasks import Task
from ..world import render, scenes

SHOWN = ("same", "toward", "all_same", "all_toward")  # does an image show what was taught?
FACTORS: dict[str, tuple[str, ...]] = {
    "fidelity": ("scene", "thing", "look"),
    "kept": ("others_same", "drift"),
}
RIDGE = 0.003  # of weights, for each observation
BINS = 4  # of estimates, each with its own errors
NAMES = "base", "called", "leaked", "unrelated_base", "unrelated"


@dataclass(frozen=True)
class Point:
    """An adapter at a strength: its signs, and the truth with its factors."""

    run: str
    signs: Mapping[str, Any]
    truth: float
    factors: Mapping[str, float]
    shown: Mapping[str, list[float]]  # "called" and "plain": 1 for each image of the evidence in which the judge sees it
    about: Mapping[str, Any]


def read_points(work: Path, judge: Judge, runs: Mapping[str, Any]) -> list[Point]:
    """All finished points; what was measured is kept beside them."""
    eyes = eyes_for(locate("pocket"))
    assert eyes
    found = []
    for name, one in runs.items():
        files = sorted(one.folder.glob("[0-9]*.json"))
        if not files or not (one.folder / "base.npy").is_file():
            continue
        training = [Image.open(file).convert("RGB") for file in sorted((one.folder / "pictures").glob("*.png"))]
        questions = ask(one.plan())
        observer = observe(eyes, questions, training, load_images(one.folder / "base.npy"), one.task.kind == "style")
        for file in files:
            about = json.loads(file.read_text())
            score = {key: about["score"][key] for key in ("fit", "drift", "contrast")}
            images = load_images(file.with_suffix(".npy"))
            signs = observer.signs(images) | score
            drawn = SimpleNamespace(**{kind: load_images(file.with_name(f"{file.stem}-{kind}.npy")) for kind in NAMES})
            drawn.true, drawn.true_plain = renders(one.task.called, 64), renders(one.task.plain, 64)
            measured = measure(judge, None, one.task, drawn)  # type: ignore[arg-type]
            shown = see(judge, one.task, images, len(questions.called), len(questions.few_plain))
            found.append(Point(name, signs, truth(measured), factors(measured), shown, about))
    return found


def see(judge: Judge, task: Task, images: Sequence[Image.Image], called: int, plain: int) -> dict[str, list[float]]:
    """In which of the evidence's images the judge sees what was taught."""
    seen = [float(said == task.name) for said in judge.verdict(images)[task.head]]
    return {"called": seen[:called], "plain": seen[called : called + plain]}


def factors(measured: Mapping[str, Any]) -> dict[str, float]:
    """The four factors, 0..1, as `truth` multiplies them."""
    identity, drift = measured["identity"], measured["drift"]
    return {
        "identity": min(1.0, share(identity["value"], identity["ceiling"])),
        "fidelity": min(1.0, measured["fidelity"]["value"]),
        "leak": measured["leak"]["value"],
        "kept": min(1.0, share(drift["value"], drift["base"])),
    }


def regress(points: Sequence[Point], factor: str, names: Sequence[str]) -> Factor:
    """A logistic regression of a factor on signs of the whole."""
    x = torch.tensor([[point.signs[name] for name in names] for point in points])
    return minimize(names, [(x, torch.tensor([point.factors[factor] for point in points]))])


def regress_shown(points: Sequence[Point]) -> Factor:
    """A logistic regression of what the judge says of each image: with the trigger and without it, which weigh the same."""
    parts = []
    for of in ("called", "plain"):
        rows = [row for point in points for row in signs_of_images(point.signs, of, SHOWN)]
        parts.append((torch.tensor(rows), torch.tensor([said for point in points for said in point.shown[of]])))
    return minimize(SHOWN, parts)


def minimize(names: Sequence[str], parts: Sequence[tuple[Tensor, Tensor]]) -> Factor:
    """The weights for which the logistic of signs [n, signs] explains shares [n] best."""
    spread = torch.cat([x for x, _ in parts]).std(0) + 1e-6
    w = torch.zeros(len(names) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = RIDGE * w[1:].square().sum()
        for x, shares in parts:
            logits = w[0] + (x / spread).double() @ w[1:]
            total = total + F.binary_cross_entropy_with_logits(logits, shares.double().clamp(0.01, 0.99))
        total.backward()
        return total

    optimizer.step(loss)
    weights = (w[1:].detach() / spread).tolist()
    return Factor(float(w[0].detach()), dict(zip(names, weights, strict=True)))


Models = Mapping[str, Factor]


def regress_all(points: Sequence[Point]) -> Models:
    """A model of each factor."""
    return {factor: regress(points, factor, names) for factor, names in FACTORS.items()} | {"shown": regress_shown(points)}


def estimate(models: Models, signs: Mapping[str, Any]) -> float:
    """Identity x fidelity x (1 - leak) x kept."""
    shown = models["shown"]
    return shown(signs, "called") * models["fidelity"](signs) * (1 - shown(signs, "plain")) * models["kept"](signs)


def left_out(points: Sequence[Point]) -> np.ndarray:
    """Estimates [n] by models that never met the point's run."""
    models = {run: regress_all([point for point in points if point.run != run]) for run in {point.run for point in points}}
    return np.array([estimate(models[point.run], point.signs) for point in points])


def error_table(estimates: np.ndarray, truths: np.ndarray) -> list[list[float]]:
    """(mean estimate, what 80 of 100 errors are below) of estimates in bins of equal counts."""
    parts = np.array_split(np.argsort(estimates, kind="stable"), BINS)
    errors = np.abs(truths - estimates)
    return [[round(float(value), 3) for value in (estimates[part].mean(), np.quantile(errors[part], 0.8))] for part in parts]


def as_json(model: Factor) -> dict[str, Any]:
    """A model as the table has it."""
    return {"bias": round(model.bias, 4), "weights": {key: round(value, 4) for key, value in model.weights.items()}}


@torch.no_grad()
def autoencoder(count: int = 200) -> dict[str, float]:
    """How well the base's autoencoder keeps drawings of its own world, in dB: the mean, and what 95 of 100 reach."""
    base = Base.load("pocket")
    drawn = [np.asarray(render(scene, base.resolution), np.float32) for scene in islice(scenes(55), count)]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = torch.cat([base.decode(base.encode(some)[0]) for some in pixels.split(20)])
    ratios = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    return {"mean": round(float(ratios.mean()), 2), "low": round(float(ratios.quantile(0.05)), 2)}


def fit(work: Path, judge: Judge, runs: Mapping[str, Any]) -> None:
    """Write the table, and say how well it does on runs that it was not fitted to."""
    points = read_points(work, judge, runs)
    truths, estimates, models = np.array([point.truth for point in points]), left_out(points), regress_all(points)
    errors = error_table(estimates, truths)
    rms = float(np.sqrt(np.mean((estimates - truths) ** 2)))
    rank = round(spearman(list(estimates), list(truths)), 3)
    how = {"runs": len({point.run for point in points}), "points": len(points), "rank": rank, "rms": round(rms, 3)}
    table = {
        "how": how | {"command": "python -m tools.pocket.calibration fit"},
        "nouns": list(DRAWINGS),
        "autoencoder": autoencoder(),
        "factors": {name: as_json(model) for name, model in models.items()},
        "errors": errors,
    }  # fmt: skip
    write_text(FILE, json.dumps(table, indent=1) + "\n")
    rows = [
        {**point.about, **point.factors, **point.signs, "truth": point.truth, "estimate": guess}
        for point, guess in zip(points, estimates, strict=True)
    ]
    write_text(work / "points.json", json.dumps(rows, indent=1) + "\n")
    print(json.dumps(table, indent=1))
    for row in rows:
        named = (f"{key} {row[key]:.2f}" for key in ("truth", "estimate", "identity", "fidelity", "leak", "kept"))
        print(f"{row['name']:12} {row['variant']:15} {row['step']:4} {row['strength']:4} ", *named)
