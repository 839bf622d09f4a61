"""What one training step launches: operations, waits and bytes, on shapes alone, beside diffusers' script where it is given."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from personalize.errors import DataError
from personalize.io import write_text
from personalize.models.joined import join_projections
from personalize.models.model import Base, quiet
from personalize.recipe.fields import Recipe
from personalize.recipe.resolve import resolve
from personalize.training.memory.estimate import Configs, Workload, cond_of, ghost, solidify
from personalize.training.memory.ladder import ComputePlan
from personalize.training.objectives.objective import Inputs, make_objective
from personalize.training.optimizers import Optimizer
from personalize.training.step import Learner, gradients
from personalize.tuning.attach import Attached, attach

from ..pocket.proof.figures import FIGURES, markdown
from . import memory, pairs, scripts
from .counting import Work, phases

SIDES = {"sd1": 512, "sdxl": 1024}
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # accelerate's names for them
PHASES = ("encoders", "forward", "backward", "update")
OURS = ((Tensor, "backward", "backward"), (Optimizer, "norm", "update"), (Optimizer, "step", "update"))
HEADS = ("family", "precision", "batch", "whose", *PHASES, "operations", "waits", "GB touched")
STEPS = 2  # the first makes the optimizer's moments


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--families", nargs="*", default=list(SIDES), choices=SIDES, help="which of them")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4], help="pictures per step")
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS, help="which of them")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, on attention layers")
    parser.add_argument("--side", type=int, default=0, help="of the pictures in pixels (default: the family's own)")
    parser.add_argument(
        "--script", type=Path, help="path of diffusers' train_dreambooth_lora.py, to be counted beside (sd1 only)"
    )
    parser.add_argument("--to", type=Path, default=FIGURES, help="folder for step.md and step.json")


def main(options: argparse.Namespace) -> None:
    """Count ours, and theirs where there is a script; publish."""
    if options.script and not options.script.is_file():
        raise DataError(f"there is no script {options.script}", "examples/dreambooth/train_dreambooth_lora.py of diffusers")
    rows = []
    for family in options.families:
        configs = memory.configs_of(pairs.family(family), options.side or SIDES[family])
        for precision in options.precisions:
            for batch in options.batches:
                side = options.side or SIDES[family]
                recipe = recipe_of(batch, options.rank)
                counts = {"personalize": ours(configs, recipe, side, precision)}
                if options.script and family == "sd1":
                    counts["diffusers"] = theirs(configs, recipe, side, precision, options.script)
                for whose, count in counts.items():
                    rows.append({"family": family, "precision": precision, "batch": batch, "whose": whose, **count})
                    print(" ".join(cells(rows[-1])), flush=True)
    publish(options, rows)


def recipe_of(batch: int, rank: int) -> Recipe:
    """What both are asked for."""
    return resolve(flags={"batch_size": batch, "rank": rank, "targets": ["attention"], "prior": "none"})


# ---------------------------------------------------------------- ours


def ours(configs: Configs, recipe: Recipe, side: int, precision: str) -> dict[str, Any]:
    """The second step of a run, from a batch to the update, as `loop.advance` takes it."""
    low = precision != "float32"
    fit = ComputePlan(precision, micro_batch=recipe.batch_size, channels_last=low, joined=low)  # as on a GPU
    with quiet():
        base = ghost(configs, fit)
        attached = attach(base, recipe.adapter)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        base.device = torch.device("cpu")
        solidify([base.denoiser])
        if fit.joined:
            join_projections(base.denoiser)
        opt = Optimizer(attached.parameters(), recipe.optim, recipe.steps)
        inputs = batch_of(base, recipe, side // base.factor)
        for done in range(STEPS):
            with phases(work := Work(values=False), OURS), work:
                step(base, attached, opt, recipe, inputs, done)
    return work.as_dict()


def batch_of(base: Base, recipe: Recipe, side: int) -> Inputs:
    """A batch of kept latents and captions, on the base's device."""
    with torch.device(base.device):
        latents = torch.zeros(recipe.batch_size, base.denoiser.config["in_channels"], side, side)
        return Inputs(latents, torch.ones_like(latents), cond_of(base, Workload(recipe, side, side), (), recipe.batch_size))


def step(base: Base, attached: Attached, opt: Optimizer, recipe: Recipe, inputs: Inputs, done: int) -> list[float]:
    """A step as `loop.advance` takes it: the losses, and the gradient's norm."""
    values = learn(base, attached, opt, recipe, inputs, done)
    told: list[float] = values.tolist()
    opt.step(done, values[-1])
    return told


def learn(base: Base, attached: Attached, opt: Optimizer, recipe: Recipe, inputs: Inputs, done: int = 0) -> Tensor:
    """A step's gradients: forward and backward."""
    learner = Learner(attached, make_objective(recipe.objective, base.noise), opt)
    generator = torch.Generator().manual_seed(done)
    return gradients([learner], [[(inputs, lambda _: generator, lambda piece: piece)]])[0]


# ---------------------------------------------------------------- theirs


def theirs(configs: Configs, recipe: Recipe, side: int, precision: str, script: Path) -> dict[str, Any]:
    """The second step of diffusers' script, which runs as it is, in a process of its own. Raises TrainingError if it does not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scripts.write_base(folder / "base", configs)
        scripts.write_pictures(folder / "pictures", 3 * recipe.batch_size, 64)
        flags = scripts.diffusers_flags(folder, recipe, side, PRECISIONS[precision], STEPS)
        counts: dict[str, Any] = scripts.run("theirs.py", folder / "counts.json", script, flags)
        return counts


# ---------------------------------------------------------------- what is told


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    phases = [f"{row['ops'].get(phase, 0)}" for phase in PHASES]
    total, touched = sum(row["ops"].values()), sum(row["bytes"].values()) / 1e9
    return [
        row["family"],
        row["precision"],
        f"{row['batch']}",
        row["whose"],
        *phases,
        f"{total}",
        f"{row['waits']}",
        f"{touched:.1f}",
    ]


def ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many times ours theirs is, where both were counted."""
    lines = []
    for theirs in (row for row in rows if row["whose"] == "diffusers"):
        same = ("family", "precision", "batch")
        ours = next(row for row in rows if row["whose"] == "personalize" and all(row[key] == theirs[key] for key in same))
        ops, touched = (sum(theirs[key].values()) / sum(ours[key].values()) for key in ("ops", "bytes"))
        batch = f"{theirs['family']} in {theirs['precision']}, batch {theirs['batch']}"
        lines.append(
            f"- {batch}: diffusers' script launches {ops:.2f} times as many operations and touches {touched:.2f} times the bytes"
        )
    return lines


def publish(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """step.md and step.json."""
    command = "python -m tools.bench step" + (f" --script {options.script.name}" if options.script else "")
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    about = f"""# What a step launches

Counted, not timed: a step's own code runs over tensors that are nothing but shapes (of true size), and every operation that torch
dispatches is seen. Nothing here was run on a GPU.

- operation: one that makes or changes a storage; views and allocations are not counted. On a GPU each is at least one kernel.
- wait: the host reads a value and has to wait for the device.
- GB touched: bytes of all arguments and results, as if no kernel kept anything: an upper bound.
- a step: from the batch to what the progress bar says. Ours has latents and captions encoded beforehand; diffusers' script
  encodes them anew at each step, as it does by default. Its data loader, and how our batches are put together, are not in it.
- adapter: LoRA, rank {options.rank}, attention layers. In bfloat16 ours stays in float32: its factors are cast all at once before
  a step, and their gradients behind it. The script (`--mixed_precision bf16`, autocast as on a CPU) holds its adapter and AdamW's
  moments in bfloat16 too
- what goes over all tensors at once (foreach, fused) is one operation here, and on a GPU a launch for every few dozen tensors
- AdamW: fused in ours; in the script's, torch's default on a GPU (foreach)
- {versions}
- command: {command}
"""
    page = "\n".join([about, markdown(HEADS, [cells(row) for row in rows]), *ratios(rows)]).rstrip() + "\n"
    options.to.mkdir(parents=True, exist_ok=True)
    write_text(options.to / "step.md", page)
    write_text(
        options.to / "step.json", json.dumps({"command": command, "versions": versions, "rows": list(rows)}, indent=1) + "\n"
    )
