"""Two adapters of a family's full size to compute with, and what should come of it: dense, in fp64, by other code than ours."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import LowRank
from personalize.adapters.ops import linalg
from personalize.errors import RecipeError, nearest
from personalize.families import names as keys
from personalize.families.clip import Clip
from personalize.families.family import Family
from personalize.families.unet import UNet
from personalize.formats.tensors import write_tensors

WEIGHTS = (0.7, 0.5)  # of both adapters in every merge
LAYERS = {"unet": ".attentions.", "text_encoder": ".layers.", "text_encoder_2": ".layers."}


def family(name: str) -> Family:
    """The row of this name. Raises RecipeError if there is none."""
    known = {row.name: row for row in keys.FAMILIES}
    if name not in known:
        raise RecipeError(f"no family is called {name!r}", nearest(name, known))
    return known[name]


def narrow(row: Family) -> Family:
    """Every layer of a family, in a tenth of the widths or less: its step launches the operations of the true one."""
    own = row.denoiser
    assert isinstance(own, UNet)
    texts = tuple(replace(text, width=64, layer_count=2) for text in row.texts if isinstance(text, Clip))
    added = 64 + 6 * 16 if own.added else 0  # the pooled text, and six numbers about sizes
    channels = tuple(width // 10 for width in own.channels)
    return replace(row, denoiser=replace(own, channels=channels, context=64 * len(texts), added=added, heads=2), texts=texts)


def small(row: Family) -> Family:
    """A family's structure in widths of next to nothing, and at most one transformer layer at each level."""
    thin = narrow(row)
    assert isinstance(thin.denoiser, UNet)
    depth, channels = tuple(min(depth, 1) for depth in thin.denoiser.depth), (32, *[64] * (len(thin.denoiser.channels) - 1))
    return replace(thin, denoiser=replace(thin.denoiser, channels=channels, depth=depth, middle=1, heads=0))


# ---------------------------------------------------------------- layers


@cache
def targets(row: Family) -> Mapping[str, keys.Shape]:
    """What kohya's trainer targets by default, by its names: attention with feed-forward and projections; of text all blocks."""
    names = keys.kohya_names(row)
    layers = keys.modules(row).items()
    return {names[path]: shape for path, shape in layers if LAYERS[keys.part_of(path)] in path}


def spread(shapes: Mapping[str, keys.Shape], count: int) -> list[str]:
    """`count` of these layers, at even steps in order of size, so that every size has its share.

    >>> spread({"a": (1, 1), "b": (2, 2), "c": (3, 3), "d": (4, 4)}, 2)
    ['b', 'd']
    """
    ordered = sorted(shapes, key=lambda name: (math.prod(shapes[name]), name))
    count = min(count, len(ordered))
    return sorted(ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count))


# ---------------------------------------------------------------- files


def write_pair(folder: Path, row: Family, rank: int, seed: int) -> tuple[Path, Path]:
    """Two fp16 files as kohya's trainer writes them, of all its targets. The alphas differ: half the rank, and the rank."""
    files = tuple(folder / f"{row.name}-{rank}-{seed}-{letter}.safetensors" for letter in "ab")
    for i, file in enumerate(files):
        if not file.is_file():
            tensors: dict[str, Tensor] = {}
            for name, shape in targets(row).items():
                tensors |= _factors(name, shape, rank, f"{seed} {i} {name}", rank / (2 - i))
            write_tensors(file, tensors, {"ss_base_model_version": row.base_version})
    return files[0], files[1]


def _factors(name: str, shape: keys.Shape, rank: int, seed: str, alpha: float) -> dict[str, Tensor]:
    """Two factors of random directions; the singular values of dW fall about as 1, 1/2, 1/3, ..., as trained ones do."""
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    out, inside = linalg.sides(shape)
    root = (rank / alpha / torch.arange(1, rank + 1)).sqrt()
    up = torch.randn(out, rank, generator=draw) / math.sqrt(out) * root
    down = root[:, None] * torch.randn(rank, inside, generator=draw) / math.sqrt(inside)
    ones = [1] * len(shape[2:])
    return {
        f"{name}.lora_up.weight": up.reshape(out, rank, *ones).half(),
        f"{name}.lora_down.weight": down.reshape(rank, *shape[1:]).half(),
        f"{name}.alpha": torch.tensor(alpha).half(),
    }


def write_sample(file: Path, to: Path, names: Iterable[str]) -> Path:
    """The same file with these layers only."""
    wanted = set(names)
    kept = {key: tensor for key, tensor in load_file(file).items() if key.split(".")[0] in wanted}
    write_tensors(to, kept, {"ss_base_model_version": "sample"})
    return to


def hollow(file: Path, row: Family, size: int) -> Path:
    """A file of about `size` bytes with a true header of this family's layers; the weights behind it are a hole in the disk."""
    names = targets(row)
    rank = max(1, round(size / (2 * sum(sum(linalg.sides(shape)) for shape in names.values()))))
    table: dict[str, object] = {"__metadata__": {"ss_base_model_version": row.base_version}}
    end = 0
    for name, shape in names.items():
        ones = [1] * len(shape[2:])
        for leaf, form in (("lora_up", [shape[0], rank, *ones]), ("lora_down", [rank, *shape[1:]])):
            start, end = end, end + 2 * math.prod(form)
            table[f"{name}.{leaf}.weight"] = {"dtype": "F16", "shape": form, "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + end)
    return file


# ---------------------------------------------------------------- the right answer


def answers(files: Sequence[Path], names: Iterable[str], rank: int | None) -> dict[str, Tensor]:
    """Layer => what should come of these files in fp64: the weighted sum (of one file, itself), or what is nearest at a rank."""
    loaded = [load_file(file) for file in files]
    weights = WEIGHTS if len(files) > 1 else (1.0,)
    found = {}
    for name in names:
        whole = sum((weight * _dense(tensors, name) for weight, tensors in zip(weights, loaded, strict=True)), torch.zeros(()))
        found[name] = _nearest(whole, rank) if rank else whole
    return found


def _dense(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    up, down = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    return float(tensors[f"{name}.alpha"]) / len(down) * (up @ down)


def _nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def error(file: Path, wanted: Mapping[str, Tensor], row: Family) -> float:
    """||dW - wanted|| / ||wanted|| over these layers together; a layer that the file lacks is zero."""
    paths = {name: path for path, name in keys.kohya_names(row).items()}
    found = Adapter.load(file).deltas
    off = math.hypot(*(float((_matrix(found.get(paths[name]), answer) - answer).norm()) for name, answer in wanted.items()))
    return off / math.hypot(*(float(answer.norm()) for answer in wanted.values()))


def _matrix(delta: object, like: Tensor) -> Tensor:
    if not isinstance(delta, LowRank):
        return torch.zeros_like(like)
    up, down = linalg.factors(delta)
    return up @ down
