"""The room Dataset: pictures with their captions, crops and masks; and those that are there twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import Response

from ...errors import PersonalizeError
from ..datasets import Picture
from ..errors import Refusal
from ..routes.common import Here, Name, incoming
from ..routes.datasets import UPLOADS, Pictures, examine, remove_dataset, set_aside
from ..studio import Studio
from .captioning import captioning_of
from .render import Room, go, nothing, show
from .train import fix_of

router = APIRouter(route_class=Room)
OF_A_TRAINING = ("without-trigger",)  # findings that depend on what a training is told
TWINS = ("duplicates", "near-duplicates", "mirror-images")


@dataclass(frozen=True)
class Frame:
    """A picture as training sees it: `crop` is what is kept of its `size`, as x, y, width and height in pixels."""

    picture: Picture
    size: tuple[int, int] | None = None
    shape: tuple[int, int] | None = None
    marks: tuple[tuple[str, str], ...] = ()  # level and word

    @property
    def crop(self) -> tuple[float, float, float, float] | None:
        """The centre of the picture in the proportions of its bucket."""
        if not (self.size and self.shape):
            return None
        (width, height), (across, down) = self.size, self.shape
        scale = min(width / across, height / down)
        kept = across * scale, down * scale
        return ((width - kept[0]) / 2, (height - kept[1]) / 2, *kept)

    @property
    def lost(self) -> float:
        """The share of the picture that is cropped away."""
        if not (self.size and (crop := self.crop)):
            return 0.0
        return 1 - crop[2] * crop[3] / (self.size[0] * self.size[1])


@router.get("/dataset")
def show_datasets(request: Request, here: Here) -> Response:
    """All datasets."""
    records = [(here.datasets.record(id), here.datasets.pictures(id)[:4]) for id in here.datasets.ids()]
    return show(request, "datasets", room="dataset", datasets=sorted(records, key=lambda one: -one[0]["changed_at"]))


@router.get("/dataset/{dataset}")
def show_dataset(request: Request, here: Here, dataset: Name) -> Response:
    """One dataset."""
    record = here.datasets.record(dataset)
    return show(request, "dataset", room="dataset", dataset=record, **captioning_of(here, dataset))


@router.get("/dataset/{dataset}/frames")
def show_frames(request: Request, here: Here, dataset: Name) -> Response:
    """Its pictures as training sees them, and what is found of them."""
    record, pictures = here.datasets.record(dataset), here.datasets.pictures(dataset)
    report = report_of(here, dataset)
    twins = [(one, fix_of(one, {})) for one in report.get("findings", []) if one["code"] in TWINS]
    frames, buckets = frames_of(pictures, report), report.get("buckets", [])
    return show(request, "_frames", dataset=record, frames=frames, buckets=buckets, twins=twins, trouble=report.get("trouble"))


def report_of(here: Studio, dataset: str) -> dict[str, Any]:
    """What the coach knows of the pictures; only its `trouble` where it cannot look."""
    try:
        return examine(here, dataset, {"class": ""})
    except PersonalizeError as error:
        return {"trouble": error.what}


def frames_of(pictures: list[Picture], report: Mapping[str, Any]) -> list[Frame]:
    """Pictures with what the report says of each."""
    seen = {one["path"]: one for one in report.get("pictures", [])}
    marks: dict[str, list[tuple[str, str]]] = {}
    for one in report.get("findings", []):
        for name in one["pictures"] if one["mark"] and one["code"] not in OF_A_TRAINING else ():
            marks.setdefault(name, []).append((one["level"], one["mark"]))
    return [
        Frame(
            one,
            tuple(seen[one.name]["size"]) if one.name in seen else None,
            tuple(seen[one.name]["shape"]) if one.name in seen else None,
            tuple(marks.get(one.name, ())),
        )
        for one in pictures
    ]


@router.post("/dataset/{dataset}/caption")
def write_caption(here: Here, dataset: Name, name: Annotated[str, Form()], caption: Annotated[str, Form()] = "") -> Response:
    """Write the caption of one picture."""
    here.datasets.write_captions(dataset, {name: caption})
    return Response("saved", media_type="text/html")


@router.post("/dataset/{dataset}/rewrite")
def rewrite(
    request: Request,
    here: Here,
    dataset: Name,
    find: Annotated[str, Form()] = "",
    put: Annotated[str, Form()] = "",
    how: Annotated[str, Form()] = "replace",
    sure: Annotated[bool, Form()] = False,
) -> Response:
    """Change many captions alike: first what would become of them, then, when somebody is sure, that."""
    captions = {one.name: one.caption for one in here.datasets.pictures(dataset)}
    changed = captions_after(captions, how, find, put)
    if sure:
        here.datasets.write_captions(dataset, changed)
        return nothing("changed")
    rows = [(name, captions[name], caption) for name, caption in changed.items()]
    return show(request, "_rewrite", dataset=dataset, rows=rows, find=find, put=put, how=how)


def captions_after(captions: Mapping[str, str], how: str, find: str, put: str) -> dict[str, str]:
    """The captions that would be others. Raises Refusal where nothing is to be found.

    >>> captions_after({"1.png": "a dog, a dog", "2.png": ""}, "replace", "dog", "cat")
    {'1.png': 'a cat, a cat'}
    >>> captions_after({"1.png": "a dog", "2.png": ""}, "fill", "", "rex")
    {'2.png': 'rex'}
    """
    if how == "replace" and not find:
        raise Refusal(400, "nothing_to_find", "What is to be replaced?", "Write it into the first field.")
    change = {
        "replace": lambda text: re.sub(re.escape(find), lambda _: put, text),
        "before": lambda text: text if not put or text.startswith(put) else f"{put} {text}".strip(),
        "behind": lambda text: text if not put or text.endswith(put) else f"{text}{'' if put[:1] in ',.;' else ' '}{put}".strip(),
        "fill": lambda text: text or put,
    }.get(how)
    if change is None:
        raise Refusal(400, "no_such_change", "There is no such change", "replace, before, behind or fill")
    found = {name: " ".join(change(text).split()) for name, text in captions.items()}
    return {name: text for name, text in found.items() if text != captions[name]}


@router.post("/dataset/{dataset}/aside")
def move_aside(here: Here, dataset: Name, pictures: Annotated[str, Form()]) -> Response:
    """Move pictures out of the way."""
    set_aside(here, dataset, Pictures(pictures=[name for name in pictures.splitlines() if name]))
    return nothing("changed")


@router.post("/dataset/{dataset}/files", tags=[UPLOADS])
def add_files(here: Here, dataset: Name, files: Annotated[list[UploadFile], File()]) -> Response:
    """Bring more pictures."""
    here.datasets.add(dataset, incoming(files))
    return nothing("changed")


@router.post("/dataset/{dataset}/remove")
def remove(here: Here, dataset: Name) -> Response:
    """Remove a dataset."""
    remove_dataset(here, dataset)
    return go("/dataset")
