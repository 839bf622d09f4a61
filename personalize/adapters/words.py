"""Vectors that stand for words, by the keys of a file: alone (a textual inversion), or inside an adapter. No torch.

alone    `emb_params` (A1111, kohya, OneTrainer: SD 1 and 2), `clip_l` and `clip_g` (SDXL), also `t5` (SD 3), `text_encoders_0`
         and `text_encoders_1` (diffusers' advanced scripts of 2023), `string_to_param` (converted A1111 pickles), or one tensor
         under the word itself, or any name (diffusers: `learned_embeds.safetensors`, a file for each text encoder)
inside   `bundle_emb.WORD.KEY`, KEY as above (A1111 1.7, OneTrainer)

A width tells the text encoder where the key does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..families.family import Family
from ..families.names import FAMILIES, says
from ..formats.header import Entry
from . import kinds

KEYS = {  # key => the text encoder whose vectors it holds; "": the width tells
    **dict.fromkeys(("emb_params", "string_to_param", "*"), ""),
    **dict.fromkeys(("clip_l", "text_encoders_0"), "text_encoder"),
    **dict.fromkeys(("clip_g", "text_encoders_1"), "text_encoder_2"),
    **dict.fromkeys(("t5", "t5xxl", "text_encoders_2"), "text_encoder_3"),
}
BUNDLE = "bundle_emb"
_WIDTHS = {1280: "text_encoder_2", 4096: "text_encoder_3"}  # of CLIP bigG and of T5; other widths are a first encoder's
_ALL_WIDTHS = {row.width for family in FAMILIES for row in family.texts}
_FLOATS = ("F64", "F32", "F16", "BF16")
_ENDINGS = rf"string_to_param\.[^.]+|(?:{'|'.join(map(re.escape, KEYS))})(?:_out)?"
_INSIDE = re.compile(rf"{BUNDLE}\.(?:(?P<word>.+?)\.(?P<key>{_ENDINGS})|(?P<first>[^.]+)\.(?P<rest>.+))")


def vectors_in(tensors: Mapping[str, Entry]) -> dict[str, str]:
    """Text encoder => the key of its vectors, of a file that is a textual inversion; empty for another file. Whether their shapes
    are sound is another question."""
    own = {key: entry for key, entry in tensors.items() if not key.startswith("string_to_token")}  # a token's number
    known = {key: KEYS[name] for key in own if (name := key.removeprefix("string_to_param.")) in KEYS}
    if not known and len(own) == 1 and _may_be_a_word(*next(iter(own.items()))):
        known = dict.fromkeys(own, "")
    parts = {key: part or _WIDTHS.get((own[key].shape or (0,))[-1], "text_encoder") for key, part in known.items()}
    whole = known.keys() == own.keys() and len(set(parts.values())) == len(parts)
    return {part: key for key, part in parts.items()} if whole else {}


def families_of_vectors(tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[Family, ...]:
    """Every family whose text encoders are as wide as the vectors of a textual inversion; of several, what its file says."""
    widths = {part: (tensors[key].shape or (0,))[-1] for part, key in vectors_in(tensors).items()}
    fit = tuple(family for family in FAMILIES if widths and {row.part: row.width for row in family.texts} == widths)
    return tuple(family for family in fit if says(metadata, family)) or fit


def _may_be_a_word(key: str, entry: Entry) -> bool:
    """Whether a lone tensor is as wide as a text encoder, and no tensor of an adapter or a model by its name."""
    named = key.isprintable() and not key.endswith((".weight", *(f".{role}" for role in kinds.roles())))
    return named and len(entry.shape) in (1, 2) and entry.shape[-1] in _ALL_WIDTHS and entry.dtype in _FLOATS


def words_in(keys: Mapping[str, Entry]) -> dict[str, dict[str, str]]:
    """Word => key of its vectors => key in the file, of the words inside an adapter's file."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        if match := _INSIDE.fullmatch(key):
            word, own = (match["word"], match["key"]) if match["word"] else (match["first"], match["rest"])
            found.setdefault(word, {})[own] = key
    return found


def key_inside(word: str, key: str) -> str:
    """The key of a word's vectors inside an adapter's file."""
    return f"{BUNDLE}.{word}.{key}"
