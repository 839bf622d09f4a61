"""Every name that the layers of a model family go by, and which family a file's names and shapes are of.

Names with underscores for dots (kohya's) are ambiguous backwards, so they are only ever looked up in tables that are built
forward from the layer lists of the families' rows. Norms have names like other layers; a bias goes by its layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from ..formats.shapes import Shape as Shape
from ..formats.shapes import same as same
from ..registry import table
from .family import Family, TextRow, weights
from .family import modules as modules

FAMILIES: tuple[Family, ...] = tuple(table("families").values())  # in the order in which they are recognised
ROWS = {family.name: family for family in FAMILIES}
A1111 = {family.name: family.a1111 for family in FAMILIES if family.a1111}  # its word for families
DENOISERS = tuple(dict.fromkeys(family.denoiser.part for family in FAMILIES))  # what pipelines call them
PARTS = (*DENOISERS, *sorted({row.part for family in FAMILIES for row in family.texts}))
TEXT_PARTS = PARTS[len(DENOISERS) :]
KOHYA_PREFIXES = tuple(dict.fromkeys(f"{prefix}_" for family in FAMILIES for row in family.networks for prefix in row.prefixes))
SPELLED = "personalize.families"  # metadata: the families that spell a file's names so, where its shapes fit more

# Metadata by which a family is known, and what it predicts: what is kept when all else is stripped.
ESSENTIAL = ("ss_base_model_version", "modelspec.architecture", "ss_v2", "modelspec.prediction_type", SPELLED)


def canonical(path: str) -> str:
    """The one path of a module, whatever the library version: CLIP's text encoders always say `text_model`.

    >>> canonical("text_encoder.encoder.layers.0.mlp.fc1")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    part, _, rest = path.partition(".")
    inside = part not in DENOISERS and rest.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"{part}.text_model.{rest}" if inside else path


def native(path: str, models: Mapping[str, Any]) -> tuple[str, str]:
    """A canonical path => part and the module's own path there: CLIPTextModel lost its `text_model` in transformers 5.6."""
    part, _, own = path.partition(".")
    return part, own if hasattr(models.get(part), "text_model") else own.removeprefix("text_model.")


def part_of(path: str) -> str:
    """The part of the model that a module path begins with.

    >>> part_of("unet.conv_in")
    'unet'
    """
    return path.partition(".")[0]


# --- names ----------------------------------------------------------------------------------------------------------


@cache
def kohya_names(family: Family) -> Mapping[str, str]:
    """Canonical path => the name that kohya's tools write and UIs know, for each layer of `weights`, norms too."""
    written = {row.part: row.prefixes[0] for row in family.networks}
    return {path: f"{written[part_of(path)]}_{body}" for path, body in _bodies(family, family.blocks[0]).items()}


@cache
def kohya_paths(family: Family) -> Mapping[str, str]:
    """Every kohya name that a file of this family may use => canonical path.

    The denoiser's blocks as diffusers and as LDM name them, in any mixture; text encoders with and without `text_model`.
    """
    prefixes = {row.part: row.prefixes for row in family.networks}
    paths = {}
    for path, body in (item for blocks in family.blocks for item in _bodies(family, blocks).items()):
        for prefix in prefixes[part_of(path)]:
            paths[f"{prefix}_{body}"] = paths[f"{prefix}_{body.removeprefix('text_model_')}"] = path
    for text in family.texts:
        for layer, body in single_names(text).items():
            for prefix in text.prefixes:
                paths.setdefault(f"{prefix}_{body.replace('.', '_')}", f"{text.part}.{layer}")
    return paths


def single_names(text: TextRow) -> dict[str, str]:
    """Path in a text encoder => its name in a single file, behind the prefix, where that is another one (OpenCLIP's). Names of
    what lies there in one tensor with others have its place behind a colon; what lies there transposed is left out."""
    found = {}
    for layer in text.layers():
        if (address := text.address(layer.path)) is None:
            continue
        body = address.key.removeprefix(text.prefix).removesuffix("weight").rstrip("._")
        place = f":{address.rows[0] // (address.rows[1] - address.rows[0])}" if address.rows else ""
        if not address.transposed and body != layer.path:
            found[layer.path] = body + place
    return found


@cache
def ldm_names(family: Family) -> Mapping[str, str]:
    """Canonical path => the path inside an LDM checkpoint's `model.diffusion_model`, for each layer of the denoiser."""
    return {f"{family.denoiser.part}.{path}": name for path, name in family.denoiser.names_in("ldm").items()}


def _bodies(family: Family, blocks: str) -> dict[str, str]:
    """Canonical path => kohya name without its prefix, with the denoiser's blocks named as diffusers or LDM does."""
    own = {f"{family.denoiser.part}.{path}": name for path, name in family.denoiser.names_in(blocks).items()}
    texts = {path: path.partition(".")[2] for path in _layers(family) if part_of(path) != family.denoiser.part}
    return {path: name.replace(".", "_") for path, name in (own | texts).items()}


def _layers(family: Family) -> list[str]:
    return [path for path in weights(family) if not path.endswith(".bias")]


# --- families -------------------------------------------------------------------------------------------------------


def families_of(shapes: Mapping[str, Shape]) -> tuple[Family, ...]:
    """Every family that has all these weights (canonical paths) with these shapes, as `same` compares them."""
    return tuple(family for family in FAMILIES if _fits(shapes, weights(family)))


def kin(each: Iterable[Mapping[str, Shape]]) -> bool:
    """Whether one family can have all these; those of no known family go with any."""
    known = [set(found) for shapes in each if (found := families_of(shapes))]
    return not known or bool(set.intersection(*known))


def family_of(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Family | None:
    """The first of `candidates`: a row to work with; None if there is none."""
    return next(iter(candidates(shapes, metadata or {})), None)


def candidates(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> tuple[Family, ...]:
    """Every family that an adapter may be of: those that have all its weights with these shapes, of which a file's own word in
    `metadata` tells, or else how its names were spelled. Families can share layers, as SD1 and SD2 share self-attention."""
    fit, spelled = families_of(shapes), metadata.get(SPELLED, "").split()
    claimed = tuple(family for family in fit if says(metadata, family))
    kernels = [path for path, shape in shapes.items() if len(shape) == 4]  # as seldom written for a linear layer
    likely = tuple(family for family in fit if all(len(weights(family)[path]) == 4 for path in kernels)) or fit
    return claimed or tuple(family for family in likely if family.name in spelled) or likely


def names_of(families: Iterable[Family]) -> str:
    """`sd1`, `sd1 or sd2` where nothing tells which, or `unknown`."""
    return " or ".join(family.name for family in families) or "unknown"


def claims(family: Family) -> dict[str, str]:
    """The metadata by which UIs know an adapter of this family."""
    told = {"ss_base_model_version": family.base_version, "modelspec.architecture": family.architecture}
    return told | {"ss_v2": str(family.base_version.startswith("sd_v2"))}  # what A1111 asks


def says(metadata: Mapping[str, str], family: Family) -> bool:
    """Whether a file's metadata claims this family."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    stem = family.architecture.removesuffix("/lora").removesuffix("-512").removesuffix("-base")
    refines = ("refiner" in architecture) == ("refiner" in stem)  # SDXL's stem begins its refiner's
    return version.startswith(family.base_version.removesuffix("-0")) or (architecture.startswith(stem) and refines)


# --- shapes ---------------------------------------------------------------------------------------------------------


def resolve_shape(path: str, shape: Shape, family: Family | None) -> Shape:
    """The weight's true shape, where this family has it and `shape` may be it; else `shape` as given."""
    known = weights(family).get(path) if family else None
    return known if known and same(shape, known) else shape


def _fits(shapes: Mapping[str, Shape], known: Mapping[str, Shape]) -> bool:
    return bool(shapes) and all(path in known and same(shape, known[path]) for path, shape in shapes.items())
