"""How much cheaper adapters are that train side by side: fleets of 1, 2, 4, ... members beside as many runs of their own.

Random weights of true shape, one picture (or `--batch`) per member and step. The rows of all members go through the base as one
batch, so attention runs in its ordinary kernel; DoRA is not among the kinds that can be trained yet.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from personalize.io import write_text
from personalize.models.model import quiet
from personalize.recipe.fields import Recipe
from personalize.training.memory.apply import apply_plan, missing_compiler
from personalize.training.memory.estimate import Configs, ghost
from personalize.training.memory.ladder import ComputePlan
from personalize.training.objectives.objective import make_objective
from personalize.training.optimizers import Optimizer
from personalize.training.step import Learner, gradients
from personalize.tuning.fleet import Fleet
from personalize.tuning.targets import fresh

from ..pocket.proof.figures import markdown
from . import resuming
from .resuming import Row
from .scripts import fill
from .step import batch_of, recipe_of
from .throughput import TINY, WARM, time_steps, tiny, trainer, true

HEADS = (
    "family",
    "side",
    "members",
    "mode",
    "ms per step",
    "of runs alone",
    "faster",
    "adapter steps/s",
    "peak GiB",
    "per member",
)
MODES = ("eager", "compiled")
Take = Callable[[], object]  # takes the next step


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--families", nargs="*", default=["sd1", "sdxl"], choices=["sd1", "sdxl"], help="which of them")
    parser.add_argument("--members", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32], help="sizes of fleets")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES, help="which of them")
    parser.add_argument("--batch", type=int, default=1, help="pictures per member and step")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, on attention layers")
    parser.add_argument("--precision", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--seconds", type=float, default=8, help="so long steps are timed for a row")
    resuming.add_options(parser, "fleet")


def main(options: argparse.Namespace) -> None:
    """Time what was not timed yet; publish after every row. Raises TrainingError where there is no GPU."""
    device = resuming.device_of(options)
    about = resuming.machine(device) | {name: getattr(options, name) for name in ("rank", "batch", "precision")}

    def row(family: str, members: int, mode: str) -> Row:
        return row_of(family, members, mode, options, device)

    def publish_rows(rows: Sequence[Row]) -> str:
        publish(options, about, rows)
        return " ".join(cells(rows[-1], rows))

    families = list(TINY) if options.tiny else options.families
    cases = itertools.product(families, [0, *options.members], options.modes)  # 0: a run alone
    resuming.measure(options, options.to / "fleet.json", about, cases, row, publish_rows)


# ---------------------------------------------------------------- measuring


def row_of(family: str, members: int, mode: str, options: argparse.Namespace, device: torch.device) -> Row:
    """Seconds per step of a fleet, or of a run alone, and the most bytes held; or why not."""
    side, configs = tiny(family) if options.tiny else true(family)
    recipe, gpu = recipe_of(options.batch, options.rank), device.type == "cuda"
    fit = ComputePlan(options.precision, micro_batch=options.batch, channels_last=gpu, compile=mode == "compiled")
    if fit.compile and (why := missing_compiler(device)):
        return {"side": side, "failed": why}
    try:
        take = fleet(configs, recipe, fit, device, members) if members else trainer(configs, recipe, fit, device)
        if not gpu:
            alone = trainer(configs, recipe, fit, device) if members else take
            return {"side": side, **time_in_turns(alone, take, max(1, members), options.seconds), "bytes": None}
        seconds, taken = time_steps(take, options.seconds, device)
    except torch.OutOfMemoryError:
        return {"side": side, "failed": "out of memory"}
    finally:
        resuming.tidy(device)
    return {"side": side, "seconds": seconds, "bytes": taken}


def time_in_turns(alone: Take, together: Take, members: int, seconds: float) -> Row:
    """CPU seconds of a fleet's step, and of a run's alone: steps are taken in turns, the least counts. Neighbours only add."""
    least = {one: math.inf for one in (alone, together)}
    for _ in range(WARM):
        alone(), together()
    began = time.perf_counter()
    while math.isinf(least[together]) or time.perf_counter() - began < seconds:
        for one in (*[alone] * members, together):
            start = time.process_time()
            one()
            least[one] = min(least[one], time.process_time() - start)
    return {"seconds": least[together], "alone": least[alone]}


def fleet(configs: Configs, recipe: Recipe, fit: ComputePlan, device: torch.device, members: int) -> Take:
    """A function that takes the next step of all members, as `train_fleet` does: the losses of all, and the gradients' norms."""
    with quiet():
        base = ghost(configs, ComputePlan(fit.precision))
    fill(base.denoiser, device)
    apply_plan(base, fit, device)
    together = Fleet(base, [fresh(base, recipe.adapter, ("unet",), seed) for seed in range(members)]).__enter__()
    objective = make_objective(recipe.objective, base.noise)
    learners = [Learner(one, objective, Optimizer(one.parameters(), recipe.optim, recipe.steps)) for one in together.members]
    inputs, steps = batch_of(base, recipe, configs.denoiser["sample_size"]), itertools.count()

    def take() -> list[float]:
        done = next(steps)
        generators = [torch.Generator().manual_seed(done * members + m) for m in range(members)]
        values = gradients(learners, [[(inputs, lambda _, one=one: one, lambda piece: piece)] for one in generators])  # type: ignore[misc]
        numbers: list[float] = torch.cat(values).tolist()
        for learner, own in zip(learners, values, strict=True):
            learner.opt.step(done, own[-1])
        return numbers

    return take


# ---------------------------------------------------------------- what is told


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row of the table; beside it, as many runs alone, one after the other."""
    family, members, mode = row["case"]
    case = [family, f"{row['side']}", f"{members}" if members else "a run alone", mode]
    if "failed" in row:
        return [*case, row["failed"], *["–"] * 5]
    count = members or 1
    other = next((one["seconds"] for one in rows if one["case"] == [family, 0, mode] and "seconds" in one), None)
    alone = row.get("alone", other)
    beside = [f"{1e3 * count * alone:.0f}", f"{count * alone / row['seconds']:.2f}x"] if alone else ["–", "–"]
    return [*case, f"{1e3 * row['seconds']:.0f}", *beside, f"{count / row['seconds']:.2f}", *memory(row, rows)]


def memory(row: Row, rows: Sequence[Row]) -> list[str]:
    """The peak, and what each member takes beyond the first."""
    family, members, mode = row["case"]
    if row["bytes"] is None:
        return ["–", "–"]
    first = next((one for one in rows if one["case"] == [family, 1, mode] and one.get("bytes")), None)
    more = f"{(row['bytes'] - first['bytes']) / (members - 1) / 2**30:.3f}" if first and members > 1 else "–"
    return [f"{row['bytes'] / 2**30:.2f}", more]


def publish(options: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """fleet.md."""
    flags = f"--modes {' '.join(options.modes)} --members {' '.join(map(str, options.members))} --precision {options.precision}"
    page = f"""# Fleets

Training steps of adapters side by side on one frozen base, beside the same steps of runs alone, one after the other; random
weights of true shape. A step: forward, backward, each member's own clipping and AdamW. Latents and captions are there already.

- machine: {about["device"]}, torch {about["torch"]}{", one thread" if torch.get_num_threads() == 1 and options.tiny else ""}
- members: LoRA of rank {options.rank} on attention layers; pictures a step each: {options.batch}; the base in {options.precision}
- on a CPU: the CPU seconds of a fleet's step and of a run's alone, taken in turns, the least of each
- runs alone: as many times the step of a run alone; per member: peak GiB beyond a fleet of one, for each further member
- attention: scaled_dot_product_attention over the rows of all members as one batch, no vmap
- command: python -m tools.bench fleet{" --tiny" if options.tiny else ""} {flags}

"""
    write_text(options.to / "fleet.md", page + markdown(HEADS, [cells(row, rows) for row in rows]))
