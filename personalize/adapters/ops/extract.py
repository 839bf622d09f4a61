"""An adapter out of two checkpoints: the truncated SVD of what one learned beyond the other, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ...errors import AdapterError
from ...families.names import FAMILIES, claims, same
from ...formats.checkpoint import Weights, close
from ..adapter import Adapter
from ..delta import Delta, Dense, LowRank, frobenius
from . import linalg
from .checkpoints import Change, Report, Source, check_same_shapes, in_fp32, open_source, shared_paths
from .resize import RULES, Cut, check_rule

_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_NOTHING = 1e-7  # of the largest singular value: what factors in fp32 cannot tell from nothing


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
    What rounding to the narrower dtype of both explains is equal. A layer of another shape (the first one of an inpainting
    model) is left out, if it is one of few.
    `clamp_quantile` cuts factors off at that quantile of their entries, as kohya's tool does at 0.99; by default nothing is cut.
    The report measures what truncation lost, and tells what changed and is not in the adapter.

    Raises FamilyMismatchError for two families, BaseModelError for what one lacks, AdapterError for shapes, rules or targets
    that do not fit (half of the layers that were chosen, or more), and if nothing differs.
    """
    _check_rule(rule, value, max_rank, clamp_quantile)
    tuned, base = open_source(tuned), open_source(base)
    paths = shared_paths(tuned, base, parts, lambda path: bool(_matching([path], targets)) and not _is_embedding(path))
    chosen = {path for path in _matching_paths(paths, targets) if not _is_embedding(path)}
    misfits = [path for path in paths if path in chosen and not same(tuned.shape(path), base.shape(path))]
    if 2 * len(misfits) >= len(chosen):
        check_same_shapes(tuned, base, misfits)
    deltas: dict[str, Delta] = {}
    changes, left_out = {}, {}
    for path in paths:
        update = _difference(tuned, base, path)
        if update is None:
            continue
        if path not in chosen or path in misfits or not (full or update.ndim > 1):
            left_out[path] = frobenius(update)
            continue
        deltas[path] = _compress(update, rule, value, max_rank, clamp_quantile) if update.ndim > 1 else Dense(update)
        changes[path] = _truncation(update, deltas[path])
    if not deltas:
        check_same_shapes(tuned, base, misfits)
        differ = f"what differs was not asked for: {next(iter(left_out))} and {len(left_out) - 1} more" if left_out else ""
        raise AdapterError(f"{tuned.path} and {base.path} are the same in every layer that was asked for", differ)
    said = {"ss_sd_model_name": base.path.name, "ss_training_comment": f"{tuned.path.name} minus {base.path.name}"}
    row = base.row or tuned.row
    said |= claims(row) if row in FAMILIES else {}
    return Adapter(deltas, said), Report(changes, left_out)


def _check_rule(rule: str, value: float, max_rank: int | None, clamp_quantile: float | None) -> None:
    if rule == "size":
        raise AdapterError("size weighs all layers against each other", "extract at a rank, then resize")
    check_rule(rule, value, max_rank)
    if clamp_quantile is not None and not 0.5 < clamp_quantile <= 1:
        raise AdapterError(f"a quantile of {clamp_quantile:g} makes no sense", "kohya's tool takes 0.99")


def _is_embedding(path: str) -> bool:
    return ".embeddings." in path


def _difference(tuned: Weights, base: Weights, path: str) -> Tensor | None:
    """W_tuned - W_base in fp32, in the base's shape; None if they are equal but for rounding. Of other shapes: [inf]."""
    if not same(tuned.shape(path), base.shape(path)):
        return torch.tensor([math.inf])
    stored, other = base[path], tuned[path]
    ours, theirs = in_fp32(stored), in_fp32(other).reshape(stored.shape)
    update = (theirs - ours).float()
    if not update.isfinite().all():
        raise AdapterError(f"{path} holds NaN or Inf in {tuned.path} or {base.path}", "is the download complete?")
    return update if update.any() and not _is_rounding(update, ours, (stored.dtype, _dtype_held(other))) else None


def _dtype_held(weight: Tensor) -> torch.dtype:
    """The narrowest dtype that holds it exactly: a model of fp16 that was stored in fp32 later has lost what fp16 cannot hold."""
    narrower = (dtype for dtype in _NARROW if weight.dtype.itemsize > dtype.itemsize or weight.dtype == torch.float16)
    return next((dtype for dtype in narrower if torch.equal(weight.to(dtype).to(weight.dtype), weight)), weight.dtype)


def _is_rounding(update: Tensor, weight: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether every entry is at most what the rounding of one number to both dtypes can make: half a step of each, unless they
    are the same, and half a step of fp16 on the way to bf16."""
    if dtypes[0] == dtypes[1]:
        return False
    above = torch.frexp(torch.maximum(weight.abs(), (weight + update).abs())).exponent - 1  # 2 ** above <= the larger of both
    facts = [torch.finfo(dtype) for dtype in {*dtypes, *([torch.float16] if torch.bfloat16 in dtypes else [])}]
    unit = torch.ldexp(torch.ones_like(update), above)
    steps = [(unit * one.eps).clamp(min=one.tiny * one.eps) for one in facts]  # at least the smallest number there is
    return bool((update.abs() <= 0.5 * sum(steps)).all())


def _compress(update: Tensor, rule: str, value: float, max_rank: int | None, clamp_quantile: float | None) -> LowRank:
    """dW as two factors of the rank wanted, with alpha = rank."""
    most = min(int(value) if rule == "rank" else update.numel(), max_rank or update.numel())
    svd = linalg.of_matrix(update.flatten(1), most if rule == "rank" else None)
    top = min(most, int((svd.s > _NOTHING * svd.s[0]).sum()))
    cut = Cut("", svd.s, top, 1, top, 1)
    (rank,) = RULES[rule].choose([cut], value)
    pair = linalg.low_rank(svd, tuple(update.shape), rank)
    return pair if clamp_quantile is None else _clamp(pair, svd.s[:rank], clamp_quantile)


def _clamp(pair: LowRank, values: Tensor, quantile: float) -> LowRank:
    """Factors U S and V, cut off at a quantile of all their entries (kohya's extract_lora_from_models).

    Of signed entries there; here of sizes, for the signs of singular vectors are an accident: the same if both are as frequent.
    """
    root = values.sqrt().float()
    up, down = pair.up.flatten(1) * root, pair.down.flatten(1) / root[:, None]
    sizes = torch.cat([up.flatten(), down.flatten()]).abs()
    limit = float(sizes.kthvalue(max(1, round((2 * quantile - 1) * len(sizes)))).values)
    return LowRank(up.clamp(-limit, limit).reshape_as(pair.up), down.clamp(-limit, limit).reshape_as(pair.down), pair.alpha)


def _truncation(update: Tensor, delta: Delta) -> Change:
    return Change(frobenius(update), frobenius(update - delta.delta()), delta.rank if isinstance(delta, LowRank) else 0)


def _matching_paths(paths: Sequence[str], targets: Sequence[str]) -> set[str]:
    """The paths that any glob names. Raises AdapterError for a glob that names none."""
    for target in targets:
        if not _matching(paths, [target]):
            raise AdapterError(f"no layer matches the target {target!r}", close(target.replace("*", ""), paths))
    return _matching(paths, targets)


def _matching(paths: Sequence[str], targets: Sequence[str]) -> set[str]:
    whole = ((path, name) for path in paths for name in (path, path.partition(".")[2]))
    return {path for path, name in whole if any(fnmatchcase(name, target) for target in targets)}
