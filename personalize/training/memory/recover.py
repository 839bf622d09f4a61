"""How a run fits into memory while it lives: tried, given way in, and gone back from.

probe_until_it_fits  a real step with a sample and a save, and down the ladder until that fits
step_down            memory ran out on the way: one rung down, and on from the last checkpoint
undo_step            a loss was not finite: what was learned since the last checkpoint is not to be trusted
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ...data.batches import generator
from ...models.model import Base
from ...recipe.adapter import EMBEDDING
from ...text import readable
from ...tuning.tunable import Tunable
from ..events import SteppedDown
from ..objectives.draws import timesteps
from ..objectives.objective import Inputs
from ..run import ActiveRun, peak_bytes
from ..step import gradients
from .apply import apply_plan
from .ladder import down, pieces
from .meter import counting, tensors_of
from .plan import MemoryPlan, estimate_of, too_large

PATIENCE = 3  # steps that may fail
MEMORY = 50  # steps after which a failed one is forgotten


def probe_until_it_fits(run: ActiveRun, batches: Callable[[], Iterable[Inputs]], sample_and_save: Callable[[], None]) -> None:
    """Try one real step of the largest batch, a sample and a save; give way, rung by rung, until that fits.

    Only where there is a budget. Leaves no trace. Raises TrainingError when the lowest rung does not fit.
    """
    budget = run.memory.budget
    while budget is not None:
        try:
            largest = max(batches(), key=lambda one: one.mean.numel())
            run.probe = probe(run, largest, sample_and_save)
            if run.probe <= budget:
                return
            why = f"the probe took {readable(run.probe)} of {readable(budget)}"
        except torch.OutOfMemoryError as error:
            why = first_sentence(error)
        _next_rung(run, why)


def probe(run: ActiveRun, inputs: Inputs, sample_and_save: Callable[[], None]) -> int:
    """Bytes that two steps (the second has the optimizer's moments), a sample and a save take. All is as before, to the bit."""
    before, base, opt = run.opt.state(), run.plan.base, run.opt
    run.learner.pieces = pieces(run.compute, run.plan.recipe.batch_size)
    devices = [base.device] if base.device.type == "cuda" else []
    batch = (inputs, lambda purpose: generator(0, purpose), lambda i: i)
    try:
        with torch.random.fork_rng(devices=devices), measure_peak(base, run.tunable) as peak:
            for _ in range(2):
                (values,) = gradients([run.learner], [[batch]])
                opt.step(0, values[-1])
            del values
            sample_and_save()
            return peak()
    finally:
        opt.skip()
        opt.load(before)


@contextlib.contextmanager
def measure_peak(base: Base, tunable: Tunable) -> Iterator[Callable[[], int]]:
    """Inside, a function tells the most bytes that tensors took so far, those that were there already among them."""
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
        torch.cuda.reset_peak_memory_stats(base.device)
        yield lambda: torch.cuda.max_memory_allocated(base.device)
        return
    models = [base.denoiser, base.vae, *(text.model for text in base.texts)]
    with counting(tensors_of(models)) as count:
        yield lambda: count.peak


# ---------------------------------------------------------------- on the way


def step_down(run: ActiveRun, why: str) -> SteppedDown:
    """Memory ran out: one rung down, and on from the last checkpoint. Raises TrainingError on the lowest rung."""
    what = _next_rung(run, why)
    run.opt.load(run.good.tensors)
    run.done, run.between = run.good.done, True
    run.failed = [step for step in run.failed if step <= run.done]
    run.plan.run.rewind(run.done)
    run.rewind()
    return SteppedDown(run.done, what, why, run.compute.record())


def _next_rung(run: ActiveRun, why: str) -> str:
    """Take the next rung; what gave way."""
    plan, budget = run.plan, run.memory.budget
    free_memory(run)
    step = down(run.compute, plan.recipe.fitting, plan.device)
    if step is None:
        raise too_large(plan, run.probe, budget, why)
    rung, compute = step
    apply_plan(plan.base, compute, plan.device)
    reasons = (*run.memory.why, f"{rung.name}: {why} ({rung.cost})")
    run.memory = MemoryPlan(compute, budget, None if budget is None else estimate_of(plan, compute), reasons)
    return rung.name


def free_memory(run: ActiveRun) -> None:
    """Drop gradients and whatever else a step that was broken off has left."""
    run.opt.skip()
    run.tunable.drop_gradients()
    gc.collect()
    if run.plan.device.type == "cuda":
        torch.cuda.empty_cache()


def undo_step(run: ActiveRun, losses: Sequence[float]) -> str:
    """Take back a step that was not finite, and say what was wrong.

    A gradient too large for float16's scale only lowers that. All else goes back to the last checkpoint; its steps are not
    taken again, for they would end the same.
    """
    cause = cause_of_failure(run, losses)
    run.opt.skip()
    if all(map(math.isfinite, losses)) and run.opt.lower_scale():
        return cause
    run.opt.load(run.good.tensors)
    run.failed = [step for step in run.failed if step > run.done - MEMORY] + [run.done]
    run.cause = cause
    return cause


# ---------------------------------------------------------------- messages


def cause_of_failure(run: ActiveRun, losses: Sequence[float]) -> str:
    """What was not finite in a step that failed: which images at which timesteps, the gradient, or the adapter itself."""
    spoiled = [name for name, p in run.opt.parameters.items() if not bool(p.isfinite().all())]
    if spoiled:
        return f"the adapter is not finite any more, {spoiled[0]} for one"
    plan, rows = run.plan, list[str]()
    for pictures, rng in run.seen:
        names = [plan.dataset.examples[i].path.name for i in pictures.tolist()]
        times = timesteps(len(names), plan.base.noise, rng, plan.recipe.objective).tolist()
        rows += [f"{name} at timestep {t}" for name, t in zip(names, times, strict=True)]
    if bad := [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]:
        return f"the loss of {', '.join(bad[:3])} was not finite"
    if run.opt.scale and not run.opt.scale.at_floor:
        return f"a gradient overflowed in float16: its scale is {run.opt.scale.value / 2:g} from now on"
    return "the gradient was not finite"


def failure_message(run: ActiveRun) -> tuple[str, str]:
    """What to say when too many steps failed, and what to try."""
    steps, recipe = ", ".join(map(str, run.failed)), run.plan.recipe
    words, lr = recipe.adapter.kind == EMBEDDING, max(recipe.optim.lr, recipe.optim.text_encoder_lr)
    flag, lr = ("--embedding-lr", recipe.optim.embedding_lr) if words else ("--lr", lr)
    other = " or --precision bfloat16 or float32" if run.compute.precision == "float16" else ""
    return (
        f"steps {steps} were not finite (the last: {run.cause}; computed in {run.compute.precision} at {flag} {lr:g}), "
        "so the run stopped; checkpoints before them are good",
        f"try a {flag} below {lr:g}{other}, with --fresh",
    )


def slowdown_message(run: ActiveRun, slower: float) -> str:
    """What to say of a run that became suddenly slow."""
    held = readable(peak_bytes(run.plan.base.device))
    return (
        f"steps take {slower:.1f} times as long as before, with at most {held} of memory in use: it may spill into slower "
        "memory, or another program is at work; close that, or stop and go on with a smaller --memory"
    )


def first_sentence(error: BaseException) -> str:
    """What an error says, without its advice."""
    return (str(error).split(". ")[0].splitlines() or ["out of memory"])[0] or "out of memory"
