"""Steps of other trainers, timed on the same device, on random weights of the same shapes: diffusers' scripts and kohya's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from personalize.errors import DataError, TrainingError
from personalize.recipe.fields import Recipe
from personalize.training.memory.estimate import Configs

from . import scripts

WARM = 3  # steps that are not timed
LIMIT = 170  # seconds for a row, loading and all
PICTURES = 32  # per picture of a batch, so that epochs are not too short
Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the other trainers are."""
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py, to be timed beside")
    parser.add_argument("--script-sdxl", type=Path, help="diffusers' train_dreambooth_lora_sdxl.py")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts, whose train_network.py is timed beside")
    parser.add_argument("--work", type=Path, default=Path("runs/throughput"), help="folder for bases of random weights")


def trainers(options: argparse.Namespace, family: str) -> dict[str, Path]:
    """Whose script there is for a family. Raises DataError for one that does not exist."""
    name = "sdxl" if family == "sdxl" else "sd1"
    found = {
        "diffusers": options.script_sdxl if name == "sdxl" else options.script,
        "kohya": options.kohya and options.kohya / scripts.KOHYA[name],
    }
    given = {whose: script for whose, script in found.items() if script}
    for script in given.values():
        if not script.is_file():
            raise DataError(f"there is no script {script}", "examples/dreambooth of diffusers, or a checkout of sd-scripts")
    return given


def time_script(
    whose: str, script: Path, configs: Configs, recipe: Recipe, side: int, options: argparse.Namespace, device: torch.device
) -> Row:
    """Seconds per step and the most bytes held; or why the script failed."""
    sdxl = len(configs.texts) > 1
    folder = options.work.resolve() / f"{'sdxl' if sdxl else 'sd1'}-{configs.denoiser['block_out_channels'][0]}-{side}"
    scripts.write_weights(folder / "base", configs, device)
    if whose == "kohya":
        scripts.write_tokenizers(folder / "tokenizers")
        scripts.write_pictures(folder / "train" / "1_sks dog", PICTURES * recipe.batch_size, side)
        flags = scripts.kohya_flags(folder, recipe, side, sdxl)
    else:
        scripts.write_pictures(folder / "pictures", PICTURES * recipe.batch_size, side)
        flags = scripts.diffusers_flags(folder, recipe, side, "bf16", scripts.FOREVER)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it is to have the whole of it
    told = (WARM, options.seconds)
    try:
        row: Row = scripts.run("timing.py", folder / "times.json", script, flags, *told, limit=LIMIT, cpu=device.type == "cpu")
    except TrainingError as error:
        return {"failed": f"failed: {error.what}"}
    return row


def ratios(rows: Sequence[Row]) -> list[str]:
    """How many times ours another trainer's step takes, for each way of ours that was timed with the same family and batch."""
    spent = {(row["family"], row["batch"], row["mode"]): row["seconds"] for row in rows if "seconds" in row}
    lines = []
    for (family, batch, whose), theirs in spent.items():
        ways = {mode: theirs / ours for (*case, mode), ours in spent.items() if case == [family, batch] and mode in OURS}
        if whose not in OURS and ways:
            told = ", ".join(f"{times:.2f} times ours {mode}" for mode, times in ways.items())
            lines.append(f"- {family}, batch {batch}: a step of {whose} takes {told}")
    return lines


OURS = ("eager", "compiled", "graphs")
