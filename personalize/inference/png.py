"""PNG files that say how they were made: as text for image UIs (`parameters`) and as JSON (`personalize`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import RecipeError
from ..io import atomic
from ..recipe.fields import Sampling
from ..version import __version__
from .prompts import with_tags
from .record import read_record
from .request import Request

SETTING = re.compile(r'\s*([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')  # as A1111 reads them
NEGATIVE = "Negative prompt: "


def save_picture(picture: Image.Image, path: Path, request: Request) -> Path:
    """Write a PNG that carries its request twice: as text for UIs (`parameters`) and as JSON (`personalize`)."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", infotext(request, __version__))
    info.add_itxt("personalize", json.dumps(request.record() | {"version": __version__}, ensure_ascii=False))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
    return path


def infotext(request: Request, version: str) -> str:
    """AUTOMATIC1111's `parameters` text: prompt with `<lora:NAME:TE:UNET>`, negative prompt, then one line of settings."""
    negative = f"\n{NEGATIVE}{request.negative}" if request.negative else ""
    width, height = request.size or (0, 0)
    settings = {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{width}x{height}",
        "Model": request.model,
    }
    if request.image and request.denoise is not None:
        settings["Denoising strength"] = f"{request.denoise:g}"
    names, tagged = (
        dict.fromkeys(use.name for use in request.adapters),
        [u for u in request.adapters if u.name not in request.words],
    )
    for what, some in (("Lora", names.keys() - set(request.words)), ("TI", set(request.words))):
        listed = [f"{name}: {request.hashes[name][:12]}" for name in names if name in some and request.hashes.get(name)]
        if listed:
            settings[f"{what} hashes"] = '"{}"'.format(", ".join(listed))
    settings["Version"] = f"personalize {version}"
    line = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"{with_tags(request.prompt, tagged)}{negative}\n{line}"


def parse_infotext(text: str) -> Request:
    """The request that a `parameters` text describes, also A1111's own; what it leaves out has its default.

    An image to begin with is not in the text, and hashes are cut short there. Raises RecipeError for what is no such text.

    >>> line = "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 7, Size: 96x64"
    >>> request = parse_infotext("a <lora:rex:0.8> dog\\n" + line)
    >>> request.prompt, request.steps, request.sampler, request.seed, request.size
    ('a dog', 30, 'DPM++ 2M Karras', 7, (96, 64))
    """
    prompts, _, line = text.strip().rpartition("\n")
    found = {key.strip(): value for key, value in SETTING.findall(line)}
    if not {"Steps", "Seed"} <= found.keys():
        raise RecipeError("this text does not say how a picture was made", "it ends with a line: Steps: 20, Sampler: Euler, ...")
    prompt, _, negative = prompts.partition(f"\n{NEGATIVE}") if f"\n{NEGATIVE}" in prompts else (prompts, "", "")
    kind = found.get("Schedule type", "")
    default = Sampling()
    try:
        return Request.parse(
            prompt,
            negative=negative,
            sampler=found.get("Sampler", default.sampler) + (" Karras" if kind == "Karras" else ""),
            seed=int(found["Seed"]),
            steps=int(found["Steps"]),
            guidance=float(found.get("CFG scale", default.guidance)),
            size=tuple(map(int, found["Size"].split("x"))) if "Size" in found else None,
            model=found.get("Model", ""),
        )
    except ValueError as error:
        raise RecipeError(f"these settings of a picture cannot be read: {line}") from error


def read_request(path: Path) -> Request:
    """The request that an image was drawn by, from our JSON or else from A1111's text. Raises RecipeError without either."""
    if record := read_record(path):
        return Request.from_record(record)
    with Image.open(path) as picture:
        return parse_infotext(str(picture.info.get("parameters", "")))
