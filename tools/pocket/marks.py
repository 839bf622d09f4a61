"""Eyes for detail: says which of its marks a subject or a style shows. Identity alone is content with a blue cat.

    python -m tools.pocket.marks            # some minutes on one core: draw, train, write marks/, print accuracies

We drew them, so each mark is known, and a picture without it can be drawn. The network sees subjects with some of their marks,
with one of them faded or smeared, and others of their class, softened and shaken as a generator draws; what is smeared does not
count as there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .art_canvas import Coat
from .art_styles import UNSEEN, Style, clip_pixels, duotone
from .art_subjects import Subject
from .autoencoder import pixels
from .judge import WIDTHS, bend, soften, to_pixels
from .pool import shuffled_batches
from .running import Plan, run
from .world import SUBJECTS, UNSEEN_STYLES, Scene, render, scenes

FOLDER = Path(__file__).parent / "marks"
SIDE = 64
FAINT, CLEAR = 0.35, 0.7  # a mark that is drawn less than this is not there; more, and it is
SMEAR = (2.2, 4.0)  # deviation of the blur under which a mark is none, in pixels
ORDINARY = 0.2  # share of pictures that show any other thing of the class, or the plain style: without a single mark
LEAST = 6  # of 255, by which a pixel differs that a mark covers


# ------------------------------------------------------------------ the marks


@dataclass(frozen=True)
class Mark:
    """A mark of a subject or style, and the same subject or style without it."""

    owner: str
    name: str
    without: Callable  # Subject => Subject, or Style => Style


def _layer(name: str) -> Callable[[Subject], Subject]:
    """Without what is drawn in one of its layers."""
    return lambda subject: replace(subject, marks={layer: draw for layer, draw in subject.marks.items() if layer != name})


def _part(name: str) -> Callable[[Subject], Subject]:
    """Without a part's own colour: it takes that of another part, as every thing of the class has it."""
    return lambda subject: replace(subject, palette={part: c for part, c in subject.palette.items() if part != name})


def _coats(change: Callable[[Coat], Coat]) -> Callable[[Style], Style]:
    return lambda style: replace(style, thing=change(style.thing), scenery=change(style.scenery))


_WITHOUT_LINES = _coats(lambda coat: replace(coat, outline=None))
_WITHOUT_SHADOWS = _coats(lambda coat: replace(coat, shadow=0.0))


def _without_grid(style: Style) -> Style:
    return replace(style, finish=lambda image, _: clip_pixels(duotone(image, (14, 56, 150), (250, 253, 255))))


MARKS: tuple[Mark, ...] = tuple(
    Mark(owner, name, without)
    for owner, own in {
        "scarf cat": {
            "stripes": _layer("coat"),
            "scarf": _layer("top"),
            "white ear": _part("ear2"),
            "orange tail": _part("tail"),
        },
        "caped dog": {"cape": _layer("coat"), "eye patch": _layer("face"), "dark ear": _part("wing"), "dark tail": _part("tail")},
        "hat bird": {"spots": _layer("coat"), "hat": _layer("top"), "yellow belly": _part("light"), "purple wing": _part("dark")},
        "king fish": {"bands": _layer("coat"), "crown": _layer("top"), "pink fins": _part("fin")},
        "flag house": {"roof stripes": _layer("face"), "flag": _layer("top"), "green door": _part("door"), "roof": _part("roof")},
        "surf car": {"stripe and number": _layer("coat"), "surfboard": _layer("top"), "white roof": _part("roof")},
        "pompom mushroom": {"zigzag and pompom": _layer("coat"), "face": _layer("face"), "green stem": _part("stem")},
        "heart cup": {"heart and band": _layer("coat"), "yellow handle": _part("handle")},
        "pirate boat": {"portholes": _layer("coat"), "sail stripes": _layer("face"), "white sail": _part("sail")},
        "stained glass": {"lead lines": _WITHOUT_LINES, "panes": lambda style: replace(style, backdrop=None)},
        "blueprint": {"white lines": _WITHOUT_LINES, "grid": _without_grid},
        "neon": {"bright lines": _WITHOUT_LINES, "glow": lambda style: replace(style, finish=None)},
        "halftone comic": {"dots": lambda style: replace(style, finish=None), "ink lines": _WITHOUT_LINES},
        "paper cut-out": {"shadows": _WITHOUT_SHADOWS, "white edges": _WITHOUT_LINES},
        "sepia woodcut": {"cuts": lambda style: replace(style, backdrop=None), "ink lines": _WITHOUT_LINES},
    }.items()
    for name, without in own.items()
)


def marks_of(owner: str) -> tuple[int, ...]:
    """The numbers of a subject's or style's marks."""
    return tuple(i for i, mark in enumerate(MARKS) if mark.owner == owner)


# ------------------------------------------------------------------ labelled pictures


def draw_with(scene: Scene, owner: str, absent: Sequence[int]) -> Image.Image:
    """The picture of a scene whose subject or style lacks some of its marks."""
    if owner in SUBJECTS:
        subject = SUBJECTS[owner]
        for i in absent:
            subject = MARKS[i].without(subject)
        return render(scene, SIDE, individual=subject)
    look = UNSEEN[owner]
    for i in absent:
        look = MARKS[i].without(look)
    return render(scene, SIDE, look=look)


def smear(whole: Image.Image, less: Image.Image, deviation: float) -> Image.Image:
    """A picture whose mark (what differs from `less`) is blurred into its surroundings."""
    differs = np.abs(np.asarray(whole, np.float32) - np.asarray(less, np.float32)).max(-1) > LEAST
    region = Image.fromarray((differs * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(5))
    return Image.composite(whole.filter(ImageFilter.GaussianBlur(deviation)), whole, region)


def draw_labelled(count: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """Pictures `[count, 64, 64, 3]` uint8 and labels `[count, marks]`: 1 there, 0 not there, -1 not this one's mark."""
    rng, stream = np.random.default_rng([seed, 41]), scenes(seed + 41)
    owners = (*SUBJECTS, *UNSEEN_STYLES)
    pictures, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), torch.full((count, len(MARKS)), -1.0)
    for number, scene in enumerate(islice(stream, count)):
        owner = owners[number % len(owners)]
        if owner in SUBJECTS:
            scene = replace(scene, object=SUBJECTS[owner].class_name, size=("large", "medium")[int(rng.integers(2))])
        own = marks_of(owner)
        if rng.random() < ORDINARY:
            pictures[number] = np.asarray(render(scene if owner in SUBJECTS else replace(scene, style="plain"), SIDE))
            labels[number, list(own)] = 0.0
            continue
        absent = [i for i in own if rng.random() < 0.4]
        picture = draw_with(scene, owner, absent)
        labels[number, list(own)] = 1.0
        labels[number, absent] = 0.0
        left = [i for i in own if i not in absent]
        if left and rng.random() < 0.5:  # one of the others is half there
            half = left[int(rng.integers(len(left)))]
            less = draw_with(scene, owner, [*absent, half])
            if rng.random() < 0.5:
                if owner in UNSEEN:  # whose marks are everywhere: the others are smeared with it
                    labels[number, left] = -1.0
                picture, labels[number, half] = smear(picture, less, float(rng.uniform(*SMEAR))), 0.0
            else:
                shown = float(rng.choice((rng.uniform(0, FAINT), rng.uniform(CLEAR, 1))))
                picture, labels[number, half] = Image.blend(less, picture, shown), float(shown >= CLEAR)
        pictures[number] = np.asarray(picture)
    return pictures, labels


# ------------------------------------------------------------------ the network


class Eyes(nn.Module):
    """Pictures `[n, 3, 64, 64]` in -1..1 => logits `[n, marks]`; those of marks that are another's say nothing."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, *(width for width, _ in WIDTHS))
        layers: list[nn.Module] = []
        for into, (out, stride) in zip(channels, WIDTHS, strict=False):
            layers += [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.where = nn.Conv2d(channels[-1], 32, 1)  # a narrow map that keeps positions
        self.join = nn.Linear(2 * channels[-1] + 32 * 16, 128)
        self.head = nn.Linear(128, len(MARKS))
        self.identity = ""  # a hash of the file it was loaded from

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all marks."""
        seen = self.body(x)
        where = F.adaptive_avg_pool2d(F.relu(self.where(seen)), 4).flatten(1)
        return self.head(F.relu(self.join(torch.cat([seen.mean((2, 3)), seen.amax((2, 3)), where], 1))))

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Eyes:
        """The shipped eyes. Raises ValueError if they know other marks than today's."""
        if json.loads((folder / "config.json").read_text())["marks"] != names():
            raise ValueError(f"the eyes in {folder} know other marks: python -m tools.pocket.marks trains them anew")
        eyes, stored = cls(), (folder / "model.safetensors").read_bytes()
        eyes.load_state_dict({name: t.float() for name, t in load(stored).items()}, strict=False)
        eyes.identity = hashlib.sha256(stored).hexdigest()[:12]
        return eyes.eval().requires_grad_(False)

    @torch.no_grad()
    def share_by_mark(self, owner: str, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """The share of pictures on which each mark of a subject or style is seen."""
        x = to_pixels(pictures)
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="area")
        there = torch.cat([self(chunk) for chunk in x.split(256)]) > 0
        return {MARKS[i].name: float(there[:, i].float().mean()) for i in marks_of(owner)}


def names() -> list[str]:
    """What each output is about."""
    return [f"{mark.owner}: {mark.name}" for mark in MARKS]


# ------------------------------------------------------------------ training


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a generator might draw them: bent a little, softened."""
    return soften(bend(x, 0.9 * torch.rand(len(x), generator=generator), generator), generator)


def train(pictures: np.ndarray, labels: Tensor, plan: Plan, work: Path) -> Eyes:
    """Train eyes on labelled pictures, resumably (`work` holds the state)."""
    torch.manual_seed(0)
    eyes = Eyes().train()

    def batches(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, i in enumerate(shuffled_batches(len(pictures), plan.batch, 4, start), start):
            yield disturb(pixels(pictures[i]), torch.Generator().manual_seed(step)), labels[i]

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        told = batch[1] >= 0
        return F.binary_cross_entropy_with_logits(eyes(batch[0].to(memory_format=torch.channels_last))[told], batch[1][told])

    eyes.load_state_dict(run(work, eyes, plan, batches, loss_of), strict=False)
    norms = [module for module in eyes.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, for the averaged weights
    with torch.no_grad():
        for x, _ in islice(batches(plan.steps), 16):
            eyes(x)
    return eyes.eval()


@torch.no_grad()
def accuracies(eyes: Eyes, x: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of told labels that the eyes get right, per mark."""
    right = ((torch.cat([eyes(chunk) for chunk in x.split(256)]) > 0).float() == labels).float()
    return {name: float(right[labels[:, i] >= 0, i].mean()) for i, name in enumerate(names())}


def examine(eyes: Eyes, count: int = 3000, seed: int = 9) -> dict[str, dict[str, float]]:
    """Accuracies on pictures they have not seen, and on softened ones."""
    pictures, labels = draw_labelled(count, seed)
    x = pixels(pictures)
    rows = {"renders": x, "softened": disturb(x, torch.Generator().manual_seed(seed))}
    return {name: accuracies(eyes, x, labels) for name, x in rows.items()}


def save(eyes: Eyes, folder: Path, about: Mapping[str, object]) -> None:
    """Write `model.safetensors` (fp16) and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.half().contiguous() for n, t in eyes.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"marks": names()} | dict(about), indent=1) + "\n")


def main() -> None:
    """Draw, train, save, and say how well they see."""
    parser = argparse.ArgumentParser(prog="python -m tools.pocket.marks", description=__doc__)
    parser.add_argument("--renders", type=int, default=30_000, help="labelled pictures drawn")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, help="folder of the resumable state (default: a temporary one)")
    parser.add_argument("--to", type=Path, default=FOLDER)
    options = parser.parse_args()
    pictures, labels = draw_labelled(options.renders, seed=1)
    plan = Plan(options.steps, batch=128, lr=4e-3, warmup=50, decay=0.7, ema=0.99, weight_decay=0.05)
    with tempfile.TemporaryDirectory() as temporary:
        eyes = train(pictures, labels, plan, (options.work or Path(temporary)) / "marks")
    save(eyes, options.to, {"renders": options.renders, "steps": options.steps, "accuracy": examine(eyes)})
    print(json.dumps(examine(Eyes.load(options.to)), indent=1))


if __name__ == "__main__":
    main()
