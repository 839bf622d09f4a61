"""How a run fits into memory while it lives: chosen from shapes, tried, given way in, and gone back from.

plan       from shapes, before anything is on the GPU
settle     one probe, a real step with a sample and a save, and down the ladder until it fits
lower      memory ran out on the way: one rung down, and on from the last checkpoint
skip       a loss was not finite: what was learned since the last checkpoint is not to be trusted
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...data.batches import generator
from ...errors import TrainingError
from ...models.model import Base
from ...text import readable
from ...tuning.attach import Attached
from ..events import SteppedDown
from ..objectives import denoise as objectives
from ..objectives.denoise import Inputs, Loss, Rng
from ..optimizers import Optimizer
from ..preflight import Job, parts
from ..rundir import State
from ..step import gradients
from .apply import place
from .estimate import Configs, Estimate, Load, estimate
from .ladder import LADDER, Fit, Rung, down, first, pieces
from .meter import counting, tensors_of
from .pace import Pace

PATIENCE = 3  # steps that may fail
MEMORY = 50  # steps after which a failed one is forgotten
RESERVE = 2**28  # bytes of a GPU that are left to kernels and fragments, beside a twentieth
GOOD = "good "  # begins the names of what an interrupted run would go back to


@dataclass(frozen=True)
class Choice:
    """What was chosen from shapes, and why."""

    fit: Fit
    budget: int | None = None  # bytes that may be taken; None: no matter
    estimate: Estimate | None = None
    why: tuple[str, ...] = ()


@dataclass
class Work:
    """A run in progress: what it works with, and where it stands."""

    job: Job
    attached: Attached
    opt: Optimizer
    loss: Loss
    choice: Choice
    fit: Fit
    good: State  # of the last checkpoint
    done: int = 0
    failed: list[int] = field(default_factory=list)  # steps that were not finite, of the last MEMORY
    probed: int | None = None  # bytes that the probe took
    pace: Pace = field(default_factory=Pace)

    def state(self) -> State:
        """Where the run stands now."""
        return State(self.done, self.job.about, self.opt.state(), {"fit": asdict(self.fit), "failed": self.failed})

    def keep(self) -> None:
        """Save the state, unless it is spoiled, and go back to it from now on."""
        state = self.state()
        if all(bool(tensor.isfinite().all()) for tensor in state.tensors.values()):
            self.job.run.save_state(state)
            self.good = state

    def stop(self) -> None:
        """Save the state of an interrupted run, with that of its last checkpoint: what it would go back to is the same later."""
        state = self.state()
        if self.good.done < self.done:
            state.tensors.update({GOOD + name: tensor for name, tensor in self.good.tensors.items()})
            state.more["good"] = self.good.done
        self.job.run.save_state(state)

    def facts(self) -> dict[str, Any]:
        """How the run fits, for events, the report and the file."""
        told = self.choice.estimate
        return {
            "words": self.fit.words(self.job.recipe.batch_size),
            **asdict(self.fit),
            "estimate": None if told is None else {**asdict(told), "peak": told.peak},
            "probe": self.probed,
            "budget": self.choice.budget,
            "why": list(self.choice.why),
        }


def begin(job: Job, attached: Attached, choice: Choice) -> Work:
    """A run at its beginning, or where its state left it."""
    recipe, fit = job.recipe, choice.fit
    opt = Optimizer(attached.groups(), recipe.optim, recipe.steps, scaled=fit.precision == "float16")
    loss = objectives.build(recipe.objective, job.base.noise, attached.off)
    work = Work(job, attached, opt, loss, choice, fit, State(0, job.about, opt.state()))
    if job.state:
        opt.load(job.state.tensors)
        work.done, work.failed = job.state.done, list(job.state.more.get("failed", []))
        behind = {name.removeprefix(GOOD): one for name, one in job.state.tensors.items() if name.startswith(GOOD)}
        work.good = State(job.state.more["good"], job.about, behind) if behind else job.state
    return work


# ---------------------------------------------------------------- before the run


def plan(job: Job) -> Choice:
    """The first rung that fits by its shapes. Raises TrainingError if none does: nothing was loaded onto the GPU yet."""
    wanted, device, before = job.recipe.fitting, job.device, (job.state.more.get("fit") if job.state else None)
    fit = first(wanted, job.recipe.batch_size, device, Fit(**before) if before else None)
    budget = budget_of(job)
    if budget is None:
        return Choice(fit)
    taken: list[tuple[Rung, Fit]] = []  # with the Fit above each
    while (told := estimate_of(job, fit)).peak > budget:
        step = down(fit, wanted, device)
        if step is None:
            raise too_large(job, told.peak, budget)
        taken.append((step[0], fit))
        fit = step[1]
    why = []
    for rung, above in taken:  # what did not help is taken back
        if estimate_of(job, back := replace(fit, **{rung.field: getattr(above, rung.field)})).peak <= budget:
            fit = back
        else:
            need = readable(estimate_of(job, back).peak)
            why.append(f"{rung.name}: without it, {need} of {readable(budget)} by estimate ({rung.cost})")
    return Choice(fit, budget, estimate_of(job, fit), tuple(why))


def estimate_of(job: Job, fit: Fit) -> Estimate:
    """What the run would take. Remembered on disk."""
    return estimate(Configs.of(job.base), load_of(job), fit, parts(job.recipe, job.base))


def budget_of(job: Job) -> int | None:
    """Bytes that the run may take: as the recipe says, else what is free on the GPU, less a margin; None on a CPU."""
    if job.recipe.fitting.budget is not None or job.device.type != "cuda":
        return job.recipe.fitting.budget
    free = torch.cuda.mem_get_info(job.device)[0] + torch.cuda.memory_reserved(job.device)
    return int(0.95 * free) - RESERVE


def load_of(job: Job) -> Load:
    """What the run asks of the base at its largest."""
    side, sampling = job.side // job.base.factor, job.recipe.sampling
    drawn = min(8, max(1, len(sampling.sample_prompts) * len(sampling.sample_seeds)))
    return Load(job.recipe, side, side, job.windows, drawn)


def settle(work: Work, batches: Callable[[], Iterable[Inputs]], sample_and_save: Callable[[], None]) -> None:
    """Try one real step of the largest batch, a sample and a save; give way, rung by rung, until that fits.

    Only where there is a budget. Leaves no trace. Raises TrainingError when the lowest rung does not fit.
    """
    budget = work.choice.budget
    while budget is not None:
        try:
            largest = max(batches(), key=lambda one: one.mean.numel())
            work.probed = probe(work, largest, sample_and_save)
            if work.probed <= budget:
                return
            why = f"the probe took {readable(work.probed)} of {readable(budget)}"
        except torch.OutOfMemoryError as error:
            why = first_sentence(error)
        _step_down(work, why)


def probe(work: Work, inputs: Inputs, sample_and_save: Callable[[], None]) -> int:
    """Bytes that two steps (the second has the optimizer's moments), a sample and a save take. All is as before, to the bit."""
    before, base, opt, n = work.opt.state(), work.job.base, work.opt, pieces(work.fit, work.job.recipe.batch_size)
    devices = [base.device] if base.device.type == "cuda" else []
    batch = (inputs, lambda purpose: generator(0, purpose), lambda i: i)
    try:
        with torch.random.fork_rng(devices=devices), measured(base, work.attached) as peak:
            for _ in range(2):
                told = gradients(base.denoise, work.loss, work.attached, opt, n, [batch])
                opt.step(0, told[-1])
            del told
            sample_and_save()
            return peak()
    finally:
        opt.skip()
        opt.load(before)


@contextlib.contextmanager
def measured(base: Base, attached: Attached) -> Iterator[Callable[[], int]]:
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


def lower(work: Work, why: str) -> SteppedDown:
    """Memory ran out: one rung down, and on from the last checkpoint. Raises TrainingError on the lowest rung."""
    what = _step_down(work, why)
    work.opt.load(work.good.tensors)
    work.done = work.good.done
    work.failed = [step for step in work.failed if step <= work.done]
    work.job.run.rewind(work.done)
    return SteppedDown(work.done, what, why, asdict(work.fit))


def _step_down(work: Work, why: str) -> str:
    """Take the next rung; says what gave way."""
    work.opt.skip()
    gc.collect()
    if work.job.device.type == "cuda":
        torch.cuda.empty_cache()
    step = down(work.fit, work.job.recipe.fitting, work.job.device)
    if step is None:
        raise too_large(work.job, work.probed, work.choice.budget, why)
    rung, work.fit = step
    place(work.job.base, work.fit, work.job.device)
    reasons = (*work.choice.why, f"{rung.name}: {why} ({rung.cost})")
    told = None if work.choice.budget is None else estimate_of(work.job, work.fit)
    work.choice = Choice(work.fit, work.choice.budget, told, reasons)
    return rung.name


def skip(work: Work, losses: Sequence[float], seen: Sequence[tuple[Tensor, Rng]]) -> str:
    """Take back a step that was not finite, and say what was wrong; its pictures are `seen` [b], each batch with its draws.

    A gradient too large for float16's scale only lowers that. All else goes back to the last checkpoint; its steps are not
    taken again, for they would end the same.
    """
    cause = blame(work, losses, seen)
    work.opt.skip()
    if all(map(math.isfinite, losses)) and work.opt.overflowed():
        return cause
    work.opt.load(work.good.tensors)
    work.failed = [step for step in work.failed if step > work.done - MEMORY] + [work.done]
    return cause


def too_large(job: Job, need: int | None, budget: int | None, why: str = "") -> TrainingError:
    """Nothing is left that could give way."""
    short = f"{readable(need)} are needed and {readable(budget)} are there" if need and budget else why
    wanted = job.recipe.fitting
    forced = [f"--{rung.setting.replace('_', '-')}" for rung in LADDER if getattr(wanted, rung.setting) not in ("auto", 0)]
    hints = [f"a --resolution below {job.side}", "--quantize nf4", "a smaller --rank"]
    hints += [f"{' and '.join(forced)} on auto"] if forced else []
    return TrainingError(f"the run does not fit into memory on the lowest rung: {short}", f"try {' or '.join(hints)}")


# ---------------------------------------------------------------- what is told


def blame(work: Work, losses: Sequence[float], seen: Sequence[tuple[Tensor, Rng]]) -> str:
    """What was not finite in a step that failed: which pictures at which timesteps, the gradient, or the adapter itself."""
    spoiled = [name for name, p in work.opt.parameters.items() if not bool(p.isfinite().all())]
    if spoiled:
        return f"the adapter is not finite any more, {spoiled[0]} for one"
    job, rows = work.job, list[str]()
    for pictures, rng in seen:
        names = [job.dataset.examples[i].path.name for i in pictures.tolist()]
        times = objectives.timesteps(len(names), job.base.noise, rng).tolist()
        rows += [f"{name} at timestep {t}" for name, t in zip(names, times, strict=True)]
    if bad := [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]:
        return f"the loss of {', '.join(bad[:3])} was not finite"
    if work.opt.scale and not work.opt.scale.at_floor:
        return f"a gradient overflowed in float16: its scale is {work.opt.scale.value / 2:g} from now on"
    return "the gradient was not finite"


def hopeless(work: Work, cause: str) -> tuple[str, str]:
    """What to say when too many steps failed."""
    steps, recipe = ", ".join(map(str, work.failed)), work.job.recipe
    lr = max(recipe.optim.lr, recipe.optim.text_encoder_lr)
    other = " or --precision bfloat16 or float32" if work.fit.precision == "float16" else ""
    return (
        f"steps {steps} were not finite (the last: {cause}; computed in {work.fit.precision} at --lr {lr:g}), "
        "so the run stopped; checkpoints before them are good",
        f"try a --lr below {lr:g}{other}, with --fresh",
    )


def spilled(work: Work, slower: float) -> str:
    """What to say of a run that became suddenly slow."""
    held = readable(peak_bytes(work.job.base.device))
    return (
        f"steps take {slower:.1f} times as long as before, with at most {held} of memory in use: it may spill into slower "
        "memory, or another program is at work; close that, or stop and go on with a smaller --memory"
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory that the run has held: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_sentence(error: BaseException) -> str:
    """What an error says, without its advice."""
    return (str(error).split(". ")[0].splitlines() or ["out of memory"])[0] or "out of memory"
