"""Base: a frozen diffusion model with four verbs: encode, embed, denoise, decode.

Each verb brings the models that it needs to the base's device. Where memory is short (`lean`), the VAE and the text encoders
leave it again, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import BaseModelError, FamilyMismatchError, RecipeError, check_type
from ..families.cond import Cond
from ..families.family import Family, LatentFormat, Read
from ..families.noise import ZERO_SNR, Noise
from ..families.text import Chunks, TextEncoder
from ..formats.header import short
from ..recipe.fields import check_device
from .folder import examine, load_folder
from .loaded import Loaded
from .quantized import Quantized
from .single import load_single, open_whole
from .sources import locate
from .useless import skip_useless_work
from .vae import other_vae

TILE = 512  # pixels


class Reading(Protocol):
    """The part of a recipe that names a base, and says how it is read."""

    @property
    def base(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def zero_snr(self) -> str: ...
    @property
    def clip_skip(self) -> int: ...
    @property
    def vae(self) -> str | None: ...


@dataclass(eq=False)
class Base:
    """A loaded base: frozen, in eval mode, computing on one device."""

    name: str
    path: Path  # its folder or file
    family: Family
    device: torch.device
    dtype: torch.dtype
    scheduler_config: dict[str, Any]
    texts: tuple[TextEncoder, ...]
    denoiser: Any
    vae: Any
    stored: dict[str, dict[str, int]]  # part => bytes on the disk by dtype
    lean: bool = False  # encoders leave the device when they are done
    tiled: bool = False  # pictures are decoded one by one, in tiles
    _busy: Counter[int] = field(default_factory=Counter, repr=False)  # by model, how many hold it on the device

    def __new__(cls, *args: Any, **values: Any) -> Base:
        """Raises BaseModelError for a name: bases are read by `load`."""
        if len(args) + len(values) == 1:
            raise BaseModelError("a base is loaded", 'p.Base.load("pocket")')
        return super().__new__(cls)

    def __post_init__(self) -> None:
        skip_useless_work(self.denoiser, self.vae)

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        prediction: str = "auto",
        zero_snr: str = "auto",
        clip_skip: int = 1,
        vae: str | Path | None = None,
    ) -> Base:
        """Load 'pocket', a diffusers folder, a .safetensors checkpoint or a hub id.

        Raises BaseModelError, which names what is missing, does not fit or is refused.

        `prediction` (epsilon, v_prediction or sample) and `zero_snr` (yes or no) overrule what the base says of itself.
        `clip_skip` counts text-encoder layers from the last, as A1111 does: 1 is the last. SDXL never reads its last.

        >>> base = Base.load("pocket")
        >>> base.family.name, base.resolution, base.embed(["a red cat"]).tokens.shape
        ('pocket', 64, torch.Size([1, 77, 192]))
        """
        check_type(name, (str, PathLike), "a base", 'a name or path: p.Base.load("pocket")', BaseModelError)
        check_type(dtype, torch.dtype, "dtype", 'one of torch: p.Base.load("pocket", dtype=torch.float16)', BaseModelError)
        device = usable_device(device)
        path, other = locate(name), locate_vae(vae)
        with quiet():
            found = load_folder(path, dtype) if path.is_dir() else load_single(path, dtype, other)
            if other and path.is_dir():
                found = Loaded(**vars(found) | {"vae": other_vae(other, found.family, dtype)})
        scheduler, models = override_scheduler(found.scheduler, prediction, zero_snr), (found.denoiser, found.vae)
        for model in (*models, *found.texts.values()):
            model.requires_grad_(False).eval().to(device)
        stored = {part: dict(sizes) for part, sizes in found.stored.items()}
        texts = tuple(row.reader(found.tokenizers[row.part], found.texts[row.part], clip_skip) for row in found.family.texts)
        return cls(str(name), path, found.family, torch.device(device), dtype, scheduler, texts, *models, stored)

    @classmethod
    def of(cls, recipe: Reading, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Base:
        """The base that a recipe names, read as it says. Raises BaseModelError."""
        how = {name: getattr(recipe, name) for name in ("prediction", "zero_snr", "clip_skip", "vae")}
        return cls.load(recipe.base, device, dtype, **how)

    @classmethod
    def autoencoder_of(cls, recipe: Reading) -> Base:
        """The base that a recipe names with its autoencoder alone, on the CPU in float32: it encodes and decodes, no more.

        Nothing is downloaded. Raises BaseModelError, also for a base that is not on this machine.
        """
        path, other = locate(recipe.base, download=False), locate_vae(recipe.vae, download=False)
        with quiet():
            family = examine(path) if path.is_dir() else open_whole(path).row
            assert family
            vae = other_vae(other or path, family, torch.float32).requires_grad_(False).eval()
        return cls(recipe.base, path, family, torch.device("cpu"), torch.float32, {}, (), None, vae, {})

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that an adapter can change, by the name that canonical module paths start with."""
        return {self.family.denoiser.part: self.denoiser} | {text.part: text.model for text in self.texts}

    @property
    def models(self) -> dict[str, Any]:
        """The parts, and the autoencoder."""
        return {**self.parts, "vae": self.vae}

    @property
    def unet(self) -> Any:
        """The denoiser, as it was called while all of them were UNets."""
        return self.denoiser

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.latents.factor

    @property
    def latents(self) -> LatentFormat:
        """How its VAE's latents become those of the denoiser."""
        return LatentFormat.of(self.vae.config)

    @property
    def channels(self) -> int:
        """Channels of its latents."""
        return int(self.denoiser.config["in_channels"])

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""
        return int(self.denoiser.config["sample_size"]) * self.factor

    @property
    def sized(self) -> bool:
        """Whether the denoiser is told how large a picture was and how it was cropped (SDXL)."""
        return self.family.denoiser.sized

    @property
    def facts(self) -> dict[str, Any]:
        """What was loaded, for people: family, prediction, parameters, dtypes on disk and in memory, bytes."""
        return {
            "family": self.family.name,
            "title": self.family.title,
            "prediction": self.noise.prediction,
            "zero_snr": self.noise.zero_snr,
            "resolution": self.resolution,
            "parameters": {part: sum(map(numel, model.modules())) for part, model in self.models.items()},
            "stored": dict(sum(map(Counter, self.stored.values()), Counter[str]())),
            "dtypes": self.dtypes,
            "bytes": sum(map(weight_bytes, self.models.values())),
        }

    @property
    def dtypes(self) -> dict[str, str]:
        """Part => in what its weights are held."""
        return {part: dtypes_of(model) for part, model in self.models.items()}

    def place(self, device: torch.device | None = None, *, lean: bool = False, tiled: bool = False) -> None:
        """Compute on `device` from now on. With `lean`, encoders leave it when they are done, and come when they are needed."""
        self.lean, self.tiled = lean, tiled
        if device is not None and device != self.device:
            self.device = device
            self.__dict__.pop("noise", None)
        self._send_away()

    @contextlib.contextmanager
    def using(self, *models: Any) -> Iterator[None]:
        """Inside, these models are on the base's device; behind it, those that are to leave it are gone."""
        self._busy.update(map(id, models))
        try:
            for model in models:
                if next(model.parameters()).device != self.device:
                    model.to(self.device)
            yield
        finally:
            self._busy.subtract(map(id, models))
            self._send_away()

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, what came to the device stays: for many calls in a row."""
        models = (self.vae, *(text.model for text in self.texts))
        self._busy.update(map(id, models))
        try:
            yield
        finally:
            self._busy.subtract(map(id, models))
            self._send_away()

    def _send_away(self) -> None:
        """Encoders that nobody uses leave the device, where memory is short; those that learn, or read words that do, stay."""
        for model, words in [(self.vae, {}), *((text.model, text.words) for text in self.texts)] if self.lean else ():
            stays = self._busy[id(model)] or any(one.requires_grad for one in (*words.values(), *model.parameters()))
            if next(model.parameters()).device.type != "cpu" and not stays:
                model.to("cpu")

    @functools.cached_property
    def noise(self) -> Noise:
        """The noise of the base's own scheduler config, and what its predictions mean."""
        return self.family.noise(self.scheduler_config).to(self.device)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] => posterior mean and std [b, c, h/f, w/f], scaled to the denoiser's units."""
        with self.using(self.vae):  # never in tiles: what is learned does not depend on memory
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return self.latents.from_vae(posterior.mean), posterior.std * self.latents.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, c, h/f, w/f] in the denoiser's units => pixels [b, 3, h, w] in [-1, 1]."""
        raw = self.latents.raw(latents)
        with self.using(self.vae), self._in_tiles():
            pixels: Tensor = self.vae.decode(raw.to(self.device, self.vae.dtype), return_dict=False)[0]
        return pixels.clamp(-1, 1)

    @contextlib.contextmanager
    def _in_tiles(self) -> Iterator[None]:
        """Inside, the VAE decodes picture by picture, in tiles of TILE pixels or of half the base's own side, if that is less."""
        if not self.tiled:
            yield
            return
        side = min(TILE, self.resolution // 2)
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self.factor
        self.vae.use_slicing = self.vae.use_tiling = True
        try:
            yield
        finally:
            self.vae.use_slicing = self.vae.use_tiling = False

    def windows(self, prompts: Sequence[str], *, weighted: bool = False, shuffled: bool = False) -> int:
        """How many windows of 75 tokens the longest of these prompts fills, also in any other order; at least one."""
        return max(text.windows(prompt, weighted, shuffled) for text in self.texts for prompt in prompts or [""])

    def embed(self, prompts: Sequence[str], *, windows: int = 0, weighted: bool = False) -> Cond:
        """Prompts => conditioning, in as many windows as the longest needs, or in `windows`: prompts of any length are read.

        `weighted` reads `(word:1.2)`, `[word]` and BREAK as UIs do; else every character stands for itself, as in captions.
        """
        read = [[text.chunks(prompt, weighted) for prompt in prompts] for text in self.texts]
        count = max([windows, *(len(chunks) for one in read for chunks in one)])
        states = [self._read(text, one, count) for text, one in zip(self.texts, read, strict=True)]
        return self.family.combine(self.family, states)

    @contextlib.contextmanager
    def knowing(self, words: Mapping[str, Mapping[str, Tensor]], emphasis: float = 1.0) -> Iterator[None]:
        """Inside, words stand for vectors: word => text encoder => [tokens, width], times `emphasis` where weights are read.

        A text encoder without vectors reads a word as it is spelled. Raises FamilyMismatchError for vectors of another width.
        """
        before, made = self.texts, []
        for text in before:
            own = {word: vectors[text.part] for word, vectors in words.items() if text.part in vectors}
            width = int(text.model.get_input_embeddings().weight.shape[1])
            for word, vectors in own.items():
                if vectors.shape[1] != width:
                    what = f"the word {short(word)!r} has vectors of {vectors.shape[1]} numbers for the {text.part}"
                    raise FamilyMismatchError(what, f"{self.name} reads {width}: it was made for another base")
            made.append(replace(text, words=own, emphasis=emphasis))
        self.texts = tuple(made)
        try:
            yield
        finally:
            self.texts = before

    def _read(self, text: TextEncoder, prompts: Sequence[Chunks], windows: int) -> Read:
        with self.using(text.model):
            return text.embed(prompts, windows)

    def denoise(self, latents: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Noisy latents [b, c, h, w], what the network is told of time [b] (Noise.time), conditioning of b prompts => its
        prediction [b, c, h, w].

        Where the base is told sizes and `cond` has none, pictures are as large as they are, and not cropped.
        """
        if self.sized and cond.sizes is None:
            cond = cond.with_sizes(self._whole(latents))
        with self.using(self.denoiser):
            return self.family.denoiser.forward(self.denoiser, latents.to(self.dtype), time, cond.cast(self.dtype))

    def _whole(self, latents: Tensor) -> Tensor:
        """Sizes [b, 6] of pictures that are as large as they are, and not cropped."""
        height, width = (self.factor * side for side in latents.shape[-2:])
        return latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), 6)


def family_at(name: str | Path, download: bool = True) -> Family:
    """The family of a base, from configs and headers alone. Raises BaseModelError for what `Base.load` would refuse by those."""
    path = locate(name, download)
    family = examine(path) if path.is_dir() else open_whole(path).row
    assert family
    return family


def numel(module: nn.Module) -> int:
    """Frozen parameters of a module itself, without its children (others are adapters'); of a packed one, as they were."""
    packed = module.in_features * module.out_features if isinstance(module, Quantized) else 0
    return packed + sum(p.numel() for p in module.parameters(recurse=False) if not p.requires_grad)


def dtypes_of(model: nn.Module) -> str:
    """In what a model's weights are held: `float32`, `bfloat16 and int8`."""
    packed = {module.format: None for module in model.modules() if isinstance(module, Quantized)}
    return " and ".join([str(next(model.parameters()).dtype).removeprefix("torch."), *packed])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's own weights, packed or not."""
    packed = sum(b.nbytes for module in model.modules() if isinstance(module, Quantized) for b in module.buffers(recurse=False))
    return packed + sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def override_scheduler(config: Any, prediction: str, zero_snr: str) -> dict[str, Any]:
    """A scheduler's config with what the user knows better."""
    told: dict[str, Any] = {} if prediction == "auto" else {"prediction_type": prediction}
    if zero_snr == "yes":
        told |= ZERO_SNR
    if zero_snr == "no":
        told |= {"rescale_betas_zero_snr": False}
    return dict(config) | told


def locate_vae(vae: str | Path | None, download: bool = True) -> Path | None:
    """Where another VAE is; None for the base's own."""
    return None if vae is None else locate(vae, download)


def device_of(device: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where there is one. Raises RecipeError for a GPU that is not there, or not supported."""
    check_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda, but torch sees no GPU here", "try --device auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name, `auto` among them. Raises RecipeError for one that there is not."""
    try:
        return torch.device(device_of(device) if isinstance(device, str) else device)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"there is no device {device!r}", "choose from auto, cpu, cuda and cuda:1") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the loading bars and reports of transformers and diffusers: we say ourselves what is wrong."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bars = transformers_logging.is_progress_bar_enabled()
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
