"""The fields of a recipe, section by section, and what no single field can see."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..errors import RecipeError
from .adapter import EMBEDDING, FULL, check_kind
from .adapter import AdapterSpec as AdapterSpec
from .by_layer import read_scales, read_thaws
from .objective import Objective as Objective
from .objective import check_objective
from .one_of import OneOf
from .part import AtCommas, equals, is_off
from .part import Part as Part
from .rule import RATE, WORDS_RATE, check_rule, remarks_on_rates, with_usual
from .samplers import AUTO, SAMPLERS, sampler_name

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _as_list(value: Any) -> Any:
    """A lone number as a list of one text: `holdout = 2`."""
    return [str(value)] if isinstance(value, int) and not isinstance(value, bool) else value


class Data(Part):
    """What is learned: pictures, captions and how they are read."""

    folder: Path = Field(Path("."), description="folder of training pictures")
    trigger: str | None = Field(None, description="word that calls the subject or style (default: the folder's name, made safe)")
    class_name: str = Field("", alias="class", description="what the subject is, e.g. 'dog'; empty for a style")
    caption: str = Field("{trigger} {class}", description="caption of pictures without one; {trigger} and {class} are filled in")
    caption_prefix: str = Field("", description="put before every caption; {trigger} and {class} are filled in")
    caption_shuffle: bool = Field(False, description="shuffle the comma-separated tags of a caption each time")
    keep_tokens: int = Field(1, ge=0, description="so many first tags are never shuffled or dropped")
    tag_dropout: float = Field(0.0, ge=0, le=1, description="share of tags left out each time")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of steps without caption")
    resolution: int = Field(0, ge=0, le=2048, description="side in pixels of a square of the area; 0 means the base's own")
    buckets: bool = Field(True, description="keep proportions, each picture in the nearest of many shapes; off: square crops")
    bucket_step: int = Field(0, ge=0, le=512, description="pixels between the sides of two shapes; 0 means the base's own")
    upscale: bool = Field(False, description="enlarge small pictures, instead of giving them a smaller shape of their own")
    flip: bool = Field(True, description="show each picture mirrored half of the time")
    balance: bool = Field(False, description="give each of several concepts the same share, whatever its number of pictures")
    alpha_mask: bool = Field(False, description="learn only what is opaque (a NAME-masklabel.png beside a picture wins)")
    regularization: Path | None = Field(None, description="folder of class images for prior 'images', instead of drawn ones")

    @property
    def varies(self) -> bool:
        """Whether the same picture's caption differs from step to step, but for being dropped."""
        return self.caption_shuffle or self.tag_dropout > 0


class Optim(Part):
    """The optimizer, its schedule and its brakes."""

    optimizer: Annotated[str, OneOf("optimizers")] = Field(
        "adamw",
        exclude_if=equals("adamw"),
        description="optimizer: AdamW, the same with moments in 8 bits, Prodigy (finds the rate: --lr 1), Adafactor, Lion, "
        "schedule-free AdamW, CAME, or one that was added; a preset's rates are converted to it",
    )
    lr: float = Field(RATE, ge=0, description="learning rate of the UNet adapter, usual for AdamW; 0 leaves the UNet alone")
    lora_plus: float = Field(
        1.0,
        gt=0,
        exclude_if=equals(1.0),
        description="rate of a LoRA's or DoRA's second factor (up) over the first one's: LoRA+ (Hayou et al. 2024)",
    )
    lr_scale: Annotated[tuple[str, ...], AtCommas] = Field(
        (),
        exclude_if=is_off,
        description="rates of layers, as PATTERN=NUMBER times their part's; the last that names a layer counts: "
        "up_blocks=1,down_blocks=0.3 (Howard & Ruder 2018)",
    )
    lr_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        exclude_if=equals(1.0),
        description="rate of a block or layer over that of the next one towards the output",
    )
    unfreeze: str = Field(
        "",
        exclude_if=is_off,
        description="which layers learn from when on, as SHARE:LAYERS of the steps: '1.0:up_blocks,mid; 0.6:down_blocks'; "
        "gradual: from the output to the input in the first half (Howard & Ruder 2018)",
    )
    text_encoder_lr: float = Field(0.0, ge=0, description="learning rate of the text-encoder adapter; 0 leaves it alone")
    text_encoder_share: float = Field(
        1.0, gt=0, le=1, description="share of the steps in which the text encoder learns, before it stays as it is"
    )
    embedding_lr: float = Field(
        WORDS_RATE,
        gt=0,
        exclude_if=equals(WORDS_RATE),
        description="learning rate of the trigger's vectors, where such are learned, as for AdamW: others convert it",
    )
    embedding_share: float = Field(
        1.0,
        gt=0,
        le=1,
        exclude_if=equals(1.0),
        description="share of the steps in which the trigger's vectors learn, before they stay as they are",
    )
    pivot: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=is_off,
        description="share of the steps in which the trigger's vectors learn alone, before the adapter begins: pivotal tuning; "
        "0: both from the first step",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="shape of the learning rate after warm-up")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's second momentum")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 turns clipping off")
    accumulate: int = Field(1, ge=1, description="micro-batches summed into one optimizer step")
    scale_weight_norms: float = Field(
        0.0,
        ge=0,
        exclude_if=is_off,
        description="largest norm of a layer's update, which is scaled back to it after each step, as kohya's option of that "
        "name does; 0 turns it off",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=is_off,
        description="decay of an average of the weights, such as 0.99, which is what is drawn, chosen and saved; it begins "
        "faster, with (1 + n) / (10 + n) after n steps; 0 turns it off",
    )

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        return with_usual(values) if isinstance(values, Mapping) else values

    @field_validator("lr_scale")
    @classmethod
    def _scales(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        read_scales(texts)
        return texts

    @field_validator("unfreeze")
    @classmethod
    def _thaws(cls, text: str) -> str:
        read_thaws(text)
        return text

    def text_encoder_steps(self, steps: int) -> int:
        """In how many of a run's steps the text encoder learns."""
        return math.ceil(self.text_encoder_share * steps) if self.text_encoder_lr else 0


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
Choice = Literal["auto", "yes", "no"]


class Fitting(Part):
    """How the run fits into memory. What is on auto is chosen before the run; what was chosen is told and stored."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the base's weights and of computing; the adapter stays float32 (auto: bfloat16 on a GPU that has it)",
    )
    memory: str = Field("auto", description="what the run may take, such as 6GB; auto: what is free on a GPU, anything on a CPU")
    checkpointing: Choice = Field("auto", description="compute activations again in the backward pass, instead of keeping them")
    free_encoders: Choice = Field("auto", description="keep the VAE and text encoders off the GPU while they have nothing to do")
    tile_vae: Choice = Field("auto", description="draw sample pictures one at a time, and encode and decode them in tiles")
    quantize: Literal["auto", "none", "int8", "fp8", "nf4"] = Field(
        "auto", description="how the UNet's frozen linear layers are held; auto: int8 where nothing milder makes the run fit"
    )
    micro_batch: int = Field(
        0, ge=0, description="pictures computed at once; their gradients add up to the batch's (0: what fits)"
    )
    offload: Choice = Field(
        "auto",
        description="keep the UNet's frozen weights in the host's memory, and bring them to the GPU block by block",
        exclude_if=lambda value: value == "auto",  # recipes were written before there was one
    )
    compile: bool = Field(False, description="compile the UNet's transformer blocks: minutes at first, then faster steps")

    @field_validator("memory")
    @classmethod
    def _readable(cls, text: str) -> str:
        if text != "auto":
            _bytes(text)
        return text

    @property
    def budget(self) -> int | None:
        """Bytes that the run may take; None: to be found out."""
        return None if self.memory == "auto" else _bytes(self.memory)


def _bytes(text: str) -> int:
    """`6GB`, `5.5 GiB`, `800m` or plain bytes, as a number. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if not found or not float(found[1]):
        raise RecipeError(f"--memory must be an amount of memory, not {text!r}", "write 6GB, 5.5GiB or auto")
    return int(float(found[1]) * UNITS[found[2] or ""])


def check_device(device: Any) -> Any:
    """Raise RecipeError for a kind of GPU that is known not to be supported."""
    if str(device).partition(":")[0] == "mps":
        why = "nothing here has been run on one, and some kinds of adapters compute in float64, which it lacks"
        raise RecipeError(f"--device {device}: an Apple GPU is not supported yet: {why}", "--device cpu works on a Mac")
    return device


WITHOUT_CLASS = (
    "{trigger}",
    "{trigger} in the snow",
    "{trigger}, ink drawing",
    "a cat",
)  # sample prompts of a folder of anything


class Sampling(Part):
    """Pictures drawn while training and for the report."""

    sample_every: int = Field(50, ge=0, description="steps between sample pictures; 0 draws them only at the end")
    sample_prompts: tuple[str, ...] = Field(
        ("{trigger} {class}", "{trigger} {class} in the snow", "{trigger} {class}, ink drawing", "a {class}"),
        description="prompts of the sample pictures; keep one without {trigger}",
    )
    sample_seeds: Annotated[tuple[Seed, ...], AtCommas] = Field((0, 1), description="seeds of the sample pictures")
    sample_steps: int = Field(20, ge=1, le=1000, description="denoising steps of the sample pictures")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance of the sample pictures")
    sampler: Annotated[str, BeforeValidator(sampler_name)] = Field(
        AUTO, description=f"sampler of the sample pictures: {', '.join(SAMPLERS)}; auto: the one that the base's own config names"
    )

    @property
    def how(self) -> dict[str, Any]:
        """What a request to draw calls it."""
        return {"steps": self.sample_steps, "guidance": self.guidance, "sampler": self.sampler}


class Choosing(Part):
    """Which checkpoint becomes the adapter, and what tells it."""

    choose: Literal["best", "last", "none"] = Field(
        "best", description="which checkpoint becomes the adapter; last: they are scored all the same; none: nothing is scored"
    )
    holdout: Annotated[tuple[str, ...], AtCommas, BeforeValidator(_as_list)] = Field(
        (), description="pictures kept back from training, to score checkpoints by: file names, or how many (default: none)"
    )
    leave_one_out: int = Field(
        0, ge=0, description="trainings before the real one, each without one picture, to choose the step by what was not learned"
    )


class Recipe(Part):
    """Everything that decides a run: same recipe, seed and machine give the same bytes."""

    base: str = Field("pocket", description="base model: 'pocket', a diffusers folder, a .safetensors checkpoint or a hub id")
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = Field(
        "auto", description="what the base predicts; auto: as it says, or as its weights tell"
    )
    zero_snr: Literal["auto", "yes", "no"] = Field(
        "auto", description="whether the base's noise ends without any signal (Lin et al. 2023); auto: as it says"
    )
    clip_skip: int = Field(1, ge=1, le=12, description="text-encoder layer that is read, from the last: 2 for most anime models")
    vae: str | None = Field(None, description="another VAE than the base's: a folder or a .safetensors file")
    init: Path | None = Field(None, description="adapter file, of any kind and dialect, whose weights the run begins with")
    preset: str | None = Field(None, description="partial recipe: a name from presets/ or a .toml file")
    steps: int = Field(200, ge=1, description="optimizer steps")
    batch_size: int = Field(4, ge=1, description="pictures per step")
    seed: Seed = Field(0, description="seed of everything random")
    name: str | None = Field(None, description="name of the adapter file (default: the trigger)")
    output: Path | None = Field(None, description="run folder (default: runs/TRIGGER)")
    dialect: Literal["kohya", "diffusers", "peft"] = Field("kohya", description="naming scheme of the adapter file")
    save_precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32",
        description="what the adapter file's numbers are kept in; fp16 halves it",
        exclude_if=lambda kept: kept == "fp32",
    )
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0 keeps only the last")
    trackers: Annotated[tuple[Annotated[str, OneOf("trackers")], ...], AtCommas] = Field(
        (), exclude_if=is_off, description="programs that show the run's figures and pictures as it goes"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(check_device)] = Field(
        "auto", description="where to train; not on an Apple GPU (mps) yet"
    )

    data: Data = Data()
    adapter: AdapterSpec = AdapterSpec()
    objective: Objective = Objective()
    optim: Optim = Optim()
    sampling: Sampling = Sampling()
    choosing: Choosing = Choosing()
    fitting: Fitting = Fitting()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        """Refuse what no single field can see."""
        if not (self.optim.lr or self.optim.text_encoder_lr):
            raise RecipeError("nothing would be trained: --lr and --text-encoder-lr are both 0")
        if not self.optim.lr and self.optim.text_encoder_share < 1:
            raise RecipeError("with --lr 0 nothing is left to train after --text-encoder-share", "leave that out")
        check_kind(self.adapter, self.optim, self.dialect)
        check_rule(self.optim)
        check_objective(self.objective)
        if self.adapter.kind == EMBEDDING and self.objective.prior != "none":
            what = f"--prior {self.objective.prior} keeps what has no trigger as it is, and --kind embedding changes nothing else"
            raise RecipeError(what, "leave it out")
        if self.adapter.vectors and not self.optim.lr:
            raise RecipeError(
                "--vectors with --lr 0 learns no adapter's layers of the UNet", "--kind embedding learns the word alone"
            )
        if self.adapter.kind == FULL and self.fitting.quantize not in ("auto", "none"):
            raise RecipeError(f"--quantize {self.fitting.quantize} rounds the weights that --kind full trains", "leave it out")
        if self.data.regularization is not None and self.objective.prior != "images":
            raise RecipeError("--regularization holds class images for --prior images", f"not for --prior {self.objective.prior}")
        brought = self.data.regularization and self.objective.prior_prompts  # folders may name their class
        if self.objective.prior == "images" and not (self.class_templates or brought):
            if self.data.class_name:
                raise RecipeError("--prior images needs --prior-prompts", "what should be drawn? e.g. 'a {class}'")
            raise RecipeError("--prior images needs --class", "what is the subject? e.g. --class dog")
        if self.choosing.leave_one_out and (self.choosing.holdout or self.choosing.choose == "none"):
            other = "--holdout" if self.choosing.holdout else "--choose none"
            raise RecipeError(f"--leave-one-out and {other} exclude each other", "leave one of them out")
        if self.fitting.micro_batch > self.batch_size:
            raise RecipeError(f"--micro-batch {self.fitting.micro_batch} is more than --batch-size {self.batch_size}")
        if self.name is not None and Path(self.name).name != self.name:
            raise RecipeError(f"--name must be a plain file name, not {self.name!r}", "the folder is --output")
        for flag, template in self._templates():
            if unknown := set(re.findall(r"(?<!\\){([^{}|]*)}", template)) - {"trigger", "class"}:
                raise RecipeError(f"{flag} can hold {{trigger}} and {{class}}, not {{{min(unknown)}}}")
        return self

    @property
    def remarks(self) -> list[str]:
        """What is allowed, and most likely not meant."""
        told, warmup = remarks_on_rates(self.optim), self.optim.warmup
        if warmup >= self.steps:
            what = f"--warmup {warmup} is as long as the run or longer ({self.steps} steps), so that --lr is never reached"
            told.append(f"{what}: --warmup {self.steps // 10}")
        if self.adapter.rank_by_timestep:
            told.append("--rank-by-timestep: samples and `generate` go by it; other programs use all ranks at every timestep")
        return told

    @property
    def is_layered(self) -> bool:
        """Whether layers learn differently, or some that would learn do not."""
        timed = self.optim.unfreeze or self.optim.pivot
        return bool(self.optim.lr_scale or timed or self.optim.lr_decay != 1 or self.adapter.freeze)

    @property
    def reading_steps(self) -> int:
        """In how many of the run's steps captions are read anew, as what reads them learns: text encoder, or trigger."""
        words = math.ceil(self.optim.embedding_share * self.steps) if self.adapter.vectors else 0
        return max(words, self.optim.text_encoder_steps(self.steps))

    @property
    def prior_rows(self) -> int:
        """How many rows of a step the prior holds."""
        return max(1, round(self.objective.prior_share * self.batch_size))

    @property
    def class_templates(self) -> tuple[str, ...]:
        """The prior prompts that can be filled in: without a class, those that need none."""
        return tuple(prompt for prompt in self.objective.prior_prompts if self.data.class_name or "{class}" not in prompt)

    def _templates(self) -> Iterator[tuple[str, str]]:
        yield "--caption", self.data.caption
        yield "--caption-prefix", self.data.caption_prefix
        yield from (("--prior-prompts", prompt) for prompt in self.objective.prior_prompts)
        yield from (("--sample-prompts", prompt) for prompt in self.sampling.sample_prompts)


Part.whole = Recipe
