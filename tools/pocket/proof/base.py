"""How well the base obeys a prompt, on combinations it has seen and on those that were held out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from personalize.inference import sampling, sheet
from personalize.models.model import Base

from ..judge import Judge, to_pixels
from ..world import BACKGROUND_WORDS, PLACE_WORDS, SIZE_WORDS, STYLE_WORDS, Scene, caption, scenes
from .drawing import Artist, Pictures, Trial, obedience, renders
from .figures import Figure, publish, share

GOALS = {"object": (0.90, 0.80), "colour": (0.85, 0.75), "background": (0.90, 0.85), "style": (0.90, 0.85)}  # seen, held out
HEADS = (*GOALS, "size", "place")
GROUPS = {"seen": False, "held-out": True}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("-n", "--pictures", type=int, default=200, help="pictures per group")
    parser.add_argument("--cache", type=Path, default=Path("runs/proof/base-pictures"), help="folder of drawn pictures")


def tells_all(words: str, scene: Scene) -> bool:
    """Whether a caption names object, colour, background and style (plain is what no word says); size and place are extra."""
    styled = scene.style == "plain" or any(word in words for word in STYLE_WORDS[scene.style])
    placed = any(word in words for word in BACKGROUND_WORDS[scene.background])
    return f"{scene.colour} {scene.object}" in words and styled and placed


def telling(scene: Scene) -> str:
    """A caption of the world's own that tells all that is judged."""
    return next(words for seed in count() if tells_all(words := caption(scene, seed), scene))


def trials(number: int, seed: int, held_out: bool) -> list[Trial]:
    """Random scenes that pretraining did not draw, with telling prompts."""
    stream: Iterator[Scene] = scenes(seed + 900_001, held_out)
    return [Trial(telling(scene), seed * 100_000 + i, scene) for i, scene in zip(range(number), stream, strict=False)]


def naming(all_trials: list[Trial], pictures: Pictures, head: str) -> tuple[list[Trial], Pictures]:
    """The trials whose prompt names a head, and their pictures."""
    words = {"size": SIZE_WORDS, "place": PLACE_WORDS}.get(head)
    rows = [
        (trial, picture)
        for trial, picture in zip(all_trials, pictures, strict=True)
        if words is None or any(word in trial.prompt for word in words[getattr(trial.scene, head)])
    ]
    return [trial for trial, _ in rows], [picture for _, picture in rows]


def through_autoencoder(base: Base, pictures: Pictures) -> Pictures:
    """Pictures encoded and decoded: no UNet can draw better."""
    with torch.no_grad():
        chunks = [base.decode(base.encode(chunk)[0]) for chunk in to_pixels(pictures).split(32)]
    return sampling.to_images(torch.cat(chunks))


def noise(number: int, side: int) -> Pictures:
    """Pictures of nothing."""
    values = torch.randint(256, (number, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(array.numpy()) for array in values]


def measure(judge: Judge, artist: Artist, asked: list[Trial], group: str, drawn: Pictures) -> list[Figure]:
    """Figures of one group: per head, the share obeyed, of the judge's ceiling on true renders of the same scenes."""
    side = artist.base.resolution
    true = renders(asked, side)
    sets = {"noise": noise(len(asked), side), "drawn": drawn, "decoded": through_autoencoder(artist.base, true), "true": true}
    figures = []
    for head in (*HEADS, "all"):
        values = {}
        for name, pictures in sets.items():
            told, shown = naming(asked, pictures, head)
            values[name] = obedience(judge, shown, told, tuple(GOALS) if head == "all" else (head,))[head]
        goal = GOALS.get(head, (None, None))[GROUPS[group]]
        reached = share(values["drawn"], values["true"])
        words = f"{100 * reached:.1f} % of ceiling" + (f"; >= {100 * goal:.0f} %" if goal else "")
        title = "all four at once" if head == "all" else head
        met = reached >= goal if goal else None
        figures.append(Figure(title, values["noise"], values["drawn"], values["true"], words, met))
        if share(values["decoded"], values["true"]) < 0.97:
            figures.append(Figure(f"{title}, through the autoencoder", None, values["decoded"], values["true"]))
    return figures


def contact_sheet(asked: list[Trial], drawn: Pictures, file: Path) -> None:
    """The first 24 pictures under their prompts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.contact_sheet(drawn[:24], 6, side=192).save(file)
    file.with_suffix(".txt").write_text("".join(f"{trial.prompt}\n" for trial in asked[:24]))


def main(options: argparse.Namespace) -> None:
    """Draw, judge, publish."""
    judge, base = Judge.load(), Base.load(options.base)
    artist = Artist(base, options.cache, options)
    tables = {}
    for group, held_out in GROUPS.items():
        asked = trials(options.pictures, options.seed, held_out)
        drawn = artist.draw_base(asked, group)
        tables[f"{group} combinations"] = measure(judge, artist, asked, group, drawn)
        contact_sheet(asked, drawn, options.to / f"{options.name}-{group}.png")
    about = {
        "base": f"{options.base} ({artist.identity})",
        "pictures": f"{options.pictures} per group, {artist.told}",
        "floor": "the judge on noise",
        "ceiling": "the judge on true renders of the same scenes; rows through the autoencoder show where that costs 3 % or more",
        "size and place": "where the prompt names them",
    }
    publish(options.to, options.name, "How well the base obeys a prompt", about, tables)
