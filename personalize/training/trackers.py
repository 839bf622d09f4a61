"""Other programs that show a run's figures and pictures while it goes on: rows of `registry.table("trackers")`.

What they are told is made of the run's events, by `figures_of` and `picture_of`, alike for all; their steps are the run's.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .. import registry
from ..errors import RecipeError
from ..recipe.rule import missing_package
from ..recipe.settings import flatten
from .events import Encoded, Event, Judged, Sample, Scored, Started, Step, Sweep, Warned
from .rundir import Run

if TYPE_CHECKING:
    from ..recipe.fields import Recipe

Numbered = tuple[int, Event]


class Board(Protocol):
    """Where one run is shown."""

    def figures(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, path: Path, caption: str, step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tracker:
    """A program that shows runs. `open` takes a run, its recipe and the number of steps that are done."""

    open: Callable[[Run, Recipe, int], Board]
    package: str  # that it is imported from
    extra: str = "trackers"  # of ours that brings it
    error: str = ""  # the name of the package's own kind of error, where it has one

    def failures(self) -> tuple[type[Exception], ...]:
        """What goes wrong in another program: a full disk, a server that is gone, a key that is not known."""
        own = [getattr(importlib.import_module(self.package), self.error)] if self.error else []
        return (OSError, RuntimeError, ValueError, TypeError, *own)

    def missing_package(self, name: str) -> RecipeError | None:
        """Where its package is missing: what to say of that."""
        return missing_package(f"--trackers {name}", self.package, self.extra)


def check_trackers(names: Iterable[str]) -> None:
    """Raise RecipeError for a tracker that there is none of, or whose package is missing."""
    for name in names:
        if missing := registry.table("trackers")[name].missing_package(name):
            raise missing


# ---------------------------------------------------------------- what is told of an event


def figures_of(event: Event) -> dict[str, float]:
    """An event's figures by the names that they are shown under; those that are not known are left out."""
    match event:
        case Step() if not event.skipped:
            rates = {name: getattr(event, name) for name in ("text_encoder_lr", "embedding_lr") if getattr(event, name)}
            told = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, "seconds": event.seconds} | rates
            group = "train"
        case Scored() if event.strength == 1:
            told = {name: getattr(event, name) for name in ("fit", "validation", "drift", "contrast", "score")}
            group = "scored"
        case Judged():
            told = {name: getattr(event, name) for name in ("value", "low", "high", "identity", "fidelity", "leak", "kept")}
            group = "judged"
        case _:
            return {}
    return {f"{group}/{name}": float(value) for name, value in told.items() if math.isfinite(value)}


def picture_of(event: Event) -> tuple[str, str, str] | None:
    """An event's picture: the name it is shown under, its path in the run folder, and a caption."""
    match event:
        case Sample():
            return f"samples/{event.prompt}, seed {event.seed}", event.path, event.prompt
        case Sweep():
            return f"strength {event.strength:g}/{event.prompt}, seed {event.seed}", event.path, event.prompt
        case Judged() if event.path:
            return "judged", event.path, f"strength {event.strength:g}"
        case Encoded():
            return "encoded and decoded by the base", event.path, event.concern
    return None


def show(board: Board, event: Event, run: Run) -> None:
    """Tell a board what an event says."""
    step = getattr(event, "step", 0)
    if figures := figures_of(event):
        board.figures(figures, step)
    if (found := picture_of(event)) and (run.folder / found[1]).is_file():
        name, path, caption = found
        board.picture(name, run.folder / path, caption, step)
    if isinstance(event, Warned):
        board.text("warning", event.text, step)
    if isinstance(event, Started):
        board.text("recipe", json.dumps(event.recipe, indent=2, ensure_ascii=False), event.resumed)


# ---------------------------------------------------------------- a run's events, told as they come


def track(
    events: Generator[Numbered, None, None], runs: Mapping[int, tuple[Run, Recipe, int]]
) -> Generator[Numbered, None, None]:
    """Pass on the events of runs by number (run, recipe, steps done), and show each on the boards that its recipe names.

    A board that fails is named in a warning and told nothing more: no run ends for that.
    """
    boards: dict[int, dict[str, Board]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(events))
        for number, (run, recipe, done) in runs.items():
            boards[number] = {}
            for name in recipe.trackers:
                row = registry.table("trackers")[name]
                try:
                    board = row.open(run, recipe, done)
                except row.failures() as error:
                    yield number, run.record(Warned(done, failure(name, error)))
                    continue
                boards[number][name] = board
                stack.callback(close, row, board)
        for number, event in events:
            told: list[Event] = [event]
            for one in told:  # a board's failure is shown on the others
                told += tell(boards[number], one, runs[number][0])
            yield number, event
            for warning in told[1:]:
                yield number, runs[number][0].record(warning)


def tell(boards: dict[str, Board], event: Event, run: Run) -> Iterator[Warned]:
    """Show an event on boards; one that fails is taken out, and a warning says so."""
    for name, board in list(boards.items()):
        try:
            show(board, event, run)
        except registry.table("trackers")[name].failures() as error:
            del boards[name]
            yield Warned(getattr(event, "step", 0), failure(name, error))


def failure(name: str, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{name} failed and is told nothing more: {said or type(error).__name__}"


def close(row: Tracker, board: Board) -> None:
    """End a board; what another program meets then is no concern of a run that has ended."""
    with contextlib.suppress(*row.failures()):
        board.close()


# ---------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Event files in the run folder's `tensorboard/`: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, run: Run, recipe: Recipe, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=done + 1 if done else None)

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, caption: str, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as opened:
            self.writer.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)  # as Markdown's code

    def close(self) -> None:
        self.writer.close()


# ---------------------------------------------------------------- Weights & Biases


class WandB:
    """A run of the project `personalize`, or of what WANDB_PROJECT says; with WANDB_MODE=offline, in the run folder's `wandb/`.

    The folder keeps its id, so that a run that goes on does so there as well. W&B's own step only grows, and a run may go back
    to a checkpoint: figures are drawn over `step`.
    """

    def __init__(self, run: Run, recipe: Recipe, done: int) -> None:
        import wandb

        self.wandb, known = wandb, run.folder / "wandb" / "personalize-id"
        if not (done and known.is_file()):
            known.parent.mkdir(exist_ok=True)
            known.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "personalize"),
            name=run.name,
            id=known.read_text(),
            resume="allow",
            dir=str(run.folder.absolute()),
            config=flatten(recipe),
            reinit="create_new",  # runs can go side by side
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def picture(self, name: str, path: Path, caption: str, step: int) -> None:
        self.run.log({name: self.wandb.Image(str(path), caption=caption), "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        self.run.summary[name] = text

    def close(self) -> None:
        self.run.finish()


TENSORBOARD = Tracker(TensorBoard, "tensorboard")
WANDB = Tracker(WandB, "wandb", error="Error")
