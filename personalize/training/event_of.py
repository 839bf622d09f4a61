"""The events of a run in progress: how it started, what a step gave, and how it failed."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from typing import Any

from ..data.dataset import Dataset, Example
from ..errors import PersonalizeError
from ..recipe.adapter import EMBEDDING
from ..recipe.settings import flatten
from ..tuning.rates import EVEN, groups_of
from .events import Failed, Started, Step
from .inputs import rng_of
from .memory.apply import obstacle_to_compiling
from .metadata import versions
from .objectives.draws import timesteps
from .preflight import RunPlan
from .run import ActiveRun


def failed_event(plan: RunPlan, step: int, error: PersonalizeError) -> Failed:
    """How a run ended, also for its diary."""
    with contextlib.suppress(PersonalizeError):  # the disk may be what went wrong
        plan.run.record_end("error", step=step, message=str(error))
    return Failed(step, str(error))


def started_event(run: ActiveRun) -> Started:
    """The event of a run that is about to go."""
    plan, data = run.plan, run.data
    sources = (plan.dataset, plan.regularization, data.latents, data.prior)
    warnings = [*plan.recipe.remarks, *(warning for source in sources if source for warning in source.warnings)]
    if run.compute.compile and (why := obstacle_to_compiling(run.compute, plan.device)):
        warnings.append(f"nothing is compiled: {why}")
    return Started(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=flatten(plan.recipe),
        images=[image_record(example, plan.dataset) for example in plan.dataset.examples],
        warnings=warnings,
        parameters=sum(p.numel() for p in run.opt.parameters.values()),
        device=str(plan.base.device),
        dtype=str(plan.base.dtype).removeprefix("torch."),
        versions=versions(),
        base=plan.base.facts,
        shapes={f"{w}x{h}": len(pool) for (w, h), pool in data.latents.buckets.items()},
        resumed=run.done,
        changes=list(plan.changes),
        init=dict(plan.init or {}),
        fit=run.facts(),
        rates=rate_records(plan),
    )


def rate_records(plan: RunPlan) -> list[dict[str, Any]]:
    """How layers learn, those together that learn alike; nothing where all do."""
    groups = groups_of(plan.base.family, plan.rates)
    if all(group.rate == EVEN for group in groups):
        return []
    return [{"layers": one.layers, "count": one.count, "start": one.rate.start, "scale": one.rate.scale} for one in groups]


def image_record(example: Example, dataset: Dataset) -> dict[str, str]:
    """A training image as events have it."""
    trigger = dataset.concepts[example.concept].trigger
    return {"path": str(example.path), "caption": example.caption, "sha256": example.sha256, "trigger": trigger}


def step_event(run: ActiveRun, losses: list[float], norm: float, seconds: float, cause: str, bounded: int = 0) -> Step:
    """The event of a step; `losses` are those of all its images, `bounded` the layers that it made too large."""
    recipe, opt, done = run.plan.recipe, run.opt, run.done
    micros = range((done - 1) * recipe.optim.accumulate, done * recipe.optim.accumulate)
    times = [t for micro in micros for t in timesteps_of(run.plan, micro)]
    return Step(
        step=done,
        loss=sum(losses) / len(losses),
        lr=opt.lr(run.plan.base.family.denoiser.part, done - 1),
        text_encoder_lr=opt.lr("text_encoder", done - 1),
        grad_norm=norm,
        seconds=seconds,
        timesteps=times,
        losses=losses,
        skipped=bool(cause),
        cause=cause,
        bounded=bounded,
        embedding_lr=opt.lr(EMBEDDING, done - 1),
    )


def timesteps_of(plan: RunPlan, micro: int) -> list[int]:
    """Those of a micro-step's images."""
    recipe = plan.recipe
    drawn: list[int] = timesteps(recipe.batch_size, plan.base.noise, rng_of(recipe, micro), recipe.objective).tolist()
    return drawn
