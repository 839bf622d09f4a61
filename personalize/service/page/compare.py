"""The room Compare: checkpoints x strengths x prompts, drawn on demand, voted on blindly; and the one that is kept."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from starlette.responses import FileResponse, Response

from ...data.captions import fill
from ...inference.record import read_record
from ...jobs import Job
from ...jobs.job import ACTIVE
from ...text import slug
from ..errors import Refusal, not_found
from ..records import address
from ..requests import job_settings
from ..routes.common import Here, Name
from ..studio import Studio
from .render import Room, go, show

router = APIRouter(route_class=Room)
FINAL = "final"
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
USUAL = (0.6, 0.8, 1.0)  # strengths that are ticked at first
MOST = 200  # pictures that are asked for at once


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a training, or the adapter that it ended with."""

    name: str  # as pictures say it
    title: str
    id: str  # in the library
    step: float


@dataclass(frozen=True)
class Cell:
    """A picture that was drawn for a comparison."""

    prompt: str
    seed: int
    checkpoint: str
    strength: float
    url: str
    path: Path

    @property
    def secret(self) -> str:
        """A name that says nothing of how it was drawn."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:20]


@router.get("/compare")
def show_compare(request: Request, here: Here, run: Name = "") -> Response:
    """The trainings that can be compared, or one of them."""
    if not run:
        jobs = [job for job in here.store.list(kinds=("train",)) if checkpoints_of(here, job)]
        return show(request, "compare", room="compare", jobs=jobs, job=None)
    job = here.store.get(run)
    found = checkpoints_of(here, job)
    ticked = {one.name for one in found[:3]}
    return show(request, "compare", room="compare", jobs=[], job=job, checkpoints=found, ticked=ticked, strengths=STRENGTHS,
                usual=USUAL, prompts=prompts_of(here, job), **grid_of(here, job))  # fmt: skip


@router.get("/compare/{run}/grid")
def show_grid(request: Request, here: Here, run: Name, seen: str = "") -> Response:
    """What is drawn by now; nothing where somebody has seen it."""
    grid = grid_of(here, here.store.get(run))
    return Response(status_code=204) if grid["mark"] == seen else show(request, "_grid", job=here.store.get(run), **grid)


@router.post("/compare/{run}/draw")
def draw(
    here: Here,
    run: Name,
    prompts: Annotated[str, Form()] = "",
    checkpoints: Annotated[list[str] | None, Form()] = None,
    strengths: Annotated[list[float] | None, Form()] = None,
    seed: Annotated[int, Form(ge=0, le=2**32 - 1)] = 0,
) -> Response:
    """Draw the grid."""
    job = here.store.get(run)
    known = {one.name: one for one in checkpoints_of(here, job)}
    chosen = [known[name] for name in checkpoints or () if name in known]
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not (chosen and strengths and lines):
        raise Refusal(400, "nothing_to_draw", "Nothing to draw", "Tick a checkpoint and a strength, and write a prompt.")
    if len(chosen) * len(strengths) * len(lines) > MOST:
        raise Refusal(400, "too_many", f"That would be more than {MOST} pictures", "Draw fewer at a time.")
    recipe = recipe_of(here, job)
    settings = {
        "prompts": lines,
        "stack": [f"{one.name}={one.id}" for one in chosen],
        "axes": [f"strength={','.join(f'{one:g}' for one in strengths)}", f"adapter={','.join(one.name for one in chosen)}"],
        "seeds": [str(seed)],
        "steps": recipe.get("sample_steps", 20),
        "guidance": recipe.get("guidance", 3.0),
    }
    here.store.add("generate", job_settings(here, "generate", settings), name=f"compare {job.name}", metadata={"compare": job.id})
    return Response(status_code=204)


@router.post("/compare/{run}/stop")
def stop(here: Here, run: Name) -> Response:
    """Stop drawing; what is drawn stays."""
    for job in drawings_of(here, here.store.get(run)):
        if job.state in ACTIVE:
            here.store.cancel(job.id)
    return Response(status_code=204)


@router.post("/compare/{run}/keep")
def keep(here: Here, run: Name, checkpoint: Annotated[str, Form()], strength: Annotated[float, Form()]) -> Response:
    """Put a checkpoint at a strength into the library, as a file that is good at strength 1."""
    job = here.store.get(run)
    one = next((one for one in checkpoints_of(here, job) if one.name == checkpoint), None)
    if one is None:
        raise not_found("checkpoint", checkpoint)
    output = f"{slug(job.name)}-{one.name}-at-{strength:g}"
    settings = job_settings(here, "merge", {"files": [f"{one.id}:{strength:g}"], "output": output})
    return go(f"/jobs/{here.store.add('merge', settings, name=f'keep {output}').id}")


@router.get("/compare/{run}/vote")
def show_pair(request: Request, here: Here, run: Name) -> Response:
    """Two pictures of the same prompt and seed, in an order that tells nothing; and how the votes stand."""
    job = here.store.get(run)
    cells, votes = cells_of(here, job), here.votes.all(job.id)
    return show(request, "vote" if "hx-request" not in request.headers else "_vote", room="compare", job=job,
                pair=pair_of(cells, votes), count=len(votes), tally=tally_of(votes))  # fmt: skip


@router.post("/compare/{run}/vote")
def vote(request: Request, here: Here, run: Name, chosen: Annotated[str, Form()], rejected: Annotated[str, Form()]) -> Response:
    """Keep a vote, and go on with the next pair."""
    job = here.store.get(run)
    cells = {cell.secret: cell for cell in cells_of(here, job)}
    if chosen not in cells or rejected not in cells:
        raise not_found("picture", chosen)
    one, other = cells[chosen], cells[rejected]
    here.votes.add(job.id, one.prompt, one.seed, told_of(here, one), told_of(here, other))
    return show_pair(request, here, run)


@router.get("/compare/{run}/blind/{secret}")
def show_blind(here: Here, run: Name, secret: Name) -> Response:
    """A picture, under a name that says nothing of it."""
    for cell in cells_of(here, here.store.get(run)):
        if cell.secret == secret:
            return FileResponse(cell.path, media_type="image/png", content_disposition_type="inline", filename="picture.png")
    raise not_found("picture", secret)


def checkpoints_of(here: Studio, job: Job) -> list[Checkpoint]:
    """What a training has saved: the adapter first, then the checkpoints, the last first."""
    found = []
    for one in here.library.all(checkpoints=True):
        if one.path.parent == job.folder:
            found.append(Checkpoint(FINAL, "the adapter", one.id, float("inf")))
        elif one.path.parent.parent == job.folder and (number := re.search(r"(\d+)$", one.path.stem)):
            found.append(Checkpoint(f"step{int(number[1])}", f"step {int(number[1])}", one.id, int(number[1])))
    return sorted(found, key=lambda one: -one.step)


def recipe_of(here: Studio, job: Job) -> dict[str, Any]:
    """The recipe of a training, by flat names."""
    told = here.watch.of(job.id).kind("started")
    return told[-1].get("recipe", {}) if told else {}


def prompts_of(here: Studio, job: Job) -> list[str]:
    """Prompts to begin with: the first of the training's own, as it draws them."""
    recipe = recipe_of(here, job)
    words = str(recipe.get("trigger") or job.name), str(recipe.get("class") or "")
    return [fill(prompt, *words) for prompt in recipe.get("sample_prompts", [words[0]])[:2]]


def drawings_of(here: Studio, job: Job) -> list[Job]:
    """The jobs that draw, or have drawn, for the comparison of a training."""
    return here.store.list(kinds=("generate",), metadata={"compare": job.id})


def cells_of(here: Studio, job: Job) -> list[Cell]:
    """All pictures of the comparison, the first drawn first."""
    found: dict[tuple[Any, ...], Cell] = {}
    for drawing in sorted(drawings_of(here, job), key=lambda one: one.created_at):
        for record in here.watch.of(drawing.id).kind("picture"):
            cell = cell_of(drawing, Path(record["path"])) if record.get("number") is not None else None
            if cell:
                found[cell.prompt, cell.seed, cell.checkpoint, cell.strength] = cell
    return list(found.values())


def cell_of(drawing: Job, path: Path) -> Cell | None:
    """A picture as it says itself how it was drawn; None for one that is gone."""
    try:
        told = read_told(file := drawing.folder / path)
        use = told["adapters"][0]
        return Cell(told["prompt"], told["seed"], use["name"], float(use["strength"]), address(drawing, path), file)
    except (OSError, KeyError, IndexError, ValueError):
        return None


@lru_cache(4096)
def read_told(path: Path) -> Any:
    """What a picture says of itself; pictures of jobs do not change."""
    return read_record(path)


def grid_of(here: Studio, job: Job) -> dict[str, Any]:
    """The pictures by prompt and seed, checkpoint and strength; and what is still being drawn."""
    cells = cells_of(here, job)
    titles = {one.name: one for one in checkpoints_of(here, job)}
    rows = sorted({cell.checkpoint for cell in cells}, key=lambda name: -titles[name].step if name in titles else 0)
    columns = sorted({cell.strength for cell in cells})
    plots: dict[tuple[str, int], dict[tuple[str, float], Cell]] = {}
    for cell in cells:
        plots.setdefault((cell.prompt, cell.seed), {})[cell.checkpoint, cell.strength] = cell
    active = [one for one in drawings_of(here, job) if one.state in ACTIVE]
    failed = next((one for one in drawings_of(here, job) if one.state == "failed"), None)
    names = {name: titles[name].title if name in titles else name for name in rows}
    mark = f"{len(cells)}-{[(one.id, one.state, one.progress.get('doing')) for one in active]}-{failed and failed.id}"
    return {"plots": plots, "rows": rows, "names": names, "columns": columns, "active": active, "failed": failed,
            "cells": len(cells), "mark": hashlib.sha256(mark.encode()).hexdigest()[:16]}  # fmt: skip


def pair_of(cells: list[Cell], votes: list[dict[str, Any]]) -> tuple[Cell, Cell] | None:
    """Two pictures of the same prompt and seed that nobody has compared yet, in random order; None where there are none."""
    known = {frozenset((one["chosen"].get("path"), one["rejected"].get("path"))) for one in votes}
    pairs = [
        (one, other)
        for number, one in enumerate(cells)
        for other in cells[number + 1 :]
        if (one.prompt, one.seed) == (other.prompt, other.seed) and frozenset((one.url, other.url)) not in known
    ]
    if not pairs:
        return None
    pair = random.choice(pairs)
    return pair if random.random() < 0.5 else pair[::-1]


def told_of(here: Studio, cell: Cell) -> dict[str, Any]:
    """A picture in a vote: where it is, and how it was drawn."""
    of = {"checkpoint": cell.checkpoint, "strength": cell.strength, "drawn": read_told(cell.path)}
    return {"path": cell.url, "file": here.workspace.relative(cell.path), **of}


def tally_of(votes: list[dict[str, Any]]) -> list[tuple[str, float, int, int]]:
    """Checkpoint, strength, votes won and votes taken part in; the best share first."""
    won = Counter((one["chosen"]["checkpoint"], one["chosen"]["strength"]) for one in votes)
    lost = Counter((one["rejected"]["checkpoint"], one["rejected"]["strength"]) for one in votes)
    found = [(*key, won[key], won[key] + lost[key]) for key in won.keys() | lost.keys()]
    return sorted(found, key=lambda row: (-row[2] / row[3], -row[3]))
