"""The room Train: pictures -> what the coach finds -> purpose, base and three settings -> a training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, File, Form, Request, UploadFile
from starlette.responses import FileResponse, Response

from ...data.folder import read_folder
from ...errors import PersonalizeError
from ...jobs import Job
from ...models.sources import NAMED
from ...recipe.about import about
from ...recipe.resolve import presets
from ...recipe.settings import flatten, settings
from .. import samples
from ..errors import not_found
from ..prefix import base_of_host
from ..requests import job_schema, job_settings
from ..routes.common import Here, Name, incoming
from ..routes.datasets import UPLOADS, examine
from ..studio import Studio
from .forms import Field, as_text, field_of, read_form, sections
from .render import Room, go, is_fragment, show

router = APIRouter(route_class=Room)

FIRST = ("base", "preset", "trigger", "class", "steps")  # what is asked for before all else
ELSEWHERE = ("folder", "output", *FIRST)
ORDER = ("subject", "style", "face", "low-memory")  # purposes
STYLE = "style"
RECENT = 6  # trainings that are shown first
LARGE = 200 << 20  # bytes of a file that may be a base


@dataclass(frozen=True)
class Purpose:
    """A preset of the base, as a choice."""

    preset: str
    title: str
    about: str


@dataclass(frozen=True)
class Fix:
    """What one click does about a finding: settings that are filled in, or pictures that are set aside."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    aside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A training as it would be: what was given, and all that follows from it."""

    dataset: str
    given: dict[str, Any]
    recipe: dict[str, Any]
    told: str
    trigger: str

    @property
    def purpose(self) -> str:
        return str(self.recipe.get("preset") or "")

    @property
    def is_style(self) -> bool:
        return self.purpose.endswith(STYLE)

    def first(self, name: str) -> Field:
        """One of the settings that are asked for first."""
        return field_of(name, job_schema("train")["properties"][name], self.given, self.recipe)


@router.get("/")
def home(request: Request, here: Here) -> Response:
    """Where everything begins: pictures."""
    recent = here.store.list(kinds=("train",), limit=RECENT)
    own = [here.datasets.record(id) for id in here.datasets.ids()]
    own = sorted((one for one in own if one["pictures"]), key=lambda one: -one["changed_at"])
    shown = [(one, here.datasets.pictures(one["id"])[:4]) for one in own[:RECENT]]
    cards = [(job, last_pictures(here, job)) for job in recent]
    return show(request, "train", room="train", samples=samples.samples(), jobs=cards, datasets=shown)


def last_pictures(here: Studio, job: Job) -> list[dict[str, Any]]:
    """The newest sample pictures of a training."""
    from ..records import sample_records

    found = sample_records(job, enumerate(here.watch.of(job.id).kind("sample")))
    last = max((one["step"] for one in found), default=0)
    return [one for one in found if one["step"] == last and not one["base"]][:4]


@router.get("/train/sample/{name}/{picture}")
def sample_picture(name: Name, picture: Name) -> Response:
    """A sample picture."""
    sample = samples.sample_named(name)
    if picture not in sample.pictures:
        raise not_found("picture", picture)
    return FileResponse(sample.folder / picture)


@router.post("/train/sample/{name}")
def take_sample(request: Request, here: Here, name: Name) -> Response:
    """Begin with sample pictures."""
    sample = samples.sample_named(name)
    own = {"base": next(iter(NAMED))} if base_of_host(request) else {}  # these are pictures of the small base's world
    return go(f"/train/{samples.take(here, sample)}?{urlencode(own | sample.settings)}", is_fragment(request))


@router.post("/train", tags=[UPLOADS])
def upload(
    request: Request, here: Here, files: Annotated[list[UploadFile], File()], name: Annotated[Name, Form()] = ""
) -> Response:
    """Begin with pictures that are sent; what was left out of them is told there."""
    dataset, staged = here.datasets.create(name, incoming(files))
    left = [("left", f"{one}: {why}") for one, why in staged.left_out[:5]]
    return go(f"/train/{quote(dataset)}?{urlencode(left)}", is_fragment(request))


@router.get("/train/{dataset}")
def set_up(request: Request, here: Here, dataset: Name) -> Response:
    """The pictures, and room for what the coach says of them."""
    record, pictures = here.datasets.record(dataset), here.datasets.pictures(dataset)
    left = request.query_params.getlist("left")
    return show(request, "set_up", room="train", dataset=record, pictures=pictures, left=left, query=request.url.query)


@router.get("/train/{dataset}/plan")
def first_plan(request: Request, here: Here, dataset: Name) -> Response:
    """The coach's findings and the form, filled in as far as the pictures tell."""
    given = read_form(request.query_params)
    if (base := base_of_host(request)) in bases(here) and not given.keys() & {"base", "preset"}:
        given["base"] = base
    return show_plan(request, here, dataset, given)


@router.post("/train/{dataset}/plan")
async def next_plan(request: Request, here: Here, dataset: Name) -> Response:
    """The same after something changed."""
    from anyio import to_thread

    given = given_in(await form_of(request))
    return await to_thread.run_sync(show_plan, request, here, dataset, given)


def show_plan(request: Request, here: Studio, dataset: str, given: dict[str, Any]) -> Response:
    """Findings and form of a plan."""
    plan = plan_of(here, dataset, given)
    found = findings_of(here, plan)
    others = list(sections(plan.given, plan.recipe, ELSEWHERE))
    return show(request, "_plan", plan=plan, findings=found, sections=others, purposes=purposes_of(plan), bases=bases(here))


@router.post("/train/{dataset}")
async def begin(request: Request, here: Here, dataset: Name) -> Response:
    """Queue the training, and go to where it is seen."""
    from anyio import to_thread

    given = given_in(await form_of(request))
    job = await to_thread.run_sync(queue_training, here, dataset, given)
    return go(f"/jobs/{job.id}", is_fragment(request))


def queue_training(here: Studio, dataset: str, given: dict[str, Any]) -> Job:
    """The job of a training. Raises PersonalizeError."""
    if "preset" not in given and "class" not in given:
        given = plan_of(here, dataset, given).given
    return here.store.add("train", job_settings(here, "train", {"folder": dataset, **given}), metadata={"dataset": dataset})


async def form_of(request: Request) -> dict[str, str]:
    """A form's texts."""
    async with request.form(max_files=0) as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


def given_in(form: Mapping[str, str]) -> dict[str, Any]:
    """What a form gives: a style has no class, and a purpose of another base is none of this one."""
    given = read_form(form)
    if str(given.get("preset", "")).endswith(STYLE):
        given.pop("class", None)
    if form.get("base") and form.get("base_before", form["base"]) != form["base"]:
        given.pop("preset", None)
    return given


def plan_of(here: Studio, dataset: str, given: dict[str, Any]) -> Plan:
    """What a training would be. Raises PersonalizeError for settings that cannot be."""
    from ...api.recipes import explain

    folder = here.datasets.folder(dataset)
    recipe, told = explain(job_settings(here, "train", {"folder": dataset, **given}), needed=False)
    flat = flatten(recipe)
    try:
        trigger = read_folder(recipe.data).trigger
    except PersonalizeError:  # the coach says what is wrong with the pictures
        trigger = str(given.get("trigger") or folder.name)
    sure = {name: flat[name] for name in ("preset", "class") if flat.get(name)}
    return Plan(dataset, {**sure, **given}, flat, told.partition(": ")[2].partition(": --")[0], trigger)


def findings_of(here: Studio, plan: Plan) -> list[tuple[dict[str, Any], Fix | None]]:
    """What the coach finds, each with what one click does about it."""
    report = examine(here, plan.dataset, plan.given)
    return [(one, fix_of(one, plan.given)) for one in report["findings"]]


def fix_of(finding: Mapping[str, Any], given: Mapping[str, Any]) -> Fix | None:
    """What one click does: the settings of the command that the finding names, or setting its pictures aside."""
    if not finding["command"]:
        return None
    words = shlex.split(finding["do"])
    if words[:2] == ["personalize", "train"]:
        wanted = {name: value for name, value in settings_of_words(words[3:]).items() if as_text(given.get(name)) != value}
        texts = [f"{name.replace('_', ' ')} = {' '.join(value.split())}" for name, value in wanted.items()]
        return Fix(f"Set {', '.join(texts)}", wanted) if wanted else None
    if finding["pictures"] and ("mv" in words or "Move-Item" in words):
        count = len(finding["pictures"])
        return Fix(f"Set {count} picture{'s' if count > 1 else ''} aside", aside=tuple(finding["pictures"]))
    return None


def settings_of_words(words: list[str]) -> dict[str, str]:
    """Settings from the words of a command, as fields hold them.

    >>> settings_of_words(["--trigger", "zwx", "--no-flip", "--targets", "conv", "--targets", "attention"])
    {'trigger': 'zwx', 'flip': 'false', 'targets': 'conv\\nattention'}
    """
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name = word.removeprefix("--").replace("-", "_")
        off = name.removeprefix("no_")
        if name in settings() and settings()[name].type is not bool:
            value = next(rest, "")
            found[name] = f"{found[name]}\n{value}" if name in found else value
        elif off in settings() and settings()[off].type is bool:
            found[off] = as_text(off == name)
    return found


def purposes_of(plan: Plan) -> list[Purpose]:
    """The purposes that the base has presets for."""
    from ...api.recipes import preset_prefix

    prefix = preset_prefix(str(plan.recipe["base"]), needed=False)
    own = {name: path for name, path in presets().items() if prefix and name.startswith(f"{prefix}-")}
    found = {name.removeprefix(f"{prefix}-"): path for name, path in own.items()}
    order = sorted(found, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind))
    return [Purpose(f"{prefix}-{kind}", kind.replace("-", " "), about(found[kind])[0]) for kind in order]


def bases(here: Studio) -> list[str]:
    """Bases that are at hand: those that came along, and checkpoints and diffusers folders below what the user named."""
    found = [*NAMED]
    for folder in here.folders:
        for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
            if (path / "model_index.json").is_file() or is_checkpoint(path):
                found.append(str(path))
    return found


def is_checkpoint(path: Path) -> bool:
    """Whether a file is large enough to be a base."""
    return path.suffix == ".safetensors" and path.is_file() and path.stat().st_size > LARGE
