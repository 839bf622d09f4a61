"""The section [adapter] of the recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ..adapters.kinds import trainable as trainable_rows
from ..adapters.kinds.lora import least_rank
from ..errors import RecipeError
from .one_of import OneOf
from .part import AtCommas, Part, equals, is_off

FULL = "full"  # the kind that is the model's own weights
EMBEDDING = "embedding"  # the kind that changes no weights: vectors for the trigger

# Of [optim], what is about an adapter's layers.
OF_LAYERS = ("lr", "text_encoder_lr", "text_encoder_share", "lora_plus", "lr_scale", "lr_decay", "unfreeze", "pivot",
             "scale_weight_norms")  # fmt: skip


def trainable() -> tuple[str, ...]:
    """What `--kind` can be."""
    return (*trainable_rows(), EMBEDDING)


def _layers_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """The layers that a kind changes where nothing is said."""
    return ("all",) if fields.get("kind") == FULL else ("attention", "feedforward")


class AdapterSpec(Part):
    """The adapter's kind and shape."""

    kind: Annotated[str, OneOf("kinds", trainable)] = Field(
        "lora",
        description="what is learned: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoHa and LoKr (Yeh et al. 2023), "
        "OFT (Qiu et al. 2023), (IA)^3 (Liu et al. 2022), norms: weights and biases of all normalization layers, full: the "
        "model's own weights, or embedding: vectors for the trigger alone (textual inversion, Gal et al. 2022)",
    )
    rank: int = Field(
        8, ge=1, le=1024, description="rank of the UNet update; of OFT, the size of a block; IA3, norms and full have none"
    )
    alpha: float = Field(
        default_factory=lambda fields: float(fields["rank"]),
        gt=0,
        description="the update is scaled by alpha / rank (default: the rank)",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Annotated[tuple[str, ...], AtCommas] = Field(
        default_factory=_layers_of,
        description="UNet layers: attention, self-attention, cross-attention, feedforward, projection, conv, all, or a path glob "
        "(default: attention,feedforward; of full: all)",
    )
    freeze: Annotated[tuple[str, ...], AtCommas] = Field(
        (),
        exclude_if=is_off,
        description="layers that stay as they are, of those that --targets and --text-targets name: down_blocks, IN01, a glob",
    )
    rslora: bool = Field(
        False,
        exclude_if=is_off,
        description="scale by alpha / sqrt(rank), rank-stabilized (Kalajdzievski 2023): LoRA, DoRA, LoHa, LoKr",
    )
    rank_by_timestep: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=is_off,
        description="share of a LoRA's ranks in the UNet that learns where there is most noise, such as 0.5; the others join "
        "as it falls: T-LoRA (Soboleva et al. 2025); 0: all learn at every timestep",
    )
    lokr_factor: int = Field(
        8,
        ge=0,
        le=1024,
        exclude_if=equals(8),
        description="side of LoKr's first half, as near as a layer allows; 0: as square as can be",
    )
    lokr_full: bool = Field(
        False, exclude_if=is_off, description="LoKr of two whole matrices, whatever the rank, without a scale"
    )
    oft_block: int = Field(
        0, ge=0, le=1024, exclude_if=is_off, description="rows that a block of OFT turns, at most; 0: the rank"
    )
    biases: bool = Field(
        False, exclude_if=is_off, description="with --kind norms, also biases of the target layers; A1111 refuses such files"
    )
    text_rank: int = Field(4, ge=1, le=1024, description="rank of the text-encoder update (alpha keeps its ratio to rank)")
    text_targets: Annotated[tuple[str, ...], AtCommas] = Field(
        default_factory=_layers_of,
        description="text-encoder layers: attention, feedforward, all, or a path glob (default: as for the UNet)",
    )
    vectors: int = Field(
        default_factory=lambda fields: int(fields.get("kind") == EMBEDDING),
        ge=0,
        le=64,
        exclude_if=is_off,
        description="vectors that the trigger stands for and that are learned, beside the adapter too; "
        "0: it is read as it is spelled (default: 0; of embedding: 1)",
    )
    init_word: str = Field(
        "", exclude_if=is_off, description="word that the trigger's vectors begin as (default: the class; of a style: style)"
    )


def check_kind(adapter: AdapterSpec, optim: Part, dialect: str) -> None:
    """Raise RecipeError for settings that an adapter's kind does not have."""
    check_words(adapter, optim)
    name, rows = adapter.kind, trainable_rows()
    if name == EMBEDDING:
        return check_embedding(adapter, optim, dialect)
    for field in dict.fromkeys(field for row in rows.values() for field in row.settings):
        part = adapter if field in AdapterSpec.model_fields else optim
        if getattr(part, field) != type(part).model_fields[field].default and field not in rows[name].settings:
            others = ", ".join(other for other, row in rows.items() if field in row.settings)
            raise RecipeError(f"--{field.replace('_', '-')} is nothing that --kind {name} has", f"it is a setting of {others}")
    if getattr(optim, "scale_weight_norms", 0) and not rows[name].linear_in:
        others = ", ".join(other for other, row in rows.items() if row.linear_in)
        raise RecipeError(f"--scale-weight-norms scales an update, which --kind {name} has no tensors for", f"{others} have")
    if adapter.rank_by_timestep and not getattr(optim, "lr", 1):
        raise RecipeError("--rank-by-timestep is about ranks in the UNet, and --lr 0 leaves it alone", "leave one of them out")
    if adapter.rank_by_timestep and least_rank(adapter.rank, adapter.rank_by_timestep) == adapter.rank:
        what = f"--rank-by-timestep {adapter.rank_by_timestep:g} of --rank {adapter.rank} is all of it at every timestep"
        raise RecipeError(what, "a higher --rank, or a smaller share")
    if dialect != "kohya" and name != "lora":
        raise RecipeError(f"--dialect {dialect} holds LoRA only, not --kind {name}", "leave it out: kohya holds every kind")
    if adapter.dropout and name in (FULL, "norms"):
        raise RecipeError(f"--dropout drops inputs of an adapter, and --kind {name} has none", "leave it out")
    if adapter.rslora and adapter.lokr_full:
        raise RecipeError("--rslora and --lokr-full exclude each other", "two whole matrices have no scale: leave one out")


def check_words(adapter: AdapterSpec, optim: Part) -> None:
    """Raise RecipeError for settings of the trigger's vectors that make no sense."""
    if not adapter.vectors:
        if adapter.kind == EMBEDDING:
            raise RecipeError("--vectors 0 leaves --kind embedding nothing to learn", "--vectors 1")
        for part, field in ((adapter, "init_word"), *((optim, name) for name in ("embedding_lr", "embedding_share", "pivot"))):
            if getattr(part, field) != type(part).model_fields[field].default:
                what = f"--{field.replace('_', '-')} is about vectors of the trigger, and none are learned"
                raise RecipeError(what, "--vectors 1 learns one beside the adapter")
    share, pivot, unfreeze = (getattr(optim, field) for field in ("embedding_share", "pivot", "unfreeze"))
    if pivot and unfreeze:
        raise RecipeError("--pivot and --unfreeze exclude each other", "both say when layers begin to learn")
    if share < pivot:
        raise RecipeError(f"nothing would learn between --embedding-share {share:g} and --pivot {pivot:g}", "let them meet")


def check_embedding(adapter: AdapterSpec, optim: Part, dialect: str) -> None:
    """Raise RecipeError for settings of an adapter's layers, which `--kind embedding` does not have."""
    plain = AdapterSpec(kind=EMBEDDING, vectors=adapter.vectors, init_word=adapter.init_word)
    odd = [field for field in AdapterSpec.model_fields if getattr(adapter, field) != getattr(plain, field)]
    odd += [field for field in OF_LAYERS if getattr(optim, field) != type(optim).model_fields[field].default]
    if odd:
        what = f"--{odd[0].replace('_', '-')} is about layers, and --kind embedding changes none"
        other = "--embedding-lr is its rate" if odd[0] == "lr" else f"--kind lora --vectors {adapter.vectors} learns both"
        raise RecipeError(what, f"leave it out: {other}")
    if optim.embedding_share < 1:  # type: ignore[attr-defined]
        raise RecipeError("with --kind embedding nothing is left to train after --embedding-share", "leave that out")
    if dialect != "kohya":
        raise RecipeError(f"--dialect {dialect} is about adapters", "leave it out: every program reads the same embedding")
