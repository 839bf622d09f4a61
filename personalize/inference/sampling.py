"""Pictures from a base (with whatever adapters are attached to it): draw, label, save.

Each picture is a function of its own prompt and seed only. Noise is always drawn on the CPU, one generator per
picture, so a picture keeps its composition in any batch and on any device.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..adapters.strengths.grammar import WHOLE, Weighting
from ..families.cond import Cond
from ..io import atomic
from ..recipe.fields import Sampling
from ..recipe.samplers import AUTO
from ..tuning.attach import attached_to
from .prompts import Use, tagged
from .schedulers import Shape, Size, latent_shape, make_sampler, sampler_of

if TYPE_CHECKING:
    from ..models.model import Base
    from .img2img import Beginning

Turn = Callable[[int, int], Iterable[str]]
DEFAULTS = Sampling()


@torch.no_grad()
def drawing(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = DEFAULTS.sample_steps,
    guidance: float = DEFAULTS.guidance,
    negative: str = "",
    sampler: str = DEFAULTS.sampler,
    size: Size | None = None,
    batch_size: int = 8,
) -> Iterator[Image.Image]:
    """One picture per (prompt, seed) pair, in order, with whatever is attached to the base; each batch as soon as it is done.

    `size` is the side or (width, height) in pixels, the base's own by default. `guidance` is classifier-free guidance
    (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): 1 is the plain conditional model. `sampler` is a
    name of samplers.py; auto is the one that the base's scheduler config names. Prompts are read as they stand: tags are for
    `draw`.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per picture")
    shape = latent_shape(base, size)
    batch_size = 1 if base.tiled else batch_size  # memory is short
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative, "sampler": sampler}
    for first in range(0, len(prompts), batch_size):
        chunk = slice(first, first + batch_size)
        yield from pictures(base, prompts[chunk], seeds[chunk], shape, **how)


@torch.no_grad()
def pictures(base: Base, prompts: Sequence[str], seeds: Sequence[int], shape: Shape, **how: Any) -> list[Image.Image]:
    """One batch, of latents [c, h, w] each; `how` is as for `diffuse`. Warns of what came out as nothing."""
    with evaluating(base):
        pixels = base.decode(diffuse(base, prompts, seeds, shape, **how))
    if not pixels.isfinite().all():
        hint = "its weights or an adapter's are damaged" if base.dtype == torch.float32 else "try --precision float32"
        dtype = str(base.dtype).removeprefix("torch.")
        warnings.warn(f"{base.name} drew what is no picture, but numbers that are not finite in {dtype}: {hint}", stacklevel=2)
    return to_pictures(pixels)


@torch.no_grad()
def diffuse(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    shape: Shape,
    *,
    steps: int,
    guidance: float,
    negative: str,
    sampler: str = AUTO,
    beginning: Beginning | None = None,
) -> torch.Tensor:
    """Noise [b, c, h, w] to latents [b, c, h, w] along the scheduler's timesteps, both halves of the guidance in one call.

    Adapters on the base follow their schedules; where the text encoder's change, the prompts are read anew.
    """
    scheduler = make_sampler(base, steps, sampler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    own = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(base.device)
    timesteps, latents = scheduler.timesteps, noise * scheduler.init_noise_sigma
    if beginning:
        timesteps, latents = beginning.enter(scheduler, steps, noise)
    cond, count = None, -(-len(timesteps) // scheduler.order)  # some samplers ask twice for each step
    with following(base) as turn:
        for i, t in enumerate(timesteps):
            changed = turn(i // scheduler.order, count)
            if cond is None or any(part.startswith("text_encoder") for part in changed):
                cond = conditioning(base, prompts, negative, guidance)
            output = predict(base, scheduler.scale_model_input(latents, t), t, cond, guidance)
            latents = scheduler.step(output.float(), t, latents, **own).prev_sample
    return latents


@contextlib.contextmanager
def following(base: Base) -> Iterator[Turn]:
    """What brings the base's adapters to a step, and says which parts changed; afterwards they are at their beginning again."""
    attached = attached_to(base)
    try:
        yield attached.turn if attached else lambda step, steps: ()
    finally:
        if attached:
            attached.turn(0, 1)


def conditioning(base: Base, prompts: Sequence[str], negative: str, guidance: float) -> Cond:
    """What b prompts say, as the text encoders read them now: b rows, or 2b with the negatives first where there is guidance.

    An empty negative prompt is nothing at all for families that were trained so (and as A1111 and diffusers do).
    """
    if guidance == 1:
        return base.embed(prompts, weighted=True)
    both = base.embed([negative, *prompts], weighted=True)
    against, wanted = both[:1], both[1:]
    if base.family.silent and not negative:
        against = against.zeros()
    return Cond.cat([against.expand(len(prompts)), wanted])


def predict(base: Base, latents: torch.Tensor, t: torch.Tensor, cond: Cond, guidance: float) -> torch.Tensor:
    """The guided model output [b, c, h, w] at timestep `t`; `cond` has b rows, or 2b with the negatives first."""
    times, attached = t.to(base.device).expand(len(cond)), attached_to(base)
    with attached.lowered() if attached else contextlib.nullcontext():
        if guidance == 1:
            return base.denoise(latents.to(base.dtype), times, cond)
        without, with_prompt = base.denoise(torch.cat([latents, latents]).to(base.dtype), times, cond).chunk(2)
    return without + guidance * (with_prompt - without)


@contextlib.contextmanager
def evaluating(base: Base) -> Iterator[None]:
    """Dropout off while pictures are drawn, and back to what it was afterwards."""
    modules = [module for model in base.parts.values() for module in model.modules()]
    before = [module.training for module in modules]
    try:
        for model in base.parts.values():
            model.eval()
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """[b, 3, h, w] in [-1, 1] to RGB pictures."""
    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()) for picture in levels]


@dataclass(frozen=True)
class Stacked:
    """An adapter as it was used for a picture: its name, how much of it, and its file's hash."""

    name: str
    weighting: Weighting = WHOLE
    sha256: str = ""

    def record(self) -> dict[str, str]:
        """As `--adapter` takes it, and the file's hash."""
        return {"name": self.name, "strength": str(self.weighting), "sha256": self.sha256}


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a picture, as UIs write it into PNG files."""

    prompt: str  # without tags
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str
    model: str
    negative: str = ""
    adapters: tuple[Stacked, ...] = ()
    image: str = ""  # the picture that it began with, and how much of that was drawn anew
    denoise: float | None = None
    precision: str = "float32"

    def record(self) -> dict[str, Any]:
        """As JSON gives it back."""
        plain = {key: value for key, value in vars(self).items() if key != "adapters"}
        return dict(json.loads(json.dumps(plain | {"adapters": [used.record() for used in self.adapters]})))

    def infotext(self, version: str) -> str:
        """AUTOMATIC1111's `parameters` text: prompt with `<lora:NAME:TE:UNET>`, negative prompt, then one line of settings."""
        prompt = tagged(self.prompt, [Use(used.name, used.weighting) for used in self.adapters])
        negative = f"\nNegative prompt: {self.negative}" if self.negative else ""
        settings = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model": self.model,
        }
        if self.denoise is not None:
            settings["Denoising strength"] = f"{self.denoise:g}"
        if hashes := ", ".join(dict.fromkeys(f"{a.name}: {a.sha256[:12]}" for a in self.adapters if a.sha256)):
            settings["Lora hashes"] = f'"{hashes}"'
        settings["Version"] = f"personalize {version}"
        return f"{prompt}{negative}\n" + ", ".join(f"{key}: {value}" for key, value in settings.items())


def save_picture(picture: Image.Image, path: Path, parameters: Parameters) -> Path:
    """Write a PNG that carries its parameters twice: as text for UIs (`parameters`) and as JSON (`personalize`)."""
    from .. import __version__

    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters.infotext(__version__))
    info.add_itxt("personalize", json.dumps(parameters.record() | {"version": __version__}, ensure_ascii=False))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
    return path


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a plain PNG, whole or not at all."""
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def enlarged(picture: Image.Image, side: int = 192) -> Image.Image:
    """A small picture grown by a whole factor to at least `side` pixels, every pixel kept square; a large one as it is."""
    factor = max(1, -(-side // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def grid(
    pictures: Sequence[Image.Image], columns: int, *, rows: Sequence[str] = (), heads: Sequence[str] = (), side: int = 192
) -> Image.Image:
    """A contact sheet on white, `columns` wide: `heads` label the columns, `rows` (e.g. prompts) stand above their row."""
    cells = [enlarged(picture, side) for picture in pictures]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    gap, line = 8, 22
    top, label = (line if heads else 0) + gap, line if rows else 0
    lines = -(-len(cells) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + lines * (label + height + gap)), "white")
    for i, head in enumerate(heads[:columns]):
        write(sheet, (gap + i * (width + gap), gap // 2), head, width)
    for i, row in enumerate(rows[:lines]):
        write(sheet, (gap, top + i * (label + height + gap)), row, sheet.width - 2 * gap)
    for i, cell in enumerate(cells):
        sheet.paste(cell, (gap + i % columns * (width + gap), top + i // columns * (label + height + gap) + label))
    return sheet


def write(sheet: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    """One line of text, shortened with … to fit into `width` pixels."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    shown = text
    while len(shown) > 1 and pen.textlength(shown, font) > width:
        shown = shown[:-2].rstrip() + "…"
    pen.text(at, shown, fill="#333333", font=font)


def settings_of(base: Base, adapters: Sequence[Stacked] = (), *, sampler: str = AUTO, **drawn: Any) -> Parameters:
    """Parameters of a picture of `base`: its name, its precision, and the sampler's name as UIs write it, are filled in."""
    precision = str(base.dtype).removeprefix("torch.")
    own = {"model": base.name, "sampler": sampler_of(base, sampler), "precision": precision}
    return Parameters(adapters=tuple(adapters), **own | drawn)


def read_parameters(path: Path) -> Mapping[str, Any]:
    """The JSON that `save_picture` wrote into a PNG; empty for other pictures."""
    with Image.open(path) as picture:
        return dict(json.loads(picture.info.get("personalize", "{}")))
