"""Blocks of a UNet: their names, presets, and strengths by block as people type them behind `lbw=`. No torch.

Names and lists are those of sd-webui-lora-block-weight: BASE is what is no block (text encoders, embeddings); the long list has
every LDM block, the short one those with attention. What a short list leaves out is 0, as there.
"""

from __future__ import annotations

import re
from functools import cache

from ...errors import AdapterError, nearest
from ...families.family import Family
from .curves import NUMBER

PRESETS = {  # of SD's 17 blocks: BASE, IN01 02 04 05 07 08, MID, OUT03 .. OUT11
    "NONE": (0,) * 17,
    "ALL": (1,) * 17,
    "INS": (1, 1, 1) + (0,) * 14,
    "IND": (1, 0, 0, 0, 1, 1, 1) + (0,) * 10,
    "INALL": (1,) * 7 + (0,) * 10,
    "MIDD": (1, 0, 0, 0) + (1,) * 8 + (0,) * 5,
    "OUTD": (1,) + (0,) * 7 + (1,) * 4 + (0,) * 5,
    "OUTS": (1,) + (0,) * 11 + (1,) * 5,
    "OUTALL": (1,) + (0,) * 7 + (1,) * 9,
}


@cache
def names(family: Family, attention: bool = False) -> tuple[str, ...]:
    """The blocks of a family's denoiser in LBW's order, or those with attention; BASE first."""
    return family.denoiser.blocks(attention)


def block_of(family: Family, path: str) -> str:
    """The block of a layer: IN04, MID, OUT11, or BASE.

    >>> from personalize.families.names import FAMILIES
    >>> block_of(FAMILIES[1], "unet.mid_block.resnets.0.conv1")
    'MID'
    """
    part, _, own = path.removesuffix(".bias").partition(".")
    return family.denoiser.block_of(own) if part == family.denoiser.part else "BASE"


def blocks(text: str, family: Family | None) -> dict[str, float]:
    """Block => strength, from a list of numbers, a preset or some blocks' names."""
    if family is None:
        raise AdapterError(f"lbw={text} needs a known family", "this adapter's layers belong to none")
    long, short = names(family), names(family, attention=True)
    if "," in text or re.fullmatch(NUMBER, text):
        values = [float(piece) for piece in text.split(",") if re.fullmatch(NUMBER, piece)]
        order = {len(long): long, len(short): short}.get(len(values))
        if order is None or len(values) != len(text.split(",")):
            counts = f"{len(short)} or {len(long)} numbers"
            raise AdapterError(
                f"lbw={text} is no list for {family.name}", f"it takes {counts}: {', '.join(short)}, or all blocks"
            )
        return dict.fromkeys(long, 0.0) | dict(zip(order, values, strict=True))
    if (preset := PRESETS.get(text.upper())) and len(short) == len(preset):
        return dict.fromkeys(long, 0.0) | dict(zip(short, map(float, preset), strict=True))
    if text.upper() in PRESETS:
        raise AdapterError(
            f"lbw={text} is a preset for SD 1 and 2, and this is {family.name}", f"it has blocks {', '.join(short)}"
        )
    chosen = [re.sub(r"^(IN|OUT)(\d)$", r"\g<1>0\2", piece.upper()) for piece in text.split("+")]
    if unknown := [block for block in chosen if block not in long]:
        known = [*long, *(PRESETS if len(short) == 17 else ())]
        raise AdapterError(f"{family.name} has no block {unknown[0]}", nearest(unknown[0], known))
    return dict.fromkeys(long, 0.0) | dict.fromkeys(chosen, 1.0)
