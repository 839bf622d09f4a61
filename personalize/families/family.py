"""A model family: all that is true of it, as a composition of rows. Every weight and name of a model follows from them.

A family is ONE file: a denoiser (unet.py holds that of Stable Diffusion 1, 2 and XL), text encoders (clip.py), the latents, the
noise, and the words that files use. It is a row of the table "families" in registry.py; tests/families holds each against the
real classes of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..formats.header import Address
from ..formats.shapes import Shape
from .noise import VP, Noise

if TYPE_CHECKING:  # names and shapes are known without torch
    from torch import Tensor

    from .cond import Cond

Read = tuple["Tensor", "Tensor | None"]  # what a text encoder makes of b prompts: states [b, n, d] and, if it projects, [b, p]


class Layer(NamedTuple):
    """One layer: its path inside the part, the shape of its weight, and whether it has a bias."""

    path: str
    shape: Shape
    bias: bool = True


class Network(Protocol):
    """A row of numbers that decide a network's layers: what denoisers and text encoders have in common."""

    @property
    def part(self) -> str:
        """Where pipelines keep it; every canonical path begins with it."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How kohya-like files begin the names of its layers; the first is written."""

    @property
    def targets(self) -> Mapping[str, str]:
        """What people call groups of its layers => a pattern of their whole paths."""

    def layers(self) -> Iterator[Layer]:
        """Every weight that an adapter may change."""

    def tables(self) -> Sequence[str]:
        """Paths of the parameters that none changes: embedding tables."""

    def address(self, path: str) -> Address | None:
        """Where a parameter (a layer's path; its bias behind `.bias`) lies in a single file; None for families without those."""

    def model(self) -> Any:
        """The class to build and load."""


class Denoiser(Network, Protocol):
    """What predicts noise, velocity or flow from noisy latents."""

    @property
    def latent(self) -> int:
        """Channels that it writes."""

    @property
    def multiple(self) -> int:
        """Sides of latents must be multiples of it."""

    @property
    def structure(self) -> str:
        """What models of one family have in common, whatever their widths and depths."""

    @property
    def sized(self) -> bool:
        """Whether it is told how large an image was and how it was cropped."""

    @property
    def text_layers(self) -> str:
        """A pattern of the layers that read the text encoders' states alone, the same at every step; "" for none."""

    def names_in(self, style: str) -> Mapping[str, str]:
        """A layer's path => the path that another tool gives it: "diffusers", or "ldm" for single files."""

    def block_of(self, path: str) -> str:
        """The block that a layer counts to in strengths by block (IN04, ...); BASE if to none."""

    def blocks(self, attention: bool = False) -> tuple[str, ...]:
        """Its blocks in order behind BASE, all or those of the short lists."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Denoiser:
        """A row from a model's config. Raises KeyError, TypeError or ValueError for another structure."""

    @classmethod
    def recognise(cls, shapes: Mapping[str, Shape]) -> Denoiser | None:
        """A row from a single file's keys and shapes."""

    @classmethod
    def reads(cls, shapes: Mapping[str, Shape]) -> int:
        """Channels that the model in a single file reads: more than it writes for inpainting and the like."""

    @staticmethod
    def beside(channels: int, title: str) -> str:
        """What a model of this title is that reads so many channels beside the noisy latents."""

    def config(self, texts: Sequence[TextRow]) -> dict[str, Any]:
        """The row as its class' config."""

    def forward(self, model: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Noisy latents [b, c, h, w], what it is told of time [b], conditioning of b prompts => prediction [b, c, h, w]."""


class TextRow(Network, Protocol):
    """A text encoder."""

    @property
    def prefix(self) -> str:
        """Of its keys in a single file; empty for families without those."""

    @property
    def width(self) -> int:
        """Of its states."""

    @property
    def layer_count(self) -> int:
        """How many transformer layers it has."""

    @property
    def optional(self) -> bool:
        """Whether the model can go without it."""

    def recognise(self, shapes: Mapping[str, Shape]) -> TextRow | None:
        """The row with the numbers of a single file's; None if it is not there."""

    def config(self, tokens: int) -> dict[str, Any]:
        """The row as its class' config, for so many tokens."""

    def load_tokenizer(self, folder: Any) -> Any:
        """The tokenizer of a folder. Raises BaseModelError."""

    def own_tokenizer(self) -> Any:
        """The tokenizer of a single file, which holds none. Raises BaseModelError where none came along."""

    def reader(self, tokenizer: Any, model: Any, clip_skip: int = 1) -> Any:
        """Tokenizer and model, as what reads prompts (text.py). Raises BaseModelError for a layer that is not there."""


@dataclass(frozen=True)
class LatentFormat:
    """How a VAE's latents become those of a denoiser: latents = (raw - shift) * scale."""

    channels: int = 4
    factor: int = 8  # pixels per latent along one side
    scale: float = 0.18215
    shift: float = 0.0
    side: int = 512  # pixels that the VAE was trained at
    upcast: bool = False  # its own weights overflow in fp16

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentFormat:
        """That of an AutoencoderKL's config."""
        shift, factor = config.get("shift_factor") or 0, 2 ** (len(config["block_out_channels"]) - 1)
        return cls(config["latent_channels"], factor, config["scaling_factor"], shift)

    def from_vae(self, raw: Tensor) -> Tensor:
        """The VAE's latents => the denoiser's."""
        return (raw - self.shift) * self.scale

    def raw(self, latents: Tensor) -> Tensor:
        """The denoiser's latents => the VAE's."""
        return latents / self.scale + self.shift


Combine = Callable[["Family", Sequence[Read]], "Cond"]


@dataclass(frozen=True)
class Family:
    """A model family: its networks, latents and noise, and what files of it say about themselves."""

    name: str
    title: str
    denoiser: Denoiser
    texts: tuple[TextRow, ...]
    combine: Combine = field(repr=False)  # what the text encoders say => one conditioning
    base_version: str = "unknown"  # ss_base_model_version, read by A1111
    architecture: str = "unknown/lora"  # modelspec.architecture, read by Forge
    preset: str = ""  # its presets begin so
    pipeline: str = "StableDiffusionPipeline"  # diffusers' class for it
    a1111: str = ""  # A1111's word for it; "": it has none
    latents: LatentFormat = LatentFormat()
    noise: Callable[[Mapping[str, Any]], Noise] = VP.of  # a scheduler's config => its noise
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # of single files, which hold none
    blocks: tuple[str, ...] = ("diffusers", "ldm")  # whose names of the denoiser's layers kohya files use, the written first
    silent: bool = False  # whether an empty negative prompt is zeros, not the text encoder's word for it
    kin: bool = True  # whether models of its structure in other sizes are of this family
    refused: str = ""  # why it can neither be trained nor drawn with
    velocity_version: str = ""  # base_version of models that predict velocity, if they have their own
    velocity_architecture: str = ""
    velocity_side: int = 0  # latents along one side that those were trained at, if another
    telling: str = ""  # the norm of which biases tell, by their spread, that a model predicts velocity

    def __hash__(self) -> int:
        return hash(self.name)  # tables are looked up by family for every name in a file

    @property
    def networks(self) -> tuple[Network, ...]:
        """The denoiser, then the text encoders."""
        return (self.denoiser, *self.texts)

    def network(self, part: str) -> Network:
        """The row of a part."""
        return next(row for row in self.networks if row.part == part)

    def version_of(self, noise: Noise) -> str:
        """kohya's word for a model of it, such as `sd_v2_v`."""
        return (self.velocity_version if noise.prediction == "v_prediction" else "") or self.base_version

    def architecture_of(self, noise: Noise) -> str:
        """ModelSpec's word for a model of it."""
        return (self.velocity_architecture if noise.prediction == "v_prediction" else "") or self.architecture


@cache
def modules(family: Family) -> Mapping[str, Shape]:
    """Every Linear and Conv2d that an adapter may target: canonical path => weight shape [out, in(, kh, kw)]."""
    return {layer.path: layer.shape for layer in _layers(family) if len(layer.shape) > 1}


@cache
def weights(family: Family) -> Mapping[str, Shape]:
    """Every weight that an adapter may change: canonical path => shape.

    A layer's path names its weight, [c] for a norm; `<path>.bias` its bias, [out]. All parameters but the embedding tables.
    """
    layers = _layers(family)
    biases = {f"{layer.path}.bias": layer.shape[:1] for layer in layers if layer.bias}
    return {layer.path: layer.shape for layer in layers} | biases


@cache
def addresses(family: Family) -> Mapping[str, Address]:
    """Canonical path of every parameter of the denoiser and the text encoders => its address in a single file.

    Paths name parameters: `unet.conv_in` is the weight, `unet.conv_in.bias` the bias; norms and embedding tables are there too.
    The VAE has no canonical paths: nothing in this package changes one. Empty for a family that is not read from single files.
    """
    rows = {row.part: row for row in family.networks}
    paths = (*weights(family), *(f"{row.part}.{name}" for row in family.texts for name in row.tables()))
    found = {path: rows[path.partition(".")[0]].address(path.partition(".")[2]) for path in paths}
    return {path: address for path, address in found.items() if address} if all(found.values()) else {}


@cache
def parameters_at(family: Family) -> Mapping[str, tuple[str, ...]]:
    """The way back: a single file's key => the paths of the parameters in it, one or (q, k, v) three."""
    table: dict[str, tuple[str, ...]] = {}
    for path, address in addresses(family).items():
        table[address.key] = (*table.get(address.key, ()), path)
    return table


def split_bias(path: str) -> tuple[str, str]:
    """A parameter's layer, and what it is there.

    >>> split_bias("conv_in.bias"), split_bias("conv_in")
    (('conv_in', 'bias'), ('conv_in', 'weight'))
    """
    return (path.removesuffix(".bias"), "bias") if path.endswith(".bias") else (path, "weight")


def _layers(family: Family) -> list[Layer]:
    """All layers of all parts, by canonical path."""
    return [layer._replace(path=f"{row.part}.{layer.path}") for row in family.networks for layer in row.layers()]
