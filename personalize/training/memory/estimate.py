"""What a run will take, from shapes alone: a step, a sample and a save on tensors that hold nothing.

The very code of a run goes over fake tensors (torch's FakeTensorMode), and every byte that they would hold is counted. What
kernels take beside, fragments, and CUDA's own few hundred MB come on top.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...data import cache as store
from ...families.cond import Cond
from ...families.names import DENOISERS
from ...families.recognition import detect
from ...models.joined import join_projections
from ...models.loaded import build, vae_dtype
from ...models.model import Base, quiet
from ...models.offload import offload, offload_of
from ...models.precision import dtype_of
from ...recipe.fields import Recipe
from ...recipe.rule import ADAMW, rule_of
from ...tuning.attach import Attached, attach
from ...tuning.textual_inversion import WordsLearned
from ...tuning.tunable import Tunable
from ..objectives.objective import Inputs, make_objective, needs_of
from ..optimizers import Optimizer
from ..step import Learner, gradients
from .apply import apply_plan
from .ladder import ComputePlan, pieces
from .meter import Count, bytes_of, counting, tensors_of
from .moments import bytes_held

DRAWN = 8  # pictures drawn at once, where memory is no matter


@dataclass(frozen=True)
class Configs:
    """The shapes of a base."""

    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: Mapping[str, Mapping[str, Any]]
    part: str = DENOISERS[0]  # what the denoiser is called

    @staticmethod
    def of(base: Base) -> Configs:
        texts = {text.part: text.model.config.to_dict() for text in base.texts}
        return Configs(dict(base.denoiser.config), dict(base.vae.config), texts, base.family.denoiser.part)


@dataclass(frozen=True)
class Workload:
    """What a run asks of a base: everything that decides a step's shapes."""

    recipe: Recipe
    height: int  # of the largest latents
    width: int
    windows: int = 1
    drawn: int = DRAWN  # sample pictures at once
    prompts: int = 1  # that the prior 'output' holds, where there is one


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors, at the worst moment of a step and of a sample."""

    weights: int  # on the device while it learns
    adapter: int  # parameters, gradients and what the optimizer holds
    activations: int  # at most, in a step
    sampling: int  # everything, at most, while a picture is drawn

    @property
    def peak(self) -> int:
        return max(self.weights + self.adapter + self.activations, self.sampling)


def estimate(configs: Configs, load: Workload, fit: ComputePlan, parts: tuple[str, ...]) -> Estimate:
    """What a run will take. A few seconds the first time, for a true base; then it is remembered on disk."""
    asked = load.recipe.model_dump(mode="json", include={"adapter", "objective", "batch_size"})  # no rate changes a shape
    asked |= {"optimizer": load.recipe.optim.optimizer, "averaged": bool(load.recipe.optim.ema)}
    shapes = [load.height, load.width, load.windows, load.drawn, load.prompts]
    configured = json.loads(json.dumps(asdict(configs), default=str))
    name = store.key(kind="estimate", configs=configured, asked=asked, shapes=shapes, fit=fit.record(), parts=parts, code=_code())

    def compute() -> dict[str, torch.Tensor]:
        return {"bytes": torch.tensor(list(asdict(_estimate(configs, load, fit, parts)).values()))}

    return Estimate(*store.recall(name, compute, [])["bytes"].tolist())


def _code() -> str:
    """What decides an estimate beside its arguments."""
    here = Path(__file__).parent
    others = ("training/objectives", "tuning", "adapters/kinds")
    files = [*sorted(here.glob("*.py")), *(path for room in others for path in sorted((here.parents[1] / room).glob("*.py")))]
    return store.key(sources=[path.read_text(encoding="utf-8") for path in files], torch=torch.__version__)


def _estimate(configs: Configs, load: Workload, fit: ComputePlan, parts: tuple[str, ...]) -> Estimate:
    with quiet():
        base = ghost(configs, fit)
        attached = attach(base, load.recipe.adapter, parts=parts)
    shapes = [tuple(p.shape) for group in attached.parameters().values() for p in group.values()]
    shapes += [tuple(one.shape) for one in vectors_of(base, load.recipe.adapter.vectors).values()]
    has_average = bool(load.recipe.optim.ema or rule_of(load.recipe.optim.optimizer).average)
    held_of_them = bytes_held(load.recipe.optim, shapes)  # by real steps
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        models = [base.denoiser, base.vae, *(text.model for text in base.texts)]
        base.device = torch.device("cpu")  # of shapes: kernels are chosen by device
        solidify(models)
        if fit.offload:
            offload(base.denoiser, base.device)
        elif fit.joined:
            join_projections(base.denoiser)
        learner = with_words(attached, load.recipe.adapter.vectors)
        optim = load.recipe.optim.model_copy(update={"optimizer": ADAMW, "ema": 0.0})  # which takes no step here
        opt = Optimizer(learner.parameters(), optim, load.recipe.steps, scaled=fit.precision == "float16")
        learned = list(opt.parameters.values())
        moments = [torch.empty(held_of_them, dtype=torch.uint8)]
        stay = {id(text.model) for text in base.texts if learner is not attached or text.part in parts}
        leaving = [model for model in models[1:] if fit.lean and id(model) not in stay]
        sizes = [bytes_of(tensors_of([model])) for model in leaving]
        if held := offload_of(base.denoiser):
            sizes.append(bytes_of(held.host))
        with counting(tensors_of(models), moments) as count:
            adapter = 2 * bytes_of(learned) + bytes_of(moments)  # parameters and gradients, and what the optimizer holds of them
            weights = count.now - sum(sizes) - bytes_of(learned) - bytes_of(moments)
            with learner.computing():
                learn(base, load, fit, learner, opt, largest(base, load, parts))
            step = count.peak - sum(sizes)
            opt.skip()
            averaged = [torch.zeros_like(p) for p in learned] if has_average else []  # what is trained is kept aside meanwhile
            count.add(averaged)
            with learner.cast_once():
                sampling = draw(base, load, fit, count, sum(sizes))
    return Estimate(weights, adapter, step - weights - adapter, sampling)


def with_words(attached: Attached, count: int) -> Tunable:
    """What learns: the adapter's layers, and beside them so many vectors in each text encoder."""
    vectors = vectors_of(attached.base, count)
    return WordsLearned(attached, {"word": vectors}, []) if vectors else attached


def vectors_of(base: Base, count: int) -> dict[str, Tensor]:
    """So many vectors for each text encoder, if any."""
    widths = {text.part: int(text.model.get_input_embeddings().weight.shape[1]) for text in base.texts}
    return {part: torch.zeros(count, width) for part, width in widths.items()} if count else {}


def learn(base: Base, load: Workload, fit: ComputePlan, tunable: Tunable, opt: Optimizer, inputs: Inputs) -> Tensor:
    """Forward and backward of one step; the losses and the gradient's norm."""
    plain = load.recipe.objective.model_copy(update={"pyramid_noise": 0.0})  # whose random shapes nothing fake can draw
    objective = make_objective(plain, base.noise)
    learner = Learner(tunable, objective, opt, pieces(fit, load.recipe.batch_size))
    generator = torch.Generator().manual_seed(0)
    return gradients([learner], [[(inputs, lambda _: generator, lambda _: 0)]])[0]


def largest(base: Base, load: Workload, parts: tuple[str, ...]) -> Inputs:
    """The largest batch, all of zeros."""
    recipe, b = load.recipe, load.recipe.batch_size
    needs, k = needs_of(recipe.objective), recipe.prior_rows
    images, output = k * needs.class_images, k * needs.class_captions
    latents = torch.zeros(b + images, base.channels, load.height, load.width)
    with base.knowing({}):  # what has no trigger
        held, alone = [cond_of(base, load, parts, output) if output else None for _ in range(2)]
        alone = cond_of(base, load, (), b) if needs.reference else alone
    return Inputs(latents, latents, cond_of(base, load, parts, b + images), images, held, alone)


@torch.no_grad()
def draw(base: Base, load: Workload, fit: ComputePlan, count: Count, away: int) -> int:
    """Bytes at most while pictures are drawn: reading, one guided step, decoding. `away` bytes of encoders come in turn."""
    rows, here = 1 if fit.tiled else load.drawn, count.now - away
    latents = torch.zeros(rows, base.channels, load.height, load.width)
    cond = cond_of(base, load, (), 2 * rows)
    count.peak = count.now
    base.denoise(torch.cat([latents, latents]), torch.zeros(2 * rows, dtype=torch.long), cond)
    steps, count.peak = count.peak - away, count.now
    base.decode(latents)
    decoding = count.peak - away + (bytes_of(tensors_of([base.vae])) if fit.lean else 0)
    reading = here + max((bytes_of(tensors_of([text.model])) for text in base.texts if fit.lean), default=0)
    return max(reading, steps, decoding)


def cond_of(base: Base, load: Workload, parts: tuple[str, ...], rows: int) -> Cond:
    """Conditioning of so many captions: what text encoders that learn, or read words that do, make of them, else its shape."""
    learning = any(text.part in parts or text.words for text in base.texts)
    read = [text.blank(rows, load.windows, base.dtype, learning) for text in base.texts]
    return base.family.combine(base.family, read)


def ghost(configs: Configs, fit: ComputePlan) -> Base:
    """A base of these shapes that holds nothing, as a ComputePlan makes it compute."""
    from diffusers import AutoencoderKL

    dtype, meta = dtype_of(fit.precision), torch.device("meta")
    family = detect(configs.denoiser, configs.texts, configs.part)
    with meta, default_dtype(dtype):
        denoiser = build(family.denoiser, configs.denoiser)
        texts = tuple(row.reader(None, build(row, configs.texts[row.part])) for row in family.texts)
    with meta, default_dtype(vae_dtype(dtype)):
        vae = AutoencoderKL(**configs.vae)
    for model in (denoiser, vae, *(text.model for text in texts)):
        model.requires_grad_(False).eval()
    base = Base("shapes", Path(), family, meta, dtype, dict(family.scheduler), texts, denoiser, vae, {})
    apply_plan(base, replace(fit, compile=False, lean=False, offload=False, joined=False), meta)
    return base


def solidify(models: Iterable[Any]) -> None:
    """Inside FakeTensorMode, bring what is nowhere to a CPU of shapes."""
    for module in (module for model in models for module in model.modules()):
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(like(old), requires_grad=old.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = like(buffer)


def like(old: Tensor) -> Tensor:
    """The same shape, strides and dtype."""
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new models are in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
