"""Sound files of every kind and dialect, small enough to be broken twenty thousand times: what the fuzzer starts from."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from personalize.families import names as keys
from personalize.families.family import addresses
from personalize.formats.header import ITEM_SIZES

Shape = tuple[int, ...]
CODES = {"F64": "d", "F32": "f", "F16": "e"}
FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    dtype: str
    shape: Shape
    data: bytes


@dataclass
class Draft:
    """A file before it is written. `hole` is how many zeros follow that are never kept in memory."""

    tensors: dict[str, Stored]
    metadata: Any = field(default_factory=dict)
    kind: str = ""
    hole: int = 0

    def header(self) -> dict[str, Any]:
        table: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata != {} else {}
        end = 0
        for key, one in self.tensors.items():
            start, end = end, end + size_of(one.dtype, one.shape)
            table[key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [start, end]}
        return table

    def data(self) -> bytes:
        return b"".join(one.data for one in self.tensors.values())


def size_of(dtype: str, shape: Shape) -> int:
    return math.prod(shape) * ITEM_SIZES[dtype]


def pack(header: object, data: bytes) -> bytes:
    """The bytes of a file, whatever its header says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "replace")
    return len(raw).to_bytes(8, "little") + raw + data


def make_tensor(draw: random.Random, dtype: str, shape: Shape) -> Stored:
    """A tensor of small numbers, with a handful of values over and over: it is quickly made."""
    some = [draw.uniform(-1, 1) for _ in range(7)]
    if dtype in CODES:
        raw = b"".join(struct.pack(f"<{CODES[dtype]}", one) for one in some)
    else:
        raw = b"".join(struct.pack("<f", one)[4 - ITEM_SIZES[dtype] :] for one in some) if dtype in FLOATS else bytes(range(56))
    if dtype.startswith("F8"):
        raw = bytes(byte & 0xBF for byte in raw)  # no NaN
    size = size_of(dtype, shape)
    return Stored(dtype, shape, (raw * (size // len(raw) + 1))[:size])


def number(value: float, dtype: str = "F32", shape: Shape = ()) -> Stored:
    """A tensor of one number over and over; infinite where the dtype cannot hold it."""
    if dtype == "I64":
        raw = struct.pack("<q", int(value))
    else:
        limit = {"F32": 3e38, "F16": 65504.0}.get(dtype, math.inf)
        raw = struct.pack(f"<{CODES[dtype]}", math.copysign(math.inf, value) if abs(value) > limit else value)
    return Stored(dtype, shape, raw * math.prod(shape))


# ---------------------------------------------------------------- kinds

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1")
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
CONV = "lora_unet_conv_in"
SIZES = (4, 6, 8, 12)

Shapes = Mapping[str, Shape]
Roles = Callable[[int, int, int, Shape], Shapes]  # out, in, rank, kernel => role => shape


def _half(name: str, o: int, i: int, r: int, k: Shape) -> Shapes:
    return {f"{name}_a": (o, r), f"{name}_b": (r, i * math.prod(k))}


KINDS: Mapping[str, Roles] = {
    "LoRA": lambda o, i, r, k: {"lora_up.weight": (o, r, *[1] * len(k)), "lora_down.weight": (r, i, *k)},
    "Tucker": lambda o, i, r, k: {
        "lora_up.weight": (o, r, 1, 1),
        "lora_down.weight": (r, i, 1, 1),
        "lora_mid.weight": (r, r, 3, 3),
    },
    "LoHa": lambda o, i, r, k: {**_half("hada_w1", o, i, r, k), **_half("hada_w2", o, i, r, k)},
    "LoHa Tucker": lambda o, i, r, k: {
        **{f"hada_w{n}_{side}": (r, o if side == "a" else i) for n in (1, 2) for side in "ab"},
        **{f"hada_t{n}": (r, r, 3, 3) for n in (1, 2)},
    },
    "LoKr": lambda o, i, r, k: {"lokr_w1": (2, 2), **_half("lokr_w2", o // 2, i // 2, r, k)},
    "LoKr whole": lambda o, i, r, k: {"lokr_w1": (2, 2), "lokr_w2": (o // 2, i // 2, *k)},
    "LoKr both": lambda o, i, r, k: {**_half("lokr_w1", 2, 2, 1, ()), **_half("lokr_w2", o // 2, i // 2, r, k)},
    "LoKr Tucker": lambda o, i, r, k: {
        **{"lokr_w1": (2, 2), "lokr_w2_a": (r, o // 2), "lokr_w2_b": (r, i // 2), "lokr_t2": (r, r, 3, 3)}
    },
    "OFT": lambda o, i, r, k: {"oft_blocks": (o // 2, 2, 2)},
    "BOFT": lambda o, i, r, k: {"oft_blocks": (1 if o % 4 else 2, o // 2, 2, 2), "rescale": (o, 1)},
    "GLoRA": lambda o, i, r, k: {"a1.weight": (i, r), "a2.weight": (r, i), "b1.weight": (o, r), "b2.weight": (r, i)},
    "IA3": lambda o, i, r, k: {"weight": (i, 1), "on_input": ()},
    "full": lambda o, i, r, k: {"diff": (o, i, *k), "diff_b": (o,)},
    "norm": lambda o, i, r, k: {"w_norm": (o,), "b_norm": (o,)},
    "DoRA": lambda o, i, r, k: {
        **{"lora_up.weight": (o, r, *[1] * len(k)), "lora_down.weight": (r, i, *k)},
        "dora_scale": (1, i, *[1] * len(k)),
    },
    "DoRA rows": lambda o, i, r, k: {**_half("hada_w1", o, i, r, ()), **_half("hada_w2", o, i, r, ()), "dora_scale": (o, 1)},
}
CONVOLUTIONS = ("Tucker", "LoHa Tucker", "LoKr Tucker")
UNSCALED = ("IA3", "full", "norm")


def kohya(draw: random.Random, kind: str) -> Draft:
    """Two modules of a kind, in the names of kohya's tools."""
    tensors: dict[str, Stored] = {}
    dtype = draw.choice(FLOATS)
    for name in (NORM,) if kind == "norm" else (CONV,) if kind in CONVOLUTIONS else draw.choice([LINEAR, (LINEAR[0], CONV)]):
        kernel = (3, 3) if name == CONV and kind not in ("DoRA rows", "GLoRA") else ()
        roles = KINDS[kind](draw.choice(SIZES), draw.choice(SIZES), draw.randrange(1, 4), kernel)
        for role, shape in roles.items():
            tensors[f"{name}.{role}"] = number(1, "I64") if role == "on_input" else make_tensor(draw, dtype, shape)
        if kind not in UNSCALED and draw.random() < 0.8:
            tensors[f"{name}.alpha"] = number(2.0)
    said = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_base_model_version": "sd_v1-5", "modelspec.title": "rex"}
    return Draft(tensors, draw.choice([{}, said, said | {"ss_tag_frequency": '{"1_rex": {"rex": 4, "dog": 2}}'}]), kind)


def diffusers_draft(draw: random.Random, dialect: str) -> Draft:
    """LoRA in the names of diffusers or peft, with a LoraConfig."""
    tensors: dict[str, Stored] = {}
    part = "base_model.model." if dialect == "peft" else "unet."
    kind = draw.choice(["LoRA", "LoRA", "DoRA", "old", "LoKr"])
    for leaf in ("attn1.to_q", "attn2.to_out.0"):
        stem, (o, i, r) = f"{part}{BLOCK}.{leaf}", (draw.choice(SIZES), draw.choice(SIZES), draw.randrange(1, 4))
        roles: dict[str, Shape]
        if kind == "LoKr":
            roles = {"lokr_w1": (2, 2), "lokr_w2_a": (o, r), "lokr_w2_b": (r, i)}
        elif kind == "old":
            roles = {"lora.up.weight": (o, r), "lora.down.weight": (r, i)}
        else:
            roles = {"lora_B.weight": (o, r), "lora_A.weight": (r, i)} | (
                {"lora_magnitude_vector": (o,)} if kind == "DoRA" else {}
            )
        tensors |= {f"{stem}.{role}": make_tensor(draw, "F32", shape) for role, shape in roles.items()}
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"attn1.to_q": 5}, "use_rslora": True}
    flat = {f"unet.{key}": value for key, value in config.items()}
    return Draft(tensors, draw.choice([{}, {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}]), f"{dialect} {kind}")


def embedding(draw: random.Random) -> Draft:
    """A textual inversion."""
    names = draw.choice([("emb_params",), ("clip_l", "clip_g"), ("<rex>",)])
    return Draft(
        {name: make_tensor(draw, draw.choice(FLOATS), (2, 8 * (i + 1))) for i, name in enumerate(names)}, {}, "embedding"
    )


@cache
def _layout() -> tuple[tuple[str, Shape], ...]:
    """Key and shape of every parameter of pocket's UNet in a single file."""
    row = next(family for family in keys.FAMILIES if family.name == "pocket")
    homes = addresses(row)
    return tuple((homes[path].key, shape) for path, shape in keys.weights(row).items() if path.startswith("unet."))


def checkpoint(draw: random.Random) -> Draft:
    """A whole single-file checkpoint, all zeros, which are a hole in the file."""
    dtype = draw.choice(FLOATS)
    tensors = {key: Stored(dtype, shape, b"") for key, shape in _layout()}
    return Draft(tensors, {}, "checkpoint", sum(size_of(dtype, shape) for _, shape in _layout()))


def part_file(draw: random.Random) -> Draft:
    """A part of a diffusers folder, of no known family."""
    leaves = {"conv_in.weight": (4, 4, 3, 3), "conv_in.bias": (4,), f"{BLOCK}.attn1.to_q.weight": (8, 8)}
    return Draft(
        {key: make_tensor(draw, draw.choice(FLOATS), shape) for key, shape in leaves.items()}, {"format": "pt"}, "folder"
    )


def drafts(draw: random.Random) -> Draft:
    """One sound file of any sort."""
    sort = draw.random()
    if sort < 0.66:
        return kohya(draw, draw.choice(list(KINDS)))
    if sort < 0.82:
        return diffusers_draft(draw, draw.choice(["diffusers", "peft"]))
    return (embedding if sort < 0.9 else part_file if sort < 0.98 else checkpoint)(draw)


def write_file(path: Path, raw: bytes, hole: int = 0) -> Path:
    """A file of these bytes and as many zeros; under a folder's path, its UNet or its index of shards is meant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + hole)
    return path


def every(draw: random.Random) -> Iterator[Draft]:
    """One sound file of each sort, none left out."""
    yield from (kohya(draw, kind) for kind in KINDS)
    yield from (diffusers_draft(draw, dialect) for dialect in ("diffusers", "peft") for _ in range(8))
    yield from (make(draw) for make in (embedding, embedding, part_file, checkpoint))
