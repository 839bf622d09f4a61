"""Base: a frozen diffusion model with four verbs: encode, embed, denoise, decode.

Any diffusers folder of Stable Diffusion's architecture will do. Only safetensors are read, never pickles, and nothing
is ever downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import BaseModelError, RecipeError
from .families import TWO_TEXT_ENCODERS, Family, detect

NAMED = {"pocket": Path(__file__).parent / "pocket" / "weights"}
PICKLES = {".ckpt", ".bin", ".pt", ".pth"}
CONFIGS = {  # what an SD folder holds, and the file that says so
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


@dataclass(frozen=True)
class Schedule:
    """The noise schedule a base was trained on: x_t = signal(t) x_0 + noise(t) eps, with signal^2 + noise^2 = 1."""

    alphas_cumprod: Tensor  # [T], signal^2; its last entry is 0 with zero-terminal SNR (Lin et al. 2023, arXiv 2305.08891)
    prediction: str  # epsilon, v_prediction or sample

    def signal(self, t: Tensor) -> Tensor:
        """sqrt(alpha-bar) [b, 1, 1, 1] at timesteps `t` [b]."""
        return self.alphas_cumprod.to(t.device)[t].sqrt()[:, None, None, None]

    def noise(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha-bar) [b, 1, 1, 1] at timesteps `t` [b]."""
        return (1 - self.alphas_cumprod.to(t.device)[t]).sqrt()[:, None, None, None]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio [b] at timesteps `t` [b]: alpha-bar / (1 - alpha-bar), 0 at a zero-terminal end."""
        signal = self.alphas_cumprod.to(t.device)[t]
        return signal / (1 - signal)


@dataclass(eq=False)
class Base:
    """A loaded base: frozen, in eval mode, on one device."""

    name: str
    folder: Path
    family: Family
    device: torch.device
    dtype: torch.dtype
    scheduler_config: dict[str, Any]
    tokenizer: Any
    unet: Any
    text_encoder: Any
    vae: Any

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Base:
        """Load 'pocket' or a diffusers folder. Raises BaseModelError, which names what is missing."""
        folder = locate(name)
        family = detect(examine(folder))
        if family.name in TWO_TEXT_ENCODERS:
            raise BaseModelError(f"{folder} is an {family.name.upper()} base: not supported yet", "use SD 1.x, SD 2.x or pocket")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is first imported
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        with quiet():
            models = {
                "unet": load_model(UNet2DConditionModel, folder / "unet", dtype),
                "vae": load_model(AutoencoderKL, folder / "vae", dtype),
                "text_encoder": load_model(CLIPTextModel, folder / "text_encoder", dtype),
            }
        for model in models.values():
            model.requires_grad_(False).eval().to(device)
        scheduler = read_json(folder / "scheduler" / CONFIGS["scheduler"])
        tokenizer = load_tokenizer(folder)
        return cls(str(name), folder, family, torch.device(device), dtype, scheduler, tokenizer, **models)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that an adapter can change, by the name that canonical module paths start with."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""
        return int(self.unet.config.sample_size) * self.factor

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the base's own scheduler config."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler.from_config(self.scheduler_config)
        return Schedule(scheduler.alphas_cumprod.to(self.device), scheduler.config.prediction_type)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] => posterior mean and std [b, c, h/f, w/f], scaled to the UNet's units."""
        posterior = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean - (self.vae.config.shift_factor or 0)) * scale, posterior.std * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [b, c, h/f, w/f] in the UNet's units => pixels [b, 3, h, w] in [-1, 1]."""
        raw = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return self.vae.decode(raw.to(self.device, self.dtype), return_dict=False)[0].clamp(-1, 1)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts => conditioning [b, n, d], n being the tokenizer's length (77); longer prompts are cut."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self.device), return_dict=False)[0]

    def denoise(self, latents: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        """Noisy latents [b, c, h, w], timesteps [b], conditioning [b, n, d] => the UNet's prediction [b, c, h, w]."""
        return self.unet(latents, timesteps, encoder_hidden_states=cond, return_dict=False)[0]


def device_of(device: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where there is one. Raises RecipeError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda, but torch sees no GPU here", "try --device auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def locate(name: str | Path) -> Path:
    """The folder that a base's name stands for. Raises BaseModelError for files and for names that are nothing."""
    folder = NAMED.get(str(name), Path(name).expanduser())
    if folder.is_dir():
        return folder
    if folder.suffix.lower() in PICKLES:
        raise BaseModelError(f"{name} is a pickle, which can run code when opened", "use a diffusers folder with .safetensors")
    if folder.is_file():
        raise BaseModelError(
            f"{name} is a file, and single-file checkpoints cannot be read yet", "convert it to a diffusers folder first"
        )
    if str(name) in NAMED:
        raise BaseModelError(
            f"the weights of {name} are missing: there is no folder {folder}", "reinstall, or name another --base"
        )
    raise BaseModelError(
        f"there is no base called {name}: no such folder", f"choose from {', '.join(NAMED)}, or give a diffusers folder"
    )


def examine(folder: Path) -> dict[str, Any]:
    """Check that `folder` holds every part, in safetensors, and return the UNet's config. Reads no weights."""
    missing = [part for part, config in CONFIGS.items() if not (folder / part / config).is_file()]
    if missing:
        names = ", ".join(f"{part}/{CONFIGS[part]}" for part in missing)
        raise BaseModelError(
            f"{folder} is not a diffusers folder of Stable Diffusion: it lacks {names}",
            "give the folder that holds model_index.json",
        )
    for part in ("unet", "vae", "text_encoder"):
        check_weights(folder / part)
    return read_json(folder / "unet" / CONFIGS["unet"])


def check_weights(part: Path) -> None:
    """Raise BaseModelError unless `part` has safetensors."""
    if any(part.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for file in part.iterdir() if file.suffix in PICKLES):
        raise BaseModelError(
            f"{part} has only pickled weights ({pickles[0]}), which can run code when opened", "convert them to .safetensors"
        )
    raise BaseModelError(f"{part} has no weights: no .safetensors file in it", "download the base again")


def load_model(kind: Any, part: Path, dtype: torch.dtype, lent: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """One model of a folder, every weight of it accounted for: what the files lack may be `lent`. Raises BaseModelError."""
    precision = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    options = {precision: dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if not any(part.glob("*model.safetensors*")) and any(part.glob("*model.fp16.safetensors*")):
        options["variant"] = "fp16"
    try:
        model, info = kind.from_pretrained(part, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise BaseModelError(f"{part} cannot be loaded: {first_line(error)}", "is the download complete?") from error
    model.load_state_dict({key: lent[key] for key in info["missing_keys"] if key in lent}, strict=False)
    if missing := sorted(key for key in info["missing_keys"] if key not in lent):
        raise BaseModelError(f"{part} lacks {len(missing)} weights, {missing[0]} for one", "is the download complete?")
    return model


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder. Raises BaseModelError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(
            f"{folder / 'tokenizer'} cannot be loaded: {first_line(error)}", "is the download complete?"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BaseModelError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
