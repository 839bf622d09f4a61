"""What the base's autoencoder keeps of a picture: encoded and decoded again, beside the true one. No adapter can draw more."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.errors import RecipeError
from personalize.inference import sampling
from personalize.inference.sheet import contact_sheet
from personalize.models.model import Base

from ..art_textures import draw_texture
from ..judge import to_pixels
from ..world import SUBJECTS, UNSEEN_STYLES, render, scenes
from .drawing import Pictures, identity, renders
from .figures import Figure, publish
from .tasks import tasks

SUBJECT_GOAL, STYLE_GOAL, PHOTOGRAPH_GOAL = 29.0, 27.0, 25.0  # dB
OPTIMIZED = 6  # pictures of a group whose latents are sought through the decoder
SHOWN = 3  # pictures of a group in the sheet


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("-n", "--pictures", type=int, default=40, help="pictures per group")
    parser.add_argument(
        "--photographs", type=Path, help="folder of photographs, e.g. those that a package ships; crops are taken"
    )
    parser.add_argument(
        "--optimize", type=int, default=0, metavar="STEPS", help="seek better latents than the encoder's, so long"
    )


def groups(options: argparse.Namespace, side: int) -> Iterator[tuple[str, float | None, Pictures]]:
    """Names, goals in dB and pictures: what the base was taught, what it never saw, and what nobody drew."""
    n = options.pictures
    yield "the world it was taught", None, [render(scene, side) for scene in islice(scenes(options.seed + 900_001), n)]
    for task in tasks("", n, options.seed):
        yield task.name, SUBJECT_GOAL if task.kind == "subject" else STYLE_GOAL, renders(task.called, side)
    rng = np.random.default_rng([options.seed, 23])
    yield "leaves, cells, patterns, clouds", None, [Image.fromarray(draw_texture(rng, side)) for _ in range(n)]
    if options.photographs:
        yield "photographs", PHOTOGRAPH_GOAL, photographs(options.photographs, n, side, rng)


def photographs(folder: Path, count: int, side: int, rng: np.random.Generator) -> Pictures:
    """Square crops of the pictures in a folder, of a third to all of their shorter side, reduced. Raises RecipeError if none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff"))
    if not files:
        raise RecipeError(f"there are no photographs in {folder}", "name a folder with .jpg or .png files")
    crops = []
    for i in range(count):
        with Image.open(files[i % len(files)]) as opened:
            picture = opened.convert("RGB")
        length = int(min(picture.size) * rng.uniform(1 / 3, 1))
        left, top = (int(rng.integers(0, extent - length + 1)) for extent in picture.size)
        crops.append(picture.crop((left, top, left + length, top + length)).resize((side, side), Image.Resampling.LANCZOS))
    return crops


def decibels(shown: Tensor, true: Tensor) -> float:
    """The mean PSNR of pictures `[n, 3, h, w]` in -1..1."""
    wrong = (shown.clamp(-1, 1) - true).square().mean((1, 2, 3)).clamp(min=1e-10)
    return float((10 * torch.log10(4 / wrong)).mean())


@torch.no_grad()
def reconstruct(base: Base, x: Tensor) -> Tensor:
    """Pictures `[n, 3, h, w]` encoded and decoded."""
    return torch.cat([base.decode(base.encode(chunk)[0]) for chunk in x.split(32)])


def best_reconstruction(base: Base, x: Tensor, steps: int) -> Tensor:
    """Pictures `[n, 3, h, w]` as the decoder shows them at best: latents sought by gradient from the encoder's."""
    latents = base.encode(x)[0].detach().requires_grad_()
    descent = torch.optim.Adam([latents], lr=0.03)
    for _ in range(steps):
        descent.zero_grad()
        (base.decode(latents) - x).square().mean().backward()
        descent.step()
    with torch.no_grad():
        return base.decode(latents)


def main(options: argparse.Namespace) -> None:
    """Encode, decode, compare, publish."""
    base = Base.load(options.base)
    tables: dict[str, list[Figure]] = {"PSNR of encode and decode, mean of each group": []}
    cells: Pictures = []
    names: list[str] = []
    best: Mapping[str, float] = {}
    for name, goal, pictures in groups(options, base.resolution):
        x = to_pixels(pictures)
        y = reconstruct(base, x)
        value = decibels(y, x)
        if options.optimize:
            best = {**best, name: decibels(best_reconstruction(base, x[:OPTIMIZED], options.optimize), x[:OPTIMIZED])}
        words, met = (f">= {goal:g}", value >= goal) if goal else ("", None)
        tables["PSNR of encode and decode, mean of each group"].append(
            Figure(name, None, value, best.get(name), words, met, "dB")
        )
        if name in (*SUBJECTS, *UNSEEN_STYLES, "photographs"):
            cells += [one for pair in zip(pictures[:SHOWN], sampling.to_images(y[:SHOWN]), strict=True) for one in pair]
            names.append(f"{name}: {value:.1f} dB")
        print(f"{name}: {value:.1f} dB", flush=True)
    options.to.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells, 2 * SHOWN, rows=names, side=128).save(options.to / f"{options.name}.png")
    about = {
        "base": f"{options.base} ({identity(base.path)})",
        "pictures": f"{options.pictures} per group, {base.resolution} px; in the sheet true ones left, decoded ones right",
        "ceiling": f"latents sought through the decoder, {options.optimize} steps, {OPTIMIZED} pictures"
        if best
        else "not sought",
    }
    publish(options.to, options.name, "What the autoencoder keeps of a picture", about, tables)
