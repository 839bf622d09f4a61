"""How much of an adapter: by part, by block, by pattern, as people type it behind a file's name. No torch.

    rex.safetensors:0.8                     all of it at 0.8
    rex.safetensors:0.8:0.5                 UNet, text encoders (A1111's <lora:NAME:TE:UNET> is the other way round)
    rex.safetensors:unet=0.8:te=0.5:te2=0   part by part
    rex.safetensors:0.8:lbw=OUTD            by block: a preset, a list of 12/17/20/26 numbers, or blocks (MID+OUT03)
    rex.safetensors:*attn2*=0.5             layers whose path matches a pattern

Block names and lists are those of sd-webui-lora-block-weight: BASE is what is no block (text encoders, embeddings); the long list
has every LDM block, the short one those with attention. What a short list leaves out is 0, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from ..errors import AdapterError, nearest
from . import keys

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
PIECE = rf"{NUMBER}|(?:unet|te|te2)={NUMBER}|lbw=[\w+.,-]+|[\w.*?\[\]-]*[.*?][\w.*?\[\]-]*={NUMBER}"
SUFFIX = re.compile(rf"(?P<path>.+?)(?P<rest>(?::(?:{PIECE}))+)", re.IGNORECASE)
PARTS = {"unet": "unet", "te": "text_encoder", "te2": "text_encoder_2"}
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


@dataclass(frozen=True)
class Weighting:
    """Strengths by part, and on top of them by block and by pattern; `str` gives what was typed."""

    parts: Mapping[str, float]
    blocks: str = ""  # as typed behind lbw=
    patterns: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        unet, te, te2 = (self.parts[part] for part in PARTS.values())
        if te == te2:
            pieces = [number(unet)] if unet == te else [number(unet), number(te)]
        else:
            pieces = [f"{name}={number(self.parts[part])}" for name, part in PARTS.items()]
        return ":".join([*pieces, *([self.inside] if self.inside else [])])

    @property
    def inside(self) -> str:
        """What is said of blocks and patterns; "" for nothing."""
        blocks = [f"lbw={self.blocks}"] if self.blocks else []
        return ":".join([*blocks, *(f"{pattern}={number(weight)}" for pattern, weight in self.patterns)])

    def of(self, paths: Iterable[str], family: keys.Family | None) -> dict[str, float]:
        """Path => strength. Raises AdapterError for blocks that the family does not have, and patterns that match nothing."""
        paths = list(paths)
        table = blocks(self.blocks, family) if self.blocks else {}
        found = {path: self.parts[keys.part_of(path)] for path in paths}
        for path in found if table and family else ():
            found[path] *= table[block_of(family, path)]  # type: ignore[arg-type]
        for pattern, weight in self.patterns:
            matched = [path for path in paths if fnmatchcase(path, pattern)]
            if not matched:
                raise AdapterError(f"the pattern {pattern} matches no layer", f"a layer is called {paths[0]}" if paths else "")
            found |= {path: found[path] * weight for path in matched}
        return found


def number(value: float) -> str:
    """Every digit of a number, without an exponent.

    >>> number(0.00001), number(1.0), number(0.1 + 0.2)
    ('0.00001', '1', '0.30000000000000004')
    """
    return f"{Decimal(repr(value)):f}".removesuffix(".0")


def split(text: str) -> tuple[str, Weighting]:
    r"""A path and how much of it. Drive letters and colons in names are left alone.

    >>> path, weighting = split(r"C:\rex.safetensors:0.8:lbw=OUTD")
    >>> path, str(weighting)
    ('C:\\rex.safetensors', '0.8:lbw=OUTD')
    """
    match = SUFFIX.fullmatch(text)
    if not match or Path(text).exists():
        return text, Weighting(dict.fromkeys(PARTS.values(), 1.0))
    named: dict[str, str] = {}
    bare: list[float] = []
    for piece in match["rest"].split(":")[1:]:
        name, _, value = piece.rpartition("=")
        if not name:
            bare.append(float(value))
        else:
            named[name.lower() if name.lower() in (*PARTS, "lbw") else name] = value
    if len(bare) > 2 or (bare and named.keys() & PARTS.keys()):
        raise AdapterError(f"too many strengths in {text}", "write PATH:BOTH, PATH:UNET:TEXT or PATH:unet=0.8:te=0.5")
    unet, te = (bare[0], bare[-1]) if bare else (float(named.pop("unet", 1)), float(named.pop("te", 1)))
    parts = {"unet": unet, "text_encoder": te, "text_encoder_2": float(named.pop("te2", te))}
    spelled = named.pop("lbw", "")
    return match["path"], Weighting(parts, spelled, tuple((name, float(value)) for name, value in named.items()))


@cache
def names(family: keys.Family, attention: bool = False) -> tuple[str, ...]:
    """The blocks of a family's UNet in LBW's order, or those with attention; BASE first."""
    found = {block_of(family, path) for path in keys.ldm_names(family) if not attention or "attentions" in path}
    order = {"B": 0, "I": 1, "M": 2, "O": 3}
    return tuple(sorted({"BASE", *found}, key=lambda block: (order[block[0]], block)))


def block_of(family: keys.Family, path: str) -> str:
    """The block of a layer: IN04, MID, OUT11, or BASE.

    >>> block_of(keys.FAMILIES[1], "unet.mid_block.resnets.0.conv1")
    'MID'
    """
    name = keys.ldm_names(family).get(path.removesuffix(".bias"), "")
    kind, _, rest = name.partition(".")
    number = int(rest.partition(".")[0]) if kind in ("input_blocks", "output_blocks") else 0
    return {"input_blocks": f"IN{number:02}", "middle_block": "MID", "output_blocks": f"OUT{number:02}"}.get(kind, "BASE")


def blocks(text: str, family: keys.Family | None) -> dict[str, float]:
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
