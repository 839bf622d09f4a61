"""From a name in an adapter file to the layer that it means, whoever wrote it and whatever wrapped the model.

Every name is looked up in tables that are built forward from the layers of the families: kohya's with underscores, and those
with dots, under diffusers' names, LDM's (ComfyUI, OneTrainer's OMI) and older ones of both. What wrappers put in front of a
name or into it is left out first, from names and tables alike, so that no depth of wrapping matters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache

from ..formats.shapes import Shape, same
from .family import Family, weights
from .names import DENOISERS, FAMILIES, KOHYA_PREFIXES, PARTS, families_of, kohya_names, kohya_paths, part_of, says, single_names

# Words of wrappers: peft, torch.compile, DDP and FSDP, checkpointing, LoRA layers, attention processors, ComfyUI's text encoders.
WRAPPERS = {"base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
WRAPPERS |= {"base_layer", "orig_module", "processor", "text_encoders"}
# What else a part is called before a dot: by ComfyUI, by OneTrainer (OMI), in single files, and as kohya's prefixes.
CALLED: dict[str, set[str]] = {
    **{part: {part} for part in PARTS},
    "diffusion_model": set(DENOISERS),
    **{name: {"text_encoder"} for name in ("text_encoder_1", "te", "te1", "clip_l", "clip_h", "cond_stage_model")},
    **{name: {"text_encoder_2"} for name in ("te2", "clip_g")},
    **{name: {"text_encoder_3"} for name in ("te3", "t5", "t5xxl")},
}
for _row in (row for _family in FAMILIES for row in _family.networks):
    for _prefix in _row.prefixes:
        CALLED[_prefix] = {*CALLED.get(_prefix, ()), _row.part}
_LEADS: dict[str, set[str]] = {}  # of several words, in single files
for _text in (text for _family in FAMILIES for text in _family.texts):
    _LEADS.setdefault(".".join(word for word in _text.prefix.split(".") if word and word not in WRAPPERS), set()).add(_text.part)
_LEADS = {lead: parts for lead, parts in sorted(_LEADS.items(), reverse=True) if lead.split(".")[0] not in CALLED}
_HIDDEN = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)_")  # inside kohya's names
_IN_FRONT = re.compile(r"_*(?:(?:base_model|model|module|unet|transformer|diffusion_model|text_encoder(?:_\d)?)_+)")
_FUSED = re.compile(r"(.+[._]attn[._]in_proj)(?:_weight)?")  # OpenCLIP's q, k and v in one
_OLD = re.compile(r"_lora$")  # diffusers before 0.22: to_q_lora


def fused_names(name: str) -> tuple[str, ...]:
    """Of a name that q, k and v share in OpenCLIP's models, one for each, as the tables have them; of others nothing.

    >>> fused_names("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight")[2]
    'conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj:2'
    """
    match = _FUSED.fullmatch(name)
    return tuple(f"{match[1]}:{i}" for i in range(3)) if match else ()


def path_in(family: Family, name: str, shape: Shape = ()) -> str:
    """The canonical path that a name has in a family, or "". Where it may be of two text encoders, the shape of dW decides.

    >>> from .sd import SD1
    >>> path_in(SD1, "unet.base_model.model.mid_block._orig_mod.resnets.0.conv1")
    'unet.mid_block.resnets.0.conv1'
    """
    if name.startswith(KOHYA_PREFIXES):
        return kohya_paths(family).get(name) or kohya_paths(family).get(_unwrap(family, name), "")
    parts, body = split_part(name)
    possible = (part for part in PARTS if not parts or part in parts)
    found = [path for part in possible if (path := _dotted_names(family).get(f"{part}.{body}"))]
    return next((path for path in found if same(shape, weights(family)[path])), found[0] if found else "")


def split_part(name: str) -> tuple[frozenset[str], str]:
    """The parts that a name with dots may be of (none: it does not say), and the path inside, without wrappers.

    >>> split_part("unet.unet.base_model.model.conv_in")
    (frozenset({'unet'}), 'conv_in')
    """
    name, parts = _plain(name), frozenset[str]()
    for lead, own in _LEADS.items():
        if name.startswith(f"{lead}."):
            name, parts = name.removeprefix(f"{lead}."), frozenset(own)
    words = name.split(".")
    while len(words) > 1 and words[0] in CALLED:
        told = parts & CALLED[words[0]] if parts else frozenset(CALLED[words[0]])
        if not told and words[0] != "transformer":  # CLIP's class in single files and in ComfyUI
            break
        parts, words = told or parts, words[1:]
    return parts, _OLD.sub("", ".".join(words))


def find_paths(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, str]:
    """Name => canonical path, in the family that knows most of the names (name => shape of dW), fits their shapes best, is
    claimed by the metadata, and spells them so itself. Names that this family does not know are left out."""
    return dict(_find_paths(tuple(sorted(shapes.items())), tuple(says(metadata, family) for family in FAMILIES)))


@lru_cache(maxsize=8)  # a run writes and reads one adapter's names many times
def _find_paths(named: tuple[tuple[str, Shape], ...], said: tuple[bool, ...]) -> Mapping[str, str]:
    """`find_paths`; `said` is which of the families the metadata claims."""
    best: tuple[tuple[int, int, bool, bool], dict[str, str]] | None = None
    shapes, claimed = dict(named), any(said)
    for family, own in sorted(zip(FAMILIES, said, strict=True), key=lambda one: not one[1]):  # which can end the search
        paths = {name: path for name, shape in shapes.items() if (path := path_in(family, name, shape))}
        wrong = sum(not same(shapes[name], weights(family)[path]) for name, path in paths.items())
        spelled = family in spelled_by(paths, (family,))
        misfit = len(shapes) - len(paths), wrong, claimed and not own, not spelled
        if best is None or misfit < best[0]:
            best = misfit, paths
        if not any(misfit):
            break  # tables of the families behind it need not be made
    return best[1] if best else {}


def spelled_by(paths: Mapping[str, str], families: tuple[Family, ...]) -> tuple[Family, ...]:
    """Those of some families whose own tools write these names (name => path); with dots, names are everybody's."""
    kohya = {name: path for name, path in paths.items() if name.startswith(KOHYA_PREFIXES)}
    return tuple(one for one in families if all(_writes(one, name, path) for name, path in kohya.items()))


def tell_apart(paths: Mapping[str, str], shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> str:
    """The names of the families that a file is of by its spelling, where shapes (by path) and metadata leave more; else ""."""
    fit = families_of(shapes)
    if len(fit) < 2 or any(says(metadata, one) for one in fit):
        return ""
    own = spelled_by(paths, fit)
    return " ".join(one.name for one in own) if len(own) < len(fit) else ""


def _writes(family: Family, name: str, path: str) -> bool:
    written = kohya_names(family).get(path, "")
    return written in (name, _unwrap(family, name)) or (name.startswith(("oft_unet_", "lycoris_")) and _same_body(written, name))


def _same_body(written: str, name: str) -> bool:
    prefix = next(prefix for prefix in KOHYA_PREFIXES if name.startswith(prefix))
    return written.endswith(f"_{name.removeprefix(prefix)}")


def _unwrap(family: Family, name: str) -> str:
    """kohya's name without what wrappers put behind its prefix or into it; as it is if that is no name of this family."""
    prefix = max((one for one in KOHYA_PREFIXES if name.startswith(one)), key=len)
    body = name.removeprefix(prefix)
    while body and f"{prefix}{body}" not in kohya_paths(family):
        shorter = _IN_FRONT.sub("", body, count=1) if _IN_FRONT.match(body) else _HIDDEN.sub("", f"_{body}").removeprefix("_")
        if shorter == body:
            return name
        body = shorter
    return f"{prefix}{body}"


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


@cache
def _dotted_names(family: Family) -> Mapping[str, str]:
    """Every name with dots, its part in front and without wrappers => canonical path."""
    found: dict[str, str] = {}
    for path, body in _bodies(family):
        for spelling in _spellings(_plain(body)):
            found.setdefault(f"{part_of(path)}.{spelling}", path)
    return found


def _bodies(family: Family) -> Iterator[tuple[str, str]]:
    """Canonical path => path inside its part, under each style of names that there is."""
    for style in ("diffusers", "ldm"):
        for path, body in family.denoiser.names_in(style).items():
            yield f"{family.denoiser.part}.{path}", body
    for text in family.texts:
        for layer in text.layers():
            yield f"{text.part}.{layer.path}", layer.path
        for path, body in single_names(text).items():
            yield f"{text.part}.{path}", body.removeprefix("transformer.")


def _spellings(body: str) -> Iterator[str]:
    """A path, without `text_model`, and with what diffusers called projections before 0.22."""
    for own in dict.fromkeys((body, body.removeprefix("text_model."))):
        yield own
        yield own.removesuffix(".0") if own.endswith(".to_out.0") else own
        yield re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", own)
