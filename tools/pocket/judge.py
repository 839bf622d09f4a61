"""The judge: a small classifier trained on renders, which says what a picture shows. Its word is the truth of our figures.

    python -m tools.pocket.judge            # about four minutes on one core: draw, train, write judge/, print accuracies

It sees every value there is: held-out combinations, unseen styles, the subjects, and impostors that resemble them. Pictures
are softened and shaken while it learns, so that it reads slightly soft generated pictures as fairly as crisp renders; and it
sees blobs and badly bent objects, which it must call unclear, so that a smudge in the right place is no cat.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from math import cos, sin
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .art_canvas import Pen, shades
from .art_objects import DRAWINGS
from .art_styles import COLOURLESS
from .autoencoder import pixels
from .pool import shuffled_batches
from .running import Plan, run
from .world import BACKGROUNDS, COLOURS, OBJECTS, PLACES, SIZES, STYLES, SUBJECTS, UNSEEN_STYLES, Scene, render, scenes

FOLDER = Path(__file__).parent / "judge"
SIDE = 64  # pixels; other pictures are resized to it
NONE = "none"  # no known subject
UNCLEAR = "unclear"  # no object that one could name
HEADS: dict[str, tuple[str, ...]] = {
    "object": (*OBJECTS, UNCLEAR),
    "colour": tuple(COLOURS),
    "background": BACKGROUNDS,
    "style": (*STYLES, *UNSEEN_STYLES),
    "size": SIZES,
    "place": PLACES,
    "subject": (NONE, *SUBJECTS),
}
WIDTHS = ((24, 2), (48, 2), (96, 1), (128, 2), (160, 1))  # channels and stride of each convolution
COATS = ("brown", "orange")  # no subject wears these


# ------------------------------------------------------------------ the network


def _convolution(into: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Judge(nn.Module):
    """Pictures `[n, 3, 64, 64]` in -1..1 => logits `{head: [n, values]}`."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, *(width for width, _ in WIDTHS))
        self.body = nn.Sequential(*(_convolution(i, o, s) for i, (o, s) in zip(channels, WIDTHS, strict=False)))
        self.where = nn.Conv2d(channels[-1], 32, 1)  # a narrow map that keeps positions
        self.join = nn.Linear(2 * channels[-1] + 32 * 16, 96)
        self.heads = nn.ModuleDict({head: nn.Linear(96, len(values)) for head, values in HEADS.items()})
        self.identity = ""  # a hash of the file it was loaded from

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        seen = self.body(x)
        where = F.adaptive_avg_pool2d(F.relu(self.where(seen)), 4).flatten(1)
        joined = F.relu(self.join(torch.cat([seen.mean((2, 3)), seen.amax((2, 3)), where], 1)))
        return {name: head(joined) for name, head in self.heads.items()}

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Judge:
        """The shipped judge. Raises ValueError if its heads are not today's world."""
        trained_for = json.loads((folder / "config.json").read_text())["heads"]
        if trained_for != {head: list(values) for head, values in HEADS.items()}:
            raise ValueError(f"the judge in {folder} knows another world: python -m tools.pocket.judge trains it anew")
        judge = cls()
        stored = (folder / "model.safetensors").read_bytes()
        judge.load_state_dict({name: t.float() for name, t in load(stored).items()}, strict=False)
        judge.identity = hashlib.sha256(stored).hexdigest()[:12]
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image] | Tensor) -> dict[str, Tensor]:
        """Probabilities `{head: [n, values]}` of pictures, or of pixels `[n, 3, h, w]` in -1..1."""
        x = pictures if isinstance(pictures, Tensor) else to_pixels(pictures)
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="area")
        logits = [self(chunk) for chunk in x.split(256)]
        return {head: torch.cat([chunk[head] for chunk in logits]).softmax(-1) for head in HEADS}

    def verdict(self, pictures: Sequence[Image.Image] | Tensor) -> dict[str, list[str]]:
        """The likeliest value of every head, per picture."""
        return {head: [HEADS[head][i] for i in p.argmax(-1)] for head, p in self.score(pictures).items()}


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size => `[n, 3, h, w]` in -1..1."""
    stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def agreement(verdict: Mapping[str, Sequence[str]], head: str, wanted: Sequence[str]) -> float:
    """The share of pictures whose verdict on a head is the wanted value."""
    return sum(said == true for said, true in zip(verdict[head], wanted, strict=True)) / max(1, len(wanted))


# ------------------------------------------------------------------ labelled pictures

IMPOSTOR = "impostor "
BENT = 0.12  # share of pictures that are bent beyond recognition while training


@contextmanager
def impostors() -> Iterator[None]:
    """Inside, the world can also draw blobs, and near misses of each subject: its palette without its marks, its marks in a
    plain coat."""
    near = {f"{IMPOSTOR}{name}": replace(subject, marks={}) for name, subject in SUBJECTS.items()}
    for coat in COATS:
        palette = shades(COLOURS[coat])
        near |= {f"{IMPOSTOR}{coat} {name}": replace(subject, palette=palette) for name, subject in SUBJECTS.items()}
    SUBJECTS.update(near)
    DRAWINGS[UNCLEAR] = _blob
    try:
        yield
    finally:
        del DRAWINGS[UNCLEAR]
        for name in near:
            del SUBJECTS[name]


def _blob(p: Pen) -> None:
    """Something in an object's colours and size that is no object."""
    for part in ("body", *(("light", "dark", "spot", "body")[: int(p.some(1, 5))])):
        whole = part == "body"
        x, y, r = (0.0, 0.0, 0.85) if whole else (p.some(-0.5, 0.5), p.some(-0.5, 0.5), p.some(0.15, 0.5))
        corners, turn = int(p.some(4, 10)), p.some(0, 6.3)
        angles = [turn + 6.283 * i / corners for i in range(corners)]
        p.blob([(x + cos(a) * r * p.some(0.5, 1.1), y + sin(a) * r * p.some(0.5, 1.1)) for a in angles], p[part], edge=whole)


def truth(scene: Scene) -> dict[str, str | None]:
    """What each head should say of a scene; None where the picture cannot tell (the colour of a subject)."""
    subject = None if scene.subject is None or scene.subject.startswith(IMPOSTOR) else scene.subject
    told = {field.name: getattr(scene, field.name) for field in fields(scene) if field.name in HEADS}
    colour = None if scene.subject or scene.style in COLOURLESS else scene.colour
    return told | {"colour": colour, "subject": subject or NONE}


def labelled_scenes(seed: int) -> Iterator[Scene]:
    """Endless scenes for the judge: every combination, 25 % in unseen styles, 25 % with subjects; among `impostors`, 10 % of
    those and 8 % blobs."""
    rng = np.random.default_rng([seed, 31])
    streams = scenes(seed), scenes(seed, held_out=True)
    subjects = list(SUBJECTS)
    near = [name for name in subjects if name.startswith(IMPOSTOR)]
    real = [name for name in subjects if not name.startswith(IMPOSTOR)]
    while True:
        scene = next(streams[int(rng.random() < 0.25)])
        if rng.random() < 0.25:
            scene = replace(scene, style=UNSEEN_STYLES[int(rng.integers(len(UNSEEN_STYLES)))])
        kind = rng.random()
        if kind < 0.35:
            names = real if kind < 0.25 or not near else near
            name = names[int(rng.integers(len(names)))]
            scene = replace(scene, subject=name, object=SUBJECTS[name].class_name)
        elif kind < 0.43 and near:
            scene = replace(scene, object=UNCLEAR)
        yield scene


def draw_labelled(count: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """Pictures `[count, 64, 64, 3]` uint8 and labels `[count, heads]`, -1 where the picture cannot tell."""
    pictures, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), torch.empty(count, len(HEADS), dtype=torch.long)
    with impostors():
        for i, scene in enumerate(islice(labelled_scenes(seed), count)):
            pictures[i] = np.asarray(render(scene, SIDE))
            told = truth(scene)
            labels[i] = torch.tensor([-1 if told[head] is None else values.index(told[head]) for head, values in HEADS.items()])
    return pictures, labels


# ------------------------------------------------------------------ training


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `[n, 3, h, w]` as a generator might draw them: blurred, faded, noisy, tinted, shifted, each in its own measure."""
    n, side = len(x), x.shape[-1]

    def some(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    small = int(torch.randint(28, side, (), generator=generator))
    coarse = F.interpolate(F.interpolate(x, (small, small), mode="area"), (side, side), mode="bilinear")
    x = torch.lerp(x, coarse, (2 * some(1, 1, 1) - 1).clamp(min=0))
    x = torch.lerp(x, blur(x), (2 * some(1, 1, 1) - 0.7).clamp(0, 1))
    x = torch.lerp(x, x.mean(1, keepdim=True), 0.4 * some(1, 1, 1).square())
    x = x * (1 + 0.12 * (some(3, 1, 1) - 0.5)) + 0.1 * (some(3, 1, 1) - 0.5)
    x = x + 0.08 * some(1, 1, 1) * torch.randn(x.shape, generator=generator)
    down, across = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    return F.pad(x, (2, 2, 2, 2), mode="replicate")[..., 2 + down : 2 + down + side, 2 + across : 2 + across + side]


def blur(x: Tensor) -> Tensor:
    """Pixels `[n, 3, h, w]` under a 5x5 binomial kernel."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 5, 5), groups=3)


def bend(x: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `[n, 3, h, w]` under random smooth shifts of `pixels` [n] root mean square."""
    n, side = len(x), x.shape[-1]
    knots = int(torch.randint(5, 10, (), generator=generator))
    shift = F.interpolate(torch.randn(n, 2, knots, knots, generator=generator), (side, side), mode="bicubic")
    shift = shift / shift.square().mean((1, 2, 3), keepdim=True).sqrt() * pixels[:, None, None, None] * (2 / side)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, straight + shift.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def disturb(x: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Softened pictures and their labels: most are bent a little, some so much that nobody is to be seen."""
    ruined = torch.rand(len(x), generator=generator) < BENT
    some = torch.rand(len(x), generator=generator)
    heads = list(HEADS)
    labels = labels.clone()
    labels[ruined, heads.index("object")] = HEADS["object"].index(UNCLEAR)
    labels[ruined, heads.index("subject")] = HEADS["subject"].index(NONE)
    return soften(bend(x, torch.where(ruined, 4 + 3 * some, 0.9 * some), generator), generator), labels


def loss_of_labels(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The sum of the heads' cross-entropies over the labels that are told."""
    losses = [F.cross_entropy(logits[head].float(), labels[:, i], ignore_index=-1) for i, head in enumerate(HEADS)]
    return torch.stack(losses).sum()


@torch.no_grad()
def _settle(judge: Judge, pictures: np.ndarray) -> None:
    """Give the batch normalisations the statistics of the averaged weights."""
    norms = [module for module in judge.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    judge.train()
    for step, i in enumerate(islice(shuffled_batches(len(pictures), min(256, len(pictures)), 5, 0), 16)):
        judge(disturb(pixels(pictures[i]), torch.zeros(len(i), len(HEADS)), torch.Generator().manual_seed(step))[0])
    judge.eval()


def train(pictures: np.ndarray, labels: Tensor, plan: Plan, work: Path) -> Judge:
    """Train a judge on labelled pictures, resumably (`work` holds the state)."""
    torch.manual_seed(0)
    judge = Judge().train()

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, i in enumerate(shuffled_batches(len(pictures), plan.batch, 4, start), start):
            yield disturb(pixels(pictures[i]), labels[i], torch.Generator().manual_seed(step))

    def loss_of(batch: Any, step: int) -> Tensor:
        return loss_of_labels(judge(batch[0].to(memory_format=torch.channels_last)), batch[1])  # bf16 is slow on most CPUs

    judge.load_state_dict(run(work, judge, plan, batches, loss_of), strict=False)
    _settle(judge, pictures)
    return judge


def accuracies(judge: Judge, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of told labels that the judge gets right, per head."""
    scores = judge.score(pixels)
    found = {}
    for i, head in enumerate(HEADS):
        told = labels[:, i] >= 0
        found[head] = float((scores[head].argmax(-1)[told] == labels[told, i]).float().mean())
    return found


def examine(judge: Judge, count: int = 2000, seed: int = 9) -> dict[str, dict[str, float]]:
    """Accuracies on renders it has not seen (the ceiling), on softened ones, and on noise (the floor)."""
    pictures, labels = draw_labelled(count, seed)
    x, generator = pixels(pictures), torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    rows = {"renders": x, "softened": soften(x, generator), "noise": noise}
    return {name: accuracies(judge, x, labels) for name, x in rows.items()}


def save(judge: Judge, folder: Path, about: Mapping[str, object]) -> None:
    """Write `model.safetensors` (fp16) and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.half().contiguous() for n, t in judge.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, folder / "model.safetensors")
    config = {"heads": {head: list(values) for head, values in HEADS.items()}} | dict(about)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Draw, train, save, and say how well it judges."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.judge", description=__doc__)
    parser.add_argument("--renders", type=int, default=36_000, help="labelled pictures drawn")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="folder of the resumable state (default: a temporary one)")
    parser.add_argument("--to", type=Path, default=FOLDER)
    options = parser.parse_args()
    pictures, labels = draw_labelled(options.renders, seed=1)
    plan = Plan(options.steps, batch=128, lr=4e-3, warmup=50, decay=0.7, ema=0.99, weight_decay=0.05)
    with tempfile.TemporaryDirectory() as temporary:
        judge = train(pictures, labels, plan, (options.work or Path(temporary)) / "judge")
    save(judge, options.to, {"renders": options.renders, "steps": options.steps, "accuracy": examine(judge)})
    print(json.dumps(examine(Judge.load(options.to)), indent=1))


if __name__ == "__main__":
    main()
