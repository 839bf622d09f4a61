"""A base in one .safetensors file, as model sites offer them: LDM's names, everything in it but tokenizer and configs.

Tensors are mapped from the file and, where they have the dtype that is asked for already, never copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import BaseModelError
from ..families import names as keys
from ..families.checkpoint import open_weights
from ..families.family import Family, Network, addresses
from ..families.noise import ZERO_SNR
from ..formats.checkpoint import Weights
from ..formats.header import Address, Header
from .loaded import Loaded, Unfilled, build, check_family
from .vae import PREFIX, other_vae

SPREAD = (
    0.09  # of a norm's biases (Family.telling): models of velocity are above it, of epsilon below (ComfyUI tells them so too)
)


def load_single(path: Path, dtype: torch.dtype, vae: Path | None = None) -> Loaded:
    """Read a single file. Raises BaseModelError, which names what is missing or does not fit.

    The VAE may come from another file or folder: many checkpoints have none, and SDXL's own overflows in fp16.
    """
    weights = open_whole(path)
    family, header = weights.row, weights.headers[0]
    assert family
    scheduler = scheduler_config(weights, header, family)
    tokenizers = {text.part: text.own_tokenizer() for text in family.texts}
    with safe_open(path, "pt") as file:
        models: dict[str, Any] = {row.part: _model(row, weights, file, dtype) for row in family.networks}
    denoiser = models.pop(family.denoiser.part)
    if family.velocity_side and scheduler["prediction_type"] == "v_prediction":
        denoiser.register_to_config(sample_size=family.velocity_side)
    return Loaded(
        family,
        scheduler,
        tokenizers,
        denoiser,
        other_vae(vae or path, family, dtype),
        models,
        stored=_stored_bytes(weights, header),
    )


def open_whole(path: Path) -> Weights:
    """A file that holds every part of a family but the VAE. Reads the header alone. Raises BaseModelError."""
    weights = open_weights(path)
    if weights.row is None or not any(place.address.key.startswith("model.") for place in weights.places.values()):
        raise BaseModelError(f"{path} holds {' and '.join(weights.parts)} alone", "take the full checkpoint, not a part of it")
    shapes = {key: entry.shape for key, entry in weights.headers[0].tensors.items()}
    check_family(path, weights.row, weights.row.denoiser.reads(shapes) - weights.row.denoiser.latent)
    check_whole(weights, weights.row)
    return weights


def check_whole(weights: Weights, family: Family) -> None:
    """Raise BaseModelError unless every weight of the family is there, in its shape; names the part and one key."""
    known = keys.weights(family)
    for part in (row.part for row in family.networks):
        table = {path: at for path, at in addresses(family).items() if keys.part_of(path) == part}
        lost = [at.key for path, at in table.items() if path not in weights.places]
        if len(lost) == len(table):
            raise BaseModelError(
                f"{weights.path} has no {part}: none of its {len(table)} weights",
                "take the full checkpoint, not a part of it",
            )
        if lost:
            raise BaseModelError(
                f"the {part} of {weights.path} lacks {len(lost)} weights, {lost[0]} for one", "download it again"
            )
        wrong = [path for path in table if path in known and not keys.same(weights.shape(path), known[path])]
        if wrong:
            here, there = list(weights.shape(wrong[0])), list(known[wrong[0]])
            raise BaseModelError(
                f"the {part} of {weights.path} does not fit: {table[wrong[0]].key} is {here}, and {family.name} has {there}",
                f"{len(wrong)} weights differ",
            )


def _model(row: Network, weights: Weights, file: Any, dtype: torch.dtype) -> nn.Module:
    """One part, built without memory and filled from the file."""
    paths = [path for path in addresses(weights.row) if keys.part_of(path) == row.part]
    model = _empty(row, weights)
    state = {}
    for path in paths:
        own = keys.native(path, {row.part: model})[1]
        name = own if own.endswith(".bias") else f"{own}.weight"
        state[name] = _tensor(file, weights.places[path].address).to(dtype)
    want = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = {name: tensor.reshape(want[name]) for name, tensor in state.items()}  # 1x1 convolutions are linear layers to some
    model.load_state_dict(state, assign=True)
    return model


def _empty(row: Network, weights: Weights) -> nn.Module:
    family: Family = weights.row
    with torch.device("meta"), Unfilled():
        if row is family.denoiser:
            return build(row, family.denoiser.config(family.texts))
        tokens = weights.shape(f"{row.part}.{row.tables()[0]}")[0]
        return build(row, next(text for text in family.texts if text is row).config(tokens))


def _tensor(file: Any, address: Address) -> Tensor:
    """A parameter, still in the file."""
    whole: Tensor = file.get_tensor(address.key)
    one = whole if address.rows is None else whole[slice(*address.rows)]
    return one.T.contiguous() if address.transposed else one


def scheduler_config(weights: Weights, header: Header, family: Family) -> dict[str, Any]:
    """The noise schedule of a single file: what it says of itself, else what its weights tell."""
    said = f"{header.metadata.get('modelspec.prediction_type', '')} {header.metadata.get('modelspec.architecture', '')}".lower()
    velocity = "v_pred" in header.tensors or said.startswith(("v ", "v_pred", "v-pred")) or "768-v" in said
    if family.telling in weights and not said.strip():
        velocity = velocity or float(weights[family.telling].float().std()) > SPREAD
    zero = ZERO_SNR if "ztsnr" in header.tensors else {}
    return dict(family.scheduler) | zero | {"prediction_type": "v_prediction" if velocity else "epsilon"}


def _stored_bytes(weights: Weights, header: Header) -> dict[str, dict[str, int]]:
    """Bytes on the disk by part and dtype."""
    parts: dict[str, dict[str, int]] = {}
    for path, place in weights.places.items():
        mine = parts.setdefault(keys.part_of(path), {})
        entry = place.entry
        mine[entry.dtype] = mine.get(entry.dtype, 0) + entry.end - entry.start
    vae = parts.setdefault("vae", {})
    for key, entry in header.tensors.items():
        if key.startswith(PREFIX):
            vae[entry.dtype] = vae.get(entry.dtype, 0) + entry.end - entry.start
    return parts
