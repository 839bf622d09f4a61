"""Every name that the layers of a model family go by, and which family a file's names and shapes are of.

Names with underscores for dots (kohya's) are ambiguous backwards, so they are only ever looked up in tables that are built
forward from the layer lists of architecture.py. Norms have names like other layers; a bias goes by its layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache

from .family import FAMILIES, PARTS, Family, Shape, UNet, weights
from .family import Text as Text
from .family import modules as modules

# How files begin the names of a part's layers, beside the way that is written (Text.kohya). sd-scripts names OFT by itself;
# `lycoris` is LyCORIS on a bare UNet. A lone text encoder is `lora_te` to most tools, and `lora_te1` to some.
_SPOKEN = {"unet": ("lora_unet", "oft_unet", "lycoris"), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
KOHYA_PREFIXES = tuple(f"{prefix}_" for part in PARTS for prefix in _SPOKEN[part])


def canonical(path: str) -> str:
    """The one path of a module, whatever the library version: text encoders always say `text_model`.

    >>> canonical("text_encoder.encoder.layers.0.mlp.fc1")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    part, _, rest = path.partition(".")
    inside = part != "unet" and rest.startswith(("encoder.", "embeddings.", "final_layer_norm"))
    return f"{part}.text_model.{rest}" if inside else path


def part_of(path: str) -> str:
    """The part of the model that a module path begins with.

    >>> part_of("unet.conv_in")
    'unet'
    """
    return path.partition(".")[0]


# --- names ----------------------------------------------------------------------------------------------------------


@cache
def kohya_names(family: Family) -> Mapping[str, str]:
    """Canonical path => the name that kohya's tools write and UIs know, for each layer of `weights`, norms too."""
    written = {"unet": "lora_unet"} | {text.part: text.kohya for text in family.texts}
    return {path: f"{written[part_of(path)]}_{body}" for path, body in _bodies(family, family.blocks[0]).items()}


@cache
def kohya_paths(family: Family) -> Mapping[str, str]:
    """Every kohya name that a file of this family may use => canonical path.

    UNet blocks as diffusers and as LDM name them, in any mixture; text encoders with and without `text_model`.
    """
    written: dict[str, tuple[str, ...]] = {text.part: (text.kohya,) for text in family.texts}
    paths = {}
    for path, body in (item for blocks in family.blocks for item in _bodies(family, blocks).items()):
        part = part_of(path)
        for prefix in {*written.get(part, ()), *_SPOKEN[part]}:
            paths[f"{prefix}_{body}"] = paths[f"{prefix}_{body.removeprefix('text_model_')}"] = path
    return paths


@cache
def ldm_names(family: Family) -> Mapping[str, str]:
    """Canonical path => the path inside an LDM checkpoint's `model.diffusion_model`, for each layer of the UNet."""
    blocks = _ldm_blocks(family.unet)
    return {path: _ldm_path(path.partition(".")[2], blocks) for path in _layers(family) if part_of(path) == "unet"}


def _bodies(family: Family, blocks: str) -> dict[str, str]:
    """Canonical path => kohya name without its prefix, with the UNet's blocks named as diffusers or LDM does."""
    renamed = ldm_names(family) if blocks == "ldm" else {}
    return {path: renamed.get(path, path.partition(".")[2]).replace(".", "_") for path in _layers(family)}


def _layers(family: Family) -> list[str]:
    return [path for path in weights(family) if not path.endswith(".bias")]


# --- families -------------------------------------------------------------------------------------------------------


def families_of(shapes: Mapping[str, Shape]) -> tuple[Family, ...]:
    """Every family that has all these weights (canonical paths) with these shapes, as `same` compares them."""
    return tuple(family for family in FAMILIES if _fits(shapes, weights(family)))


def kin(each: Iterable[Mapping[str, Shape]]) -> bool:
    """Whether one family can have all these; those of no known family go with any."""
    known = [set(found) for shapes in each if (found := families_of(shapes))]
    return not known or bool(set.intersection(*known))


def family_of(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Family | None:
    """The family that has all these weights with these shapes; None if there is none.

    Families can share layers (SD1 and SD2 share self-attention); then the file's own word in `metadata` decides,
    and without one the first row.
    """
    return min(families_of(shapes), key=lambda family: not says(metadata or {}, family), default=None)


def says(metadata: Mapping[str, str], family: Family) -> bool:
    """Whether a file's metadata claims this family."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    stem = family.architecture.removesuffix("/lora").removesuffix("-512").removesuffix("-base")
    refines = ("refiner" in architecture) == ("refiner" in stem)  # SDXL's stem begins its refiner's
    return version.startswith(family.base_version.removesuffix("-0")) or (architecture.startswith(stem) and refines)


def find_kohya(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Mapping[str, str]:
    """kohya name => canonical path, in the family that knows most of the names and fits their weight shapes best."""

    def misfit(family: Family) -> tuple[int, int, bool]:
        paths, known = kohya_paths(family), weights(family)
        named = [name for name in shapes if name in paths]
        wrong = sum(not same(shapes[name], known[paths[name]]) for name in named)
        return len(shapes) - len(named), wrong, not says(metadata, family)

    return kohya_paths(min(FAMILIES, key=misfit))


# --- shapes ---------------------------------------------------------------------------------------------------------


def same(shape: Shape, known: Shape) -> bool:
    """Whether a shape as a file tells it may be that of a known weight.

    -1 matches anything (OFT and IA3 tell one side or none), [out, in * kh * kw] a convolution (LoHa and LoKr store it flat),
    and a 1x1 convolution is as good as a linear layer.

    >>> same((320, 36), (320, 4, 3, 3)), same((320, -1), (320, 4, 3, 3)), same((320, 4), (320, 4, 3, 3))
    (True, True, False)
    """
    if (len(shape), len(known)) == (2, 4):
        known = (known[0], math.prod(known[1:]))
    elif (len(shape), len(known)) == (4, 2):
        known = (*known, 1, 1)
    return len(shape) == len(known) and all(size in (-1, true) for size, true in zip(shape, known, strict=True))


def resolve_shape(path: str, shape: Shape, family: Family | None) -> Shape:
    """The weight's true shape, where this family has it and `shape` may be it; else `shape` as given."""
    known = weights(family).get(path) if family else None
    return known if known and same(shape, known) else shape


def _fits(shapes: Mapping[str, Shape], known: Mapping[str, Shape]) -> bool:
    return bool(shapes) and all(path in known and same(shape, known[path]) for path, shape in shapes.items())


# --- LDM's names ----------------------------------------------------------------------------------------------------

_LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _ldm_path(path: str, blocks: Mapping[str, str]) -> str:
    """A UNet path under LDM's names; `blocks` holds the beginning of every path."""
    words = path.split(".")
    n = next(n for n in range(1, len(words) + 1) if ".".join(words[:n]) in blocks)
    leaf = [_LDM_RESNET[words[n]]] if "resnets" in words else words[n:]
    return ".".join([blocks[".".join(words[:n])], *leaf])


def _ldm_blocks(row: UNet) -> dict[str, str]:
    """diffusers block => LDM block: LDM numbers a level's layers and its resampler in one row."""
    blocks = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i, depth in enumerate(row.depth):
        first = 1 + i * (row.layers + 1)
        for j in range(row.layers):
            blocks |= _ldm_layer(f"down_blocks.{i}", j, f"input_blocks.{first + j}")
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + row.layers}.0.op"

        up, last = len(row.depth) - 1 - i, (len(row.depth) - i) * (row.layers + 1) - 1
        for j in range(row.layers + 1):
            blocks |= _ldm_layer(f"up_blocks.{up}", j, f"output_blocks.{last - row.layers + j}")
        blocks[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if depth else 1}.conv"
    return blocks


def _ldm_layer(block: str, j: int, name: str) -> dict[str, str]:
    return {f"{block}.resnets.{j}": f"{name}.0", f"{block}.attentions.{j}": f"{name}.1"}
