"""What a run makes between steps and at its end: sample images, checkpoints, its state, the adapter with its companions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image

from ..adapters.files import PrecisionError
from ..errors import TrainingError
from ..inference.pipeline import draw_images
from ..inference.png import save_picture
from ..inference.sheet import enlarge
from ..io import atomic, write_text
from ..tuning.tunable import Tunable
from .events import Chosen, Event, Sample, Saved, Sweep, Warned
from .inputs import training_batches
from .limits import show_reconstruction, unknown_class, unlike_class
from .memory.recover import probe_until_it_fits
from .metadata import describe_run, sidecar
from .preflight import RunPlan
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
        for concern in filter(None, (unknown_class(plan) or unlike_class(plan),)):
            yield folder.record(Warned(0, concern))
    if done == 0 or is_due(done, recipe.sampling.sample_every, recipe.steps):
        yield from sample_images(plan, done)
    if recipe.checkpoint_every and is_due(done, recipe.checkpoint_every, recipe.steps):
        yield folder.record(save_adapter(run, done, folder.checkpoint(done)))
    if is_due(done, recipe.checkpoint_every or 50, recipe.steps):
        run.keep()


def is_due(done: int, every: int, steps: int) -> bool:
    """Every so many steps (never, if 0), and after the last."""
    return done == steps or (done > 0 and every > 0 and done % every == 0)


def sample_images(plan: RunPlan, done: int) -> Iterator[Event]:
    """Draw the sample images; those of step 0 show the base, for an adapter starts as nothing."""
    pairs = sample_pairs(plan)
    for (p, s), image in zip(pairs, draw_samples(plan, pairs), strict=True):
        path, request = plan.run.sample(done, p, s), plan.sample_request(p, s)
        save_picture(image, path, request.complete(plan.base))
        yield plan.run.record(Sample(done, request.prompt, request.seed, plan.run.relative(path), base=done == 0))


def sample_pairs(plan: RunPlan) -> list[tuple[int, int]]:
    """Every sample prompt's number with every seed's."""
    return [(p, s) for p in range(len(plan.prompts)) for s in range(len(plan.recipe.sampling.sample_seeds))]


def draw_samples(plan: RunPlan, pairs: list[tuple[int, int]], steps: int = 0) -> Iterator[Image.Image]:
    """Sample images for pairs of (prompt, seed) numbers, with what is attached now; in the recipe's steps, or in fewer."""
    fewer = {"steps": steps} if steps else {}
    return draw_images(plan.base, [plan.sample_request(p, s, **fewer) for p, s in pairs])


def save_adapter(run: ActiveRun, step: int, path: Path) -> Saved:
    """Write what is attached, an adapter of `step` steps, with the image of that step or the last one before it."""
    plan, adapter = run.plan, run.tunable.snapshot()
    if not all(delta.finite() for delta in adapter.deltas.values()):
        raise TrainingError(f"the adapter is not finite after {step} steps; nothing was overwritten", "try a lower --lr")
    first = next((image for earlier in range(step, -1, -1) if (image := plan.run.sample(earlier, 0, 0)).is_file()), None)
    peak = peak_bytes(plan.base.device) if plan.base.device.type == "cuda" else None
    memory = run.compute, run.facts()["estimate"], plan.regularization, peak
    about = describe_run(plan.recipe, plan.base, plan.dataset, plan.run.name, step, first, *memory)
    try:
        adapter.save(path, plan.recipe.dialect, about, plan.recipe.save_precision)
    except PrecisionError as error:  # learned too little for it yet; what was trained must not be lost
        warnings.warn(f"{error.what}: kept as fp32 instead", stacklevel=2)
        adapter.save(path, plan.recipe.dialect, about)
    return Saved(step, plan.run.relative(path))


def finish(run: ActiveRun) -> Iterator[Event]:
    """Choose a checkpoint, draw it at several strengths, and write it under its own name, with its companions for UIs."""
    plan, step, weight = run.plan, run.plan.recipe.steps, 1.0
    if plan.recipe.choosing.choose != "none":
        for event in choose(plan, run.data.latents, run.data.held, run.tunable):
            yield event
            if isinstance(event, Chosen):
                step, weight = event.step, event.weight
    if step != plan.recipe.steps and not is_due(step, plan.recipe.sampling.sample_every, plan.recipe.steps):
        yield from sample_images(plan, step)  # what was chosen is shown
    yield from sweep_strengths(plan, run.tunable, step)
    first = plan.run.sample(step, 0, 0)
    if first.is_file():
        with Image.open(first) as image, atomic(plan.run.adapter.with_suffix(".png")) as temporary:
            enlarge(image, 256).save(temporary, format="PNG")
    write_text(plan.run.adapter.with_suffix(".json"), sidecar(plan.recipe, plan.base, plan.dataset, step, weight))
    yield plan.run.record(save_adapter(run, step, plan.run.adapter))


def sweep_strengths(plan: RunPlan, tunable: Tunable, step: int) -> Iterator[Event]:
    """Draw the first two prompts at several strengths; those at 0 and 1 are there already."""
    pairs = [(p, 0) for p in range(len(plan.prompts[:2])) if plan.recipe.sampling.sample_seeds]
    for strength in (0.0, *SWEEP, 1.0):
        with tunable.at(strength):
            images = list(draw_samples(plan, pairs)) if strength in SWEEP else []
        for i, (p, s) in enumerate(pairs):
            request = plan.sample_request(p, s)
            path = plan.run.sweep(strength, p, s) if images else plan.run.sample(step if strength else 0, p, s)
            if images:
                save_picture(images[i], path, request.complete(plan.base))
            yield plan.run.record(Sweep(step, strength, request.prompt, request.seed, plan.run.relative(path)))


def probe_run(run: ActiveRun) -> None:
    """Probe the largest batch, a sample and a save, where there is a budget to keep to."""
    if run.memory.budget is None:
        return
    plan, path = run.plan, run.plan.run.folder / ".probe.safetensors"
    epoch = -(-len(plan.dataset.examples) // plan.recipe.batch_size)

    def sample_and_save() -> None:
        pairs = sample_pairs(plan)
        for _ in draw_samples(plan, pairs[:8], steps=1) if pairs else ():
            pass
        try:
            run.tunable.save(path, plan.recipe.dialect)
        finally:
            path.unlink(missing_ok=True)

    probe_until_it_fits(run, lambda: islice(training_batches(plan, run.data, 0), min(epoch, LARGEST_AMONG)), sample_and_save)
    run.rewind()
