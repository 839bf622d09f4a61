"""Datasets: pictures sent singly, as a folder or as an archive; checked; their captions read and written."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import StringConstraints
from starlette.responses import FileResponse, Response

from ...errors import DataError
from ...findings import worst_first
from .. import samples
from ..datasets import LONGEST_CAPTION
from ..errors import Refusal
from ..requests import inside, job_schema
from ..studio import Studio
from ..uploads import Staged, thumbnail, write_mask
from .common import Body, Here, Name, incoming, many
from .jobs import BYTES

router = APIRouter(tags=["datasets"])
Files = Annotated[list[UploadFile], File(description="pictures, captions, masks, metadata, archives; names may be paths")]
Caption = Annotated[str, StringConstraints(max_length=LONGEST_CAPTION)]
CHECK = ("folder",)  # settings that the address gives
UPLOADS = "uploads"  # tag of routes whose bodies may be large


class Captions(Body):
    """Captions by the pictures' names."""

    captions: dict[Name, Caption]


class Pictures(Body):
    """Pictures of a dataset, by their names."""

    pictures: list[Name]


class CheckSettings(Body):
    """Settings that change how pictures are judged: those of a training."""

    settings: dict[str, Any] = {}


@router.get("/datasets")
def list_datasets(here: Here) -> dict[str, Any]:
    """The datasets: those that were sent, and folders that the user named."""
    return many([here.datasets.record(id) for id in here.datasets.ids()])


@router.post("/datasets", status_code=201, tags=[UPLOADS])
def add_dataset(here: Here, files: Files, name: Annotated[Name, Form()] = "") -> dict[str, Any]:
    """A new dataset of pictures, a folder or an archive. Its name gives the trigger, unless a setting says another one."""
    dataset, staged = here.datasets.create(name, incoming(files))
    return here.datasets.record(dataset) | outcome(staged)


@router.get("/samples")
def list_samples() -> dict[str, Any]:
    """The sample pictures that come along, and what a training of them is told."""
    return many(
        [{"name": one.name, "title": one.title, "about": one.about, "settings": one.settings} for one in samples.samples()]
    )


@router.post("/samples/{sample}", status_code=201)
def add_sample(here: Here, sample: Name) -> dict[str, Any]:
    """The dataset of sample pictures, which is made where it is not there."""
    found = samples.sample_named(sample)
    return here.datasets.record(samples.take(here, found)) | {"settings": found.settings}


@router.get("/datasets/{dataset}")
def get_dataset(here: Here, dataset: Name) -> dict[str, Any]:
    """A dataset with its pictures and their captions."""
    at = f"/api/datasets/{dataset}/pictures/"
    pictures = [asdict(one) | {"url": at + one.name} for one in here.datasets.pictures(dataset)]
    return here.datasets.record(dataset) | {"data": pictures}


@router.delete("/datasets/{dataset}")
def remove_dataset(here: Here, dataset: Name) -> dict[str, Any]:
    """Remove a dataset; not while a job needs it."""
    here.check_unused(here.datasets.folder(dataset))
    here.datasets.remove(dataset)
    return {"id": dataset, "object": "dataset", "deleted": True}


@router.post("/datasets/{dataset}/files", tags=[UPLOADS])
def add_files(here: Here, dataset: Name, files: Files, replace: Annotated[bool, Form()] = False) -> dict[str, Any]:
    """Put more files into a dataset."""
    if replace:
        here.check_unused(here.datasets.folder(dataset))
    staged = here.datasets.add(dataset, incoming(files), replace)
    return here.datasets.record(dataset) | outcome(staged)


@router.post("/datasets/{dataset}/check")
def check_dataset(here: Here, dataset: Name, body: CheckSettings) -> dict[str, Any]:
    """What is in a dataset, what is wrong with it and what to do about that, as `personalize dataset --quick` says it.

    What the base makes of the pictures is told by a job of the kind `dataset`.
    """
    return examine(here, dataset, body.settings)


def examine(here: Studio, dataset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The report on a dataset. Raises RecipeError and DataError."""
    from ...api.recipes import explain
    from ...reports import dataset as report

    properties = job_schema("train")["properties"]
    unknown = next((name for name in given if name not in properties or name in CHECK), None)
    if unknown is not None:
        raise Refusal(400, "recipe_error", f"unknown setting {unknown!r}", "GET /api/schemas/train lists them", unknown)
    flags = {name: inside(here, name, value, properties[name]) for name, value in given.items()}
    recipe, told = explain({"class": "", **flags, "folder": here.datasets.folder(dataset)}, needed=False)
    stats = report.measure_dataset(recipe, flags)
    found: dict[str, Any] = json.loads(report.as_json(stats, worst_first(report.find_problems(stats))))
    return found | {"id": dataset, "taken_for": told}


@router.post("/datasets/{dataset}/aside")
def set_aside(here: Here, dataset: Name, body: Pictures) -> dict[str, Any]:
    """Move pictures with their captions and masks out of the way, into a folder of the dataset that nothing reads."""
    here.check_unused(here.datasets.folder(dataset))
    return {"moved": here.datasets.set_aside(dataset, body.pictures)}


@router.get("/datasets/{dataset}/captions")
def read_captions(here: Here, dataset: Name) -> dict[str, Any]:
    """The captions that somebody wrote, by the pictures' names."""
    return {"captions": {one.name: one.caption for one in here.datasets.pictures(dataset)}}


@router.put("/datasets/{dataset}/captions")
def write_captions(here: Here, dataset: Name, body: Captions) -> dict[str, Any]:
    """Write captions: all that are sent, or none where one of them cannot be. Others stay as they are."""
    return {"changed": here.datasets.write_captions(dataset, body.captions)}


@router.put("/datasets/{dataset}/masks/{name:path}", tags=[UPLOADS])
def put_mask(here: Here, dataset: Name, name: str, file: UploadFile) -> dict[str, Any]:
    """Put a mask beside a picture: white where it is to be learned."""
    picture = here.datasets.picture(dataset, name)
    mask = write_mask(picture.parent, picture, file.file, here.options.limits)
    return {"mask": mask.relative_to(here.datasets.folder(dataset)).as_posix()}


@router.get("/datasets/{dataset}/pictures/{name:path}", responses=BYTES, response_class=Response)
def get_picture(here: Here, dataset: Name, name: str, side: Annotated[int | None, Query(ge=16, le=1024)] = None) -> Response:
    """A picture or a mask as it was sent; with `side`, a small one that fits into such a square."""
    path = here.datasets.picture(dataset, name)
    if side is None:
        return FileResponse(path, headers={"Cache-Control": "private, no-cache"})
    small = io.BytesIO()
    try:
        thumbnail(path, side, small)
    except DataError as error:
        raise DataError(error.what.replace(f"{path}: ", f"{name}: "), error.hint) from None
    return Response(small.getvalue(), media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})


@router.delete("/datasets/{dataset}/pictures/{name:path}")
def remove_picture(here: Here, dataset: Name, name: str) -> dict[str, Any]:
    """Remove a picture with its caption and mask; not while a job needs it."""
    here.check_unused(here.datasets.folder(dataset))
    here.datasets.remove_picture(dataset, name)
    return {"id": name, "object": "picture", "deleted": True}


def outcome(staged: Staged) -> dict[str, Any]:
    """What became of files that were sent."""
    return {"files": staged.files, "left_out": [{"name": name, "why": why} for name, why in staged.left_out]}
