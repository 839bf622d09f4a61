"""What OpenAI's clients send -> settings of our jobs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ...api.recipes import explain
from ...data.captions import safe_trigger
from ...errors import NoSuchJobError
from ...pictures.galleries import count_pictures
from ..errors import Refusal, not_found
from ..library import id_of
from ..requests import job_schema, job_settings
from ..studio import Studio
from .names import job_id, parse_model

Auto = Literal["auto"]
Key, Value = Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
OTHERS = 16  # most entries of metadata, as at OpenAI


class Hyperparameters(BaseModel):
    """OpenAI's three numbers; any setting of the recipe may be sent beside them."""

    model_config = ConfigDict(extra="forbid")
    n_epochs: Auto | Annotated[int, Field(ge=1, le=100_000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e4)] = "auto"


class Method(BaseModel):
    """How it is learned."""

    model_config = ConfigDict(extra="allow")
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: dict[str, Any] | None = None


class NewFineTuning(BaseModel):
    """A training as OpenAI's clients ask for it; every other key is a setting of the recipe."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})
    model: Annotated[str, StringConstraints(max_length=500)]
    training_file: Annotated[str, StringConstraints(max_length=200)]
    validation_file: str | None = None
    suffix: Annotated[str, StringConstraints(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    metadata: dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]] | None = (
        None
    )
    integrations: list[Any] | None = None

    @property
    def numbers(self) -> Hyperparameters:
        """The hyperparameters, wherever a client puts them."""
        inside_method = ((self.method.supervised if self.method else None) or {}).get("hyperparameters")
        return self.hyperparameters or Hyperparameters.model_validate(inside_method or {})


def fine_tuning(studio: Studio, asked: NewFineTuning) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and metadata of the training that a client asks for. Raises Refusal for what is not there."""
    check_supported(asked)
    metadata = dict(asked.metadata or {})
    if len(metadata) > OTHERS:
        raise Refusal(400, "too_many", f"{len(metadata)} entries of metadata", f"at most {OTHERS}", "metadata")
    settings = (
        dict(asked.model_extra or {}) | base_of(studio, asked.model) | {"folder": training_folder(studio, asked.training_file)}
    )
    if asked.suffix:
        settings.setdefault("name", safe_trigger(asked.suffix))
    if asked.seed is not None:
        settings["seed"] = asked.seed
    settings = job_settings(studio, "train", settings)
    settings = with_numbers(settings, asked.numbers)
    about = {"model": asked.model, "training_file": asked.training_file, "validation_file": asked.validation_file}
    given = asked.numbers.model_dump(exclude_unset=True)
    return settings, metadata | {"openai": about | {"hyperparameters": given}}


def check_supported(asked: NewFineTuning) -> None:
    """Raise Refusal for what OpenAI has and this service does not."""
    if asked.method and asked.method.type != "supervised":
        raise Refusal(400, "unsupported", f"{asked.method.type} is not trained here", "use supervised", "method")
    if asked.integrations:
        raise Refusal(400, "unsupported", "integrations are not sent anywhere from here", "leave them out", "integrations")
    if asked.validation_file is not None:
        hint = "send holdout: names of pictures in the training file that are kept back, or how many"
        raise Refusal(400, "unsupported", "validation pictures come out of the training file", hint, "validation_file")


def training_folder(studio: Studio, id: str) -> str:
    """The dataset that a training file is: its own id, or that of a dataset of the workspace."""
    if id in studio.datasets.ids():
        return id
    file = studio.files.get(id)
    if not file.dataset:
        raise Refusal(400, "no_pictures", f"{file.filename} is no archive of pictures", "send a .zip", "training_file")
    return file.dataset


def base_of(studio: Studio, model: str) -> dict[str, Any]:
    """Settings that name the base: a model that was trained here is where the training begins."""
    found = parse_model(model)
    if found is None:
        if model.startswith("ft:"):
            raise not_found("model", model)
        return {"base": model}
    path, job = adapter_of(studio, model), studio.store.get(found.job)
    return {"base": str(job.settings.get("base") or "pocket"), "init": id_of(studio.workspace, path)}


def adapter_of(studio: Studio, model: str) -> Any:
    """The adapter file of a fine-tuned model or checkpoint. Raises Refusal where it is not there (any more)."""
    from ...reports.run.read import inside as file_inside

    found = parse_model(model)
    if found is None:
        raise not_found("model", model)
    try:
        job = studio.store.get(job_id(found.job))
    except NoSuchJobError:
        raise not_found("model", model, "GET /v1/models lists them") from None
    if found.step is None:
        path = (job.result or {}).get("adapter")
        there = file_inside(job.folder, path) if isinstance(path, str) else None
    else:
        records = [record for _, record in studio.store.events(job.id) if record.get("event") == "saved"]
        names = [str(record.get("path")) for record in records if record.get("step") == found.step]
        there = next((path for name in names if "/" in name and (path := file_inside(job.folder, name))), None)
    if there is None:
        raise not_found("model", model, "GET /v1/models lists them")
    return there


def with_numbers(settings: dict[str, Any], numbers: Hyperparameters) -> dict[str, Any]:
    """Settings with OpenAI's numbers: an epoch is every picture once, the rate is a multiple of the preset's."""
    if numbers.batch_size != "auto":
        settings = {**settings, "batch_size": numbers.batch_size}
    if numbers.n_epochs == "auto" and numbers.learning_rate_multiplier == "auto":
        return settings
    recipe, _ = explain(settings, needed=False)
    if numbers.n_epochs != "auto":
        shown = numbers.n_epochs * count_pictures(recipe.data.folder)
        settings = {**settings, "steps": math.ceil(shown / (recipe.batch_size * recipe.optim.accumulate))}
    if numbers.learning_rate_multiplier != "auto":
        settings = {**settings, "lr": recipe.optim.lr * numbers.learning_rate_multiplier}
    return settings


# ---------------------------------------------------------------- pictures

IGNORED = ("quality", "style", "background", "moderation", "user", "output_compression", "input_fidelity", "complexity",
           "safety_identifier", "partial_images")  # fmt: skip  # of OpenAI's, which nothing here depends on
FORMATS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
MOST = 10  # pictures of a request, as at OpenAI


class Drawing(BaseModel):
    """Pictures as OpenAI's clients ask for them; every other key is a setting of `personalize generate`."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=32_000)]
    model: Annotated[str, StringConstraints(max_length=500)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST)] | None = None
    size: Annotated[str, StringConstraints(max_length=20)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    stream: bool | None = None
    adapters: list[str] | None = Field(None, description="adapters by id or path, each with a strength: ID:0.8")


def drawing(studio: Studio, asked: Drawing, files: Mapping[str, str] = {}) -> dict[str, Any]:
    """Settings of the job that draws what a client asks for, over the `image` among `files`, in its `mask`."""
    given = {name: value for name, value in (asked.model_extra or {}).items() if name not in IGNORED and value is not None}
    if (asked.model_extra or {}).get("background") == "transparent":
        raise Refusal(400, "unsupported", "pictures have no transparent background here", "leave background out", "background")
    settings = {**given, "prompts": [asked.prompt], "seeds": [str(asked.seed or 0)], "count": asked.n or 1}
    if asked.size not in (None, "auto"):
        settings["size"] = asked.size
    stack = list(asked.adapters or [])
    if asked.model and parse_model(asked.model):
        stack = [id_of(studio.workspace, adapter_of(studio, asked.model)), *stack]
    elif asked.model and asked.model.startswith("ft:"):
        raise not_found("model", asked.model, "GET /v1/models lists them")
    elif asked.model:
        settings.setdefault("base", asked.model)
    if stack:
        settings["stack"] = stack
    if "mask" in files:
        settings.setdefault("denoise", 1.0)
    return job_settings(studio, "generate", settings | dict(files))


def form_values(form: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a form as JSON has them: numbers where the settings of drawing are numbers."""
    kinds = {name: one.get("type") for name, one in job_schema("generate")["properties"].items()}
    kinds |= {"n": "integer", "seed": "integer", "stream": "boolean"}
    return {name: typed_value(value, kinds.get(name, "string")) for name, value in form.items()}


def typed_value(value: Any, kind: str) -> Any:
    """A text as a number or truth value where it is one; else as it is, and the check of the setting says what is wrong.

    >>> typed_value("3", "integer"), typed_value("0.5", "number"), typed_value("true", "boolean"), typed_value("x", "number")
    (3, 0.5, True, 'x')
    """
    if not isinstance(value, str):
        return value
    try:
        if kind == "integer":
            return int(value)
        if kind == "number":
            return float(value)
    except ValueError:
        return value
    return {"true": True, "false": False}.get(value.lower(), value) if kind == "boolean" else value
