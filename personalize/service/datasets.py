"""Datasets of a workspace: folders of pictures that were sent, and folders that the user named; and their captions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.captions import safe_trigger
from ..data.sidecars import write_caption, written_caption
from ..errors import DataError
from ..io import disk_error
from ..jobs.workspace import Workspace
from ..pictures.files import ASIDE, Contents, all_files, format_of, is_picture, look_into
from ..pictures.galleries import Gallery, galleries
from .errors import Refusal, not_found
from .options import Limits
from .paths import relative_path
from .uploads import Incoming, Staged, folder_aside, move_into, stage

NAMED = "folder-"  # ids of the folders that the user named: folder-1, folder-2, ...
LONGEST_CAPTION = 20_000  # letters


@dataclass(frozen=True)
class Picture:
    """A picture of a dataset: its path below the folder, the caption that somebody wrote, its mask."""

    name: str
    caption: str
    bytes: int
    mask: str | None


class Datasets:
    """The datasets of a workspace by id. An id of the workspace's own is the name of its folder, which gives the trigger."""

    def __init__(self, workspace: Workspace, folders: Iterable[Path], limits: Limits) -> None:
        self.workspace, self.limits = workspace, limits
        self.roots = {f"{NAMED}{number}": path for number, path in enumerate(folders, 1)}

    def ids(self) -> list[str]:
        """All of them: the workspace's own, the named folders with pictures, and where one has none the folders in it that do."""
        own = sorted(path.name for path in self.workspace.datasets.iterdir() if path.is_dir() and not path.name.startswith("."))
        for id, path in self.roots.items():
            if _has_pictures(path):
                own.append(id)
            else:
                own += [f"{id}-{one.name}" for one in _folders_in(path) if _has_pictures(one)]
        return own

    def folder(self, dataset: str) -> Path:
        """Its folder. Raises Refusal for an id that is none."""
        if dataset in self.roots:
            return self.roots[dataset]
        for id, root in self.roots.items():
            if dataset.startswith(f"{id}-") and (found := [one for one in _folders_in(root) if dataset == f"{id}-{one.name}"]):
                return found[0]
        path = self.workspace.datasets / dataset
        if not dataset or dataset.startswith(".") or Path(dataset).name != dataset or "\0" in dataset or not path.is_dir():
            raise not_found("dataset", dataset, "GET /api/datasets lists them")
        return path

    def record(self, dataset: str) -> dict[str, Any]:
        """What is told of a dataset in a list."""
        folder = self.folder(dataset)
        files = [path for path in all_files(folder) if not path.is_symlink()]
        count = sum(len(one.pictures) for one in _galleries(folder))
        size, created = sum(path.stat().st_size for path in files), folder.stat().st_mtime
        return {"id": dataset, "object": "dataset", "name": folder.name, "folder": str(folder), "pictures": count,
                "bytes": size, "changed_at": int(created), "own": self._is_own(folder)}  # fmt: skip

    def create(self, name: str, incoming: Iterable[Incoming]) -> tuple[str, Staged]:
        """A new dataset of what was sent. Raises Refusal and DataError, and nothing is left of it then."""
        with folder_aside(self.workspace.uploads) as aside:
            (inner := aside / "files").mkdir()
            staged = stage(inner, incoming, self.limits)
            self._check(inner)
            dataset = self._free_name(name or staged.title)
            try:
                inner.rename(self.workspace.datasets / dataset)
            except OSError as error:
                raise disk_error(self.workspace.datasets / dataset, error) from error
        return dataset, staged

    def add(self, dataset: str, incoming: Iterable[Incoming], replace: bool = False) -> Staged:
        """Put more files into a dataset. Raises Refusal where one is there already, unless it replaces that."""
        folder = self.folder(dataset)
        with folder_aside(self.workspace.uploads) as aside:
            staged = stage(aside, incoming, self.limits)
            if sum(1 for _ in all_files(folder)) + len(staged.files) > self.limits.files:
                raise Refusal(413, "too_many_files", f"it would hold more than {self.limits.files} files", "make another dataset")
            move_into(staged, folder, replace)
        return staged

    def remove(self, dataset: str) -> None:
        """Remove a dataset. Raises Refusal for a folder that is the user's own."""
        folder = self.folder(dataset)
        if not self._is_own(folder):
            raise Refusal(403, "named_folder", f"{folder} is a folder of yours", "remove it yourself, it is not the workspace's")
        with folder_aside(self.workspace.uploads) as aside:
            folder.rename(aside / "gone")

    def pictures(self, dataset: str) -> list[Picture]:
        """Its pictures with their captions."""
        return [
            Picture(
                path.relative_to(folder).as_posix(),
                caption_of(gallery, path, beside(path.parent)),
                path.stat().st_size,
                mask.relative_to(folder).as_posix() if (mask := gallery.contents.mask_of(path)) else None,
            )
            for folder, beside in [(self.folder(dataset), functools.cache(look_into))]
            for gallery in _galleries(folder)
            for path in gallery.pictures
        ]

    def picture(self, dataset: str, name: str) -> Path:
        """The file of a picture, or of a mask. Raises Refusal for one that is none, or lies elsewhere."""
        folder = self.folder(dataset)
        path = folder.joinpath(*relative_path(name))
        try:
            there = path.is_file() and path.resolve().is_relative_to(folder.resolve())
        except OSError:  # a name that is too long all together
            there = False
        if not (there and is_picture(path) and format_of(path.suffix)):
            raise not_found("picture", name, f"GET /api/datasets/{dataset} lists them")
        return path

    def remove_picture(self, dataset: str, name: str) -> None:
        """Remove a picture with its caption and mask."""
        path = self.picture(dataset, name)
        contents = next((one.contents for one in _galleries(self.folder(dataset)) if path in one.pictures), None)
        beside = (contents.caption_of(path), contents.mask_of(path)) if contents else ()
        for file in (path, *filter(None, beside)):
            file.unlink(missing_ok=True)

    def set_aside(self, dataset: str, names: Iterable[str]) -> int:
        """Move pictures with their captions and masks into a folder of the dataset that nothing reads; returns how many moved.

        Raises Refusal for a picture that there is not, and where one of that name lies there already; nothing has moved then.
        """
        folder, moves = self.folder(dataset), list[tuple[Path, Path]]()
        known = {path: gallery.contents for gallery in _galleries(folder) for path in gallery.pictures}
        for name in names:
            path = self.picture(dataset, name)
            contents = known.get(path)
            beside = (contents.caption_of(path), contents.mask_of(path)) if contents else ()
            for file in (path, *filter(None, beside)):
                target = file.parent / ASIDE / file.name
                if target.exists():
                    raise Refusal(409, "exists", f"{target} is there already", "rename one of them")
                moves.append((file, target))
        for file, target in moves:
            try:
                target.parent.mkdir(exist_ok=True)
                file.rename(target)
            except OSError as error:
                raise disk_error(target, error) from error
        return sum(is_picture(file) for file, _ in moves)

    def write_captions(self, dataset: str, captions: Mapping[str, str]) -> int:
        """Write captions beside their pictures, after all of them were checked; returns how many changed."""
        known = {one.name: one.caption for one in self.pictures(dataset)}
        folder, written, beside = self.folder(dataset), [], functools.cache(look_into)
        for name, caption in captions.items():
            if name not in known:
                raise not_found("picture", name, f"GET /api/datasets/{dataset} lists them")
            written.append((name, " ".join(_check_caption(caption).split())))
        changed = [(name, caption) for name, caption in written if caption != known[name]]
        for name, caption in changed:
            write_caption(folder / name, caption, beside((folder / name).parent))
        return len(changed)

    def _is_own(self, folder: Path) -> bool:
        """Whether a dataset's folder is the workspace's, and not one that the user named."""
        return folder.is_relative_to(self.workspace.datasets)

    def _check(self, folder: Path) -> None:
        """Raise DataError for a folder without pictures, or with metadata that cannot be read."""
        try:
            found = galleries(folder)
        except DataError as error:
            raise DataError(error.what.replace(f"{folder}/", ""), error.hint) from None
        if not found:
            raise Refusal(400, "no_pictures", "there is no picture in it", "send PNG, JPEG, WebP or another that Pillow reads")

    def _free_name(self, name: str) -> str:
        """A name for a new dataset; another one where that is taken."""
        first = safe_trigger(Path(name).name) if name else "subject"
        taken = {path.name for path in self.workspace.datasets.iterdir()} | set(self.ids()) | set(self.roots)
        number, free = 2, first
        while free in taken:
            free, number = f"{first}-{number}", number + 1
        return free


def caption_of(gallery: Gallery, picture: Path, beside: Contents) -> str:
    """What somebody wrote of a picture; what the metadata says where the file beside it is no text."""
    try:
        return written_caption(gallery, picture, beside)
    except DataError:
        note = gallery.notes.get(picture)
        return note.caption if note else ""


def _check_caption(caption: str) -> str:
    if len(caption) > LONGEST_CAPTION:
        raise Refusal(400, "too_long", f"a caption of {len(caption):,} letters", f"at most {LONGEST_CAPTION:,}", "caption")
    if "\0" in caption or not caption.encode("utf-8", "replace").decode() == caption:
        raise Refusal(400, "no_text", "a caption that is no text", "send UTF-8", "caption")
    return caption


def _galleries(folder: Path) -> list[Gallery]:
    """What is learned from a folder; nothing where its metadata cannot be read: the check says why."""
    try:
        return galleries(folder)
    except DataError:
        return []


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".") and not one.is_symlink())
    except OSError:
        return []


def _has_pictures(folder: Path) -> bool:
    return bool(folder.is_dir() and _galleries(folder))
