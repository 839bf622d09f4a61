"""A model's weights on disk: read one parameter at a time, and written anew with some of them changed.

Canonical path of a parameter => its tensor, whatever files hold it: where each one lies is said by who knows the model
(families/checkpoint.py opens them). Nothing ever holds more than a few tensors, and no source is ever touched.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, BaseModelError, HostileFileError, OutputError
from ..io import atomic, disk_error
from .header import PICKLES, Address, Entry, Header, open_file, short
from .shapes import Shape, same
from .tensors import bytes_of, read_tensor
from .writer import HASHES, encode_header, overwrites

New = Callable[[str], Tensor | None]  # path => its new tensor; None leaves it as it is
Changed = Mapping[str, Tensor] | New

Views = Sequence[tuple["Weights", New]]

CHUNK = 4 << 20  # bytes of unchanged tensors that are copied at once
_WEIGHTS = {*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf"}


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
    def shape(self) -> Shape:
        return self.entry.shape[::-1] if self.address.transposed else self.entry.shape


@dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """A checkpoint, seen read-only: canonical path of each parameter of the denoiser and the text encoders => its tensor.

    Weights are named by their module, biases end in `.bias`; norms and embeddings are there. Tensors have the file's dtype.
    """

    path: Path
    row: Any  # the model's family (families.family.Family); None for another architecture
    headers: tuple[Header, ...]  # of the files that hold the parameters
    places: Mapping[str, Place]
    copies: Mapping[str, Place] = field(default_factory=dict)  # second copies of parameters: an EMA beside the weights

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
        with open_file(place.header.path) as file:
            tensor = read_tensor(file, place.address.key, place.entry)
        return tensor.T if place.address.transposed else tensor

    def shape(self, path: str) -> Shape:
        """The shape of one parameter; reads nothing."""
        return self.place(path).shape

    def place(self, path: str) -> Place:
        if path not in self.places:
            raise BaseModelError(f"{self.path} has no parameter {short(path)}", close(path, self.places))
        return self.places[path]

    @property
    def copy(self) -> Weights:
        """The second copies, as weights of their own."""
        return replace(self, places=self.copies, copies={})

    @property
    def family(self) -> str:
        """Its name: "sd1", ... or "unknown"."""
        return str(self.row.name) if self.row else "unknown"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that it holds, such as ("unet", "text_encoder")."""
        return tuple(dict.fromkeys(path.partition(".")[0] for path in self.places))

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a single file says about itself; a folder says nothing."""
        return {} if self.path.is_dir() else self.headers[0].metadata


def close(path: str, paths: Iterable[str]) -> str:
    """A hint that names the path nearest to a mistyped one, if any is near: there are too many to list."""
    return "".join(f"did you mean {found}?" for found in difflib.get_close_matches(path, list(paths), 1))


# --- writing --------------------------------------------------------------------------------------------------------


def rewrite(
    source: Weights,
    destination: str | Path,
    changed: Changed,
    metadata: Mapping[str, str] | None = None,
    *,
    copies: New = lambda path: None,
    stripped: bool = False,
) -> Path:
    """Write `source` to `destination` with some parameters changed, in the same layout and dtypes; return the path written.

    `changed` gives new tensors by canonical path, a callable one at a time. All else is copied byte for byte, and the new
    file or folder takes its name when it is whole. `copies` gives new tensors of second copies, which know no other.
    `metadata` is added to a single file's header, whose hashes are dropped; with `stripped`, what it said before is too.
    Of a folder come all files but the weights that were not read and would now be wrong: other variants, pickles, a copy of
    the model in one file. An existing file is replaced, an existing folder is not.

    Raises AdapterError for a new tensor that does not fit, OutputError for what the disk or this contract refuses.
    """
    destination = check_destination(destination, source)
    if isinstance(changed, Mapping) and (strange := sorted(changed.keys() - source.places.keys())):
        raise AdapterError(f"{source.path} has no parameter {short(strange[0])}", close(strange[0], source.places))
    new: New = changed.get if isinstance(changed, Mapping) else changed
    views = ((source, new), (source.copy, copies))
    if source.path.is_dir():
        _rewrite_folder(source, destination, views)
    else:
        with atomic(destination) as temporary:
            head = _header_with(source.headers[0], metadata or {}, stripped)
            _rewrite_file(views, source.headers[0], temporary, destination, head)
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
        raise disk_error(path, error) from error
    return path


def _rewrite_folder(source: Weights, destination: Path, views: Views) -> None:
    headers = {header.path: header for header in source.headers}
    with _whole_folder(destination) as temporary:
        for file in _files_to_copy(source.path, headers):
            target = temporary / file.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in headers:
                _rewrite_file(views, headers[file], target, destination)
            else:
                with open_file(file) as original, _output(target, destination) as out:
                    shutil.copyfileobj(original, out, CHUNK)


def _files_to_copy(folder: Path, read: Mapping[Path, Header]) -> Iterator[Path]:
    """The files of a folder that its copy gets: those that were read, and all that are no other form of the same weights."""
    parts = {folder, *(file.parent for file in read)}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # .git, .cache
        stale = Path(place) in parts
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
        raise disk_error(destination, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rewrite_file(views: Views, header: Header, target: Path, name: Path, head: bytes = b"") -> None:
    """Write one file of the views' source anew, its header as it is if no other is given; `name` is what errors call it."""
    inside: dict[str, list[tuple[Weights, New, str]]] = {}
    for view, new in views:
        for path, place in view.places.items():
            if place.header is header:
                inside.setdefault(place.address.key, []).append((view, new, path))
    with open_file(header.path) as file, _output(target, name) as out:
        out.write(head or _head(file))
        for key, entry in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            fresh = {path: tensor for _, new, path in inside.get(key, ()) if (tensor := new(path)) is not None}
            if fresh:
                whole = _patch_tensor(read_tensor(file, key, entry), inside[key][0][0], fresh)
                out.write(bytes_of(whole))
            else:
                _copy(file, out, entry)


def _patch_tensor(whole: Tensor, source: Weights, fresh: Mapping[str, Tensor]) -> Tensor:
    """A file's tensor with the parameters in it replaced, in its own dtype."""
    for path, tensor in fresh.items():
        address, shape = source.places[path].address, source.shape(path)
        if not same(tuple(tensor.shape), shape):
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


def _header_with(header: Header, metadata: Mapping[str, str], stripped: bool) -> bytes:
    """The same tensors in the same order, with more metadata, without the hashes that no longer hold (`stripped`: and more)."""
    start = min((entry.start for entry in header.tensors.values()), default=0)
    entries = {
        key: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start - start, entry.end - start]}
        for key, entry in header.tensors.items()
    }
    kept = {key: value for key, value in header.metadata.items() if key not in HASHES and not stripped}
    return encode_header(entries, kept | dict(metadata))


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
        raise disk_error(name, error) from error
