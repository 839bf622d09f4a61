"""Many runs seen from a terminal: one bar for all, a line for each that ends, and at the end what became of every folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..errors import PersonalizeError
from ..io import write_text
from ..lock import hold
from ..pictures.files import SHEET, SUMMARY
from ..recipe.fields import Recipe
from ..text import duration, readable
from ..training.events import Event, Failed, Finished, Shared, Started, Step, Stopped, Warned, parse
from ..training.verdict import describe
from .messages import answer, print_warning, strict
from .progress import doing_after, error_change
from .queueing import events_of
from .view import View, follow, terminal

if TYPE_CHECKING:
    from ..jobs import Job, Store

SHEET_PROMPTS = 3  # sample prompts on the sheet
SIDE = 128  # pixels of a picture on it


def train_many(
    recipes: Sequence[Recipe],
    backend: str,
    *,
    place: Path,
    fresh: bool = False,
    together: int | None = None,
    refused: Mapping[Path, str] | None = None,
) -> int:
    """Train many runs on a backend, write a report for each, and a summary and a sheet of all into `place`.

    `refused` are folders that have no recipe, and why: they are in the summary too. Returns the exit code: 0, 2 if some failed,
    130 after Ctrl-C. Raises RecipeError for a backend that there is not, OutputError where another batch writes into `place`.
    """

    def events() -> Iterator[tuple[int, Event]]:
        from ..backends.backend import get_backend  # torch comes with it

        return get_backend(backend).run(recipes, fresh=fresh, together=together)

    with hold(place, "wait for it, or choose another --output"):
        return follow(BatchView(terminal(), recipes, place, refused or {}), events)


def follow_job(store: Store, job: Job, recipes: Sequence[Recipe], place: Path, refused: Mapping[Path, str]) -> int:
    """The same of a batch that a server does."""

    def read(record: Mapping[str, Any]) -> tuple[int, Event] | None:
        event = parse(dict(record))
        return None if event is None or "number" not in record else (record["number"], event)

    def events() -> Iterator[tuple[int, Event]]:
        state = yield from events_of(store, job, read)
        view.stopped = state != "succeeded"

    view = BatchView(terminal(), recipes, place, refused, writes=False)
    return follow(view, events)


@dataclass
class Standing:
    """What became of a folder so far; its fields are what summary.json says of it."""

    name: str
    folder: Path
    run: Path | None
    state: str = "not begun"  # then: training, stopped, done, done before, failed
    step: int = 0
    steps: int = 0
    adapter: Path | None = None
    report: Path | None = None
    chosen: Mapping[str, Any] | None = None  # the record of the checkpoint that became the adapter, if they were judged
    verdict: str = ""  # what images of it say
    error: str = ""

    def holds_older(self) -> bool:
        """Whether a run that gave no adapter now has one of before in its folder."""
        return self.adapter is None and self.run is not None and any(self.run.glob("*.safetensors"))

    def score(self) -> str:
        """How the chosen checkpoint was judged, in words; "" where it was not."""
        if not self.chosen:
            return f"step {self.step} of {self.steps}"
        known = {name: value for name in ("validation", "drift") if isinstance(value := self.chosen.get(name), int | float)}
        validation = f", validation {error_change(known['validation'])}" if "validation" in known else ""
        drift = f", drift {known['drift']:.2f}" if "drift" in known else ""
        return f"step {self.chosen['step']} of {self.steps}{validation}{drift}" + (f", {self.verdict}" if self.verdict else "")

    def line(self, width: int) -> str:
        """One line of the summary."""
        detail = {"failed": self.error, "not begun": ""}.get(self.state, self.score())
        where = f": {self.adapter}" if self.adapter else ""
        return f"  {self.name:<{width}}  {self.state}" + (f", {detail}" if detail else "") + where


class BatchView(View):
    """Many runs: one bar for all of their steps, a line for each run that ends, a summary and one sheet of pictures."""

    def __init__(
        self, console: Console, recipes: Sequence[Recipe], place: Path, refused: Mapping[Path, str], writes: bool = True
    ) -> None:
        super().__init__(console, "steps", "loading", writes)
        self.recipes, self.place = recipes, place
        self.runs = [Standing(name_of(one.data.folder), one.data.folder, one.output, steps=one.steps) for one in recipes]
        self.refused = [Standing(name_of(folder), folder, None, "failed", error=why) for folder, why in refused.items()]
        self.fleets: list[Shared] = []
        self.warnings: set[str] = set()  # those that were shown
        self.task = self.bar.add_task(self.doing, total=sum(recipe.steps for recipe in recipes))

    def __enter__(self) -> View:
        super().__enter__()
        self.bar.start()
        return self

    def show(self, event: tuple[int, Event]) -> None:
        number, what = event
        run, recipe = self.runs[number], self.recipes[number]
        match what:
            case Shared():
                self.fleets.append(what)
                self.print(memory_line(what))
            case Started():
                run.state, run.step = "training", what.resumed
                for warning in what.warnings:
                    self.print(f"{run.name}: warning: {warning}")
            case Step():
                run.state, run.step = "training", what.step
            case Warned() if what.text not in self.warnings:
                self.warnings.add(what.text)
                self.print(f"warning: {what.text}")
            case Failed():
                run.state, run.error = "failed", what.message
                self.print(f"{run.name}: failed: {what.message}")
            case Stopped():
                run.state, run.step, self.stopped = "stopped", what.step, True
                self.print(f"{run.name}: stopped after step {what.step}")
            case Finished():
                self._show_end(run, recipe, what)
        assert run.run
        self.reports.show(run.run, what)
        doing = doing_after(what, recipe)
        active = sum(one.state == "training" and one.step < one.steps for one in self.runs)
        self.begin(f"training {active}" if doing == "training" and active else f"{run.name}: {doing}" if doing else self.doing)
        self.bar.update(self.task, completed=self.progress()[0])

    def _show_end(self, run: Standing, recipe: Recipe, event: Finished) -> None:
        from ..api.runs import write_reports
        from ..reports.run.read import read_run
        from ..reports.run.verdict import judgement

        assert run.run
        run.state, run.step, run.adapter = "done before" if event.again else "done", run.steps, run.run / event.path
        run.report = run.run / "report.html"
        if self.reports.writes and not (event.again and run.report.is_file()):
            self.begin(f"{run.name}: writing the report")
            write_reports(run.run, recipe.base)
        read = read_run(run.run)
        run.chosen, found = read.chosen, judgement(read)
        run.verdict = describe(found).headline if found else ""
        if event.again:  # the summary says so
            return
        chosen = f", step {run.chosen['step']} chosen" if run.chosen else ""
        facts = f"{run.adapter} ({readable(run.adapter.stat().st_size)}), {event.step} steps{chosen}"
        self.print(f"{run.name}: done: {facts}, {duration(event.seconds)} after the start")

    def progress(self) -> tuple[int, int]:
        done = sum(one.steps if one.state == "failed" else one.step for one in self.runs)
        return done, sum(one.steps for one in self.runs)

    def folders_to_finish(self) -> list[Path]:
        begun = [run.run for run in self.runs if run.run and run.step and run.state in ("training", "stopped")]
        return list(dict.fromkeys(self.place if run.parent == self.place else run for run in begun))

    def standing(self) -> str:
        self._print_summary()
        return f"stopped; {sum(run.adapter is not None for run in self.runs)} of {len(self.runs) + len(self.refused)} are done."

    def finish(self) -> int:
        """What became of every folder, and a sheet of them."""
        failed = [run.name for run in (*self.runs, *self.refused) if run.state == "failed"]
        whole, own = len(self.runs) + len(self.refused), sum(run.adapter is not None for run in self.runs)
        older = sum(run.holds_older() for run in self.runs)
        self._print_summary()
        before = f", {older} of them from before" if older else ""
        wrong = f"; {len(failed)} failed: {', '.join(failed)}" if failed else ""
        self.print(f"{own + older} of {whole} adapters are there{before}{wrong}")
        if path := self.write_sheet():
            self.print(f"pictures {path}")
        answer(sheet=path)
        return 2 if failed else 0

    def _print_summary(self) -> None:
        """A line for each folder; and summary.json, if anything was written at all."""
        every = [*self.runs, *self.refused]
        for one in every:
            self.print(one.line(max(len(one.name) for one in every)))
        records = strict([vars(one) for one in every])
        fleets = strict([asdict(one) | {"peak": one.peak} for one in self.fleets])
        answer(runs=records, fleets=fleets, summary=None)
        if any(one.run and one.run.is_dir() for one in self.runs):
            try:
                path = write_text(self.place / SUMMARY, json.dumps({"runs": records, "fleets": fleets}, indent=1) + "\n")
            except PersonalizeError as error:  # a full disk: the adapters are what counts
                print_warning(str(error))
                return
            answer(summary=path)
            self.print(f"summary  {path}")

    def write_sheet(self) -> Path | None:
        """A row per run, with its prompts and how it was judged: a training picture, then the base's and the adapter's picture of
        each prompt. None where no sample was drawn."""
        from PIL import Image

        from ..data.folder import read_folder
        from ..inference.sheet import contact_sheet, save_sheet

        cells, rows = list[Image.Image](), list[str]()
        drawn = [(run, recipe, sample_pairs(run)) for run, recipe in zip(self.runs, self.recipes, strict=True) if run.adapter]
        most = max((len(pairs) for *_, pairs in drawn), default=0)
        for run, recipe, pairs in drawn:
            if not pairs:
                continue
            prompts = "   ".join(f"{i}: {prompt}" for i, (prompt, *_) in enumerate(pairs, 1))
            rows.append(f"{run.name}: {run.score()}\n{prompts}")
            paths = [read_folder(recipe.data).examples[0].path, *(path for _, *both in pairs for path in both)]
            cells += [*map(cell, paths), *[blank()] * (1 + 2 * most - len(paths))]
        if not cells:
            return None
        heads = ("learned from", *(f"{i} {whose}" for i in range(1, most + 1) for whose in ("base", "adapter")))
        sheet = contact_sheet(cells, len(heads), rows=rows, heads=heads, side=SIDE)
        return save_sheet(sheet, self.place / SHEET)


def memory_line(fleet: Shared) -> str:
    """What members that train side by side take: the base once, and each of them."""
    base, adapter, batch, both = map(readable, (fleet.base, fleet.adapter, fleet.batch, fleet.adapter + fleet.batch))
    count, each = f"{fleet.members} members at once", f"{both} for each member"
    if fleet.at_once < fleet.members:
        count = f"{fleet.members} members, {fleet.at_once} at a time"
        each = f"{adapter} for each member, {batch} for each at a time"
    return f"{count}: {base} for the base, {each}; {readable(fleet.peak)} by estimate"


def name_of(folder: Path) -> str:
    """The name of a folder of pictures."""
    return folder.resolve().name


def sample_pairs(run: Standing) -> list[tuple[str, Path | None, Path | None]]:
    """The first prompts of a run with the base's picture and the adapter's, of the first seed."""
    from ..reports.run.read import read_run
    from ..reports.run.samples import samples_by_prompt

    assert run.run
    records, pairs = read_run(run.run), dict[str, tuple[Path | None, Path | None]]()
    shown = int(run.chosen["step"]) if run.chosen else run.step
    for (prompt, *_), by_step, base in samples_by_prompt(records):
        own = by_step.get(shown) or (by_step[max(by_step)] if by_step else None)
        pairs.setdefault(prompt, (run.run / base if base else None, run.run / own if own else None))
    return [(prompt, *both) for prompt, both in pairs.items()][:SHEET_PROMPTS]


def cell(path: Path | None) -> Any:
    """A picture as the sheet shows it; a blank one where there is none."""
    from PIL import Image

    from ..inference.sheet import enlarge

    if path is None or not path.is_file():
        return blank()
    with Image.open(path) as picture:
        return enlarge(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), SIDE)


def blank() -> Any:
    """A place without a picture."""
    from PIL import Image

    return Image.new("RGB", (SIDE, SIDE), "#eeeeee")
