"""How fast training steps are on a GPU, and what they take: on random weights of true shape, beside other trainers."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from personalize.io import write_text
from personalize.models.model import Base, quiet
from personalize.recipe.fields import Recipe
from personalize.training.memory.apply import apply_plan, missing_compiler
from personalize.training.memory.estimate import Configs, ghost, solidify
from personalize.training.memory.ladder import ComputePlan
from personalize.training.optimizers import Optimizer
from personalize.tuning.attach import Attached, attach

from ..pocket.proof.figures import markdown
from . import beside, memory, pairs, resuming
from .graphs import capture_graph
from .resuming import Row
from .scripts import fill
from .step import SIDES, batch_of, learn, recipe_of, step

TINY = {"pocket": 64}
WARM = 3  # steps that are not timed; the first compiles
HEADS = ("family", "side", "batch", "mode", "images/s", "ms per step", "peak GiB", "TFLOP per image", "share of peak")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--families", nargs="*", default=list(SIDES), choices=SIDES, help="which of them")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 8], help="pictures per step")
    parser.add_argument("--modes", nargs="*", default=list(beside.OURS), choices=beside.OURS, help="of ours, which")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, on attention layers")
    parser.add_argument("--seconds", type=float, default=8, help="so long steps are timed for a row")
    beside.add_options(parser)
    resuming.add_options(parser, "throughput")


def main(options: argparse.Namespace) -> None:
    """Time what was not timed yet; publish after every row. Raises TrainingError where there is no GPU."""
    device = resuming.device_of(options)
    about = resuming.machine(device) | {"rank": options.rank}
    peak = matrix_peak(device, 512 if options.tiny else 8192)  # in each call: clocks differ

    def row(family: str, batch: int, mode: str) -> Row:
        return row_of(family, batch, mode, options, device, peak)

    def publish_rows(rows: Sequence[Row]) -> str:
        publish(options, about, rows)
        return " ".join(cells(rows[-1]))

    resuming.measure(options, options.to / "throughput.json", about, cases(options), row, publish_rows)


def cases(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Family, batch, and a mode of ours or another trainer. A tiny SDXL is there for its script alone."""
    families = [*TINY, *(["sdxl"] if options.script_sdxl else [])] if options.tiny else options.families
    ways = {family: [*options.modes, *beside.trainers(options, family)] for family in families}
    return [(family, batch, way) for family in families for batch in options.batches for way in ways[family]]


# ---------------------------------------------------------------- measuring


def row_of(family: str, batch: int, mode: str, options: argparse.Namespace, device: torch.device, peak: float) -> Row:
    """One row, or why there is none."""
    recipe, (side, configs) = recipe_of(batch, options.rank), tiny(family) if options.tiny else true(family)
    row: Row = {"family": family, "side": side, "batch": batch, "mode": mode}
    if mode in beside.OURS:
        row |= own(configs, recipe, mode, options.seconds, device)
    else:
        row |= beside.time_script(mode, beside.trainers(options, family)[mode], configs, recipe, side, options, device)
    if "failed" in row:
        return row
    flops = batch * flops_of_one(family, options.rank, options.tiny)
    return row | {"flops": flops, "peak": peak, "share": flops / row["seconds"] / peak}


def true(family: str) -> tuple[int, Configs]:
    """A family's side in pixels, and its shapes."""
    return SIDES[family], memory.configs_of(pairs.family(family), SIDES[family])


def tiny(family: str) -> tuple[int, Configs]:
    """The same for a CPU."""
    row = pairs.family(family)
    configs = memory.configs_of(row if family in TINY else pairs.small(row), side := TINY.get(family, 64))
    return side, replace(configs, vae={**configs.vae, "block_out_channels": (32, 32, 64, 64)})


def own(configs: Configs, recipe: Recipe, mode: str, seconds: float, device: torch.device) -> Row:
    """Seconds per step and bytes of ours; or why there are none."""
    gpu = device.type == "cuda"
    fit = ComputePlan(
        "bfloat16",
        micro_batch=recipe.batch_size,
        channels_last=gpu,
        compile=mode == "compiled",
        joined=gpu and mode != "compiled",
    )
    if fit.compile and (why := missing_compiler(device)):
        return {"failed": why}
    if mode == "graphs" and not gpu:
        return {"failed": "CUDA graphs need a GPU"}
    try:
        spent, taken = time_steps(trainer(configs, recipe, fit, device, graphs=mode == "graphs"), seconds, device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except RuntimeError as error:
        if mode != "graphs":
            raise
        return {"failed": f"cannot be captured: {str(error).splitlines()[0]}"}
    finally:
        resuming.tidy(device)
    return {"seconds": spent, "bytes": taken}


def trainer(
    configs: Configs, recipe: Recipe, fit: ComputePlan, device: torch.device, *, graphs: bool = False
) -> Callable[[], object]:
    """A function that takes the next step of a run on random weights. The encoders are nowhere: a step does not need them."""
    base, attached = shapes(configs, recipe, replace(fit, compile=False))
    fill(base.denoiser, device)
    apply_plan(base, fit, device)
    opt = Optimizer(attached.parameters(), recipe.optim, recipe.steps)
    inputs, steps = batch_of(base, recipe, configs.denoiser["sample_size"]), itertools.count()
    if graphs:
        vars(base)["denoise"] = capture_graph(base, inputs)
    return lambda: step(base, attached, opt, recipe, inputs, next(steps))


def shapes(configs: Configs, recipe: Recipe, fit: ComputePlan) -> tuple[Base, Attached]:
    """A base without weights, and an adapter on it."""
    with quiet():
        base = ghost(configs, fit)
        return base, attach(base, recipe.adapter)


def time_steps(take: Callable[[], object], seconds: float, device: torch.device) -> tuple[float, int | None]:
    """Seconds per step, and the most bytes held (None on a CPU)."""
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(WARM):
        take()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    wait()
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        take()
        count += 1
    wait()
    return (time.perf_counter() - began) / count, torch.cuda.max_memory_allocated() if gpu else None


def matrix_peak(device: torch.device, n: int) -> float:
    """FLOP per second of a product of two n x n matrices in bf16: the best of several."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return max(2 * n**3 / time_steps(lambda: a @ a, 0.2, device)[0] for _ in range(5))


@functools.cache
def flops_of_one(family: str, rank: int, small: bool) -> int:
    """FLOP of a step of one picture; a GPU's time is not to be spent on counting them for every row."""
    return flops_of((tiny if small else true)(family)[1], recipe_of(1, rank))


def flops_of(configs: Configs, recipe: Recipe) -> int:
    """FLOP of a step: matrix products, convolutions and attention, forward and backward, on shapes alone."""
    aten: Any = torch.ops.aten
    ours = {  # torch counts the GPU's attention only
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
            g, q, k, v
        ),
    }
    base, attached = shapes(configs, recipe, ComputePlan("bfloat16", micro_batch=recipe.batch_size))
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        base.device = torch.device("cpu")
        solidify([base.denoiser])
        opt = Optimizer(attached.parameters(), recipe.optim, recipe.steps)
        inputs = batch_of(base, recipe, configs.denoiser["sample_size"])
        with FlopCounterMode(display=False, custom_mapping=ours) as counter:
            learn(base, attached, opt, recipe, inputs)
    return int(counter.get_total_flops())


# ---------------------------------------------------------------- what is told


def cells(row: Row) -> list[str]:
    """A row of the table."""
    case = [row["family"], f"{row['side']}", f"{row['batch']}", row["mode"]]
    if "failed" in row:
        return [*case, row["failed"], *["–"] * 4]
    taken = "–" if row["bytes"] is None else f"{row['bytes'] / 2**30:.2f}"
    speed = [f"{row['batch'] / row['seconds']:.2f}", f"{1e3 * row['seconds']:.1f}", taken]
    return [*case, *speed, f"{row['flops'] / row['batch'] / 1e12:.3f}", f"{100 * row['share']:.1f} %"]


def publish(options: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """throughput.md and throughput.json."""
    peaks = sorted(row["peak"] / 1e12 for row in rows if "peak" in row)
    peak = f"{peaks[0]:.1f} to {peaks[-1]:.1f} TFLOP/s" if peaks else "–"
    page = f"""# Throughput

Training steps on random weights: forward, backward, clipping and AdamW; latents and captions are there already,
encoders are not on the GPU. The base in bfloat16, a LoRA of rank {options.rank} on attention layers in float32.

- machine: {about["device"]}, torch {about["torch"]}
- peak: {peak}, the best bf16 product of two square matrices, measured in each call
- eager, compiled (blocks, by inductor), graphs (the UNet's both passes as CUDA graphs): ours
- diffusers: `train_dreambooth_lora.py` and `_sdxl.py` as they are, in bf16, adapter and moments too; pictures are encoded at each
  step, by SD's script captions too. kohya: sd-scripts' `train_network.py`, bf16, `--sdpa`, latents cached, the UNet alone, with
  feed-forward and projections. Both from one step to the next, data loader and all
- share of peak: FLOP of matrix products, convolutions and attention of our step (torch's counter) per second, of that peak
- command: python -m tools.bench throughput{" --tiny" if options.tiny else ""}

"""
    options.to.mkdir(parents=True, exist_ok=True)
    write_text(
        options.to / "throughput.md",
        "\n".join([page + markdown(HEADS, [cells(row) for row in rows]), *beside.ratios(rows)]).rstrip() + "\n",
    )
