"""What training takes, by family, batch and rung of the ladder: estimated on shapes alone, so that any machine can say it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from personalize.families.family import Family
from personalize.io import write_text
from personalize.recipe.resolve import resolve
from personalize.training.memory.estimate import Configs, Estimate, Workload, estimate
from personalize.training.memory.ladder import LADDER, ComputePlan

from ..pocket.proof.figures import FIGURES, markdown
from . import pairs

CASES = (("sd1", 512), ("sd2", 768), ("sdxl", 1024))  # family, side in pixels
VAE = {  # of all of them
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TOKENS = 49408
HEADS = ("family", "side", "batch", "rung", "weights", "adapter", "activations", "a step", "a sample", "peak")
GOAL = 5 * 2**30  # bytes, for SDXL on the lowest rung


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--families", nargs="*", default=[name for name, _ in CASES], help="which of them")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4], help="pictures per step")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, on attention and feed-forward layers")
    parser.add_argument("--precision", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--to", type=Path, default=FIGURES, help="folder for memory.md and memory.json")


def main(options: Any) -> None:
    """Walk the ladder for each family and batch; publish."""
    rows = []
    for name, side in CASES:
        for batch in options.batches if name in options.families else ():
            configs = configs_of(pairs.family(name), side)
            load = Workload(resolve(flags={"batch_size": batch, "rank": options.rank}), side // 8, side // 8)
            for rung, fit, told in walk(configs, load, options.precision):
                rows.append({"family": name, "side": side, "batch": batch, "rung": rung, **asdict(fit), **asdict(told)})
                print(f"{name} {side} px, batch {batch}, {rung}: {told.peak / 2**30:.2f} GiB", flush=True)
    publish(options, rows)


def walk(configs: Configs, load: Workload, precision: str) -> Iterator[tuple[str, ComputePlan, Estimate]]:
    """Every rung with what it takes."""
    for rung, fit in rungs(load.recipe.batch_size, precision):
        yield rung, fit, estimate(configs, load, fit, ("unet",))


def rungs(batch: int, precision: str) -> Iterator[tuple[str, ComputePlan]]:
    """Every rung from the first to the last that changes anything; then the last without int8, and nf4 without the last."""
    rung, fit = "everything at once", ComputePlan(precision, micro_batch=batch, channels_last=True, joined=precision != "float32")
    while True:
        yield rung, fit
        below = next(((one.name, one.of(fit)) for one in LADDER if one.of(fit) != fit), None)
        if below is None:
            break
        rung, fit = below
    yield "offload, nothing packed", replace(fit, quantize="none")
    yield "nf4", replace(fit, quantize="nf4", offload=False)


def configs_of(row: Family, side: int) -> Configs:
    """A family's true shapes."""
    texts = {text.part: text.config(TOKENS) | ({"hidden_act": "gelu"} if row.name != "sd1" else {}) for text in row.texts}
    denoiser = row.denoiser.config(row.texts) | {"sample_size": side // 8}
    vae = VAE | {"sample_size": side, "latent_channels": denoiser["in_channels"]}
    return Configs(denoiser, vae, texts, row.denoiser.part)


def publish(options: Any, rows: Sequence[dict[str, Any]]) -> None:
    """memory.md and memory.json."""
    lowest = min((peak(row) for row in rows if row["family"] == "sdxl" and row["quantize"] == "int8"), default=0)
    command = f"python -m tools.bench memory --batches {' '.join(map(str, options.batches))} --rank {options.rank}"
    about = [
        "# Memory by rung",
        "",
        "Estimated: the code of a step and of a sample runs over tensors that are nothing but shapes, and every byte is counted.",
        "What kernels take for themselves, fragments and CUDA's own few hundred MB come on top; nothing here was run on a GPU.",
        "`adapter` is parameters, gradients and two moments; `a sample` is 8 pictures at once, one from `tiled VAE` on.",
        "",
        f"- held and computed in {options.precision}, the adapter in float32, rank {options.rank} on attention and feed-forward",
        f"- torch {torch.__version__}",
        f"- command: {command}",
        *([f"- SDXL's lowest rung with int8 takes {lowest / 2**30:.2f} GiB; the goal is {GOAL / 2**30:.0f}"] if lowest else []),
        "",
    ]
    cells = [
        [row["family"], f"{row['side']}", f"{row['batch']}", row["rung"], *(f"{one / 2**30:.2f}" for one in figures(row))]
        for row in rows
    ]
    options.to.mkdir(parents=True, exist_ok=True)
    write_text(options.to / "memory.md", "\n".join(about) + "\n" + markdown(HEADS, cells) + "\n\nAll sizes are in GiB.\n")
    write_text(options.to / "memory.json", json.dumps({"command": command, "rows": list(rows)}, indent=1) + "\n")


def figures(row: dict[str, Any]) -> list[int]:
    """The bytes of a table's row."""
    step = row["weights"] + row["adapter"] + row["activations"]
    return [row["weights"], row["adapter"], row["activations"], step, row["sampling"], peak(row)]


def peak(row: dict[str, Any]) -> int:
    """The most bytes of a row."""
    return max(int(row["weights"] + row["adapter"] + row["activations"]), int(row["sampling"]))
