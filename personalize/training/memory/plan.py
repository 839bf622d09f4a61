"""How a run computes, chosen from shapes alone before anything is on the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...errors import TrainingError
from ...recipe.adapter import FULL
from ...text import readable
from ..preflight import RunPlan, parts
from .estimate import Configs, Estimate, Workload, estimate
from .ladder import LADDER, ComputePlan, Rung, down, first

RESERVE = 2**28  # bytes of a GPU that are left to kernels and fragments, beside a twentieth


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen from shapes, and why."""

    compute: ComputePlan
    budget: int | None = None  # bytes that may be taken; None: no matter
    estimate: Estimate | None = None
    why: tuple[str, ...] = ()


def choose_memory_plan(plan: RunPlan) -> MemoryPlan:
    """The first rung that fits by its shapes. Raises TrainingError if none does: nothing was loaded onto the GPU yet."""
    wanted, device, before = plan.recipe.fitting, plan.device, (plan.state.more.get("fit") if plan.state else None)
    compute = first(wanted, plan.recipe.batch_size, device, ComputePlan(**before) if before else None)
    budget = budget_of(plan)
    if budget is None:
        return MemoryPlan(compute)
    steps: list[tuple[Rung, ComputePlan]] = []  # with the plan above each rung
    while (expected := estimate_of(plan, compute)).peak > budget:
        step = down(compute, wanted, device)
        if step is None:
            raise too_large(plan, expected.peak, budget)
        steps.append((step[0], compute))
        compute = step[1]
    why = []
    for rung, above in steps:  # what did not help is taken back
        if estimate_of(plan, back := replace(compute, **{rung.field: getattr(above, rung.field)})).peak <= budget:
            compute = back
        else:
            need = readable(estimate_of(plan, back).peak)
            why.append(f"{rung.name}: without it, {need} of {readable(budget)} by estimate ({rung.cost})")
    return MemoryPlan(compute, budget, estimate_of(plan, compute), tuple(why))


def estimate_of(plan: RunPlan, compute: ComputePlan) -> Estimate:
    """What the run would take. Remembered on disk."""
    return estimate(Configs.of(plan.base), workload_of(plan), compute, parts(plan.recipe, plan.base))


def budget_of(plan: RunPlan) -> int | None:
    """Bytes that the run may take: as the recipe says, else what is free on the GPU, less a margin; None on a CPU."""
    if plan.recipe.fitting.budget is not None or plan.device.type != "cuda":
        return plan.recipe.fitting.budget
    free = torch.cuda.mem_get_info(plan.device)[0] + torch.cuda.memory_reserved(plan.device)
    return int(0.95 * free) - RESERVE


def workload_of(plan: RunPlan) -> Workload:
    """What the run asks of the base at its largest."""
    side, sampling = plan.side // plan.base.factor, plan.recipe.sampling
    drawn = min(8, max(1, len(sampling.sample_prompts) * len(sampling.sample_seeds)))
    return Workload(plan.recipe, side, side, plan.windows, drawn)


def too_large(plan: RunPlan, need: int | None, budget: int | None, why: str = "") -> TrainingError:
    """The error of a run on the lowest rung: nothing is left that could give way."""
    short = f"{readable(need)} are needed and {readable(budget)} are there" if need and budget else why
    wanted = plan.recipe.fitting
    forced = [f"--{rung.setting.replace('_', '-')}" for rung in LADDER if getattr(wanted, rung.setting) not in ("auto", 0)]
    smaller = ["fewer --targets"] if plan.recipe.adapter.kind == FULL else ["--quantize nf4", "a smaller --rank"]
    hints = [f"a --resolution below {plan.side}", *smaller]
    hints += [f"{' and '.join(forced)} on auto"] if forced else []
    return TrainingError(f"the run does not fit into memory on the lowest rung: {short}", f"try {' or '.join(hints)}")
