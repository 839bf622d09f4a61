"""Where each parameter of a model lies in a single-file checkpoint, as LDM's and SGM's tools write them and sites offer them.

Generated forward from the family's row, like every other name in this package. Paths name parameters: `unet.conv_in` is the
weight, `unet.conv_in.bias` the bias, and norms and embedding tables are there too. Text encoders that were trained with
OpenCLIP (SD2's, and bigG of SDXL) keep q, k and v in one tensor, and the text projection as x @ W.
The VAE has no canonical paths: nothing in this package changes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from . import names as keys
from .names import Family, Text

UNET = "model.diffusion_model."
# What a text encoder's keys begin with, by family and part, and whether OpenCLIP named them; SD1's is everyone else's.
_PREFIXES = {
    ("sd2", "text_encoder"): ("cond_stage_model.model.", True),
    ("sdxl", "text_encoder"): ("conditioner.embedders.0.transformer.", False),
    ("sdxl", "text_encoder_2"): ("conditioner.embedders.1.model.", True),
    ("sdxl-refiner", "text_encoder_2"): ("conditioner.embedders.0.model.", True),
}
_SD1 = ("cond_stage_model.transformer.", False)

_EMBEDDINGS = ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding")
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPENCLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPENCLIP_TOP = {
    "text_model.embeddings.token_embedding": "token_embedding.weight",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_model.final_layer_norm": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class Address:
    """Where a parameter lies: under which key, in which rows of that tensor (None is all of it), and whether as its transpose."""

    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


@cache
def addresses(family: Family) -> Mapping[str, Address]:
    """Canonical path of every parameter of the UNet and the text encoders => its address in a single file."""
    names, texts = keys.ldm_names(family), {text.part: text for text in family.texts}
    tables = [f"{part}.{name}" for part in texts for name in _EMBEDDINGS]
    return {path: _address(family, path, names, texts) for path in (*keys.weights(family), *tables)}


@cache
def parameters_at(family: Family) -> Mapping[str, tuple[str, ...]]:
    """The way back: a single file's key => the paths of the parameters in it, one or (q, k, v) three."""
    table: dict[str, tuple[str, ...]] = {}
    for path, address in addresses(family).items():
        table[address.key] = (*table.get(address.key, ()), path)
    return table


def text_prefix(family: Family, part: str) -> tuple[str, bool]:
    """What the keys of a text encoder begin with, and whether OpenCLIP named what follows."""
    return _PREFIXES.get((family.name, part), _SD1)


def _address(family: Family, path: str, names: Mapping[str, str], texts: Mapping[str, Text]) -> Address:
    module, kind = _split(path)
    part, _, rest = path.partition(".")
    if part == "unet":
        return Address(f"{UNET}{names[module]}.{kind}")
    prefix, openclip = text_prefix(family, part)
    return _openclip(rest, texts[part], prefix) if openclip else Address(prefix + ".".join(_split(rest)))


def _openclip(rest: str, text: Text, prefix: str) -> Address:
    if rest == "text_projection":
        return Address(f"{prefix}text_projection", transposed=True)
    if rest in _OPENCLIP_TOP:
        return Address(prefix + _OPENCLIP_TOP[rest])
    module, kind = _split(rest)
    number, _, leaf = module.removeprefix("text_model.encoder.layers.").partition(".")
    block = f"{prefix}transformer.resblocks.{number}."
    if leaf in _FUSED:
        start = _FUSED.index(leaf) * text.width
        return Address(f"{block}attn.in_proj_{kind}", (start, start + text.width))
    return Address(f"{block}{_OPENCLIP[leaf]}.{kind}")


def _split(path: str) -> tuple[str, str]:
    """A parameter's layer, and what it is there."""
    return (path.removesuffix(".bias"), "bias") if path.endswith(".bias") else (path, "weight")
