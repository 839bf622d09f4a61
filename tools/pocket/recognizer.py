"""Trains the network that tells individuals and looks apart, on invented ones of which the benchmarks know none.

    python -m tools.pocket.recognizer --work runs/recognizer      # about twenty minutes on one core, resumable

Every batch holds sixteen individuals of one class, among them some that differ in their marks or their coat alone, and sixteen
looks, each four times in other scenes: images of one are to lie nearer to each other than to all the rest (Khosla et al. 2020,
supervised contrastive learning, https://arxiv.org/abs/2004.11362).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from personalize.models.recognizer import Recognizer
from personalize.training.calibration import RECOGNIZER

from .art_canvas import RGB, mix, shades
from .art_individuals import invent_individual
from .art_looks import invent_look
from .art_subjects import Subject
from .colours import COLOURS
from .judge import bend, soften
from .running import Plan, run
from .world import BACKGROUNDS, OBJECTS, PLACES, SIZES, STYLES, Scene, render

EACH = 200  # individuals of each class
LOOKS = 1000
NEAR = 0.4  # of the individuals have each kind of near miss
TIMES = 6  # images of each
AMONG, SHOWN, TOGETHER = 16, 4, 4  # in a batch: so many individuals or looks, images of each, and neighbours in the pool
TEMPERATURE = 0.1
SEED = 4711  # no other of the world's streams begins here


def individuals() -> dict[str, list[Subject]]:
    """By class: whole ones and near misses of the one before: no marks, the marks on another coat, and on one half-way."""
    found: dict[str, list[Subject]] = {}
    for number, thing in enumerate(OBJECTS):
        rng = np.random.default_rng([SEED, number])
        own: list[Subject] = []
        while len(own) < EACH:
            one = invent_individual(rng, thing, str(rng.choice(list(COLOURS))), COLOURS)
            own.append(one)
            other = shades(COLOURS[str(rng.choice(list(COLOURS)))])
            near: list[dict[str, Any]] = [{"marks": {}}, {"palette": other}, {"palette": mix_palettes(one.palette, other)}]
            own += [replace(one, **change) for change in near if one.marks and rng.random() < NEAR]
        found[thing] = own[:EACH]
    return found


def mix_palettes(a: Mapping[str, RGB], b: Mapping[str, RGB]) -> dict[str, RGB]:
    """The colours half-way between those of two palettes."""
    return {part: mix(colour, b.get(part, colour), 0.5) for part, colour in a.items()}


def random_scene(rng: np.random.Generator, thing: str, plain: float) -> Scene:
    """Any scene of a thing, in the plain style with this probability."""
    style = "plain" if rng.random() < plain else STYLES[int(rng.integers(len(STYLES)))]
    size, place = SIZES[int(rng.integers(1, 3))], PLACES[int(rng.integers(3))]
    colour, background = list(COLOURS)[int(rng.integers(len(COLOURS)))], BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(thing, colour, size, place, background, style, int(rng.integers(2**31)))


def draw_pool() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images of individuals by class [EACH, TIMES, 64, 64, 3], and of looks [LOOKS, TIMES, 64, 64, 3]."""
    rng = np.random.default_rng([SEED, 99])
    people = {
        thing: np.stack([[np.asarray(render(random_scene(rng, thing, 0.5), 64, one)) for _ in range(TIMES)] for one in own])
        for thing, own in individuals().items()
    }
    looks = [invent_look(rng, COLOURS)[0] for _ in range(LOOKS)]
    shown = [
        [
            np.asarray(render(random_scene(rng, OBJECTS[int(rng.integers(len(OBJECTS)))], 1.0), 64, None, look))
            for _ in range(TIMES)
        ]
        for look in looks
    ]
    return people, np.stack(shown)


def contrast(vectors: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The supervised contrastive loss of vectors [AMONG * SHOWN, d], SHOWN of each in a row: a scalar."""
    same = torch.arange(len(vectors)) // SHOWN
    alike = (same[:, None] == same[None]) & ~torch.eye(len(vectors), dtype=torch.bool)
    logits = (vectors @ vectors.T / temperature).masked_fill(torch.eye(len(vectors), dtype=torch.bool), -1e9)
    return -(F.log_softmax(logits, 1) * alike).sum(1).div(SHOWN - 1).mean()


def pick_images(rng: np.random.Generator, pool: np.ndarray) -> np.ndarray:
    """AMONG of a pool [n, TIMES, ...], SHOWN images of each, in a row. Neighbours come together: near misses meet their like."""
    shift = int(rng.integers(TOGETHER))
    firsts = rng.choice((len(pool) - shift) // TOGETHER, AMONG // TOGETHER, replace=False) * TOGETHER + shift
    chosen = (firsts[:, None] + np.arange(TOGETHER)).flatten()
    return np.concatenate([pool[i][rng.choice(TIMES, SHOWN, replace=False)] for i in chosen])


def train(work: Path, steps: int) -> Recognizer:
    """Train, or go on."""
    file = work / "pool.npz"
    if not file.is_file():
        people, looks = draw_pool()
        work.mkdir(parents=True, exist_ok=True)
        np.savez(file, allow_pickle=False, looks=looks, **people)
    pool = dict(np.load(file))
    looks = pool.pop("looks")
    torch.manual_seed(0)
    model = Recognizer().train()

    def batches(start: int) -> Iterator[Tensor]:
        step = start
        while True:
            rng = np.random.default_rng([SEED, step])
            images = np.concatenate([pick_images(rng, pool[OBJECTS[step % len(OBJECTS)]]), pick_images(rng, looks)])
            x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
            generator = torch.Generator().manual_seed(step)
            yield soften(bend(x, 0.9 * torch.rand(len(x), generator=generator), generator), generator)
            step += 1

    def loss_of(batch: Any, step: int) -> Tensor:
        found, half = model(batch), AMONG * SHOWN
        return contrast(found["individual"][:half]) + contrast(found["look"][half:])

    plan = Plan(steps, batch=2 * AMONG * SHOWN, lr=3e-3, warmup=50, decay=0.6, ema=0.99, weight_decay=0.02, save_every=100)
    model.load_state_dict(run(work, model, plan, batches, loss_of))
    return model


def main() -> None:
    """Draw, train, save."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.recognizer", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/recognizer"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--to", type=Path, default=RECOGNIZER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(options.work, options.steps)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, options.to)


if __name__ == "__main__":
    main()
