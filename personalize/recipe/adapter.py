"""The section [adapter] of the recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ..adapters.kinds import trainable as trainable_rows
from ..errors import RecipeError
from .one_of import OneOf
from .part import AtCommas, Part, equals, is_off

FULL = "full"  # the kind that is the model's own weights


def trainable() -> tuple[str, ...]:
    """What `--kind` can be."""
    return tuple(trainable_rows())


def _layers_of(fields: dict[str, Any]) -> tuple[str, ...]:
    """The layers that a kind changes where nothing is said."""
    return ("all",) if fields.get("kind") == FULL else ("attention", "feedforward")


class AdapterSpec(Part):
    """The adapter's kind and shape."""

    kind: Annotated[str, OneOf("kinds", trainable)] = Field(
        "lora",
        description="what is learned: LoRA (Hu et al. 2021), DoRA (Liu et al. 2024), LoHa and LoKr (Yeh et al. 2023), "
        "OFT (Qiu et al. 2023), (IA)^3 (Liu et al. 2022), norms: weights and biases of all normalization layers, or full: the "
        "model's own weights",
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


def check_kind(adapter: AdapterSpec, optim: Part, dialect: str) -> None:
    """Raise RecipeError for settings that an adapter's kind does not have."""
    name, rows = adapter.kind, trainable_rows()
    for field in dict.fromkeys(field for row in rows.values() for field in row.settings):
        part = adapter if field in AdapterSpec.model_fields else optim
        if getattr(part, field) != type(part).model_fields[field].default and field not in rows[name].settings:
            others = ", ".join(other for other, row in rows.items() if field in row.settings)
            raise RecipeError(f"--{field.replace('_', '-')} is nothing that --kind {name} has", f"it is a setting of {others}")
    if getattr(optim, "scale_weight_norms", 0) and not rows[name].linear_in:
        others = ", ".join(other for other, row in rows.items() if row.linear_in)
        raise RecipeError(f"--scale-weight-norms scales an update, which --kind {name} has no tensors for", f"{others} have")
    if dialect != "kohya" and name != "lora":
        raise RecipeError(f"--dialect {dialect} holds LoRA only, not --kind {name}", "leave it out: kohya holds every kind")
    if adapter.dropout and name in (FULL, "norms"):
        raise RecipeError(f"--dropout drops inputs of an adapter, and --kind {name} has none", "leave it out")
    if adapter.rslora and adapter.lokr_full:
        raise RecipeError("--rslora and --lokr-full exclude each other", "two whole matrices have no scale: leave one out")
