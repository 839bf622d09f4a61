"""What to draw, as one value: from a command's flags, through drawing, to the text inside the PNG, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.strengths.grammar import read
from ..data.images import load_mask, load_whole
from ..errors import RecipeError
from ..families.notation import choose_by_seed
from ..recipe.fields import Sampling
from ..recipe.lines import parse_line
from ..recipe.samplers import sampler_name
from ..text import plain
from .prompts import Use, check_negative, parse
from .schedulers import sampler_of

if TYPE_CHECKING:
    from PIL import Image

    from ..models.model import Base

DEFAULTS = Sampling()
DENOISE = 0.75  # A1111's denoising strength, when nothing is said


@dataclass(frozen=True, eq=False)
class InitImage:
    """An image to begin with (img2img). One that was read back from a PNG's text is only a name."""

    picture: Image.Image | None
    name: str = ""  # of its file
    mask: Image.Image | None = None  # of the same size, "L": white is drawn anew, black is kept; None: all is drawn anew

    @classmethod
    def open(cls, image: str | Path | Image.Image | None, mask: str | Path | None = None) -> InitImage | None:
        """Read files: RGB, upright; a mask is white or see-through where the picture is drawn anew. None for no image.

        Raises DataError for files, RecipeError for a mask alone.
        """
        if image is None:
            if mask:
                raise RecipeError("a mask, and no picture that it is of", "give the picture too: --image FILE")
            return None
        name = plain(Path(image).name) if isinstance(image, str | Path) else ""
        picture = load_whole(Path(image)) if isinstance(image, str | Path) else image
        return cls(picture, name, load_mask(Path(mask), picture.size) if mask else None)


@dataclass(frozen=True)
class Request:
    """One image to draw. Everything that decides it is here; the same request gives the same image.

    `prompt` is what the text encoder reads: tags such as `<lora:rex:0.8>` are `parse`'s. The last four fields say what it was
    drawn with: a session fills them in, together with the size and the sampler's true name.

    >>> request = Request.parse("a <lora:rex:0.8> dog", seed=7, sampler="dpmpp_2m")
    >>> request.prompt, request.sampler, [(use.name, str(use.weighting)) for use in request.adapters]
    ('a dog', 'DPM++ 2M', [('rex', '0.8')])
    """

    prompt: str
    seed: int = 0
    steps: int = DEFAULTS.sample_steps
    guidance: float = DEFAULTS.guidance  # classifier-free guidance; 1 is the plain conditional model
    size: tuple[int, int] | None = None  # width and height in pixels; None: the image's, or the base's own
    sampler: str = DEFAULTS.sampler
    negative: str = ""
    adapters: tuple[Use, ...] = ()
    image: InitImage | None = None
    denoise: float | None = DENOISE  # how much of `image` is drawn anew: 0 nothing, 1 all of it
    model: str = ""
    precision: str = "float32"
    hashes: Mapping[str, str] = field(default_factory=dict)  # adapter's name => sha256 of its weights
    words: tuple[str, ...] = ()  # those of the adapters that are textual inversions: words of the prompt, without tags

    def __post_init__(self) -> None:
        if self.image and not 0 <= (self.denoise or 0) <= 1:
            raise RecipeError(f"--denoise must be 0 to 1, not {self.denoise:g}", "0 keeps the picture, 1 draws a new one")

    @classmethod
    def parse(cls, prompt: str, *, negative: str = "", sampler: str = DEFAULTS.sampler, **settings: Any) -> Request:
        """A request as people write it: tags, choices and kohya's options in the prompt, a sampler's name in any spelling.

        Raises RecipeError for tags that say nothing sensible or stand in the negative prompt, and for an unknown sampler.
        """
        prompt, options = parse_line(prompt)
        options = {"negative": negative, "sampler": sampler, **settings} | options
        text, uses = parse(choose_by_seed(prompt, options.get("seed", 0)))
        uses = (*options.pop("adapters", ()), *uses)
        negative, sampler = check_negative(options.pop("negative")), sampler_name(options.pop("sampler"))
        return cls(text, adapters=uses, negative=negative, sampler=sampler, **options)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What all requests of a batch have in common."""
        own = self.adapters, self.negative, self.steps, self.guidance, self.sampler
        return *own, self.denoise, self.size, self.image

    def complete(
        self,
        base: Base,
        size: tuple[int, int] | None = None,
        hashes: Mapping[str, str] | None = None,
        words: Sequence[str] = (),
    ) -> Request:
        """The request with its size, the sampler's name as UIs write it, and the base, precision, hashes and words filled in."""
        return replace(
            self,
            size=size or self.size,
            sampler=sampler_of(base, self.sampler),
            denoise=self.denoise if self.image else None,
            model=base.name,
            precision=str(base.dtype).removeprefix("torch."),
            hashes=hashes or {},
            words=tuple(words),
        )

    def record(self) -> dict[str, Any]:
        """The request as JSON writes it, in the order in which PNG files have it."""
        uses = [{"name": use.name, "strength": str(use.weighting), "sha256": self.hashes.get(use.name, "")}
                for use in self.adapters]  # fmt: skip
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "size": list(self.size) if self.size else None,
            "sampler": self.sampler,
            "model": self.model,
            "negative": self.negative,
            "image": self.image.name if self.image else "",
            "denoise": self.denoise if self.image else None,
            **({"masked": True} if self.image and self.image.mask else {}),
            "precision": self.precision,
            "adapters": uses,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Request:
        """The request that `record` wrote; unknown keys are left out. Of an image to begin with, only the name is there."""
        known = {key: value for key, value in record.items() if key in cls.__dataclass_fields__}
        used = record.get("adapters", ())
        known["adapters"] = tuple(Use(one["name"], read(one["strength"].split(":"))) for one in used)
        known["hashes"] = {one["name"]: one["sha256"] for one in used if one["sha256"]}
        known.pop("words", None)
        known["image"] = InitImage(None, name) if (name := record.get("image")) else None
        known["size"] = tuple(record["size"]) if record.get("size") else None
        return cls(**known)
