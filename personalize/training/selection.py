"""Choose for me: which checkpoint becomes the adapter, and at which strengths it is good.

The loss of a training step is mostly the luck of its timesteps. Here every checkpoint answers the same questions: noise and
timesteps depend on (seed, picture, timestep) only, so two checkpoints differ by what they have learned and by nothing else.

fit         of the base's error on noisy training pictures under their captions, the share that is gone
validation  the same on pictures that were not trained on, where some were held back or left out; else it is the fit
drift       how far predictions without the trigger moved from the base's, squared: leak and forgetting
contrast    how much of the change on the pictures needs the trigger: 0 where the whole class has become the subject

Fit and drift have one unit, the base's error on the training pictures: what is gained here and what is moved elsewhere can be
weighed whatever the base predicts (eps, v or x_0) and however well it knew the subject.

Nothing is drawn but a few small pictures by the base, once, to have something to ask about that is not the training pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.embedding import load_learned
from ..data.batches import generator
from ..data.captions import remove_triggers
from ..data.latents import Latents
from ..families.notation import settle
from ..inference.request import Request
from ..inference.sampling import denoise, eval_mode
from ..models.model import Base
from ..models.processes import share
from ..text import spread
from ..tuning.tunable import Tunable
from .calibration import calibration_of
from .events import Chosen, Event, Judged, Scored
from .examiner import Examiner, prepare_examiner
from .preflight import RunPlan

# How much is asked, in rows: one prediction each. A training step on 4 pictures costs about as much as 20 of them.
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # places on the schedule
FEW = (1, 3)  # those of them at which drift and contrast are told: the others rank checkpoints alike
PICTURES = 4  # of either kind that are asked about
OTHERS = 8  # prompts without the trigger, half of them about anything
EVERYDAY = ("a house in the snow", "a car at night", "a bird on the beach", "a flower, watercolour")  # any base knows them
DRAWN = 6  # denoising steps of the base's own pictures
ROWS = 4  # at a time, for every row of a training step, which keeps all of its activations: these keep none
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)  # besides 1

# What drift costs was set on six runs of the embedded base (docs/figures/choice.md). From 1 to 3, the same checkpoints were
# chosen; at 4 and more, strengths were called good at which nobody is recognised.
DRIFT = 2.0
EQUAL = 0.01  # scores this close are equal, and then the later checkpoint is better: its learning rate has come down further
CLOSE = 0.1  # strengths are good whose score is below the best one's by at most this share of what was learned
GRAIN = 0.05  # of a strength range
SHORTLIST = 2  # checkpoints of which images are drawn
SAME = 0.03  # estimates this close are equal, and then the later checkpoint is better


@dataclass(frozen=True)
class Sheet:
    """Questions: noisy latents under prompts."""

    latents: Tensor  # [n, c, h, w]
    t: Tensor  # [n]
    prompts: tuple[str, ...]  # n


@dataclass(frozen=True)
class Figures:
    """What an adapter's answers say, in numbers."""

    fit: float
    validation: float
    drift: float
    contrast: float


@dataclass(frozen=True)
class Exam:
    """All questions of a run and the base's answers to them, on the CPU."""

    base: Base
    batch: int  # rows at a time
    trained: int  # how many of the pictures were trained on; they come first, and the rest was not
    called: Sheet  # noisy pictures under their captions, at TIMES
    bare: Sheet  # the same without the trigger, at a FEW of them
    others: Sheet  # what the base drew from prompts without the trigger, noisy, at a FEW of them
    target: Tensor  # what would be right for `called`
    off: tuple[Tensor, Tensor, Tensor]  # the base's answers to the three sheets

    def figures(self) -> Figures:
        """What is attached now, examined."""
        called, bare, others = (answers(self.base, sheet, self.batch) for sheet in (self.called, self.bare, self.others))
        errors, before = by_time(called - self.target, len(TIMES)), by_time(self.off[0] - self.target, len(TIMES))
        own, fresh = slice(self.trained), slice(self.trained, None)
        fit = error_reduction(errors[own], before[own])
        moved = by_time(others - self.off[2], len(FEW)).mean(0) / before[own].mean(0)[list(FEW)]
        few = at_few(len(called))
        return Figures(
            fit,
            error_reduction(errors[fresh], before[fresh]) if len(errors) > self.trained else fit,
            float(moved.mean()),
            called_for((called - self.off[0])[few], bare - self.off[1]),
        )


def by_time(difference: Tensor, times: int) -> Tensor:
    """[pictures * times, c, h, w] => mean squares [pictures, times]."""
    return difference.square().mean(dim=(1, 2, 3)).view(-1, times)


def at_few(rows: int) -> list[int]:
    """Which of so many rows at TIMES are at a FEW of them."""
    return [row for row in range(rows) if row % len(TIMES) in FEW]


def error_reduction(errors: Tensor, before: Tensor) -> float:
    """The share of the base's errors [pictures, times] that is gone, each timestep counting the same."""
    return float((1 - errors.sum(0) / before.sum(0)).mean())


def called_for(called: Tensor, bare: Tensor) -> float:
    """Contrast: 1 - |change without the trigger| / |change with it|; 0 where nothing changed, or more without it."""
    change = float(called.norm())
    return max(0.0, 1 - float(bare.norm()) / change) if change else 0.0


def score(found: Figures) -> float:
    """One number, higher is better: what was learned, less what it cost. See docs/figures/choice.md for how far it is true."""
    return (found.fit + found.validation) / 2 - DRIFT * found.drift


# ---------------------------------------------------------------- the questions


def prepare_exam(plan: RunPlan, trained: Latents, held: Latents | None, tunable: Tunable) -> Exam:
    """Everything that is asked of every checkpoint, and what the base says."""
    examples = plan.dataset.examples, plan.held
    asked = [(latents, side, i) for latents, side in zip((trained, held), examples, strict=True) if latents
             for i in spread(len(side), PICTURES)]  # fmt: skip
    shape = plan.side, plan.side  # all are asked about as squares: no question depends on what else there is
    x0, shown = torch.stack([latents.posterior(i, shape, False)[0] for latents, _, i in asked]), [side[i] for _, side, i in asked]
    captions, names = [example.caption for example in shown], [example.sha256 for example in shown]
    called, right = noisy(plan, x0, names, captions, TIMES)
    few = at_few(len(called.t))
    without_trigger = tuple(remove_triggers(plan.dataset.triggers, called.prompts[i])[0] for i in few)
    bare = Sheet(called.latents[few], called.t[few], without_trigger)
    batch = ROWS * plan.recipe.batch_size
    with tunable.off():
        others = drawings(plan, batch)
        off = share(plan.base, lambda sheet: [answers(plan.base, sheet, batch).numpy()], (called, bare, others))
        first, second, third = map(torch.from_numpy, off)
    return Exam(plan.base, batch, min(len(examples[0]), PICTURES), called, bare, others, right, (first, second, third))


def noisy(
    plan: RunPlan, x0: Tensor, names: Sequence[str], prompts: Sequence[str], times: Sequence[float]
) -> tuple[Sheet, Tensor]:
    """Latents x0 [p, c, h, w] at all times, each with noise that depends on (seed, name, timestep); and the right answers."""
    noise = plan.base.noise
    steps = [int(time * noise.steps) for time in times]
    draws = [
        torch.randn(x0.shape[1:], generator=generator(plan.recipe.seed, f"choose {name}", t)) for name in names for t in steps
    ]
    eps, t = torch.stack(draws), torch.tensor(steps).repeat(len(x0))
    x0, asked = x0.float().cpu().repeat_interleave(len(steps), 0), tuple(prompt for prompt in prompts for _ in steps)
    return Sheet(noise.add(x0, eps, t), noise.time(t), asked), noise.target(x0, eps, t)


def drawings(plan: RunPlan, batch: int) -> Sheet:
    """What the base itself draws from prompts without the trigger, noisy."""
    prompts, guidance = prompts_without_trigger(plan), plan.recipe.sampling.guidance
    requests = [Request(one, i, DRAWN, guidance, (plan.side, plan.side)) for i, one in enumerate(prompts)]
    size = max(1, batch // 4)  # half of it for what is not asked for
    chunks = [requests[first : first + size] for first in range(0, len(requests), size)]
    with torch.no_grad(), eval_mode(plan.base):
        drawn = list(share(plan.base, lambda chunk: [denoise(plan.base, chunk).float().cpu().numpy()], chunks))
    return noisy(plan, torch.cat([torch.from_numpy(one) for one in drawn]), prompts, prompts, [TIMES[i] for i in FEW])[0]


def prompts_without_trigger(plan: RunPlan) -> list[str]:
    """Prompts without the trigger: half of the run's own, about the class, and as many about anything."""
    own = [prompt for prompt in plan.prompts if not remove_triggers(plan.dataset.triggers, prompt)[1]]
    near = list(dict.fromkeys([*own, *plan.class_prompts, *plan.class_captions]))[: OTHERS - len(EVERYDAY)]
    return [*near, *(prompt for prompt in EVERYDAY if prompt not in near)]


@torch.no_grad()
def answers(base: Base, sheet: Sheet, batch: int) -> Tensor:
    """Predictions [n, c, h, w] with what is attached now, in fp32 on the CPU."""
    distinct = list(dict.fromkeys(sheet.prompts))
    row = torch.tensor([distinct.index(prompt) for prompt in sheet.prompts])
    with eval_mode(base):
        cond = base.embed(list(map(settle, distinct)), weighted=True)
        parts = [
            base.denoise(sheet.latents[i].to(base.device, base.dtype), sheet.t[i].to(base.device), cond[row[i].to(base.device)])
            for i in torch.arange(len(row)).split(batch)
        ]
    return torch.cat([part.float().cpu() for part in parts])


# ---------------------------------------------------------------- the choice


def choose(plan: RunPlan, trained: Latents, held: Latents | None, tunable: Tunable) -> Iterator[Event]:
    """Examine every checkpoint, then the chosen one at other strengths; leaves it attached. The last event says which it is.

    Denoising ranks all of them; of the best two, images are drawn and judged, and these decide. With `choose = "last"` it is the
    last one whatever the scores say; they are told all the same.
    """
    exam, left_out, examiner = prepare_exam(plan, trained, held, tunable), unseen(plan), prepare_examiner(plan, tunable)
    files: Mapping[int, Path | None] = plan.run.checkpoints() or {plan.recipe.steps: None}
    asked: dict[int, Figures] = {}
    found: dict[int, Figures] = {}

    def examine(file: Path | None) -> Iterator[Figures]:
        put(tunable, file)
        yield exam.figures()

    for step, figures in zip(files, share(plan.base, examine, list(files.values())), strict=True):
        asked[step] = figures
        found[step] = replace(figures, validation=left_out.get(step, figures.validation))
        yield plan.run.record(scored_event(step, 1.0, found[step]))
    most = max(map(score, found.values()))
    best = max(step for step, figures in found.items() if score(figures) >= most - EQUAL)
    if examiner and plan.recipe.choosing.choose == "best":
        others = sorted(set(found) - {best}, key=lambda step: score(found[step]), reverse=True)
        some = (best, *others)[: SHORTLIST if calibration_of(plan.base) else 1]  # estimates choose
        best = yield from judge_checkpoints(examiner, {step: files[step] for step in some}, found, tunable)
    step = best if plan.recipe.choosing.choose == "best" else plan.recipe.steps
    put(tunable, files[step])
    f, by_strength = found[step], {1.0: asked[step]}

    def examine_at(strength: float) -> Iterator[Figures]:
        with tunable.at(strength):
            yield exam.figures()

    for strength, figures in zip(STRENGTHS, share(plan.base, examine_at, STRENGTHS), strict=True):
        by_strength[strength] = figures
        yield plan.run.record(scored_event(step, strength, figures))
    scores = {strength: score(figures) for strength, figures in by_strength.items()}
    low, weight, high = strengths(scores, CLOSE * max(0.0, asked[step].fit))
    if examiner and (weight != 1 or plan.recipe.choosing.choose != "best"):
        with tunable.at(weight):
            yield plan.run.record(examiner.judge(step, weight, exam.figures()))
    judges = judged_by(plan, left_out)
    yield plan.run.record(Chosen(step, best, len(found), f.fit, f.validation, f.drift, f.contrast, judges, low, weight, high))


def put(tunable: Tunable, file: Path | None) -> None:
    """Attach a checkpoint; None is what is attached already."""
    if file:
        tunable.put(load_learned(file))


def judge_checkpoints(
    examiner: Examiner, files: Mapping[int, Path | None], found: Mapping[int, Figures], tunable: Tunable
) -> Generator[Event, None, int]:
    """Draw and judge images of checkpoints; returns the one with the best estimate."""

    def judge(step: int) -> Iterator[Judged]:
        put(tunable, files[step])
        yield examiner.judge(step, 1.0, found[step])

    judged: dict[int, float] = {}
    for event in share(examiner.plan.base, judge, list(files)):
        judged[event.step] = event.value
        yield examiner.plan.run.record(event)
    return max(judged, key=lambda step: (judged[step] >= max(judged.values()) - SAME, step))


def scored_event(step: int, strength: float, f: Figures) -> Scored:
    """The event of an examined adapter."""
    return Scored(step, strength, f.fit, f.validation, f.drift, f.contrast, score(f))


def unseen(plan: RunPlan) -> dict[int, float]:
    """Validation by step on pictures left out in turn: means over the runs that left one out, for steps that all of them have."""
    found = [run.scores() for run in plan.folds]
    common = set.intersection(*map(set, found)) if found else set()
    return {step: sum(scores[step] for scores in found) / len(found) for step in sorted(common)}


def judged_by(plan: RunPlan, left_out: Mapping[int, float]) -> str:
    """Which pictures told the validation, in words."""
    if left_out:
        return f"pictures left out in turn ({len(plan.folds)} trainings)"
    return f"{len(plan.held)} held-back picture{'s' * (len(plan.held) > 1)}" if plan.held else "the training pictures"


def strengths(scores: Mapping[float, float], close: float) -> tuple[float, float, float]:
    """(low, preferred, high): how far around the best strength the score stays this close, and 1 where that is in between.

    >>> strengths({0.5: 0.3, 1.0: 0.5, 1.5: 0.1}, 0.1)
    (0.75, 1.0, 1.1)
    >>> strengths({0.25: 0.2, 0.5: 0.3, 1.0: 0.0}, 0.06)
    (0.35, 0.6, 0.6)
    """
    best = max(scores, key=lambda strength: (scores[strength], -abs(strength - 1)))
    fine = [round(min(scores) + i * GRAIN, 2) for i in range(round((max(scores) - min(scores)) / GRAIN) + 1)]
    down, up = [s for s in reversed(fine) if s <= best], [s for s in fine if s >= best]
    least = scores[best] - close - 1e-9
    low, high = (list(itertools.takewhile(lambda s: between(scores, s) >= least, side))[-1] for side in (down, up))
    return low, min(max(1.0, low), high), high


def between(scores: Mapping[float, float], strength: float) -> float:
    """The score at a strength, on the line between its neighbours."""
    left = max(known for known in scores if known <= strength)
    right = min(known for known in scores if known >= strength)
    part = (strength - left) / (right - left) if right > left else 0.0
    return scores[left] + part * (scores[right] - scores[left])
