"""Model families as compact rows, and every weight that follows from a row.

The layer list of a family is generated forward from its row, with the shape of each weight and whether it has a bias.
A new family is a new row in FAMILIES; a test holds each row against the real diffusers and transformers classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

Shape = tuple[int, ...]
PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class UNet:
    """The numbers of a `UNet2DConditionModel` that decide its module names and weight shapes."""

    channels: tuple[int, ...]  # block_out_channels
    depth: tuple[int, ...]  # transformer layers per attention at each level; 0 is a level without attention
    middle: int  # the same, in the middle block
    context: int  # cross_attention_dim
    layers: int = 2  # layers_per_block
    latent: int = 4  # in_channels and out_channels
    linear: bool = False  # use_linear_projection
    added: int = 0  # projection_class_embeddings_input_dim (SDXL's size and crop conditioning)


@dataclass(frozen=True)
class Text:
    """The numbers of a `CLIPTextModel`, and the prefix that kohya's tools give it."""

    width: int
    layers: int
    kohya: str = "lora_te"
    projection: bool = False  # CLIPTextModelWithProjection
    part: str = "text_encoder"  # where pipelines keep it


@dataclass(frozen=True)
class Family:
    """A model family: its architecture, and what files of it say about themselves."""

    name: str
    unet: UNet
    texts: tuple[Text, ...]
    base_version: str  # ss_base_model_version, read by A1111
    architecture: str  # modelspec.architecture, read by Forge
    blocks: tuple[str, ...] = ("diffusers", "ldm")  # whose UNet block names its kohya files use; the first is written


FAMILIES = (
    Family(
        "pocket", UNet((96, 192), (1, 1), 1, 192, layers=1, latent=16), (Text(192, 4),), "pocket", "pocket/lora", ("diffusers",)
    ),
    Family("sd1", UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768), (Text(768, 12),), "sd_v1", "stable-diffusion-v1/lora"),
    Family(
        "sd2",
        UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 1024, linear=True),
        (Text(1024, 23),),
        "sd_v2",
        "stable-diffusion-v2-512/lora",
    ),
    Family(
        "sdxl",
        UNet((320, 640, 1280), (0, 2, 10), 10, 2048, linear=True, added=2816),
        (Text(768, 12, "lora_te1"), Text(1280, 32, "lora_te2", projection=True, part="text_encoder_2")),
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
        ("ldm", "diffusers"),  # UIs take SDXL's convolutions under LDM's names only
    ),
    Family(  # its only text encoder is SDXL's second: diffusers calls it so, ComfyUI alone patches it, and as `lora_te`
        "sdxl-refiner",
        UNet((384, 768, 1536, 1536), (0, 4, 4, 0), 4, 1280, linear=True, added=2560),
        (Text(1280, 32, projection=True, part="text_encoder_2"),),
        "sdxl_refiner_v1-0",
        "stable-diffusion-xl-v1-refiner/lora",
        ("ldm", "diffusers"),
    ),
)
A1111 = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "sdxl-refiner": "SDXL"}  # its word for families


class Layer(NamedTuple):
    """One layer: its path inside the part, the shape of its weight, and whether it has a bias."""

    path: str
    shape: Shape
    bias: bool = True


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


def _layers(family: Family) -> list[Layer]:
    """All layers of all parts, by canonical path."""
    parts = [("unet", _unet(family.unet)), *((text.part, _text(text)) for text in family.texts)]
    return [layer._replace(path=f"{part}.{layer.path}") for part, layers in parts for layer in layers]


# --- layer lists ----------------------------------------------------------------------------------------------------


def _unet(row: UNet) -> Iterator[Layer]:
    first, last, levels = row.channels[0], row.channels[-1], len(row.channels)
    yield Layer("conv_in", (first, row.latent, 3, 3))
    yield Layer("conv_norm_out", (first,))
    yield Layer("conv_out", (row.latent, first, 3, 3))
    yield from _embedding("time_embedding", first, 4 * first)
    if row.added:
        yield from _embedding("add_embedding", row.added, 4 * first)

    width = first
    for i, channels in enumerate(row.channels):
        for j in range(row.layers):
            yield from _resnet(row, f"down_blocks.{i}.resnets.{j}", width, channels)
            yield from _transformer(row, f"down_blocks.{i}.attentions.{j}", channels, row.depth[i])
            width = channels
        if i < levels - 1:
            yield Layer(f"down_blocks.{i}.downsamplers.0.conv", (channels, channels, 3, 3))

    for j in range(2):
        yield from _resnet(row, f"mid_block.resnets.{j}", last, last)
    yield from _transformer(row, "mid_block.attentions.0", last, row.middle)

    upwards, depth = row.channels[::-1], row.depth[::-1]
    for i, channels in enumerate(upwards):
        below = upwards[min(i + 1, levels - 1)]
        for j in range(row.layers + 1):
            skip = below if j == row.layers else channels
            yield from _resnet(row, f"up_blocks.{i}.resnets.{j}", width + skip, channels)
            yield from _transformer(row, f"up_blocks.{i}.attentions.{j}", channels, depth[i])
            width = channels
        if i < levels - 1:
            yield Layer(f"up_blocks.{i}.upsamplers.0.conv", (channels, channels, 3, 3))


def _embedding(path: str, width: int, out: int) -> Iterator[Layer]:
    yield Layer(f"{path}.linear_1", (out, width))
    yield Layer(f"{path}.linear_2", (out, out))


def _resnet(row: UNet, path: str, width: int, out: int) -> Iterator[Layer]:
    yield Layer(f"{path}.norm1", (width,))
    yield Layer(f"{path}.conv1", (out, width, 3, 3))
    yield Layer(f"{path}.time_emb_proj", (out, 4 * row.channels[0]))
    yield Layer(f"{path}.norm2", (out,))
    yield Layer(f"{path}.conv2", (out, out, 3, 3))
    if width != out:
        yield Layer(f"{path}.conv_shortcut", (out, width, 1, 1))


def _transformer(row: UNet, path: str, width: int, depth: int) -> Iterator[Layer]:
    if not depth:
        return
    yield Layer(f"{path}.norm", (width,))
    for projection in ("proj_in", "proj_out"):
        yield Layer(f"{path}.{projection}", (width, width) if row.linear else (width, width, 1, 1))
    for block in (f"{path}.transformer_blocks.{k}" for k in range(depth)):
        for norm in ("norm1", "norm2", "norm3"):
            yield Layer(f"{block}.{norm}", (width,))
        for attention, context in (("attn1", width), ("attn2", row.context)):
            yield Layer(f"{block}.{attention}.to_q", (width, width), bias=False)
            yield Layer(f"{block}.{attention}.to_k", (width, context), bias=False)
            yield Layer(f"{block}.{attention}.to_v", (width, context), bias=False)
            yield Layer(f"{block}.{attention}.to_out.0", (width, width))
        yield Layer(f"{block}.ff.net.0.proj", (8 * width, width))  # GEGLU: values and gates
        yield Layer(f"{block}.ff.net.2", (width, 4 * width))


def _text(row: Text) -> Iterator[Layer]:
    for i in range(row.layers):
        layer = f"text_model.encoder.layers.{i}"
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield Layer(f"{layer}.self_attn.{leaf}", (row.width, row.width))
        for norm in ("layer_norm1", "layer_norm2"):
            yield Layer(f"{layer}.{norm}", (row.width,))
        yield Layer(f"{layer}.mlp.fc1", (4 * row.width, row.width))
        yield Layer(f"{layer}.mlp.fc2", (row.width, 4 * row.width))
    yield Layer("text_model.final_layer_norm", (row.width,))
    if row.projection:
        yield Layer("text_projection", (row.width, row.width), bias=False)
