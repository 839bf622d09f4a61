"""Between checkpoints and adapters: an adapter out of two checkpoints, an adapter into one, and a blend of two.

All of it streams: one parameter at a time is read, worked on in fp32 and written, so that memory is bounded by the largest
layer. Inputs are paths or open Weights, and are never touched. The VAE stays the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ...errors import AdapterError, BaseModelError, FamilyMismatchError, nearest
from ...families import names as keys
from ...families.checkpoint import open_weights
from ...formats.checkpoint import Weights, check_destination, close, rewrite
from ...formats.header import short
from ..adapter import Adapter
from ..delta import Delta, Dense, LowRank, frobenius
from ..strengths.grammar import every_part
from . import linalg
from .resize import RULES, Cut, check_rule

Source = Weights | str | Path
Strengths = float | Mapping[str, float]  # one for all, or per part; parts that are not named count 1.0
STORY = "personalize.merged"  # metadata: what a checkpoint was made of
_NOTHING = 1e-7  # of the largest singular value: what factors in fp32 cannot tell from nothing


@dataclass(frozen=True)
class Change:
    """What became of one parameter: Frobenius norms of its update and of what was lost of that, and the rank that holds it."""

    norm: float
    lost: float
    rank: int = 0


@dataclass(frozen=True)
class Report:
    """What was done, by canonical path, which changed parameters were left out => norm of their update, and what was written."""

    changes: Mapping[str, Change]
    left_out: Mapping[str, float] = field(default_factory=dict)
    path: Path | None = None

    def part(self, name: str) -> Report:
        """The same for one part of the model."""
        changes = {path: change for path, change in self.changes.items() if keys.part_of(path) == name}
        return Report(changes, {path: norm for path, norm in self.left_out.items() if keys.part_of(path) == name})

    @property
    def error(self) -> float:
        """Relative error of all updates together: by truncation, or by the rounding of the checkpoint's dtype."""
        total = math.hypot(*(change.norm for change in self.changes.values()))
        return math.hypot(*(change.lost for change in self.changes.values())) / total if total else 0.0


# --- extract --------------------------------------------------------------------------------------------------------


def extract(
    tuned: Source,
    base: Source,
    rule: str = "rank",
    value: float = 32,
    *,
    max_rank: int | None = None,
    parts: Sequence[str] = (),
    targets: Sequence[str] = ("*",),
    full: bool = False,
    clamp_quantile: float | None = None,
) -> tuple[Adapter, Report]:
    """What `tuned` learned beyond `base`, as LoRA: the truncated SVD of W_tuned - W_base per layer; what is equal is left out.

    `rule` and `value` are those of `resize`, applied to each layer by itself. `parts` none: all that both have. `targets` are
    globs over canonical paths, with or without the part. `full` adds biases and norms as they are; embedding tables never are.
    `clamp_quantile` cuts factors off at that quantile of their entries, as kohya's tool does at 0.99; by default nothing is cut.
    The report measures what truncation lost, and tells what changed and is not in the adapter.

    Raises FamilyMismatchError for two families, BaseModelError for what one lacks, AdapterError for shapes, rules or targets
    that do not fit, and if nothing differs.
    """
    _check_rule(rule, value, max_rank, clamp_quantile)
    tuned, base = _opened(tuned), _opened(base)
    paths = _shared(tuned, base, parts)
    _check_shapes(tuned, base, [path for path in paths if not _is_table(path)])
    chosen = {path for path in _matching(paths, targets) if not _is_table(path)}
    deltas: dict[str, Delta] = {}
    changes, left_out = {}, {}
    for path in paths:
        update = _difference(tuned, base, path)
        if update is None:
            continue
        if path not in chosen or not (full or update.ndim > 1):
            left_out[path] = frobenius(update)
            continue
        deltas[path] = _compressed(update, rule, value, max_rank, clamp_quantile) if update.ndim > 1 else Dense(update)
        changes[path] = _kept(update, deltas[path])
    if not deltas:
        differ = f"what differs was not asked for: {next(iter(left_out))} and {len(left_out) - 1} more" if left_out else ""
        raise AdapterError(f"{tuned.path} and {base.path} are the same in every layer that was asked for", differ)
    said = {"ss_sd_model_name": base.path.name, "ss_training_comment": f"{tuned.path.name} minus {base.path.name}"}
    return Adapter(deltas, said), Report(changes, left_out)


def _check_rule(rule: str, value: float, max_rank: int | None, clamp_quantile: float | None) -> None:
    if rule == "size":
        raise AdapterError("size weighs all layers against each other", "extract at a rank, then resize")
    check_rule(rule, value, max_rank)
    if clamp_quantile is not None and not 0.5 < clamp_quantile <= 1:
        raise AdapterError(f"a quantile of {clamp_quantile:g} makes no sense", "kohya's tool takes 0.99")


def _is_table(path: str) -> bool:
    return ".embeddings." in path


def _difference(tuned: Weights, base: Weights, path: str) -> Tensor | None:
    """W_tuned - W_base in fp32, in the base's shape; None if they are equal. Tables may differ in length: then inf."""
    if not keys.same(tuned.shape(path), base.shape(path)):
        return torch.tensor([math.inf])
    ours = _wide(base[path])
    update = (_wide(tuned[path]).reshape(ours.shape) - ours).float()
    if not update.isfinite().all():
        raise AdapterError(f"{path} holds NaN or Inf in {tuned.path} or {base.path}", "is the download complete?")
    return update if update.any() else None


def _compressed(update: Tensor, rule: str, value: float, max_rank: int | None, clamp_quantile: float | None) -> LowRank:
    """dW as two factors of the rank wanted, with alpha = rank."""
    most = min(int(value) if rule == "rank" else update.numel(), max_rank or update.numel())
    svd = linalg.of_matrix(update.flatten(1), most if rule == "rank" else None)
    top = min(most, int((svd.s > _NOTHING * svd.s[0]).sum()))
    cut = Cut("", svd.s, top, 1, top, 1)
    (rank,) = RULES[rule].choose([cut], value)
    pair = linalg.low_rank(svd, tuple(update.shape), rank)
    return pair if clamp_quantile is None else _clamped(pair, svd.s[:rank], clamp_quantile)


def _clamped(pair: LowRank, values: Tensor, quantile: float) -> LowRank:
    """Factors U S and V, cut off at a quantile of all their entries (kohya's extract_lora_from_models).

    Of signed entries there; here of sizes, for the signs of singular vectors are an accident: the same if both are as frequent.
    """
    root = values.sqrt().float()
    up, down = pair.up.flatten(1) * root, pair.down.flatten(1) / root[:, None]
    sizes = torch.cat([up.flatten(), down.flatten()]).abs()
    limit = float(sizes.kthvalue(max(1, round((2 * quantile - 1) * len(sizes)))).values)
    return LowRank(up.clamp(-limit, limit).reshape_as(pair.up), down.clamp(-limit, limit).reshape_as(pair.down), pair.alpha)


def _kept(update: Tensor, delta: Delta) -> Change:
    return Change(frobenius(update), frobenius(update - delta.delta()), delta.rank if isinstance(delta, LowRank) else 0)


def _matching(paths: Sequence[str], targets: Sequence[str]) -> set[str]:
    """The paths that any glob names. Raises AdapterError for a glob that names none."""
    chosen: set[str] = set()
    for target in targets:
        found = {path for path in paths if fnmatchcase(path, target) or fnmatchcase(path.partition(".")[2], target)}
        if not found:
            raise AdapterError(f"no layer matches the target {target!r}", close(target.replace("*", ""), paths))
        chosen |= found
    return chosen


# --- bake -----------------------------------------------------------------------------------------------------------


def bake(base: Source, adapters: Iterable[tuple[Adapter, Strengths]], destination: str | Path) -> Report:
    """Write the base with adapters in its weights, W + sum of strength * dW, in its own layout and dtype.

    Computed in fp32; an adapter that depends on the base (DoRA, OFT) is given the base's W. The report tells what the dtype
    rounded off: bf16 loses small updates. To go back, keep the base.

    Raises FamilyMismatchError or AdapterError for an adapter that does not fit, and what `rewrite` raises.
    """
    base = _opened(base)
    updates: dict[str, list[tuple[float, Adapter]]] = {}
    story = []
    for adapter, strengths in adapters:
        check_fit(base, adapter)
        by_part = _by_part(adapter, strengths)
        story.append(f"{_name(adapter)} ({', '.join(f'{part} {strength:g}' for part, strength in by_part.items())})")
        for path in adapter.deltas:
            if strength := by_part[keys.part_of(path)]:
                updates.setdefault(path, []).append((strength, adapter))
    changes: dict[str, Change] = {}

    def baked(path: str) -> Tensor | None:
        if path not in updates:
            return None
        stored = base[path]
        weight = _wide(stored)
        total = weight.clone()
        for strength, adapter in updates[path]:
            total += strength * adapter.deltas[path].delta(weight).reshape(weight.shape)
        changes[path] = _rounded(weight, total, stored.dtype)
        return total

    made = rewrite(base, destination, baked, _told(base, " + ".join([base.path.name, *story])))
    return Report(changes, path=made)


def check_fit(base: Weights, adapter: Adapter) -> None:
    """Raise unless every update has its parameter, in its shape: FamilyMismatchError for another family, else AdapterError."""
    shapes = adapter.shapes
    wrong = [path for path, shape in shapes.items() if path not in base or not keys.same(shape, base.shape(path))]
    if not wrong:
        return
    path = wrong[0]
    here = f"is {list(base.shape(path))}" if path in base else "does not exist"
    what = f"{_name(adapter)} ({adapter.family}) does not fit {base.path} ({base.family}): {len(wrong)} of {len(adapter.deltas)}"
    same = adapter.family in (base.family, "unknown")
    raise (AdapterError if same else FamilyMismatchError)(
        f"{what} updates differ, e.g. {path} is {list(shapes[path])} there and here it {here}",
        "use the base it was trained on",
    )


def _by_part(adapter: Adapter, strengths: Strengths) -> dict[str, float]:
    """The strength of each part of an adapter. Raises AdapterError for parts that are none, and for NaN and infinity."""
    named = strengths if isinstance(strengths, Mapping) else dict.fromkeys(keys.PARTS, strengths)
    for part, strength in named.items():
        if part not in keys.PARTS:
            raise AdapterError(f"no part of a model is called {short(part)!r}", nearest(part, keys.PARTS))
        if not math.isfinite(strength):
            raise AdapterError(f"a strength of {strength} makes no sense", "use a finite number")
    known = every_part(named)
    return {part: known[part] for part in adapter.parts}


def _name(adapter: Adapter) -> str:
    return short(adapter.metadata.get("ss_output_name", "an adapter"))


# --- interpolate ----------------------------------------------------------------------------------------------------


def interpolate(base: Source, tuned: Source, alpha: float, destination: str | Path) -> Report:
    """Write (1 - alpha) base + alpha tuned, of every parameter (Wortsman et al. 2021, https://arxiv.org/abs/2109.01903).

    Layout, dtype and all files beside the weights are the base's; so is a part that only the base has. `alpha` 0 is the base,
    1 is `tuned`; outside of them it extrapolates. Raises as `extract` and `rewrite` do.
    """
    base, tuned = _opened(base), _opened(tuned)
    if not math.isfinite(alpha):
        raise AdapterError(f"an alpha of {alpha} makes no sense", "use a finite number, such as 0.5")
    check_destination(destination, base, tuned)
    paths = _shared(tuned, base, ())
    _check_shapes(tuned, base, paths)
    shared, changes = set(paths), dict[str, Change]()

    def between(path: str) -> Tensor | None:
        if path not in shared:
            return None
        stored = base[path]
        ours = _wide(stored)
        total = torch.lerp(ours, _wide(tuned[path]).to(ours.dtype).reshape(ours.shape), alpha)  # exact at 0 and at 1
        changes[path] = _rounded(ours, total, stored.dtype)
        return total

    story = f"{1 - alpha:g} x {base.path.name} + {alpha:g} x {tuned.path.name}"
    made = rewrite(base, destination, between, _told(base, story))
    return Report(changes, path=made)


# --- both -----------------------------------------------------------------------------------------------------------


def _opened(source: Source) -> Weights:
    return source if isinstance(source, Weights) else open_weights(source)


def _shared(tuned: Weights, base: Weights, parts: Sequence[str]) -> list[str]:
    """The parameters of `parts`, or of all parts that both have; both must have them all."""
    if base.family != tuned.family and "unknown" not in (base.family, tuned.family):
        raise FamilyMismatchError(f"{tuned.path} is {tuned.family} and {base.path} is {base.family}: nothing can be compared")
    for part in parts:
        if part not in keys.PARTS:
            raise AdapterError(f"no part of a model is called {short(part)!r}", nearest(part, keys.PARTS))
        for one in (tuned, base):
            if part not in one.parts:
                raise BaseModelError(f"{one.path} has no {part}", f"it has {' and '.join(one.parts)}")
    common = parts or [part for part in base.parts if part in tuned.parts]
    if not common:
        raise BaseModelError(f"{tuned.path} and {base.path} have no part of a model in common")
    ours, theirs = ({path for path in one if keys.part_of(path) in common} for one in (base, tuned))
    if missing := sorted(ours ^ theirs):
        lacking, having = (tuned, base) if missing[0] in ours else (base, tuned)
        more = f" and {len(missing) - 1} more differ" if len(missing) > 1 else ""
        raise BaseModelError(f"{lacking.path} lacks {missing[0]}, which {having.path} has{more}", "is the download complete?")
    return [path for path in base if path in ours]


def _check_shapes(tuned: Weights, base: Weights, paths: Iterable[str]) -> None:
    if wrong := [path for path in paths if not keys.same(tuned.shape(path), base.shape(path))]:
        path = wrong[0]
        shapes = f"{list(tuned.shape(path))} in {tuned.path} and {list(base.shape(path))} in {base.path}"
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise AdapterError(f"{path} is {shapes}{more}", "both must be of one architecture")


def _rounded(before: Tensor, after: Tensor, dtype: torch.dtype) -> Change:
    """The change of a parameter, and what its dtype rounds off."""
    return Change(
        frobenius(after - before), frobenius(after.to(dtype).to(after.dtype).sub_(after)) if after.dtype != dtype else 0.0
    )


def _told(base: Weights, story: str) -> dict[str, str]:
    """A line about what was made, behind what the base tells of itself."""
    return {STORY: "; ".join(filter(None, (base.metadata.get(STORY), story)))}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
