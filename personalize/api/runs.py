"""A run that is trained while it is iterated over, and a run folder as a value: what Python gets, with the command's report."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.embedding import load_learned
from ..data.folder import read_folder
from ..errors import DataError, RecipeError, TrainingError, check_type
from ..recipe.fields import Recipe
from ..reports.kit.page import template
from ..reports.run import usage, write_report
from ..reports.run.pictures import inliner
from ..reports.run.read import Run as RunRecords
from ..reports.run.read import read_run
from ..reports.run.samples import before_and_after, example_prompt
from ..training import loop
from ..training.events import Event, Finished
from ..training.preflight import with_defaults

SHOWN = 6  # pairs of pictures that a notebook shows
SIDE = 192  # pixels


class Run:
    """The folder of a run: its adapter, its report, its pictures. In a notebook it shows what it has learned.

    run = personalize.Run("runs/rex")
    run.load() * 0.8          # the adapter as a value; run.adapter and run.report are files

    Raises DataError for a folder that is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        check_type(folder, (str, Path), "a run", 'its folder: p.Run("runs/rex")', DataError)
        self.folder = Path(folder).expanduser()
        self.records  # noqa: B018  # a folder that is none is told now

    @cached_property
    def records(self) -> RunRecords:
        """What the folder says, as values."""
        return read_run(self.folder)

    @property
    def adapter(self) -> Path:
        """The adapter's file; the newest checkpoint of a run that is not finished. Raises TrainingError where there is none."""
        if (found := self.records.adapter) is None:
            raise TrainingError(f"{self.folder} holds no adapter yet", "iterate over p.train(recipe) to its end")
        return found

    @property
    def report(self) -> Path:
        """The report, an HTML page; it is written if it is not there."""
        path = self.folder / "report.html"
        return path if path.is_file() else write_report(self.folder)

    @property
    def pictures(self) -> list[Path]:
        """The sample pictures, in the order in which they were drawn."""
        paths = [self.folder / record["path"] for record in (*self.records.samples, *self.records.sweeps)]
        return [path for path in dict.fromkeys(paths) if path.is_file()]

    def load(self) -> Adapter:
        """The adapter as a value; of an embedding, one that brings its word and changes no layer."""
        return load_learned(self.adapter)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Pictures of the base and of the adapter side by side, and where everything is."""
        rows = [
            (pair.title, [(label, picture) for label, picture in pair.frames if picture])
            for pair in before_and_after(self.records, inliner(self.folder), SIDE)[:SHOWN]
        ]
        report = self.folder / "report.html"
        files = {"adapter": self.records.adapter, "report": report if report.is_file() else None}
        return template(Path(__file__).parent).render(run=self, rows=rows, command=proposal(self.folder), **files)


class Training(Iterator[Event]):
    """The events of a training that goes on while they are asked for; `finish` asks for all, and returns the run.

    Closing it saves the state, and the same call goes on. At its end, metrics and report are written.
    """

    def __init__(self, recipe: Recipe, fresh: bool = False) -> None:
        self.recipe = recipe
        self._events = events_and_report(recipe, fresh)

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Stop, with the state saved."""
        self._events.close()

    def finish(self) -> Run:
        """Train to the end. Raises what `train` does."""
        for _ in self:
            pass
        return self.run

    @property
    def run(self) -> Run:
        """The run folder."""
        return Run(run_folder(self.recipe))


def train(recipe: Recipe, *, fresh: bool = False) -> Training:
    """Train an adapter and leave it, with its report and all that belongs to it, in the run folder, as `personalize train` does.

        for event in personalize.train(recipe):
            print(event)
        run = personalize.train(recipe).finish()    # or at once; run.adapter and run.report are files

    Goes on with what the run folder holds, unless `fresh`. Raises RecipeError for what is no recipe, PersonalizeError before
    anything expensive if something is wrong, and TrainingError if the run fails.
    """
    check_type(recipe, Recipe, "what is trained", 'a Recipe: p.train(p.resolve(folder="photos/rex", class_="dog"))', RecipeError)
    return Training(recipe, fresh)


def events_and_report(recipe: Recipe, fresh: bool = False) -> Generator[Event, None, None]:
    """What `training.loop.train` yields; before the last event the report is written."""
    with contextlib.closing(loop.train(recipe, fresh=fresh)) as events:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Finished):
                write_reports(run_folder(recipe), recipe.base)
            yield event


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run is."""
    output = recipe.output or with_defaults(recipe, read_folder(recipe.data)).output
    assert output
    return output


def write_reports(folder: Path, base: str) -> Path:
    """Metrics and report of a run folder; returns the report's path."""
    from ..reports.metrics import write_metrics  # with transformers, which takes a while

    write_metrics(folder, base)
    return write_report(folder)


def proposal(folder: Path) -> str:
    """The command that draws with a run's adapter, the same in the report and in the terminal; "" where there is none."""
    run = read_run(folder)
    return usage.generate_command(run, example_prompt(run)) if run.adapter else ""
