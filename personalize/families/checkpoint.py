"""A base's weights on disk, whichever family it is of: a diffusers folder (shards and the fp16 variant too) and a single
.safetensors file of a model site look the same from here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BaseModelError, HostileFileError
from ..formats.checkpoint import Place, Weights
from ..formats.header import PICKLES, Address, Entry, Header, read_header, short
from . import names as keys
from .family import Family, addresses
from .recognition import family_in, stranger_in
from .spelling import path_in

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_AVERAGE = re.compile(r"(?<![^.])ema[._]|_ema(?=\.)")  # `model_ema.`, `ema.`, `ema_model.`, `cond_stage_model_ema.`
_CONVERT = "pickled weights can run code and are never opened; take the .safetensors, or convert them where they came from"


def open_weights(path: str | Path) -> Weights:
    """A diffusers folder or a single .safetensors checkpoint; reads headers only.

    Raises HostileFileError for pickles and for files that are not what they say, BaseModelError for what is no model.
    """
    path = Path(path).expanduser()
    weights = _open_folder(path) if path.is_dir() else _open_file(path)
    if scaled := [key for header in weights.headers for key in header.tensors if key.endswith((".scale_weight", "scaled_fp8"))]:
        raise BaseModelError(f"{path} holds weights that are scaled to fit ({short(scaled[0])})", "use a file of fp16 or bf16")
    return weights


# --- single files ---------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> Weights:
    header = read_header(path)
    shapes = {key: entry.shape for key, entry in header.tensors.items()}
    families = (own,) if (own := family_in(shapes)) else keys.FAMILIES
    layouts = {family: _places(header, family) for family in families}
    family = own or _closest({row: {path: place.shape for path, place in places.items()} for row, places in layouts.items()})
    if family is None and (spelled := _read_spelled(header)):
        found = {at: place.shape for at, place in spelled.items()}
        return Weights(path, _closest({row: found for row in keys.FAMILIES}), (header,), spelled)
    if family is None:
        adapter = any("lora" in key or "hada_" in key or "lokr_" in key for key in header.tensors)
        hint = "that is an adapter: name the checkpoint" if adapter else f"known: {', '.join(row.name for row in keys.FAMILIES)}"
        raise BaseModelError(f"{path} is no checkpoint of a known family{stranger_in(shapes)}", hint)
    return Weights(path, family, (header,), layouts[family], _averages(header, layouts[family]))


def _places(header: Header, family: Family) -> dict[str, Place]:
    table = {}
    for path, address in addresses(family).items():
        bare = address.key.replace(".text_model.", ".")  # some tools leave it out
        key = address.key if address.key in header.tensors or bare not in header.tensors else bare
        if (entry := header.tensors.get(key)) and _usable(entry) and _holds(entry, address):
            table[path] = Place(header, Address(key, address.rows, address.transposed))
    return table


def _averages(header: Header, places: Mapping[str, Place]) -> dict[str, Place]:
    """The moving averages that trainers keep beside the weights: LDM's under their names without dots, others with them."""
    averages = {_without_dots(plain): key for key in header.tensors if (plain := _AVERAGE.sub("", key)) != key}
    found = {}
    for path, place in places.items():
        key = averages.get(_without_dots(place.address.key), "")
        if (entry := header.tensors.get(key)) and _usable(entry) and entry.shape == place.entry.shape:
            found[path] = Place(header, Address(key))
    return found


def _without_dots(key: str) -> str:
    return key.removeprefix("model.").replace(".", "")


def _read_spelled(header: Header) -> dict[str, Place]:
    """The parameters of a denoiser alone, or in wrappers, under any spelling: ComfyUI's models/diffusion_models, a UNet out of
    diffusers' folder. In the family that knows most of the keys; empty unless they are half of its denoiser, and nearly all."""
    stems = {
        key: key.rpartition(".") for key, entry in header.tensors.items() if key.endswith((".weight", ".bias")) and _usable(entry)
    }
    best: dict[str, Place] = {}
    for family in keys.FAMILIES:
        table = {key: path_in(family, stem) for key, (stem, _, _) in stems.items() if not key.startswith(keys.KOHYA_PREFIXES)}
        found = {path + ".bias" * key.endswith(".bias"): Place(header, Address(key)) for key, path in table.items() if path}
        layers = sum(keys.part_of(path) == family.denoiser.part for path in keys.modules(family))
        own = sum(keys.part_of(path) == family.denoiser.part for path in found)
        whole = 2 * own > layers and len(found) > 0.95 * len(stems)
        best = found if whole and len(found) > len(best) else best
    return best


def _closest(shapes: Mapping[Family, Mapping[str, keys.Shape]]) -> Family | None:
    """The family with most of its denoiser there, in its shapes; at least half: an inpainting model has a wider conv_in."""

    def share(family: Family) -> float:
        known = {path: shape for path, shape in keys.modules(family).items() if keys.part_of(path) == family.denoiser.part}
        return sum(keys.same(shapes[family].get(path, ()), shape) for path, shape in known.items()) / len(known)

    best = max(shapes, key=share)
    return best if share(best) > 0.5 else None


def _holds(entry: Entry, address: Address) -> bool:
    return (not address.rows or address.rows[1] <= entry.shape[0]) and (not address.transposed or len(entry.shape) == 2)


def _usable(entry: Entry) -> bool:
    return entry.dtype in _FLOATS and len(entry.shape) > 0 and 0 not in entry.shape


# --- diffusers folders ----------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Weights:
    headers: list[Header] = []
    places: dict[str, Place] = {}
    for part in keys.PARTS:
        for file in _files(folder / part) if (folder / part).is_dir() else ():
            headers.append(header := read_header(file))
            places |= {path: place for path, place in _named_places(header, part) if _usable(place.entry)}
    if not places:
        raise BaseModelError(
            f"{folder} is not a diffusers folder: no {' or '.join(keys.DENOISERS)} in it",
            "give the folder that holds model_index.json",
        )
    shapes = {path: place.shape for path, place in places.items()}
    family = _closest(dict.fromkeys(keys.FAMILIES, shapes))
    return Weights(folder, family, tuple(headers), places)


def _named_places(header: Header, part: str) -> Iterator[tuple[str, Place]]:
    for key in header.tensors:
        if key.endswith((".weight", ".bias")):
            yield keys.canonical(f"{part}.{key.removesuffix('.weight')}"), Place(header, Address(key))


def _files(part: Path) -> list[Path]:
    """The files that a library would load from a part's folder: whole or in shards, else the fp16 variant."""
    stem = "diffusion_pytorch_model" if part.name in keys.DENOISERS else "model"
    for variant, spelling in (("", ""), (".fp16", ".fp16")):
        if (whole := part / f"{stem}{variant}.safetensors").is_file():
            return [whole]
        if (index := part / f"{stem}.safetensors.index{spelling}.json").is_file():
            return _shards(index)
    if pickles := sorted(file.name for file in part.iterdir() if file.suffix in PICKLES):
        raise BaseModelError(f"{part} has only pickled weights ({pickles[0]})", _CONVERT)
    raise BaseModelError(f"{part} has no weights: no {stem}.safetensors in it", "download the base again")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them there with the tensors that it promises."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"{index} is no index of shards: {short(error)}", "download the base again") from None
    if outside := [name for name in names.values() if Path(name).name != name or not name.isprintable()]:
        raise HostileFileError(f"{index} points outside its folder: {short(outside[0])}")
    files = [index.parent / name for name in sorted(set(names.values()))]
    found = {(key, file.name) for file in files for key in read_header(file).tensors}
    if missing := sorted(names.items() - found):
        raise BaseModelError(f"{index.parent / missing[0][1]} lacks {short(missing[0][0])}", "download the base again")
    return files
