"""Everything that can be known to be wrong before anything expensive is done."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.delta import Delta
from ..adapters.embedding import Embedding, load_learned, save_learned
from ..data.batches import generator
from ..data.cache import fingerprint
from ..data.captions import fill, remove_triggers, safe_trigger
from ..data.dataset import Concept, Dataset, Example
from ..data.folder import read_folder, regularization, without_cut_masks
from ..data.latents import grid_of
from ..errors import DataError, OutputError, RecipeError, nearest
from ..families.names import claims
from ..families.notation import choose_by_seed, variants
from ..inference import schedulers
from ..inference.prompts import parse
from ..inference.record import read_record
from ..inference.request import Request
from ..io import weights_hash
from ..models.model import Base, device_of
from ..models.precision import dtype_of, precision_of
from ..models.skeleton import Skeleton
from ..pictures.galleries import check_output
from ..recipe.adapter import FULL
from ..recipe.fields import Recipe
from ..recipe.lines import PromptLine, parse_line
from ..recipe.resolve import to_toml
from ..recipe.settings import flatten
from ..text import plain
from ..tuning.continued import start_from
from ..tuning.rates import Rate, rates_of
from ..tuning.targets import fresh as fresh_deltas
from ..tuning.textual_inversion import Vectors, continue_words
from .changes import changes_since, identity
from .events import Finished
from .memory.moments import states_held
from .objectives.draws import check_timesteps
from .objectives.objective import needs_of
from .optimizers import check_optimizer
from .rundir import Run, State
from .sample_names import sample_name
from .trackers import check_trackers
from .wording import begin_words

# Settings that change nothing about the training itself: a run may go on with other ones.
HARMLESS = {"preset", "output", "name", "dialect", "save_precision", "checkpoint_every", "folder", "regularization", "device"}
HARMLESS |= {"choose", "leave_one_out", "trackers"}
# How a run fits into memory rounds its results, no more; precision and what is quantized are compared as they came out.
HARMLESS |= {"precision", "quantize", "memory", "checkpointing", "free_encoders", "tile_vae", "micro_batch", "compile", "offload"}
SAMPLING = {"sample_every", "sample_prompts", "sample_seeds", "sample_steps", "guidance", "sampler"}
MARGIN = 64 * 2**20  # bytes of disk for everything small


@dataclass(frozen=True)
class RunPlan:
    """A checked run: its recipe with every default filled in, its base and pictures, and where it stands."""

    recipe: Recipe
    base: Base  # on the CPU, until the run is placed
    device: torch.device  # where it is to train
    dataset: Dataset  # what is trained on
    held: tuple[Example, ...]  # what is not
    run: Run
    about: dict[str, Any]  # what the state must agree with to go on
    state: State | None  # None: start at the beginning
    finished: Finished | None  # not None: there is nothing to do
    start: Mapping[str, Delta]  # the adapter before its first step
    words: Vectors = field(default_factory=dict)  # that are learned, before the first step: word => text encoder => vectors
    init: Mapping[str, Any] | None = None  # which adapter that is, where it is one
    regularization: Dataset | None = None  # class images that somebody brought
    changes: tuple[str, ...] = ()  # since the run was here last, what it was asked for
    history: Sequence[Mapping[str, Any]] = ()  # all such changes: after how many steps, and what

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.recipe.data.resolution or self.base.resolution

    @functools.cached_property
    def windows(self) -> int:
        """Windows of the text encoder that every caption is brought to, so that they fit into one batch."""
        written = [way for example in (*self.dataset.examples, *self.held) for way in variants(example.caption)]
        with self.base.knowing(self.words):
            return self.base.windows([*written, *self.class_captions], weighted=True, shuffled=self.recipe.data.varies)

    @functools.cached_property
    def rates(self) -> dict[str, Rate]:
        """How each layer learns. Raises RecipeError for patterns that name none."""
        return rates_of(self.base.family, self.start, self.recipe.optim, self.recipe.steps)

    @property
    def folds(self) -> list[Run]:
        """The runs that leave a picture out, if the recipe wants such."""
        wanted = min(self.recipe.choosing.leave_one_out, len(self.dataset.examples))
        return [self.run.fold(number) for number in range(1, wanted + 1)]

    @property
    def prompts(self) -> list[str]:
        """The sample prompts, filled in, without the options behind them."""
        return [line.text for line in self.lines]

    @functools.cached_property
    def lines(self) -> list[PromptLine]:
        """The sample prompts, filled in: all of them for the first concept, and the first with a trigger for each other one.

        Raises RecipeError for what is not read in them.
        """
        templates = self.recipe.sampling.sample_prompts
        called = [template for template in templates if "{trigger}" in template][:1]
        others = [self._fill(template, one) for one in self.dataset.concepts[1:] for template in called]
        own = [self._fill(template) for template in templates]
        filled = [*own, *(prompt for prompt in dict.fromkeys(others) if prompt not in own)]
        return [_sample_line(prompt, self.recipe.seed) for prompt in filled]

    @property
    def class_prompts(self) -> list[str]:
        """The prompts that tell how the class, or each of several, is without the trigger, filled in."""
        concepts, templates = self.dataset.concepts, self.recipe.objective.prior_prompts
        fitting = [(text, one) for one in concepts for text in templates if one.class_name or "{class}" not in text]
        return list(dict.fromkeys(self._fill(text, one) for text, one in fitting))

    @property
    def class_captions(self) -> list[str]:
        """The pictures' captions without the triggers, then the class prompts: what prior 'output' holds."""
        triggers = self.dataset.triggers
        captions = [variants(example.caption)[0] for example in self.dataset.examples]
        return [*(remove_triggers(triggers, caption)[0] for caption in captions), *self.class_prompts]

    def sample_request(self, prompt: int, seed: int, **changed: Any) -> Request:
        """A sample image of a prompt and a seed by their numbers; a prompt's own seed is the first of as many."""
        (text, options), seeds = self.lines[prompt], self.recipe.sampling.sample_seeds
        own = {**options, "seed": (options.get("seed", seeds[0]) + seeds[seed] - seeds[0]) % 2**32}
        return replace(self.request(text, 0), **own | changed)

    def sample_requests(self, seeds: int | None = None, **changed: Any) -> dict[str, Request]:
        """The sample images by the names of their files, without the step: every prompt with all seeds, or the first ones."""
        numbers = [(p, s) for p in range(len(self.lines)) for s in range(len(self.recipe.sampling.sample_seeds[:seeds]))]
        requests = [(self.lines[p], self.sample_request(p, s, **changed)) for p, s in numbers]
        return {self._sample_name(line, request): request for line, request in requests}

    def _sample_name(self, line: PromptLine, request: Request) -> str:
        """The name of a sample image without its step: another one where that name's images were drawn in another way."""
        name, whole = sample_name(*line, request.seed), request.complete(self.base)
        records = [record_of(path) for path in self.run.drawings(name)]
        if all(record is None or is_record_of(record, whole) for record in records):
            return name
        return sample_name(line.text, {**line.options, "drawn": whole.record()}, request.seed)

    def request(self, prompt: str, seed: int, **changed: Any) -> Request:
        """A sample image, as the recipe wants it drawn."""
        return Request(prompt, seed, size=(self.side, self.side), **self.recipe.sampling.how | changed)

    def _fill(self, template: str, concept: Concept | None = None) -> str:
        """Filled in for a concept, by default the first."""
        concept = concept or self.dataset.concepts[0]
        return fill(template, concept.trigger, concept.class_name)


def _sample_line(prompt: str, seed: int) -> PromptLine:
    """A sample prompt with its choices made. Raises RecipeError for what is not read in it."""
    text, options = parse_line(choose_by_seed(prompt, seed))
    for one in (text, options.get("negative", "")):
        if parse(one).uses:
            raise RecipeError(f"--sample-prompts: adapters cannot be named in '{one:.60}'", "samples show the run's own")
    return PromptLine(text, options)


def check(
    recipe: Recipe, *, fresh: bool = False, base: Base | None = None, claim: Callable[[Run], object] = lambda run: None
) -> RunPlan:
    """Check a recipe against the world: pictures, base, targets, prompts, dialect, what the output holds, disk.

    Raises PersonalizeError for the first thing that is wrong. Changes nothing but for making the run folder. `base` is the one
    that the recipe names, if it was loaded before. `claim` is called before anything in the run folder is believed.
    """
    whole, asked = read_folder(recipe.data), recipe.choosing.holdout
    recipe = with_defaults(recipe, whole)
    assert recipe.output and recipe.name
    check_output(recipe.data.folder, recipe.output)
    if recipe.output.suffix == ".safetensors":
        raise RecipeError(f"--output is the run's folder, and {recipe.output} a file's name", "name the adapter with --name")
    run = Run(recipe.output, recipe.name)
    claim(run)
    state = None if fresh else run.load_state()
    before = held_before(recipe, asked, whole, state)
    if state and before:
        recipe = holding_back(recipe, still_held(recipe, whole, state))
    device = torch.device(device_of(recipe.device))
    check_optimizer(recipe.optim, device)
    check_trackers(recipe.trackers)
    precision = precision_of(recipe.fitting, device)
    base = base or Base.of(recipe, "cpu", dtype_of(precision))
    check_timesteps(recipe.objective, base.noise)
    schedulers.make_sampler(base, recipe.sampling.sample_steps, recipe.sampling.sampler)
    schedulers.latent_shape(base, recipe.data.resolution or None)
    dataset, held = split(without_cut_masks(recipe.data.folder, whole, grid_of(base, recipe), base.factor), recipe)
    brought = class_folder(recipe)
    about: dict[str, Any] = {
        "settings": settings_to_compare(recipe) | held_as(recipe, precision),
        "pictures": [identity(e) for e in (*dataset.examples, *(brought.examples if brought else ()))],
        "weights": weights(base),
    }
    about |= {"held": [example.sha256 for example in held]} if held or before else {}
    if before:
        about["settings"]["holdout"] = before  # the same pictures, whatever they are called now
    start, words = fresh_deltas(base, recipe.adapter, parts(recipe, base), recipe.seed), begin_words(recipe, base, dataset)
    init: dict[str, Any] | None = state.about.get("init") if state else None  # the state holds what was made of it
    if recipe.init and not state:
        init, start, words = begin_with(recipe.init, base, start, words)
    about |= {"init": init} if init else {}
    history: list[dict[str, Any]] = state.more.get("changes", []) if state else []
    changes = changes_since(state, about, recipe, run, names_of(recipe, dataset)) if state else []
    if state and before and any(state.about.get(name, about[name]) != about[name] for name in ("pictures", "held")):
        changes += held_words(recipe, before)
    same = state and state.done == recipe.steps and run.recipe_text() == recipe_text(recipe, history)
    finished = run.finished_event() if same else None
    if state and changes and not finished:
        history = [*history, {"after": state.done, "what": changes}]
    told = init, brought, tuple(changes), tuple(history)
    plan = RunPlan(recipe, base, device, dataset, held, run, about, state, finished, start, words, *told)
    _ = plan.rates  # patterns that name no layer are told now
    for _, options in plan.lines:
        schedulers.latent_shape(base, options.get("size"))
    if not finished:
        rehearse(plan)
    return plan


def begin_with(
    path: Path, base: Base, start: Mapping[str, Delta], words: Vectors
) -> tuple[dict[str, Any], dict[str, Delta], Vectors]:
    """What an adapter file is, for the run's files, and a start that does what it does. Raises AdapterError."""
    adapter = load_learned(path)
    said = adapter.metadata.get
    facts = {"file": path.name, "sha256": weights_hash(path), "steps": said("personalize.step") or said("ss_steps")}
    begun = start_from(base, adapter, start, str(path)), continue_words(words, adapter, str(path))
    return {name: value for name, value in facts.items() if value}, *begun


def class_folder(recipe: Recipe) -> Dataset | None:
    """The class images that somebody brought, if any."""
    if recipe.data.regularization is None:
        return None
    return regularization(recipe.data.regularization, recipe.objective.prior_prompts[0], recipe.data.class_name)


def with_defaults(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with those defaults filled in that depend on others: trigger, class, name, output, what is held back and how."""
    name = recipe.name or safe_trigger(dataset.trigger)
    data = recipe.data.model_copy(update={"trigger": dataset.trigger, "class_name": dataset.concepts[0].class_name})
    told: dict[str, Any] = {"data": data, "name": name, "output": recipe.output or Path("runs") / name}
    if recipe.adapter.kind == FULL:  # rounded weights cannot be trained
        told["fitting"] = recipe.fitting.model_copy(update={"quantize": "none"})
    return holding_back(recipe, kept_back(recipe, dataset)).model_copy(update=told)


def holding_back(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with these pictures held back."""
    return recipe.model_copy(update={"choosing": recipe.choosing.model_copy(update={"holdout": tuple(names)})})


def kept_back(recipe: Recipe, dataset: Dataset) -> list[str]:
    """Names of the pictures that are held back; a number draws so many. Raises RecipeError for a name that is none."""
    names, asked = names_of(recipe, dataset), recipe.choosing.holdout
    if is_number(asked, names):
        order = torch.randperm(len(names), generator=generator(recipe.seed, "holdout")).tolist()
        asked = tuple(names[i] for i in sorted(order[: int(asked[0])]))
    for name in asked:
        if name not in names:
            raise RecipeError(f"--holdout: there is no picture {name} in {recipe.data.folder}", nearest(name, names))
    if len(set(asked)) == len(names) or (recipe.choosing.leave_one_out and len(names) == 1):
        raise RecipeError(f"nothing is left to train on: there are {len(names)} pictures", "hold fewer back")
    return list(asked)


def is_number(holdout: Sequence[str], names: Sequence[str]) -> bool:
    """Whether --holdout says how many pictures, and not which."""
    return len(holdout) == 1 and holdout[0].isdecimal() and holdout[0] not in names


def held_before(recipe: Recipe, asked: Sequence[str], dataset: Dataset, state: State | None) -> list[str]:
    """The pictures that a run has held back so far, where it goes on and is `asked` for as many; else none."""
    if state is None or not is_number(asked, names_of(recipe, dataset)):
        return []
    before: list[str] = state.about["settings"].get("holdout", [])
    return before if len(before) == len(recipe.choosing.holdout) else []


def still_held(recipe: Recipe, dataset: Dataset, state: State) -> list[str]:
    """The pictures that a run has held back so far, by their bytes, as they are called now: none that comes later takes their
    place, and none that was learned."""
    shas, before = state.about.get("held"), state.about["settings"].get("holdout", [])
    pairs = zip(names_of(recipe, dataset), dataset.examples, strict=True)
    return [name for name, example in pairs if (name in before if shas is None else example.sha256 in shas)]


def held_words(recipe: Recipe, before: Sequence[str]) -> list[str]:
    """What is told where a number of pictures is held back and the folder has others now."""
    now = recipe.choosing.holdout
    what = f"--holdout {len(before)} holds the same pictures back: {', '.join(now)}" if now else "what was held back is gone"
    return [f"{what}; {len(before) - len(now)} of them gone" if 0 < len(now) < len(before) else what]


def names_of(recipe: Recipe, dataset: Dataset) -> list[str]:
    """The pictures' names below the folder."""
    return [example.path.relative_to(recipe.data.folder).as_posix() for example in dataset.examples]


def split(dataset: Dataset, recipe: Recipe) -> tuple[Dataset, tuple[Example, ...]]:
    """What is trained on, and what is held back."""
    pairs = list(zip(names_of(recipe, dataset), dataset.examples, strict=True))
    kept = tuple(example for name, example in pairs if name not in recipe.choosing.holdout)
    if not kept:
        raise DataError("nothing is left to train on but what is held back", "hold fewer back")
    return replace(dataset, examples=kept), tuple(example for name, example in pairs if name in recipe.choosing.holdout)


def parts(recipe: Recipe, base: Base | Skeleton) -> tuple[str, ...]:
    """The parts of the base that the recipe trains: those with a learning rate."""
    texts = [row.part for row in base.family.texts] if recipe.optim.text_encoder_lr else []
    return (*([base.family.denoiser.part] if recipe.optim.lr else []), *texts)


def settings_to_compare(recipe: Recipe) -> dict[str, Any]:
    """The settings that must not change when a run goes on. Class images depend on how pictures are sampled."""
    free = HARMLESS | (SAMPLING if not needs_of(recipe.objective).class_images else set())
    return {name: value for name, value in flatten(recipe).items() if name not in free}


def held_as(recipe: Recipe, precision: str) -> dict[str, Any]:
    """In what the base is held, where the recipe decides it."""
    return {"precision": precision, "quantize": recipe.fitting.quantize}


def weights(base: Base) -> str:
    """sha256 over the weights of everything that an adapter is trained through, as they were when it was first asked for."""
    kept: dict[str, Any] = vars(base)
    if "weights" not in kept:
        named = {f"{part}.{name}": p for part, model in base.parts.items() for name, p in model.state_dict().items()}
        kept["weights"] = fingerprint(named)
    return str(kept["weights"])


def rehearse(plan: RunPlan) -> None:
    """Save the adapter as it will be, still empty, read it back and remove it: targets, dialect, output and disk are sound."""
    plan.run.make()
    path = plan.run.folder / ".rehearsal.safetensors"
    words = {word: Embedding(vectors).inside() for word, vectors in plan.words.items()}
    adapter = Adapter(plan.start, claims(plan.base.family), words)
    save_learned(adapter, path, plan.recipe.dialect, {}, plan.recipe.save_precision)
    size, free = path.stat().st_size, shutil.disk_usage(plan.run.folder).free
    path.unlink()
    saves = 2 + (plan.recipe.steps // plan.recipe.checkpoint_every if plan.recipe.checkpoint_every else 0)
    need = size * (saves + 2 * (1 + states_held(plan.recipe.optim))) + MARGIN  # a new state is written beside the old one
    if plan.recipe.adapter.kind == FULL:
        need += 2 * size_of(plan.base.path)  # the model, beside an earlier one
    if free < need:
        what = f"{plan.run.folder} has {free / 2**20:.0f} MiB free and the run needs about {need / 2**20:.0f} MiB"
        raise OutputError(what, "free some space, choose another --output, or a larger --checkpoint-every")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file())


def recipe_text(recipe: Recipe, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """The recipe.toml of a run: the recipe as it is now, below what it did not begin with."""
    notes = [f"# after step {one['after']}: {plain(what)}\n" for one in history for what in one["what"]]
    return "".join(notes) + to_toml(recipe)


def is_drawn(path: Path, request: Request) -> bool:
    """Whether an image is there that was drawn from just this request, which is complete."""
    record = record_of(path)
    return record is not None and is_record_of(record, request)


def record_of(path: Path) -> Mapping[str, Any] | None:
    """What an image says of how it was drawn; None for one that is damaged or not there."""
    try:
        return read_record(path)
    except (OSError, ValueError, TypeError):
        return None


def is_record_of(record: Mapping[str, Any], request: Request) -> bool:
    """Whether an image's record is that of a request, which is complete."""
    return all(record.get(key) == value for key, value in request.record().items())
