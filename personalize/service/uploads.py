"""What somebody sends: pictures, captions, masks and archives, looked at in a folder aside before they go where they belong."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from ..data.images import DAMAGE, Unreadable, load_whole, open_image, probe
from ..data.masks import mask_of
from ..errors import DataError, OutputError
from ..io import disk_error
from ..pictures.files import ADVICE, MARK, SIDECARS, format_of, is_picture, same_name
from ..pictures.galleries import KOHYA
from ..pictures.metadata import FILES
from ..text import plain, readable
from . import archives
from .errors import Refusal
from .options import Limits
from .paths import relative_path

ARCHIVE = ".zip"
FAL_MARK = "_mask"  # fal's name for a mask: NAME_mask.EXT
WANTED = f"send pictures, their captions ({', '.join(SIDECARS)}), {', '.join(FILES)} or a {ARCHIVE}"


class Incoming(NamedTuple):
    """A file that is sent: its name or its path in a folder, and its bytes."""

    name: str
    file: BinaryIO


@dataclass
class Staged:
    """Files that were looked at, in a folder aside; and those that were left out, with why."""

    folder: Path
    files: list[str] = field(default_factory=list)  # paths below the folder
    left_out: list[tuple[str, str]] = field(default_factory=list)
    title: str = ""  # what the archive, or the folder in it, is called
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


@contextlib.contextmanager
def folder_aside(place: Path) -> Iterator[Path]:
    """A folder of its own on the same disk, which is gone at the end with all that is still in it. Raises OutputError."""
    try:
        folder = Path(tempfile.mkdtemp(dir=place, prefix=".incoming-"))
    except OSError as error:
        raise disk_error(place, error) from error
    try:
        yield folder
    except OSError as error:
        raise disk_error(place, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Remove what uploads left that a crash ended."""
    for folder in place.glob(".incoming-*"):
        shutil.rmtree(folder, ignore_errors=True)


def stage(folder: Path, incoming: Iterable[Incoming], limits: Limits) -> Staged:
    """Put files aside, archives unpacked, and leave out what is of no use.

    Raises Refusal for names that lead elsewhere, twice the same name, archives that are no honest ones, too much of anything,
    and where nothing is left.
    """
    staged = Staged(folder)
    sent = [(name, None if name.lower().endswith(ARCHIVE) else relative_path(name), file) for name, file in incoming]
    top = common_folder([parts for _, parts, _ in sent if parts])
    for name, parts, file in sent:
        if parts is None:
            _unpack(staged, name, file, limits)
        else:
            _put(staged, without_top(parts, top), limits, file)
    staged.title = staged.title or top
    _rename_masks(staged)
    if not staged.files:
        name, why = staged.left_out[0] if staged.left_out else ("", "")
        raise Refusal(
            400, "nothing_to_use", f"{plain(name, 80)}: {why}" if name else "no files were sent", "" if name else WANTED
        )
    return staged


def move_into(staged: Staged, folder: Path, replace: bool = False) -> None:
    """Move staged files into a folder that is there. Raises Refusal where one has that name already, unless they replace it."""
    known = {same_name(path.relative_to(folder).as_posix()): path for path in folder.rglob("*")}
    there = [name for name in staged.files if same_name(name) in known]
    if there and not replace:
        raise Refusal(409, "exists", f"{plain(there[0], 80)} is there already", "send replace=true to replace it")
    try:
        for name in staged.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staged.folder / name).replace(known.get(same_name(name), folder / name))
    except OSError as error:
        raise disk_error(folder, error) from error


def common_folder(paths: list[tuple[str, ...]]) -> str:
    """The one folder that all files lie in; "" without one.

    >>> common_folder([("rex", "1.png"), ("rex", "more", "2.png")]), common_folder([("1.png",), ("rex", "2.png")])
    ('rex', '')
    """
    tops = {parts[0] if len(parts) > 1 else "" for parts in paths}
    return tops.pop() if len(tops) == 1 else ""


def without_top(parts: tuple[str, ...], top: str) -> tuple[str, ...]:
    """A path without the folder around all, unless its name says what the pictures show: `10_rex dog`."""
    return parts[1:] if top and not KOHYA.fullmatch(top) else parts


def _unpack(staged: Staged, name: str, file: BinaryIO, limits: Limits) -> None:
    """The files of an archive; one folder around them all is left out, unless its name says what they show."""
    archive, entries = archives.read_archive(file, limits)
    top = common_folder([parts for _, parts in entries])
    staged.title = staged.title or top or Path(name).stem
    with archive:
        for info, parts in entries:
            inside = without_top(parts, top)
            if why := fault_of_kind(Path(inside[-1])):
                staged.left_out.append(("/".join(inside), why))
            else:
                path = _place(staged, inside, limits)
                archives.unpack_entry(archive, info, path)
                _look_at(staged, "/".join(inside), limits)


def _put(staged: Staged, parts: tuple[str, ...], limits: Limits, file: BinaryIO) -> None:
    """One file that was sent by itself."""
    if why := fault_of_kind(Path(parts[-1])):
        staged.left_out.append(("/".join(parts), why))
        return
    with _place(staged, parts, limits).open("xb") as target:
        shutil.copyfileobj(file, target, 1 << 18)
    _look_at(staged, "/".join(parts), limits)


def _place(staged: Staged, parts: tuple[str, ...], limits: Limits) -> Path:
    """Where a file is put. Raises Refusal for one too many, and for a name that is there."""
    name = "/".join(parts)
    if same_name(name) in staged.seen:
        raise Refusal(400, "twice", f"{plain(name, 80)} was sent twice", "give every file a name of its own")
    staged.seen[same_name(name)] = name
    if len(staged.seen) > limits.files:
        raise Refusal(413, "too_many_files", f"more than {limits.files} files", "send fewer at a time")
    path = staged.folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _look_at(staged: Staged, name: str, limits: Limits) -> None:
    """Keep a file that was put aside, or leave it out."""
    path = staged.folder / name
    if why := fault_inside(path, limits):
        staged.left_out.append((name, why))
        path.unlink()
    else:
        staged.files.append(name)


def fault_of_kind(path: Path) -> str:
    """Why a file of this name is of no use in a dataset; "" for one that may be.

    >>> fault_of_kind(Path("1.png")), fault_of_kind(Path("1.heic"))[:36], fault_of_kind(Path("run.sh"))
    ('', 'this format needs a plugin: pip inst', 'neither a picture nor a caption')
    """
    if path.name.lower() in FILES or path.suffix.lower() in SIDECARS:
        return ""
    if not is_picture(path):
        return "neither a picture nor a caption"
    return "" if format_of(path.suffix) else ADVICE.get(path.suffix.lower(), "not a picture that is read")


def fault_inside(path: Path, limits: Limits) -> str:
    """Why what is in a file is of no use; "" for a picture of a size that is allowed, or for text."""
    if is_picture(path):
        return fault_of_picture(path, limits)
    most = limits.metadata if path.name.lower() in FILES else limits.text
    if path.stat().st_size > most:
        return f"larger than {readable(most)}"
    try:
        path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return ""


def fault_of_picture(path: Path, limits: Limits) -> str:
    """Why a file is no picture of a size that is allowed, as its header tells; "" for a good one."""
    try:
        with open_image(path) as (_, image):
            if (pixels := image.width * image.height) > limits.pixels:
                return f"{pixels:,} pixels are more than {limits.pixels:,}: make it smaller first"
    except Unreadable as error:
        return str(error)
    return ""


def _rename_masks(staged: Staged) -> None:
    """fal's masks, NAME_mask.EXT beside NAME.EXT, under the name that is read here: NAME-masklabel.png."""
    stems = {str(Path(name).with_suffix("")) for name in staged.files if is_picture(Path(name))}
    for number, name in enumerate(staged.files):
        stem = str(Path(name).with_suffix(""))
        if not (is_picture(Path(name)) and stem.endswith(FAL_MARK) and stem.removesuffix(FAL_MARK) in stems):
            continue
        mask = f"{stem.removesuffix(FAL_MARK)}{MARK}.png"
        if (staged.folder / mask).exists():
            continue
        if Path(name).suffix.lower() == ".png":
            (staged.folder / name).rename(staged.folder / mask)
        else:
            try:
                with open_image(staged.folder / name) as (_, image):
                    image.convert("L").save(staged.folder / mask, format="PNG")
            except (Unreadable, *DAMAGE) as error:
                raise Refusal(400, "bad_mask", f"the mask {plain(name, 80)} cannot be read: {error}", "save it as PNG") from error
            (staged.folder / name).unlink()
        staged.files[number] = mask


def write_mask(folder: Path, picture: Path, file: BinaryIO, limits: Limits) -> Path:
    """Put a mask beside a picture: white where it is to be learned. Raises Refusal for what is no picture of its proportions."""
    mask = picture.with_name(f"{picture.stem}{MARK}.png")
    with folder_aside(folder) as aside:
        (aside / mask.name).write_bytes(file.read(limits.upload))
        if why := fault_of_picture(aside / mask.name, limits):
            raise Refusal(400, "bad_mask", f"the mask is of no use: {why}", "send a PNG, white where the picture is learned")
        try:
            mask_of(picture, aside / mask.name, *probe(picture), alpha=False)
        except Unreadable as error:
            raise DataError(f"{picture.name}: {error}", "send another picture") from error
        except DataError as error:
            raise DataError(error.what.replace(f"{aside}/", ""), error.hint) from None
        (aside / mask.name).replace(mask)
    return mask


def thumbnail(path: Path, side: int, target: BinaryIO) -> None:
    """Write a picture as a small WebP, upright. Raises DataError where it cannot be read."""
    image = load_whole(path)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    try:
        image.save(target, format="WEBP", quality=80)
    except OSError as error:
        raise OutputError(f"cannot show {path.name}: {error}") from error
