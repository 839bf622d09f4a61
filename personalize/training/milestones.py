"""What a run makes between steps and at its end: sample images, checkpoints, its state, the adapter with its companions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from PIL import Image

from ..adapters.contract import PrecisionError
from ..adapters.embedding import save_learned
from ..errors import TrainingError
from ..inference.pipeline import draw_images
from ..inference.png import save_picture
from ..inference.request import Request
from ..inference.sheet import enlarge
from ..io import atomic, write_text
from ..models.processes import share
from ..recipe.adapter import EMBEDDING, FULL
from ..tuning.tunable import Tunable
from .companions import write_companions, write_words
from .events import Chosen, Event, Sample, Saved, Sweep, Warned
from .inputs import training_batches
from .limits import find_strange_classes, show_reconstruction
from .memory.recover import probe_until_it_fits
from .metadata import describe_run, sidecar
from .preflight import RunPlan, is_drawn
from .run import ActiveRun, peak_bytes
from .selection import choose

LARGEST_AMONG = 32  # batches of which the probe takes the largest
SWEEP = (0.25, 0.5, 0.75, 1.25)  # strengths


def make_what_is_due(run: ActiveRun) -> Iterator[Event]:
    """Sample images and files that are due where the run stands. Doing it twice does no harm, so a run goes on with this."""
    plan, done = run.plan, run.done
    recipe, folder = plan.recipe, plan.run
    if done == 0:
        yield folder.record(show_reconstruction(plan, run.data.latents))
        for finding in find_strange_classes(plan.base, plan.dataset, plan.side):
            yield folder.record(Warned(0, finding.sentence))
    if done == 0 or is_due(done, recipe.sampling.sample_every, recipe.steps):
        yield from sample_images(run, done)
    if recipe.checkpoint_every and is_due(done, recipe.checkpoint_every, recipe.steps):
        yield save_checkpoint(run)


def state_is_due(run: ActiveRun) -> bool:
    """Whether the state is kept where the run stands."""
    return is_due(run.done, run.plan.recipe.checkpoint_every or 50, run.plan.recipe.steps)


def is_due(done: int, every: int, steps: int) -> bool:
    """Every so many steps (never, if 0), and after the last."""
    return done == steps or (done > 0 and every > 0 and done % every == 0)


def sample_images(run: ActiveRun, step: int) -> Iterator[Event]:
    """Draw the sample images that are not there yet, with what is attached, of `step` steps; the base's own, of step 0, first."""
    with run.tunable.off():
        yield from draw_missing(run.plan, 0)
    if step:
        yield from draw_missing(run.plan, step)


def draw_missing(plan: RunPlan, step: int) -> Iterator[Event]:
    """Draw the sample images of a step that are not there as the recipe wants them drawn."""
    there = plan.run.samples()
    missing = {name: one for name, one in plan.sample_requests().items() if drawn_path(plan, there, step, one) is None}
    for (name, request), image in zip(missing.items(), draw_images(plan.base, missing.values()), strict=True):
        path = save_picture(image, plan.run.sample(step, name), request.complete(plan.base))
        yield plan.run.record(Sample(step, request.prompt, request.seed, plan.run.relative(path), base=step == 0))


def drawn_path(plan: RunPlan, there: Mapping[tuple[int, str, int], list[Path]], step: int, request: Request) -> Path | None:
    """The sample image, of those that are `there`, that was drawn from just this request at a step."""
    own, whole = there.get((step, request.prompt, request.seed), ()), request.complete(plan.base)
    return next((path for path in own if is_drawn(path, whole)), None)


def save_checkpoint(run: ActiveRun) -> Event:
    """Write what is attached as the checkpoint of where the run stands."""
    return run.plan.run.record(save_adapter(run, run.done, run.plan.run.checkpoint(run.done)))


def save_adapter(run: ActiveRun, step: int, path: Path) -> Saved:
    """Write what is attached, an adapter of `step` steps, with the image of that step or the last one before it."""
    plan, adapter = run.plan, run.tunable.snapshot()
    vectors = [one for own in adapter.words.values() for one in own.values()]
    if not all(delta.finite() for delta in adapter.deltas.values()) or not all(bool(one.isfinite().all()) for one in vectors):
        rates = "a lower --lr" + " or --embedding-lr" * bool(vectors)
        raise TrainingError(f"the adapter is not finite after {step} steps; nothing was overwritten", f"try {rates}")
    peak = peak_bytes(plan.base.device) if plan.base.device.type == "cuda" else None
    memory = run.compute, run.facts()["estimate"], plan.regularization, peak
    about = describe_run(plan.recipe, plan.base, plan.dataset, plan.run.name, step, first_sample(plan, step), *memory)
    past = {"personalize.init": plan.init, "personalize.changes": plan.history}
    about |= {name: json.dumps(value, ensure_ascii=False) for name, value in past.items() if value}
    try:
        save_learned(adapter, path, plan.recipe.dialect, about, plan.recipe.save_precision)
    except PrecisionError as error:  # learned too little for it yet; what was trained must not be lost
        warnings.warn(f"{error.what}: kept as fp32 instead", stacklevel=2)
        save_learned(adapter, path, plan.recipe.dialect, about)
    return Saved(step, plan.run.relative(path))


def first_sample(plan: RunPlan, step: int) -> Path | None:
    """The image of the first sample prompt and seed at a step, or the last one before it."""
    there = plan.run.samples()
    for request in islice(plan.sample_requests(seeds=1).values(), 1):
        steps = [at for at, *pair in there if at <= step and pair == [request.prompt, request.seed]]
        if steps:
            last = max(steps)
            return drawn_path(plan, there, last, request) or there[last, request.prompt, request.seed][0]
    return None


def finish(run: ActiveRun) -> Iterator[Event]:
    """Choose a checkpoint, draw it at several strengths, and write it under its own name, with its companions for UIs."""
    plan, step, weight = run.plan, run.plan.recipe.steps, 1.0
    if plan.recipe.choosing.choose != "none":
        for event in choose(plan, run.data.latents, run.data.held, run.tunable):
            yield event
            if isinstance(event, Chosen):
                step, weight = event.step, event.weight
    if step != plan.recipe.steps and not is_due(step, plan.recipe.sampling.sample_every, plan.recipe.steps):
        yield from sample_images(run, step)  # what was chosen is shown
    yield from sweep_strengths(plan, run.tunable, step)
    if first := first_sample(plan, step):
        with Image.open(first) as image, atomic(plan.run.adapter.with_suffix(".png")) as temporary:
            enlarge(image, 256).save(temporary, format="PNG")
    write_text(plan.run.adapter.with_suffix(".json"), sidecar(plan.recipe, plan.base, plan.dataset, step, weight))
    yield plan.run.record(save_adapter(run, step, plan.run.adapter))
    if plan.recipe.adapter.kind == FULL:
        yield from write_companions(plan, step)
    if plan.words and plan.recipe.adapter.kind != EMBEDDING:
        yield from write_words(plan, step)


def sweep_strengths(plan: RunPlan, tunable: Tunable, step: int) -> Iterator[Event]:
    """Draw the first two prompts at several strengths; those at 0 and 1 are there already."""
    there, requests = plan.run.samples(), dict(islice(plan.sample_requests(seeds=1).items(), 2))

    def draw_at(strength: float) -> Iterator[dict[str, Path]]:
        paths = {name: plan.run.sweep(step, strength, name) for name in requests}
        with tunable.at(strength):
            draw_into(plan, paths, requests)
        yield paths

    def paths_at(step: int) -> dict[str, Path]:
        return {n: drawn_path(plan, there, step, one) or plan.run.sample(step, n) for n, one in requests.items()}

    drawn = dict(zip(SWEEP, share(plan.base, draw_at, SWEEP), strict=True))
    for strength, paths in {0.0: paths_at(0), **drawn, 1.0: paths_at(step)}.items():
        for name, request in requests.items():
            yield plan.run.record(Sweep(step, strength, request.prompt, request.seed, plan.run.relative(paths[name])))


def draw_into(plan: RunPlan, paths: Mapping[str, Path], requests: Mapping[str, Request]) -> None:
    """Draw each request whose image is not at its path yet: those of a step that is not taken anew are."""
    missing = [name for name, path in paths.items() if not is_drawn(path, requests[name].complete(plan.base))]
    for name, image in zip(missing, draw_images(plan.base, [requests[name] for name in missing]), strict=True):
        save_picture(image, paths[name], requests[name].complete(plan.base))


def probe_run(run: ActiveRun) -> None:
    """Probe the largest batch, a sample and a save, where there is a budget to keep to."""
    if run.memory.budget is None:
        return
    plan, path = run.plan, run.plan.run.folder / ".probe.safetensors"
    epoch = -(-len(plan.dataset.examples) // plan.recipe.batch_size)

    def sample_and_save() -> None:
        requests = list(plan.sample_requests(steps=1).values())[:8]
        with run.opt.holding_average():
            for _ in draw_images(plan.base, requests) if requests else ():
                pass
            try:
                run.tunable.save(path, plan.recipe.dialect)
            finally:
                path.unlink(missing_ok=True)

    probe_until_it_fits(
        run, lambda: islice(training_batches(plan, run.data, 0, run.tunable.off), min(epoch, LARGEST_AMONG)), sample_and_save
    )
    run.rewind()
