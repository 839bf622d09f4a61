"""Everything that can be known to be wrong before anything expensive is done."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import sample
from .adapters import Adapter
from .attach import fresh as fresh_deltas
from .base import Base, device_of
from .data import Dataset, fill, read_folder, safe_trigger, without
from .data.store import fingerprint
from .errors import OutputError, RecipeError
from .events import Finished
from .fit import dtype_of, precision_of
from .recipe import Recipe, flatten, to_toml
from .runs import Run, State

# Settings that change nothing about the training itself: a run may go on with other ones.
HARMLESS = {"preset", "output", "name", "dialect", "checkpoint_every", "folder", "device"}
# How a run fits into memory rounds its results, no more; precision and what is quantized are compared as they came out.
HARMLESS |= {"precision", "quantize", "memory", "checkpointing", "free_encoders", "tile_vae", "micro_batch", "compile"}
SAMPLING = {"sample_every", "sample_prompts", "sample_seeds", "sample_steps", "guidance"}
MARGIN = 64 * 2**20  # bytes of disk for everything small


@dataclass(frozen=True)
class Job:
    """A checked run: its recipe with every default filled in, its base and pictures, and where it stands."""

    recipe: Recipe
    base: Base  # on the CPU, until the run is placed
    device: torch.device  # where it is to train
    dataset: Dataset
    run: Run
    about: dict[str, Any]  # what the state must agree with to go on
    state: State | None  # None: start at the beginning
    finished: Finished | None  # not None: there is nothing to do

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.recipe.data.resolution or self.base.resolution

    @property
    def windows(self) -> int:
        """Windows of the text encoder that every caption is brought to, so that they fit into one batch."""
        return self.base.windows([*(example.caption for example in self.dataset.examples), *self.class_captions])

    @property
    def prompts(self) -> list[str]:
        """The sample prompts, filled in."""
        return [self._filled(prompt) for prompt in self.recipe.sampling.sample_prompts]

    @property
    def class_prompts(self) -> list[str]:
        """The prompts that tell how the class is without the trigger, filled in."""
        return [self._filled(template) for template in self.recipe.class_templates]

    @property
    def class_captions(self) -> list[str]:
        """The pictures' captions without the trigger, then the class prompts: what prior 'output' holds."""
        return [*(without(self.dataset.trigger, example.caption)[0] for example in self.dataset.examples), *self.class_prompts]

    def parameters(self, prompt: str, seed: int) -> sample.Parameters:
        """What a sample picture carries in its file."""
        sampling, size = self.recipe.sampling, (self.side, self.side)
        return sample.settings_of(
            self.base, prompt=prompt, seed=seed, steps=sampling.sample_steps, guidance=sampling.guidance, size=size
        )

    def _filled(self, template: str) -> str:
        return fill(template, self.dataset.trigger, self.recipe.data.class_name)


def check(recipe: Recipe, *, fresh: bool = False) -> Job:
    """Check a recipe against the world: pictures, base, targets, prompts, dialect, what the output holds, disk.

    Raises PersonalizeError for the first thing that is wrong. Changes nothing but for making the run folder.
    """
    dataset = read_folder(recipe.data)
    recipe = settled(recipe, dataset)
    assert recipe.output and recipe.name
    if recipe.output.suffix == ".safetensors":
        raise RecipeError(f"--output is the run's folder, and {recipe.output} a file's name", "name the adapter with --name")
    device = torch.device(device_of(recipe.device))
    precision = precision_of(recipe.fitting, device)
    base = Base.load(
        recipe.base,
        "cpu",
        dtype_of(precision),
        prediction=recipe.prediction,
        zero_snr=recipe.zero_snr,
        clip_skip=recipe.clip_skip,
        vae=recipe.vae,
    )
    sample.make_sampler(base, recipe.sampling.sample_steps)
    sample.latent_shape(base, recipe.data.resolution or None)
    run = Run(recipe.output, recipe.name)
    about = {
        "settings": compared(recipe) | held_as(recipe, precision),
        "pictures": [[e.sha256, e.caption] for e in dataset.examples],
        "weights": weights(base),
    }
    state = None if fresh else run.load_state()
    if state:
        check_same(run, state.about, about)
    finished = run.finished() if state and state.done == recipe.steps and run.recipe_text() == to_toml(recipe) else None
    job = Job(recipe, base, device, dataset, run, about, state, finished)
    if not finished:
        rehearse(job)
    return job


def settled(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with those defaults filled in that depend on the pictures: trigger, name, output."""
    name = recipe.name or safe_trigger(dataset.trigger)
    data = recipe.data.model_copy(update={"trigger": dataset.trigger})
    return recipe.model_copy(update={"data": data, "name": name, "output": recipe.output or Path("runs") / name})


def parts(recipe: Recipe, base: Base) -> tuple[str, ...]:
    """The parts of the base that the recipe trains: those with a learning rate."""
    texts = [text.part for text in base.texts] if recipe.optim.text_encoder_lr else []
    return (*(["unet"] if recipe.optim.lr else []), *texts)


def compared(recipe: Recipe) -> dict[str, Any]:
    """The settings that must not change when a run goes on. Class images depend on how pictures are sampled."""
    free = HARMLESS | (SAMPLING if recipe.objective.prior != "images" else set())
    return {name: value for name, value in flatten(recipe).items() if name not in free}


def held_as(recipe: Recipe, precision: str) -> dict[str, Any]:
    """In what the base is held, where the recipe decides it."""
    forced = recipe.fitting.quantize
    return {"precision": precision, "quantize": forced}


def weights(base: Base) -> str:
    """sha256 over the weights of everything that an adapter is trained through."""
    return fingerprint({f"{part}.{name}": p for part, model in base.parts.items() for name, p in model.state_dict().items()})


def check_same(run: Run, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RecipeError, naming the differences, if a state belongs to another run than the one that is asked for."""
    old, new = before["settings"], now["settings"]
    changed = [
        f"--{n.replace('_', '-')} was {old.get(n)}, now {new.get(n)}" for n in sorted({*old, *new}) if old.get(n) != new.get(n)
    ]
    changed += ["the pictures or captions changed"] if before["pictures"] != now["pictures"] else []
    changed += ["the weights of the base changed"] if before["weights"] != now["weights"] else []
    if changed:
        what = f"{run.folder} holds a run that cannot go on like this: {'; '.join(changed[:5])}"
        raise RecipeError(what, "start over with --fresh, choose another --output, or set it back")


def rehearse(job: Job) -> None:
    """Save the adapter as it will be, still empty, read it back and remove it: targets, dialect, output and disk are sound."""
    deltas = fresh_deltas(job.base, job.recipe.adapter, parts(job.recipe, job.base), job.recipe.seed)
    job.run.make()
    path = job.run.folder / ".rehearsal.safetensors"
    Adapter(deltas).save(path, job.recipe.dialect)
    size, free = path.stat().st_size, shutil.disk_usage(job.run.folder).free
    path.unlink()
    saves = 1 + (job.recipe.steps // job.recipe.checkpoint_every if job.recipe.checkpoint_every else 0)
    need = size * (saves + 6) + MARGIN  # the state is three adapters, and a new one is written before the old one goes
    if free < need:
        what = f"{job.run.folder} has {free / 2**20:.0f} MiB free and the run needs about {need / 2**20:.0f} MiB"
        raise OutputError(what, "free some space, choose another --output, or a larger --checkpoint-every")


def is_drawn(path: Path, parameters: sample.Parameters) -> bool:
    """Whether a picture is there that was drawn with just these parameters."""
    wanted = json.loads(json.dumps(asdict(parameters)))  # tuples become lists
    return path.is_file() and wanted == {key: sample.read_parameters(path).get(key) for key in wanted}
