"""Which family a model is of, from its config or from a single file's keys and shapes alone, whatever its widths.

Names say nothing: pruned, distilled and tiny models are read like the ones they are made after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from ..formats.shapes import Shape
from . import names as keys
from .clip import Clip, side_by_side
from .family import Denoiser, Family
from .unet import UNet

# What a checkpoint that is none of ours has, and what it is.
STRANGERS = {
    "joint_blocks.0.": "Stable Diffusion 3",
    "double_blocks.0.": "Flux",
    "edm_mean": "a Playground model with EDM noise",
    "effnet_mapper": "Stable Cascade",
    "transformer_blocks.0.attn1.to_q_a": "an unknown transformer",
}


def detect(config: Mapping[str, Any], texts: Iterable[str] = ("text_encoder",), part: str = keys.DENOISERS[0]) -> Family:
    """The family of a denoiser's config, such as `unet/config.json`, and the parts that are text encoders.

    Text encoders that a family can go without are in it only if they are among `texts`. A denoiser of another structure is of
    the family "unknown".
    """
    texts = list(texts)
    for kind in _kinds(part):
        try:
            row = kind.from_config(config)
        except (KeyError, TypeError, ValueError):
            continue
        if family := _nearest(row, texts):
            return replace(family, texts=kept) if (kept := _there(family, texts)) != family.texts else family
    return _unknown(config, texts)


def family_in(shapes: Mapping[str, Shape]) -> Family | None:
    """The family of a single file's tensors (key => shape): a known row, or one with this file's own numbers; None for others."""
    for kind in (kind for part in keys.DENOISERS for kind in _kinds(part)):
        if row := kind.recognise(shapes):
            known = [family for family in keys.FAMILIES if family.denoiser == row]
            return known[0] if known else next(_families_with_sizes(row, shapes), None)
    return None


def stranger_in(shapes: Mapping[str, Shape]) -> str:
    """What a model is that this package does not know, as the end of a sentence; "" if it cannot tell."""
    return next((f": it is {name}" for mark, name in STRANGERS.items() if any(mark in key for key in shapes)), "")


def refusal(family: Family, beside: int) -> str:
    """Why a model of a family, reading `beside` more channels than noisy latents have, can neither be trained nor drawn with;
    "" if it can."""
    if beside > 0:
        return family.denoiser.beside(beside, family.title)
    return f"the {family.title}, which {family.refused}" if family.refused else ""


def _kinds(part: str) -> dict[type[Denoiser], None]:
    """The kinds of denoisers that pipelines keep there."""
    return dict.fromkeys(type(family.denoiser) for family in keys.FAMILIES if family.denoiser.part == part)


def _nearest(row: Denoiser, texts: Iterable[str]) -> Family | None:
    """The family of a denoiser: one with just its numbers, else one of its structure that listens to these text encoders."""
    if known := [family for family in keys.FAMILIES if family.denoiser == row]:
        return known[0]
    alike = [family for family in _alike(row) if family.texts[0].part in texts] or list(_alike(row))[-1:]
    return replace(alike[0], denoiser=_copy_numbers(alike[0].denoiser, row)) if alike else None


def _alike(row: Denoiser) -> Iterator[Family]:
    for family in keys.FAMILIES:
        if family.kin and type(family.denoiser) is type(row) and family.denoiser.structure == row.structure:
            yield family


def _families_with_sizes(row: Denoiser, shapes: Mapping[str, Shape]) -> Iterator[Family]:
    """Families of a denoiser's structure that find all of their text encoders in a single file, with its numbers."""
    for family in _alike(row):
        found = [(text, text.recognise(shapes)) for text in family.texts]
        if all(own or text.optional for text, own in found):
            texts = tuple(own for _, own in found if own)
            yield replace(family, denoiser=_copy_numbers(family.denoiser, row), texts=texts)


def _copy_numbers(row: Any, numbers: Any) -> Any:
    """A row with another's numbers; what no weight tells is its own."""
    return replace(row, **{one.name: getattr(numbers, one.name) for one in fields(row) if one.compare})


def _there(family: Family, texts: list[str]) -> tuple[Any, ...]:
    return tuple(row for row in family.texts if row.part in texts or not row.optional)


def _unknown(config: Mapping[str, Any], texts: list[str]) -> Family:
    """What is loaded as a UNet beside CLIP's text encoders, of a structure that no row can tell."""
    channels, added = config.get("block_out_channels") or (), config.get("projection_class_embeddings_input_dim") or 0
    unet = UNet(tuple(channels), (), 0, 0, added=added if config.get("addition_embed_type") == "text_time" else 0)
    layer, normed = (2, False) if unet.sized else (1, True)
    rows = (Clip(0, 0, part=part, projection=part != "text_encoder", layer=layer, normed=normed) for part in texts)
    return Family("unknown", "unknown", unet, tuple(rows), side_by_side)
