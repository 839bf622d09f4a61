"""Model families as compact rows, and every name that their modules go by.

The module list of a family is generated forward from its row, with the shape of each weight. Names with underscores
for dots (kohya's) are ambiguous backwards, so they are only ever looked up in tables built from these lists.
A new family is a new row in FAMILIES; a test holds each row against the real diffusers and transformers classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

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
        (Text(768, 12, "lora_te1"), Text(1280, 32, "lora_te2", projection=True)),
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
        ("ldm", "diffusers"),  # UIs take SDXL's convolutions under LDM's names only
    ),
)


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


@cache
def modules(family: Family) -> Mapping[str, Shape]:
    """Every Linear and Conv2d that an adapter may target: canonical path => weight shape [out, in(, kh, kw)]."""
    found = {f"unet.{path}": shape for path, shape in _unet(family.unet)}
    for part, text in zip(PARTS[1:], family.texts, strict=False):
        found |= {f"{part}.{path}": shape for path, shape in _text(text)}
    return found


@cache
def kohya_names(family: Family) -> Mapping[str, str]:
    """Canonical path => the name that kohya's tools write and UIs know."""
    return _kohya(family, family.blocks[0])


@cache
def kohya_paths(family: Family) -> Mapping[str, str]:
    """Every kohya name that a file of this family may use => canonical path."""
    return {name: path for blocks in family.blocks for path, name in _kohya(family, blocks).items()}


def families_of(shapes: Mapping[str, Shape]) -> tuple[Family, ...]:
    """Every family that has all these paths with these weight shapes."""
    return tuple(family for family in FAMILIES if _fits(shapes, modules(family)))


def family_of(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Family | None:
    """The family whose modules have all these paths and weight shapes; None if there is none.

    Families can share layers (SD1 and SD2 share self-attention); then the file's own word in `metadata` decides,
    and without one the first row.
    """
    return min(families_of(shapes), key=lambda family: not says(metadata or {}, family), default=None)


def says(metadata: Mapping[str, str], family: Family) -> bool:
    """Whether a file's metadata claims this family."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    stem = family.architecture.removesuffix("/lora").removesuffix("-512").removesuffix("-base")
    return version.startswith(family.base_version.removesuffix("-0")) or architecture.startswith(stem)


def find_kohya(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Mapping[str, str]:
    """kohya name => canonical path, in the family that knows most of the names and fits their weight shapes best."""

    def misfit(family: Family) -> tuple[int, int, bool]:
        paths, known = kohya_paths(family), modules(family)
        named = {paths[name]: shape for name, shape in shapes.items() if name in paths}
        wrong = sum(not _same(shape, known[path]) for path, shape in named.items())
        return len(shapes) - len(named), wrong, not says(metadata, family)

    return kohya_paths(min(FAMILIES, key=misfit))


def fit(up: Shape, down: Shape) -> bool:
    """Whether two low-rank factors make an update: [out, r] with [r, in], or [out, r, 1, 1] with [r, in, kh, kw], r >= 1."""
    paired = len(up) == len(down) and len(up) in (2, 4) and up[1] == down[0]
    return paired and up[2:] in ((), (1, 1)) and 0 not in up + down


def _fits(shapes: Mapping[str, Shape], known: Mapping[str, Shape]) -> bool:
    return bool(shapes) and all(path in known and _same(shape, known[path]) for path, shape in shapes.items())


def _same(shape: Shape, other: Shape) -> bool:
    """Equal weights; a 1x1 convolution is as good as a linear layer."""
    return shape[:2] == other[:2] and (*shape[2:], 1, 1)[:2] == (*other[2:], 1, 1)[:2]


def _kohya(family: Family, blocks: str) -> dict[str, str]:
    """Canonical path => kohya name, with the UNet's blocks named as diffusers or LDM does."""
    renamed = _ldm_blocks(family.unet) if blocks == "ldm" else {}
    prefixes = {"unet": "lora_unet"} | {part: text.kohya for part, text in zip(PARTS[1:], family.texts, strict=False)}
    named = {path: _ldm_path(path, renamed).partition(".")[2].replace(".", "_") for path in modules(family)}
    return {path: f"{prefixes[part_of(path)]}_{name}" for path, name in named.items()}


# --- module lists ---------------------------------------------------------------------------------------------------


def _unet(row: UNet) -> Iterator[tuple[str, Shape]]:
    first, last, levels = row.channels[0], row.channels[-1], len(row.channels)
    yield "conv_in", (first, row.latent, 3, 3)
    yield "conv_out", (row.latent, first, 3, 3)
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
            yield f"down_blocks.{i}.downsamplers.0.conv", (channels, channels, 3, 3)

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
            yield f"up_blocks.{i}.upsamplers.0.conv", (channels, channels, 3, 3)


def _embedding(path: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.linear_1", (out, width)
    yield f"{path}.linear_2", (out, out)


def _resnet(row: UNet, path: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.conv1", (out, width, 3, 3)
    yield f"{path}.time_emb_proj", (out, 4 * row.channels[0])
    yield f"{path}.conv2", (out, out, 3, 3)
    if width != out:
        yield f"{path}.conv_shortcut", (out, width, 1, 1)


def _transformer(row: UNet, path: str, width: int, depth: int) -> Iterator[tuple[str, Shape]]:
    if not depth:
        return
    for projection in ("proj_in", "proj_out"):
        yield f"{path}.{projection}", (width, width) if row.linear else (width, width, 1, 1)
    for block in (f"{path}.transformer_blocks.{k}" for k in range(depth)):
        for attention, context in (("attn1", width), ("attn2", row.context)):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, context)
            yield f"{block}.{attention}.to_v", (width, context)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)  # GEGLU: values and gates
        yield f"{block}.ff.net.2", (width, 4 * width)


def _text(row: Text) -> Iterator[tuple[str, Shape]]:
    for i in range(row.layers):
        layer = f"text_model.encoder.layers.{i}"
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{leaf}", (row.width, row.width)
        yield f"{layer}.mlp.fc1", (4 * row.width, row.width)
        yield f"{layer}.mlp.fc2", (row.width, 4 * row.width)
    if row.projection:
        yield "text_projection", (row.width, row.width)


# --- LDM's names ----------------------------------------------------------------------------------------------------

_LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _ldm_path(path: str, blocks: Mapping[str, str]) -> str:
    """A UNet path under LDM's block names; a path with no block in the table is returned as it is."""
    for block, name in blocks.items():
        if path == block or path.startswith(f"{block}."):
            leaf = path[len(block) :]
            return name + (f".{_LDM_RESNET[leaf[1:]]}" if ".resnets." in block else leaf)
    return path


def _ldm_blocks(row: UNet) -> dict[str, str]:
    """diffusers block => LDM block: LDM numbers a level's layers and its resampler in one row."""
    blocks = {
        "conv_in": "input_blocks.0.0",
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
    return {f"unet.{path}": f"unet.{name}" for path, name in blocks.items()}


def _ldm_layer(block: str, j: int, name: str) -> dict[str, str]:
    return {f"{block}.resnets.{j}": f"{name}.0", f"{block}.attentions.{j}": f"{name}.1"}
