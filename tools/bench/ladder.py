"""The low-memory ladder on a GPU, rung by rung: what steps and a sample take, beside the estimate; random weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from personalize.io import write_text
from personalize.models.model import Base, quiet
from personalize.recipe.resolve import resolve
from personalize.training.memory.apply import apply_plan
from personalize.training.memory.estimate import Configs, Workload, cond_of, estimate, ghost, largest, learn
from personalize.training.memory.ladder import ComputePlan
from personalize.training.memory.recover import measure_peak
from personalize.training.optimizers import Optimizer
from personalize.tuning.attach import attach

from ..pocket.proof.figures import markdown
from . import memory, pairs, resuming
from .resuming import Row
from .scripts import fill
from .throughput import tiny

STEPS = 2  # the first makes the optimizer's moments
HEADS = ("family", "side", "batch", "rung", "a step", "estimated", "a sample", "estimated")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--families", nargs="*", default=["sd1", "sdxl"], help="which of them")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4], help="pictures per step")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, on attention and feed-forward layers")
    parser.add_argument("--precision", default="bfloat16", help="float32, bfloat16 or float16")
    resuming.add_options(parser, "ladder")


def main(options: argparse.Namespace) -> None:
    """Measure what was not measured yet; publish after every row. Raises TrainingError where there is no GPU."""
    device = resuming.device_of(options)
    about = resuming.machine(device) | {"rank": options.rank, "precision": options.precision}
    known, told = fits(options), published_rows(options)

    def row(*case: Any) -> Row:
        family, side, batch, _ = case
        load = Workload(resolve(flags={"batch_size": batch, "rank": options.rank}), side // 8, side // 8)
        configs = shapes(options, family)[1]
        expected = told.get(case) or asdict(estimate(configs, load, known[case], ("unet",)))
        step = sum(expected[name] for name in ("weights", "adapter", "activations"))
        found = measure_or_fail(configs, load, known[case], device)
        return {"step_estimate": step, "sample_estimate": expected["sampling"], **found}

    def page(rows: Sequence[Row]) -> str:
        publish(options, about, rows)
        return " ".join(cells(rows[-1]))

    resuming.measure(options, options.to / "ladder.json", about, known, row, page)


def shapes(options: argparse.Namespace, family: str) -> tuple[int, Configs]:
    """A family's side in pixels, and its shapes."""
    if options.tiny:
        return tiny(family)
    side = dict(memory.CASES)[family]
    return side, memory.configs_of(pairs.family(family), side)


def fits(options: argparse.Namespace) -> dict[tuple[Any, ...], ComputePlan]:
    """Every case (family, side, batch, rung), and how it is done."""
    return {
        (family, shapes(options, family)[0], batch, rung): fit
        for family in (["pocket"] if options.tiny else options.families)
        for batch in options.batches
        for rung, fit in memory.rungs(batch, options.precision)
    }


def published_rows(options: argparse.Namespace) -> dict[tuple[Any, ...], Row]:
    """Estimates that `bench memory` left, for a GPU's time is not to be spent on them; those that are missing are made."""
    file = options.to / "memory.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"command": "", "rows": []}
    if not found["command"].endswith(f"--rank {options.rank}"):
        return {}
    rows = [row for row in found["rows"] if row["precision"] == options.precision]
    return {(row["family"], row["side"], row["batch"], row["rung"]): row for row in rows}


# ---------------------------------------------------------------- measuring


def measure_or_fail(configs: Configs, load: Workload, fit: ComputePlan, device: torch.device) -> Row:
    """Bytes at most in a step and in a sample, as CUDA counts them (on a CPU: those of tensors); or why not."""
    try:
        return measure_step(configs, load, fit, device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        resuming.tidy(device)


def measure_step(configs: Configs, load: Workload, fit: ComputePlan, device: torch.device) -> Row:
    """The same, where there is enough."""
    base = solid(configs, fit, device)
    attached = attach(base, load.recipe.adapter)
    opt = Optimizer(attached.parameters(), load.recipe.optim, STEPS, scaled=fit.precision == "float16")
    with torch.device(device):
        inputs = largest(base, load, ("unet",))
    with measure_peak(base, attached) as peak:
        for done in range(STEPS):
            told = learn(base, load, fit, attached, opt, inputs)
            opt.step(done, told[-1])
        del told
        step = peak()
    with measure_peak(base, attached) as peak, torch.no_grad(), attached.cast_once():
        sample(base, load, fit, device)
        drawn = peak()
    return {"step": step, "sample": drawn}


def solid(configs: Configs, fit: ComputePlan, device: torch.device) -> Base:
    """A base of random weights that computes as a ComputePlan says."""
    with quiet():
        base = ghost(configs, ComputePlan(fit.precision))
    for model in (base.denoiser, base.vae, *(text.model for text in base.texts)):
        fill(model, device)
    apply_plan(base, replace(fit, compile=False), device)
    return base


@torch.no_grad()
def sample(base: Base, load: Workload, fit: ComputePlan, device: torch.device) -> None:
    """Read prompts, take one guided step, decode: as many pictures at once as a run draws."""
    rows = 1 if fit.tiled else load.drawn
    with torch.device(device):
        for text in base.texts:
            with base.using(text.model):
                text.model(torch.zeros(1, 77, dtype=torch.long))
        latents = torch.zeros(rows, base.denoiser.config["in_channels"], load.height, load.width)
        base.denoise(torch.cat([latents, latents]), torch.zeros(2 * rows, dtype=torch.long), cond_of(base, load, (), 2 * rows))
        base.decode(latents)


# ---------------------------------------------------------------- what is told


def cells(row: Row) -> list[str]:
    """A row of the table, in GiB."""
    case = list(map(str, row["case"]))
    if "failed" in row:
        return [*case, row["failed"], size(row["step_estimate"]), "–", size(row["sample_estimate"])]
    return [*case, *(size(row[name]) for name in ("step", "step_estimate", "sample", "sample_estimate"))]


def size(count: int) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def publish(options: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """ladder.md."""
    page = f"""# The low-memory ladder, measured

The most that tensors held in two training steps (forward, backward, AdamW), and in a sample (prompts read, one guided step,
decoded; 8 pictures at once, one from `tiled VAE` on), beside the estimate. Random weights of true shape; all sizes are in GiB.

- machine: {about["device"]}, torch {about["torch"]}
- measured: {"tensors, counted" if options.tiny else "torch.cuda.max_memory_allocated; CUDA's own few hundred MB come on top"}
- held and computed in {options.precision}, the adapter in float32, rank {options.rank} on attention and feed-forward
- command: python -m tools.bench ladder{" --tiny" if options.tiny else ""}

"""
    write_text(options.to / "ladder.md", page + markdown(HEADS, [cells(row) for row in rows]))
