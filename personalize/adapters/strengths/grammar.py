"""How much of an adapter, and when: by part, block, pattern and step, as people type it behind a file's name. No torch.

rex.safetensors:0.8                     all of it at 0.8
rex.safetensors:0.8:0.5                 UNet, text encoders (A1111's <lora:NAME:TE:UNET> is the other way round)
rex.safetensors:unet=0.8:te=0.5:te2=0   part by part
rex.safetensors:0.8:lbw=OUTD            by block: a preset, a list of 12/17/20/26 numbers, or blocks (MID+OUT03)
rex.safetensors:*attn2*=0.5             layers whose path matches a pattern
rex.safetensors:unet=0@0,1@0.5:te=1     by step: a curve wherever a strength stands (curves.py)
rex.safetensors:0.8:start=5:stop=10     only in these steps; step=5-10 says the same
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from ...errors import AdapterError
from ...families import names as family_names
from ...families.family import Family
from ...families.names import DENOISERS, TEXT_PARTS, part_of
from .blocks import PRESETS as PRESETS
from .blocks import block_of, blocks
from .blocks import names as names
from .curves import ALWAYS, CURVE, NUMBER, Curve, Strength, Window, level, number, strength, strength_text

S = TypeVar("S", float, Strength)
STRENGTH = rf"(?:{CURVE}|{NUMBER})"
BLOCKS = r"[\w+.,-]+"
PATTERN = r"[\w.*?\[\]-]*[.*?][\w.*?\[\]-]*"
PIECES = (  # what may stand between colons
    rf"(?P<bare>{STRENGTH})",
    rf"(?P<part>unet|te|te2)=(?P<strength>{STRENGTH})",
    rf"lbw=(?P<blocks>{BLOCKS})",
    rf"(?P<end>start|stop)=(?P<position>{NUMBER})",
    r"step=(?P<first>\d+\.?\d*|\.\d+)-(?P<last>\d+\.?\d*|\.\d+)",
    rf"(?P<pattern>{PATTERN})=(?P<weight>{NUMBER})",
)
PIECE = re.compile("|".join(PIECES), re.IGNORECASE)
SUFFIX = re.compile(rf"(?P<path>.+?)(?P<rest>(?::(?:{re.sub('[?]P<[a-z]+>', '?:', PIECE.pattern)}))+)", re.IGNORECASE)
PARTS = {"unet": DENOISERS[0], "te": "text_encoder", "te2": "text_encoder_2"}  # `unet` stands for any denoiser


@dataclass(frozen=True)
class Weighting:
    """Strengths by part, and on top of them by block and by pattern, inside a window of steps; `str` gives what was typed."""

    parts: Mapping[str, Strength]
    blocks: str = ""  # as typed behind lbw=
    patterns: tuple[tuple[str, float], ...] = ()
    window: Window = ALWAYS

    def __str__(self) -> str:
        unet, te, te2 = (self.parts[part] for part in PARTS.values())
        if te == te2:
            pieces = [strength_text(unet)] if unet == te else [strength_text(unet), strength_text(te)]
        else:
            pieces = [f"{name}={strength_text(self.parts[part])}" for name, part in PARTS.items()]
        return ":".join([*pieces, *([self.inside] if self.inside else [])])

    def without(self, parts: Iterable[str]) -> Weighting:
        """The same with nothing of some parts."""
        return replace(self, parts={**self.parts, **dict.fromkeys(parts, 0.0)})

    @property
    def inside(self) -> str:
        """What is said of blocks, patterns and steps; "" for nothing."""
        blocks = [f"lbw={self.blocks}"] if self.blocks else []
        patterns = [f"{pattern}={number(weight)}" for pattern, weight in self.patterns]
        return ":".join([*blocks, *patterns, *filter(None, [str(self.window)])])

    @property
    def moves(self) -> bool:
        """Whether it may differ from step to step."""
        return self.window != ALWAYS or any(isinstance(value, Curve) for value in self.parts.values())

    def levels(self, step: int, steps: int) -> dict[str, float]:
        """The strength of each part at a step of 0 .. steps - 1."""
        on = self.window.open(step, steps)
        return {part: level(value, step, steps) if on else 0.0 for part, value in self.parts.items()}

    def at(self, step: int, steps: int) -> Weighting:
        """What it is at a step: numbers only."""
        return replace(self, parts=self.levels(step, steps), window=ALWAYS)

    @property
    def shape(self) -> Weighting:
        """Blocks and patterns alone, with every part at 1."""
        return replace(self, parts=dict.fromkeys(self.parts, 1.0), window=ALWAYS)

    def of(self, paths: Iterable[str], family: Family | None) -> dict[str, float]:
        """Path => strength. Raises AdapterError for blocks that the family does not have, patterns that match nothing, and
        strengths that change from step to step."""
        paths = list(paths)
        table = blocks(self.blocks, family) if self.blocks else {}
        found = {path: self._constant(part_of(path)) for path in paths}
        for path in found if table and family else ():
            found[path] *= table[block_of(family, path)]  # type: ignore[arg-type]
        for pattern, weight in self.patterns:
            matched = [path for path in paths if fnmatchcase(path, pattern)]
            if not matched:
                raise AdapterError(f"the pattern {pattern} matches no layer", f"a layer is called {paths[0]}" if paths else "")
            found |= {path: found[path] * weight for path in matched}
        return found

    def _constant(self, part: str) -> float:
        value = self.parts[part]
        if isinstance(value, Curve) or self.window != ALWAYS:
            raise AdapterError(f"{self} changes from step to step, and here are no steps", "schedules are for drawing: generate")
        return value


WHOLE = Weighting(dict.fromkeys(family_names.PARTS, 1.0))


def split(text: str) -> tuple[str, Weighting]:
    r"""A path and how much of it. Drive letters and colons in names are left alone.

    >>> path, weighting = split(r"C:\rex.safetensors:0.8:lbw=OUTD")
    >>> path, str(weighting)
    ('C:\\rex.safetensors', '0.8:lbw=OUTD')
    """
    match = SUFFIX.fullmatch(text)
    if not match or os.path.exists(text):
        return text, WHOLE
    try:
        return match["path"], read(match["rest"].split(":")[1:])
    except AdapterError as error:
        raise AdapterError(f"{error.what} in {text}", error.hint) from error


def read(pieces: Sequence[str], text_first: bool = False) -> Weighting:
    """What stands between colons, as a weighting. A second bare strength is the text encoders', or with `text_first`, as in
    A1111's prompts, the UNet's. Raises AdapterError for what is none.

    >>> str(read(["0.5", "1@0,0@1", "stop=10"], text_first=True))
    '1@0,0@1:0.5:stop=10'
    """
    bare: list[Strength] = []
    named: dict[str, Strength] = {}
    patterns: dict[str, float] = {}
    spelled, ends = "", {"start": ALWAYS.start, "stop": ALWAYS.stop}
    for piece in pieces:
        if not (match := PIECE.fullmatch(piece)):
            raise AdapterError(f"{piece!r} says no strength", "e.g. 0.8, te=0.5, lbw=OUTD, start=5, stop=0.5, 0@0,1@0.5")
        if match["bare"]:
            bare.append(strength(piece))
        elif match["part"]:
            named[PARTS[match["part"].lower()]] = strength(match["strength"])
        elif match["pattern"]:
            patterns[match["pattern"]] = float(match["weight"])
        elif match["end"]:
            ends[match["end"].lower()] = float(match["position"])
        elif match["first"]:
            ends = {"start": float(match["first"]), "stop": float(match["last"])}
        else:
            spelled = match["blocks"]
    return Weighting(by_part(bare, named, text_first), spelled, tuple(patterns.items()), Window(**ends))


def by_part(bare: Sequence[Strength], named: Mapping[str, Strength], text_first: bool = False) -> dict[str, Strength]:
    """Strengths without and with a part's name => one per part. In A1111's prompts a name may correct a bare one."""
    if len(bare) > 2 or (bare and named and not text_first):
        raise AdapterError("too many strengths", "write PATH:BOTH, PATH:UNET:TEXT or PATH:unet=0.8:te=0.5")
    if text_first:
        te = named.get("text_encoder", bare[0] if bare else 1.0)
        unet = named.get(PARTS["unet"], bare[1] if len(bare) > 1 else te)
    else:
        unet, te = (bare[0], bare[-1]) if bare else (named.get(PARTS["unet"], 1.0), named.get("text_encoder", 1.0))
    return every_part({PARTS["unet"]: unet, "text_encoder": te, "text_encoder_2": named.get("text_encoder_2", te)})


def every_part(named: Mapping[str, S]) -> dict[str, S | float]:
    """A strength for every part of any family. Denoisers that are not named go by the one that is, text encoders beyond the
    second by the first; what nothing is said of counts 1."""
    denoiser = next((named[part] for part in DENOISERS if part in named), 1.0)
    others = {part: named.get("text_encoder" if part not in PARTS.values() else part, 1.0) for part in TEXT_PARTS}
    return {**dict.fromkeys(DENOISERS, denoiser), **others, **named}
