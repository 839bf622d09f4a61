"""Images in one call: a thin layer over a session.

import personalize as p

base, rex = p.Base.load("pocket"), p.Adapter.load("runs/rex/rex.safetensors")
p.draw(base, ["a <lora:rex:0.8> rex dog", "a dog"], seeds=[0, 0], adapters={"rex": rex})[0].save("rex.png")
p.draw(base, ["a <lora:rex:unet=0@0,1@0.5:te=1> rex dog"], seeds=[0], adapters={"rex": rex})  # grows over the steps
p.draw(base, ["a <lora:rex> rex dog"], seeds=[0], adapters={"rex": rex}, image="photo.png", denoise=0.6)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..adapters.adapter import Adapter
from ..errors import RecipeError, check_type
from ..models.model import Base
from .events import images
from .library import Library
from .request import DEFAULTS, DENOISE, InitImage, Request
from .schedulers import Size
from .session import Session
from .sheet import Pictures


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    adapters: Mapping[str, Adapter] | None = None,
    steps: int = DEFAULTS.sample_steps,
    guidance: float = DEFAULTS.guidance,
    negative: str = "",
    sampler: str = DEFAULTS.sampler,
    size: Size | None = None,
    image: Image.Image | str | Path | None = None,
    denoise: float = DENOISE,
    mask: str | Path | None = None,
    batch_size: int | None = None,
) -> Pictures:
    """One image per (prompt, seed) pair, in order; `<lora:NAME:0.8>` in a prompt adds an adapter of `adapters` to it.

    Tags are A1111's (prompts.py). `size` is the side or (width, height) in pixels, by default the image's or the base's.
    `guidance` is classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): 1 is the plain conditional
    model. `sampler` is a name of samplers.py, such as "DPM++ 2M Karras"; auto is the base's own. With `image`, an image or its
    file, drawing begins there and changes `denoise` (0 to 1) of it; with the file of a `mask`, only where that is white or
    see-through. Raises RecipeError for unknown samplers and names that are
    not in `adapters`, FamilyMismatchError for adapters of another family.

    >>> from personalize.models import Base
    >>> from personalize.recipe import AdapterSpec
    >>> from personalize.tuning.attach import attach
    >>> base = Base.load("pocket")
    >>> fresh = attach(base, AdapterSpec(rank=1)).detach()  # changes nothing yet
    >>> one, two = draw(base, ["a <lora:new:0.8> cat", "a cat"], [7, 7], adapters={"new": fresh}, steps=2)
    >>> one.size, one == two
    ((64, 64), True)
    """
    check_arguments(base, prompts, seeds, adapters, steps, size)
    start = InitImage.open(image, mask)
    sides = (size, size) if isinstance(size, int) else size
    library = Library(adapters or {})
    requests = [
        library.resolve(Request.parse(prompt, seed=seed, steps=steps, guidance=guidance, negative=negative, sampler=sampler,
                                      size=sides, image=start, denoise=denoise))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]  # fmt: skip
    if unused := library.adapters.keys() - {use.name for request in requests for use in request.adapters}:
        name = min(unused)
        warnings.warn(f"no prompt says <lora:{name}:1>: {name} is not used", stacklevel=2)
    return Pictures(images(Session(base, library, batch_size=batch_size).draw(requests)))


def check_arguments(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], adapters: Mapping[str, Adapter] | None, steps: int, size: object
) -> None:
    """Raise PersonalizeError, which says what to pass, for what `draw` is easily given by mistake."""
    check_type(base, Base, "base", 'a loaded Base: p.Base.load("pocket")', RecipeError)
    for name, value, kind, example in (("prompts", prompts, str, '["a cat"]'), ("seeds", seeds, int, "[0]")):
        check_type(value, (list, tuple, range), name, f"a list, one for each picture: {name}={example}", RecipeError)
        for one in value:
            check_type(one, kind, f"each of {name}", f"of the kind in {example}: {name}={example}", RecipeError)
    if len(prompts) != len(seeds):
        raise RecipeError(f"{len(prompts)} prompts but {len(seeds)} seeds", "give one seed per picture")
    check_type(
        adapters, (Mapping, type(None)), "adapters", 'by name: adapters={"rex": p.Adapter.load("rex.safetensors")}', RecipeError
    )
    for name, adapter in (adapters or {}).items():
        wanted = f'an Adapter: adapters={{"{name}": p.Adapter.load("{name}.safetensors")}}'
        check_type(adapter, Adapter, f"adapters[{name!r}]", wanted, RecipeError)
    check_type(size, (int, tuple, list, type(None)), "size", "a side, or width and height: size=(96, 64)", RecipeError)
    check_type(steps, int, "steps", "a whole number: steps=20", RecipeError)
    if steps < 1:
        raise RecipeError(f"steps must be at least 1, not {steps}", "steps=20")


def draw_images(base: Base, requests: Iterable[Request], *, batch_size: int | None = None) -> Iterator[Image.Image]:
    """The image of each request, in order, each batch as soon as it is done, with whatever is attached to the base."""
    return images(Session(base, batch_size=batch_size).draw(requests))
