"""A base's weights on disk: read one parameter at a time, and written anew with some of them changed.

A diffusers folder (shards and the fp16 variant too) and a single .safetensors file of a model site look the same from here:
canonical path of a parameter => its tensor. Nothing ever holds more than a few tensors, and no source is ever touched.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, BaseModelError, HostileFileError, OutputError
from ..formats.header import Entry, Header, opened, read_header, short
from ..formats.tensors import HASHES, bytes_of, encoded, read_tensor
from ..io import atomic
from . import addresses as checkpoint_keys
from . import names as keys
from .addresses import Address
from .recognition import family_in, stranger_in

New = Callable[[str], Tensor | None]  # path => its new tensor; None leaves it as it is
Changed = Mapping[str, Tensor] | New

CHUNK = 4 << 20  # bytes of unchanged tensors that are copied at once
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_PICKLES = {".ckpt", ".bin", ".pt", ".pth"}
_WEIGHTS = {*_PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf"}
_CONVERT = "pickled weights can run code and are never opened; take the .safetensors, or convert them where they came from"


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: in which file, and where there."""

    header: Header
    address: Address

    @property
    def entry(self) -> Entry:
        """The bytes of this parameter alone: rows of a fused tensor follow each other."""
        whole = self.header.tensors[self.address.key]
        if self.address.rows is None:
            return whole
        (first, last), size = self.address.rows, (whole.end - whole.start) // whole.shape[0]
        return Entry(whole.dtype, (last - first, *whole.shape[1:]), whole.start + first * size, whole.start + last * size)

    @property
    def shape(self) -> keys.Shape:
        return self.entry.shape[::-1] if self.address.transposed else self.entry.shape


@dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """A checkpoint, seen read-only: canonical path of each UNet and text encoder parameter => its tensor, read when asked for.

    Weights are named by their module, biases end in `.bias`; norms and embeddings are there. Tensors have the file's dtype.
    """

    path: Path
    row: keys.Family | None  # None for a folder of another architecture
    headers: tuple[Header, ...]  # of the files that hold the parameters
    places: Mapping[str, Place]

    def __repr__(self) -> str:
        return f"Weights({self.path.name}, {self.family}, {len(self)} parameters)"

    def __contains__(self, path: object) -> bool:
        return path in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, path: str) -> Tensor:
        """A copy of one parameter. Raises BaseModelError if there is none."""
        place = self.place(path)
        with opened(place.header.path) as file:
            tensor = read_tensor(file, place.address.key, place.entry)
        return tensor.T if place.address.transposed else tensor

    def shape(self, path: str) -> keys.Shape:
        """The shape of one parameter; reads nothing."""
        return self.place(path).shape

    def place(self, path: str) -> Place:
        if path not in self.places:
            raise BaseModelError(f"{self.path} has no parameter {short(path)}", close(path, self.places))
        return self.places[path]

    @property
    def family(self) -> str:
        """Its name: "sd1", ... or "unknown"."""
        return self.row.name if self.row else "unknown"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that it holds, such as ("unet", "text_encoder")."""
        found = {keys.part_of(path) for path in self.places}
        return tuple(part for part in keys.PARTS if part in found)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a single file says about itself; a folder says nothing."""
        return {} if self.path.is_dir() else self.headers[0].metadata


def open_weights(path: str | Path) -> Weights:
    """A diffusers folder or a single .safetensors checkpoint; reads headers only.

    Raises HostileFileError for pickles and for files that are not what they say, BaseModelError for what is no model.
    """
    path = Path(path).expanduser()
    weights = _open_folder(path) if path.is_dir() else _open_file(path)
    if scaled := [key for header in weights.headers for key in header.tensors if key.endswith((".scale_weight", "scaled_fp8"))]:
        raise BaseModelError(f"{path} holds weights that are scaled to fit ({short(scaled[0])})", "use a file of fp16 or bf16")
    return weights


def close(path: str, paths: Iterable[str]) -> str:
    """A hint that names the path nearest to a mistyped one, if any is near: there are too many to list."""
    return "".join(f"did you mean {found}?" for found in difflib.get_close_matches(path, list(paths), 1))


# --- single files ---------------------------------------------------------------------------------------------------


def _open_file(path: Path) -> Weights:
    header = read_header(path)
    shapes = {key: entry.shape for key, entry in header.tensors.items()}
    families = (own,) if (own := family_in(shapes)) else keys.FAMILIES
    layouts = {family: _places(header, family) for family in families}
    family = own or _closest({row: {path: place.shape for path, place in places.items()} for row, places in layouts.items()})
    if family is None:
        adapter = any("lora" in key or "hada_" in key or "lokr_" in key for key in header.tensors)
        hint = "that is an adapter: name the checkpoint" if adapter else f"known: {', '.join(row.name for row in keys.FAMILIES)}"
        raise BaseModelError(f"{path} is no checkpoint of a known family{stranger_in(shapes)}", hint)
    return Weights(path, family, (header,), layouts[family])


def _places(header: Header, family: keys.Family) -> dict[str, Place]:
    table = {}
    for path, address in checkpoint_keys.addresses(family).items():
        bare = address.key.replace(".text_model.", ".")  # some tools leave it out
        key = address.key if address.key in header.tensors or bare not in header.tensors else bare
        if (entry := header.tensors.get(key)) and _usable(entry) and _holds(entry, address):
            table[path] = Place(header, Address(key, address.rows, address.transposed))
    return table


def _closest(shapes: Mapping[keys.Family, Mapping[str, keys.Shape]]) -> keys.Family | None:
    """The family with most of its UNet there, in its shapes; at least half: an inpainting model has a wider conv_in."""

    def share(family: keys.Family) -> float:
        known = {path: shape for path, shape in keys.modules(family).items() if path.startswith("unet.")}
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
            places |= {path: place for path, place in _named(header, part) if _usable(place.entry)}
    if not places:
        raise BaseModelError(f"{folder} is not a diffusers folder: no unet in it", "give the folder that holds model_index.json")
    shapes = {path: place.shape for path, place in places.items()}
    family = _closest(dict.fromkeys(keys.FAMILIES, shapes))
    return Weights(folder, family, tuple(headers), places)


def _named(header: Header, part: str) -> Iterator[tuple[str, Place]]:
    for key in header.tensors:
        if key.endswith((".weight", ".bias")):
            yield keys.canonical(f"{part}.{key.removesuffix('.weight')}"), Place(header, Address(key))


def _files(part: Path) -> list[Path]:
    """The files that a library would load from a part's folder: whole or in shards, else the fp16 variant."""
    stem = "diffusion_pytorch_model" if part.name == "unet" else "model"
    for variant, spelling in (("", ""), (".fp16", ".fp16")):
        if (whole := part / f"{stem}{variant}.safetensors").is_file():
            return [whole]
        if (index := part / f"{stem}.safetensors.index{spelling}.json").is_file():
            return _shards(index)
    if pickles := sorted(file.name for file in part.iterdir() if file.suffix in _PICKLES):
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


# --- writing --------------------------------------------------------------------------------------------------------


def rewrite(
    source: Weights | str | Path, destination: str | Path, changed: Changed, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `source` to `destination` with some parameters changed, in the same layout and dtypes; return the path written.

    `changed` gives new tensors by canonical path, a callable one at a time. All else is copied byte for byte, and the new
    file or folder takes its name when it is whole. `metadata` is added to a single file's header, whose hashes are dropped.
    Of a folder come all files but the weights that were not read and would now be wrong: other variants, pickles, a copy of
    the model in one file. An existing file is replaced, an existing folder is not.

    Raises AdapterError for a new tensor that does not fit, OutputError for what the disk or this contract refuses.
    """
    source = source if isinstance(source, Weights) else open_weights(source)
    destination = check_destination(destination, source)
    if isinstance(changed, Mapping) and (strange := sorted(changed.keys() - source.places.keys())):
        raise AdapterError(f"{source.path} has no parameter {short(strange[0])}", close(strange[0], source.places))
    new = changed.get if isinstance(changed, Mapping) else changed
    if source.path.is_dir():
        _rewrite_folder(source, destination, new)
    else:
        with atomic(destination) as temporary:
            _rewrite_file(source, source.headers[0], temporary, destination, new, metadata or {})
    return destination


def check_destination(destination: str | Path, *sources: Weights) -> Path:
    """Where the first source's copy will lie. Raises OutputError if that is a source, lies in one, or cannot take it."""
    path, single = Path(destination).expanduser(), not sources[0].path.is_dir()
    if single and path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    try:
        if taken := [source.path for source in sources if overwrites(path, source.path)]:
            raise OutputError(f"{path} would overwrite {taken[0]}, which is read", "choose another name")
        if not single and (path.suffix == ".safetensors" or path.is_file()):
            raise OutputError(f"{path} is a file's name, and {sources[0].path} is a folder", "name a new folder")
        if not single and path.is_dir() and any(path.iterdir()):
            raise OutputError(f"{path} is there already", "name a new folder")
    except OSError as error:
        raise _refused(path, error) from error
    return path


def overwrites(path: Path, source: Path) -> bool:
    """Whether writing to `path` would change `source`: it is that file, or lies in that folder."""
    return source.resolve() in (path.resolve(), *path.resolve().parents) or (path.exists() and path.samefile(source))


def _rewrite_folder(source: Weights, destination: Path, new: New) -> None:
    headers = {header.path: header for header in source.headers}
    with _whole_folder(destination) as temporary:
        for file in _carried(source.path, headers):
            target = temporary / file.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in headers:
                _rewrite_file(source, headers[file], target, destination, new, None)
            else:
                with opened(file) as original, _output(target, destination) as out:
                    shutil.copyfileobj(original, out, CHUNK)


def _carried(folder: Path, read: Mapping[Path, Header]) -> Iterator[Path]:
    """The files of a folder that its copy gets: those that were read, and all that are no other form of the same weights."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # .git, .cache
        stale = place == str(folder) or (Path(place).parent == folder and Path(place).name in keys.PARTS)
        for file in (Path(place) / name for name in sorted(names)):
            other = file.suffix in _WEIGHTS or (".index" in file.name and not _indexes(file, read))
            if file in read or not (stale and other):
                yield file


def _indexes(index: Path, read: Mapping[Path, Header]) -> bool:
    """Whether an index names the shards that were read."""
    return any(f'"{file.name}"' in index.read_text("utf-8", "replace") for file in read if file.parent == index.parent)


@contextlib.contextmanager
def _whole_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination` that takes its name at the end of the block, or vanishes if it fails."""
    temporary = destination.with_name(f".{destination.name}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(destination)
    except OSError as error:
        raise _refused(destination, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rewrite_file(
    source: Weights, header: Header, target: Path, name: Path, new: New, metadata: Mapping[str, str] | None
) -> None:
    """Write one file of `source` anew; `name` is what errors call it."""
    inside: dict[str, list[str]] = {}
    for path, place in source.places.items():
        if place.header is header:
            inside.setdefault(place.address.key, []).append(path)
    with opened(header.path) as file, _output(target, name) as out:
        out.write(_head(file) if metadata is None else _described(header, metadata))
        for key, entry in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            fresh = {path: tensor for path in inside.get(key, ()) if (tensor := new(path)) is not None}
            if fresh:
                whole = _patched(read_tensor(file, key, entry), source, fresh)
                out.write(bytes_of(whole))
            else:
                _copy(file, out, entry)


def _patched(whole: Tensor, source: Weights, fresh: Mapping[str, Tensor]) -> Tensor:
    """A file's tensor with the parameters in it replaced, in its own dtype."""
    for path, tensor in fresh.items():
        address, shape = source.places[path].address, source.shape(path)
        if not keys.same(tuple(tensor.shape), shape):
            raise AdapterError(f"{path} is {list(shape)} in {source.path}, and {list(tensor.shape)} does not fit")
        view = whole if address.rows is None else whole[slice(*address.rows)]
        (view.T if address.transposed else view).copy_(tensor.detach().reshape(shape))
        if not torch.stack(view.float().aminmax()).isfinite().all():  # NaN is both; no mask of the whole is made
            raise AdapterError(f"{path} would hold NaN or Inf in {str(whole.dtype).removeprefix('torch.')}", "use less strength")
    return whole


def _head(file: BinaryIO) -> bytes:
    """A header as it is."""
    file.seek(0)
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def _described(header: Header, metadata: Mapping[str, str]) -> bytes:
    """The same tensors in the same order, with more metadata, and without the hashes that no longer hold."""
    start = min((entry.start for entry in header.tensors.values()), default=0)
    entries = {
        key: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start - start, entry.end - start]}
        for key, entry in header.tensors.items()
    }
    kept = {key: value for key, value in header.metadata.items() if key not in HASHES}
    return encoded(entries, kept | dict(metadata))


def _copy(file: BinaryIO, out: BinaryIO, entry: Entry) -> None:
    file.seek(entry.start)
    left = entry.end - entry.start
    while left:
        chunk = file.read(min(left, CHUNK))
        if not chunk:
            raise HostileFileError(f"{file.name} became shorter while it was read", "try again")
        out.write(chunk)
        left -= len(chunk)


@contextlib.contextmanager
def _output(target: Path, name: Path) -> Iterator[BinaryIO]:
    """An open file that is on the disk at the end of the block; OutputError for what the disk refuses."""
    try:
        with target.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise _refused(name, error) from error


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}", "free some space or choose another place")
