"""The denoiser of Stable Diffusion 1, 2 and XL: `UNet2DConditionModel` under diffusers' and LDM's names, from a few numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from ..formats.header import Address
from ..formats.shapes import Shape
from .family import Layer, TextRow, split_bias

if TYPE_CHECKING:
    from torch import Tensor

    from .cond import Cond

PREFIX = "model.diffusion_model."  # of its keys in a single file
# What a UNet is that reads so many channels beside the noisy latents.
BESIDE = {1: "a depth-to-image model", 4: "an image-editing model (InstructPix2Pix)", 5: "an inpainting model"}


@dataclass(frozen=True)
class UNet:
    """The numbers of a `UNet2DConditionModel` that decide its module names and weight shapes."""

    channels: tuple[int, ...]  # block_out_channels
    depth: tuple[int, ...]  # transformer layers per attention at each level; 0 is a level without attention
    middle: int  # the same, in the middle block
    context: int  # cross_attention_dim
    layers_per_block: int = 2
    latent: int = 4  # in_channels and out_channels
    linear: bool = False  # use_linear_projection
    added: int = 0  # projection_class_embeddings_input_dim (SDXL's size and crop conditioning)
    # What no weight tells:
    heads: int = field(default=0, compare=False)  # of each attention; 0: of 64 channels each
    side: int = field(default=128, compare=False)  # of the latents that it was trained at
    told: int = field(default=6, compare=False)  # numbers about size and crop, embedded beside the pooled text

    part: ClassVar[str] = "unet"
    # sd-scripts names OFT by itself; `lycoris` is LyCORIS on a bare UNet.
    prefixes: ClassVar[tuple[str, ...]] = ("lora_unet", "oft_unet", "lycoris")
    # Kohya's choice of layers. UIs stumble over conv_in, conv_out and the time embedding: only a glob finds them.
    targets: ClassVar[Mapping[str, str]] = {
        "attention": r".*\.attn[12]\.to_(q|k|v|out\.0)",
        "self-attention": r".*\.attn1\.to_(q|k|v|out\.0)",
        "cross-attention": r".*\.attn2\.to_(q|k|v|out\.0)",
        "feedforward": r".*\.ff\.net\.(0\.proj|2)",
        "projection": r".*\.attentions\.\d+\.proj_(in|out)",
        "conv": r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv)",
    }

    text_layers: ClassVar[str] = r".*\.attn2\.to_[kv]"

    @property
    def multiple(self) -> int:
        """It halves the latents once between any two of its levels."""
        return 1 << max(0, len(self.channels) - 1)

    @property
    def structure(self) -> str:
        return "sized" if self.added else "linear" if self.linear else "plain"

    @property
    def sized(self) -> bool:
        return self.added > 0

    def layers(self) -> Iterator[Layer]:
        return _layers(self)

    def tables(self) -> Sequence[str]:
        return ()

    def model(self) -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    # --- names ---

    def names_in(self, style: str) -> Mapping[str, str]:
        return ldm_names(self) if style == "ldm" else {layer.path: layer.path for layer in self.layers()}

    def address(self, path: str) -> Address:
        layer, kind = split_bias(path)
        return Address(f"{PREFIX}{ldm_names(self)[layer]}.{kind}")

    def block_of(self, path: str) -> str:
        """IN04, MID, OUT11, as sd-webui-lora-block-weight counts LDM's blocks."""
        kind, _, rest = ldm_names(self).get(path, "").partition(".")
        number = int(rest.partition(".")[0]) if kind in ("input_blocks", "output_blocks") else 0
        return {"input_blocks": f"IN{number:02}", "middle_block": "MID", "output_blocks": f"OUT{number:02}"}.get(kind, "BASE")

    def blocks(self, attention: bool = False) -> tuple[str, ...]:
        found = {self.block_of(path) for path in ldm_names(self) if not attention or "attentions" in path}
        order = {"B": 0, "I": 1, "M": 2, "O": 3}
        return tuple(sorted({"BASE", *found}, key=lambda block: (order[block[0]], block)))

    # --- configs and single files ---

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        channels, cross = tuple(config["block_out_channels"]), [one.startswith("CrossAttn") for one in config["down_block_types"]]
        depths = config.get("transformer_layers_per_block", 1)
        depths = [depths] * len(channels) if isinstance(depths, int) else list(depths)
        return cls(
            channels=channels,
            depth=tuple(depth if yes else 0 for depth, yes in zip(depths, cross, strict=True)),
            middle=int(depths[-1]),
            context=int(config["cross_attention_dim"]),
            layers_per_block=int(config.get("layers_per_block", 2)),
            latent=int(config.get("out_channels", 4)),
            linear=bool(config.get("use_linear_projection", False)),
            added=int(config.get("projection_class_embeddings_input_dim") or 0),
        )

    def config(self, texts: Sequence[TextRow]) -> dict[str, Any]:
        cross = [bool(depth) for depth in self.depth]
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (self.added - texts[-1].width) // self.told if self.added else None,
            "projection_class_embeddings_input_dim": self.added,
        }
        return {
            "sample_size": self.side,
            "in_channels": self.latent,
            "out_channels": self.latent,
            "block_out_channels": self.channels,
            "layers_per_block": self.layers_per_block,
            "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in cross],
            "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(cross)],
            "transformer_layers_per_block": [depth or self.middle for depth in self.depth],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": self.context,
            "attention_head_dim": self.heads or [max(1, channels // 64) for channels in self.channels],
            "use_linear_projection": self.linear,
            **(added if self.added else {}),
        }

    @classmethod
    def recognise(cls, shapes: Mapping[str, Shape]) -> UNet | None:
        return _recognise_unet(shapes)

    @classmethod
    def reads(cls, shapes: Mapping[str, Shape]) -> int:
        return shapes[f"{PREFIX}input_blocks.0.0.weight"][1]

    @staticmethod
    def beside(channels: int, title: str) -> str:
        what = BESIDE.get(channels, f"a model with {channels} more channels")
        return f"{what} of {title}: its UNet reads more than a noisy picture"

    def forward(self, model: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond.pooled, "time_ids": cond.sizes} if self.added else None
        told = {"encoder_hidden_states": cond.tokens, "added_cond_kwargs": added}
        predicted: Tensor = model(x, t, **told, return_dict=False)[0]
        return predicted


# --- layers ---------------------------------------------------------------------------------------------------------


def _layers(row: UNet) -> Iterator[Layer]:
    first, last, levels = row.channels[0], row.channels[-1], len(row.channels)
    yield Layer("conv_in", (first, row.latent, 3, 3))
    yield Layer("conv_norm_out", (first,))
    yield Layer("conv_out", (row.latent, first, 3, 3))
    yield from _embedding("time_embedding", first, 4 * first)
    if row.added:
        yield from _embedding("add_embedding", row.added, 4 * first)

    width = first
    for i, channels in enumerate(row.channels):
        for j in range(row.layers_per_block):
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
        for j in range(row.layers_per_block + 1):
            skip = below if j == row.layers_per_block else channels
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


# --- LDM's names ----------------------------------------------------------------------------------------------------

_LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@cache
def ldm_names(row: UNet) -> Mapping[str, str]:
    """Path => the path inside an LDM checkpoint's `model.diffusion_model`, for each layer."""
    blocks = _ldm_blocks(row)
    return {layer.path: _ldm_path(layer.path, blocks) for layer in _layers(row)}


def _ldm_path(path: str, blocks: Mapping[str, str]) -> str:
    """A path under LDM's names; `blocks` holds the beginning of every path."""
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
    count = row.layers_per_block
    for i, depth in enumerate(row.depth):
        first = 1 + i * (count + 1)
        for j in range(count):
            blocks |= _ldm_layer(f"down_blocks.{i}", j, f"input_blocks.{first + j}")
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + count}.0.op"

        up, last = len(row.depth) - 1 - i, (len(row.depth) - i) * (count + 1) - 1
        for j in range(count + 1):
            blocks |= _ldm_layer(f"up_blocks.{up}", j, f"output_blocks.{last - count + j}")
        blocks[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if depth else 1}.conv"
    return blocks


def _ldm_layer(block: str, j: int, name: str) -> dict[str, str]:
    return {f"{block}.resnets.{j}": f"{name}.0", f"{block}.attentions.{j}": f"{name}.1"}


# --- single files ---------------------------------------------------------------------------------------------------


def _recognise_unet(shapes: Mapping[str, Shape]) -> UNet | None:
    """The numbers of a UNet under LDM's names; None for what is no such UNet."""
    levels: list[list[tuple[int, int]]] = [[]]  # by level: (channels, depth) of each layer
    n = 1
    while True:
        block = f"{PREFIX}input_blocks.{n}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif (kernel := shapes.get(f"{block}.0.in_layers.2.weight")) is not None:
            levels[-1].append((kernel[0], _depth(shapes, f"{block}.1")))
        else:
            break
        n += 1
    counts = {len(level) for level in levels}
    if len(counts) != 1 or counts == {0} or any(len(set(level)) != 1 for level in levels):
        return None
    depth = tuple(level[0][1] for level in levels)
    middle = f"{PREFIX}middle_block.1"
    contexts = {shape[1] for key, shape in shapes.items() if key.startswith(PREFIX) and key.endswith("attn2.to_k.weight")}
    projection, out = shapes.get(f"{middle}.proj_in.weight"), shapes.get(f"{PREFIX}out.2.weight")
    if len(contexts) != 1 or projection is None or out is None or f"{PREFIX}input_blocks.0.0.weight" not in shapes:
        return None
    return UNet(
        channels=tuple(level[0][0] for level in levels),
        depth=depth,
        middle=_depth(shapes, middle),
        context=contexts.pop(),
        layers_per_block=counts.pop(),
        latent=out[0],
        linear=len(projection) == 2,
        added=shapes.get(f"{PREFIX}label_emb.0.0.weight", (0, 0))[1],
    )


def _depth(shapes: Mapping[str, Shape], block: str) -> int:
    depth = 0
    while f"{block}.transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    return depth
