"""Which family a single-file checkpoint is of, from its keys and shapes alone, whatever its widths.

Names say nothing: pruned, distilled and tiny models are read like the ones they are made after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import names as keys
from .addresses import UNET, text_prefix
from .family import FAMILIES, Family, Shape, Text, UNet

ROWS = {family.name: family for family in FAMILIES}
# What a checkpoint that is none of ours has, and what it is.
STRANGERS = {
    "joint_blocks.0.": "Stable Diffusion 3",
    "double_blocks.0.": "Flux",
    "edm_mean": "a Playground model with EDM noise",
    "effnet_mapper": "Stable Cascade",
    "transformer_blocks.0.attn1.to_q_a": "an unknown transformer",
}


def family_in(shapes: Mapping[str, Shape]) -> Family | None:
    """The family of a single file's tensors (key => shape): a known row, or one with this file's own numbers; None for others."""
    unet = _unet(shapes)
    if unet is None:
        return None
    if known := [row for row in keys.FAMILIES if row.unet == unet]:
        return known[0]
    row = ROWS[_structure(unet, shapes)]
    texts = tuple(filter(None, (_text(row, text, shapes) for text in row.texts)))
    return replace(row, unet=unet, texts=texts) if len(texts) == len(row.texts) else None


def stranger_in(shapes: Mapping[str, Shape]) -> str:
    """What a model is that this package does not know, as the end of a sentence; "" if it cannot tell."""
    return next((f": it is {name}" for mark, name in STRANGERS.items() if any(mark in key for key in shapes)), "")


def channels_in(shapes: Mapping[str, Shape]) -> int:
    """How many channels the UNet of a single file reads: more than it writes for inpainting and the like."""
    return shapes[f"{UNET}input_blocks.0.0.weight"][1]


def _structure(unet: UNet, shapes: Mapping[str, Shape]) -> str:
    if unet.added:
        return "sdxl" if any(key.startswith("conditioner.embedders.1.") for key in shapes) else "sdxl-refiner"
    return "sd2" if unet.linear else "sd1"


def _unet(shapes: Mapping[str, Shape]) -> UNet | None:
    """The numbers of a UNet under LDM's names; None for what is no such UNet."""
    levels: list[list[tuple[int, int]]] = [[]]  # by level: (channels, depth) of each layer
    n = 1
    while True:
        block = f"{UNET}input_blocks.{n}"
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
    middle = f"{UNET}middle_block.1"
    contexts = {shape[1] for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("attn2.to_k.weight")}
    projection, out = shapes.get(f"{middle}.proj_in.weight"), shapes.get(f"{UNET}out.2.weight")
    if len(contexts) != 1 or projection is None or out is None or f"{UNET}input_blocks.0.0.weight" not in shapes:
        return None
    return UNet(
        channels=tuple(level[0][0] for level in levels),
        depth=depth,
        middle=_depth(shapes, middle),
        context=contexts.pop(),
        layers=counts.pop(),
        latent=out[0],
        linear=len(projection) == 2,
        added=shapes.get(f"{UNET}label_emb.0.0.weight", (0, 0))[1],
    )


def _depth(shapes: Mapping[str, Shape], block: str) -> int:
    depth = 0
    while f"{block}.transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    return depth


def _text(row: Family, text: Text, shapes: Mapping[str, Shape]) -> Text | None:
    """A row's text encoder with the numbers of this file's."""
    prefix, openclip = text_prefix(row, text.part)
    table = "token_embedding.weight" if openclip else "embeddings.token_embedding.weight"
    found = next((shape for key, shape in shapes.items() if key.startswith(prefix) and key.endswith(table)), None)
    marks = "resblocks." if openclip else "encoder.layers."
    numbers = {int(key.partition(marks)[2].partition(".")[0]) for key in shapes if key.startswith(prefix) and marks in key}
    if found is None or not numbers:
        return None
    unread = 1 if row.name == "sd2" else 0  # diffusers leaves out the last layer, which SD 2 never listens to
    return replace(text, width=found[1], layers=len(numbers) - unread)
