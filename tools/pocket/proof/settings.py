"""What pretraining's settings are worth at small scale: each changed alone, on the same pictures, and judged alike.

Every row is a run of `tools.pocket.pretrain` in a folder of its own, resumable as ever; a finished row is kept. All
have the autoencoder and the tokenizer of a finished base, and all but the last its text encoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalize.families.noise import VP
from personalize.io import write_text
from personalize.models.model import Base
from personalize.models.sources import locate

from .. import pretrain
from ..judge import Judge, to_pixels
from .base import GOALS, trials
from .drawing import Artist, Trial, obedience, renders
from .figures import machine, publish, show

ROWS: dict[str, tuple[str, ...]] = {  # what is changed => options of pretrain
    "as shipped": (),
    "epsilon, no zero SNR": ("--unet-prediction", "epsilon", "--no-unet-zero-snr"),
    "v, no zero SNR": ("--no-unet-zero-snr",),
    "sample": ("--unet-prediction", "sample"),
    "min-SNR 5": ("--unet-min-snr", "5"),
    "logit-normal timesteps": ("--unet-density", "logit-normal"),
    "narrower, 32 to 128": ("--unet-width", "32", "64", "128"),
    "wider, 64 to 256": ("--unet-width", "64", "128", "256"),
    "half the learning rate": ("--unet-lr", "1e-3"),
    "text encoder untrained": ("--clip-steps", "0"),
}
SHARED = ("pool", "tokenizer", "vae", "latents.npy")  # what a row's folder has in common with all others
TEXT = ("clip", "conditions.npy")
HEADS = ("changed", "UNet", "1,000 pictures", "error of v", *GOALS, "all four")
LEVELS = 12  # signal levels at which the error is measured
SHOWN = 288  # true pictures on which it is measured, of scenes that no pool has


@dataclass(frozen=True)
class Row:
    """What became of one setting."""

    name: str
    error: float  # mean squared, of v, at equal shares of signal
    obeyed: Mapping[str, float]  # per head, 0..1
    cost: float  # CPU seconds for a thousand pictures, forward and backward
    parameters: int

    def cells(self) -> tuple[str, ...]:
        heads = (show(self.obeyed[head], "%") for head in (*GOALS, "all"))
        return self.name, f"{self.parameters / 1e6:.1f} M", f"{self.cost:.0f} s", f"{self.error:.4f}", *heads


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--images", type=int, default=32_000, help="that each UNet sees")
    parser.add_argument("--pool", type=int, default=16_000, help="pictures drawn")
    parser.add_argument("-n", "--pictures", type=int, default=96, help="drawn by each and judged")
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW", help="some of the rows")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--muon", default=True, action=argparse.BooleanOptionalAction, help="or AdamW for everything")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, in pixels")
    parser.set_defaults(sampler="DDIM")  # which follows every prediction
    parser.add_argument("--work", type=Path, default=Path("runs/settings"), help="folder of pools, states and finished rows")


def prepare_folder(options: argparse.Namespace) -> None:
    """The folder that all rows share: pictures, latents and conditions, by the parts of a finished base."""
    base, parts = locate(options.base), options.work / "shared"
    kept = ("--start", str(base), "--vae-steps", "0", "--decoder-steps", "0", "--clip-steps", "0")
    told = pretrain.arguments([*common(options, parts), *kept])
    pretrain.run(told, ("pool", "unpack", "vae", "clip", "latents", "conditions"))


def common(options: argparse.Namespace, work: Path) -> list[str]:
    """The options of every run of pretrain."""
    told = {"work": work, "to": work / "base", "size": options.size, "pool": options.pool, "seed": 11, "device": "cpu"}
    told |= {"unet-batch": options.batch, "unet-steps": options.images // options.batch}
    return [
        "--muon" if options.muon else "--no-muon",
        *(word for name, value in told.items() for word in (f"--{name}", str(value))),
    ]


def run_row(options: argparse.Namespace, name: str, judge: Judge) -> Row:
    """Train a UNet as a row says, and look at it; a finished row is read."""
    work = options.work / name.replace(" ", "-").replace(",", "")
    if (file := work / "row.json").is_file():
        return Row(**json.loads(file.read_text()))
    work.mkdir(parents=True, exist_ok=True)
    told = pretrain.arguments([*common(options, work), *ROWS[name]])
    for part in SHARED if "--clip-steps" in ROWS[name] else (*SHARED, *TEXT):
        if not (work / part).exists():
            (work / part).symlink_to((options.work / "shared" / part).resolve())
    pretrain.run(told, ("clip", "conditions", "unet", "export"))
    base = Base.load(str(told.to))
    asked = trials(options.pictures, options.seed, held_out=False)
    drawn = Artist(base, work / "pictures", options).draw(asked, name)
    size = sum(p.numel() for p in base.unet.parameters())
    wrong = error(base, trials(SHOWN, options.seed + 1, held_out=False))
    row = Row(name, wrong, obedience(judge, drawn, asked, tuple(GOALS)), cost(base, options.batch), size)
    write_text(file, json.dumps(asdict(row)))
    return row


@torch.no_grad()
def error(base: Base, asked: Sequence[Trial]) -> float:
    """Mean squared error of v on true pictures, over equally spaced shares of signal, whatever the UNet predicts."""
    schedule, generator = VP.of(base.scheduler_config), torch.Generator().manual_seed(0)
    levels = torch.linspace(0.03, 0.97, LEVELS)
    steps = (schedule.alphas_cumprod[None] - levels[:, None]).abs().argmin(1)  # of each schedule its own
    found = []
    for first in range(0, len(asked), 48):
        some = asked[first : first + 48]
        x0 = base.encode(to_pixels(renders(some, base.resolution)))[0]
        t, noise = steps[torch.arange(len(some)) % LEVELS], torch.randn(x0.shape, generator=generator)
        x = schedule.signal(t) * x0 + schedule.noise(t) * noise
        predicted = base.denoise(x, t, base.embed([trial.prompt for trial in some]))
        v = schedule.signal(t) * noise - schedule.noise(t) * x0
        found.append((velocity(predicted, x, t, schedule) - v).square().mean((1, 2, 3)))
    return float(torch.cat(found).mean())


def cost(base: Base, batch: int) -> float:
    """CPU seconds that a thousand pictures take in a UNet, forward and backward: the least of three batches."""
    unet, cond, spent = base.unet.requires_grad_(), base.embed([""] * batch), []
    x = torch.zeros(batch, unet.config.in_channels, *[unet.config.sample_size] * 2)
    for _ in range(3):
        began = time.process_time()
        base.denoise(x, torch.zeros(batch, dtype=torch.long), cond).sum().backward()
        spent.append(time.process_time() - began)
    return 1000 * min(spent) / batch


def velocity(predicted: Tensor, x: Tensor, t: Tensor, schedule: VP) -> Tensor:
    """v of whatever was predicted from x_t; v = signal eps - noise x_0 and x_t = signal x_0 + noise eps."""
    signal, noise = schedule.signal(t), schedule.noise(t)
    if schedule.prediction == "v_prediction":
        return predicted
    if schedule.prediction == "epsilon":
        return (predicted - noise * x) / signal
    return (signal * x - predicted) / noise


def main(options: argparse.Namespace) -> None:
    """Train, look, publish."""
    prepare_folder(options)
    judge = Judge.load()
    rows = [run_row(options, name, judge) for name in options.only]
    about = {
        "each UNet": f"from random weights, {options.images:,} pictures in batches of {options.batch}, on {machine()}",
        "optimizer": "Muon for matrices, AdamW for the rest" if options.muon else "AdamW",
        "pictures": f"{options.pictures} seen combinations, {options.sampler_steps} steps of {options.sampler}, "
        f"guidance {options.guidance:g}",
        "1,000 pictures": "CPU seconds, forward and backward in the UNet",
        "error of v": f"on {SHOWN} true pictures of other scenes, at {LEVELS} even shares of signal, whatever is predicted",
        "one seed": "differences of a few per cent in what is obeyed are chance",
    }
    tables = {"Changed alone": rows}
    publish(options.to, options.name, "What pretraining's settings are worth at small scale", about, tables, heads=HEADS)
