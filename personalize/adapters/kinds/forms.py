"""The forms of LoHa, LoKr, OFT, GLoRA and IA3: how dW comes from their tensors. Rows, each with its paper.

Semantics are those of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS), which writes these files. `W` is the base's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AdapterError
from .kind import glora_is_new

Tensors = Mapping[str, Tensor]  # by role
Dense = Callable[[Tensors, Tensor, float | None], Tensor]  # tensors, W (empty if not needed), alpha => dW before its scale
Factors = Callable[[Tensors], "tuple[Tensor, Tensor] | None"]  # => [out, r], [r, in * kh * kw]


@dataclass(frozen=True)
class Form:
    """How dW is made. `linear_in`: the roles that carry a strength; empty where dW is not linear in any one tensor."""

    dense: Dense
    linear_in: tuple[str, ...]
    factors: Factors | None = None
    needs_base: bool = False
    bound: Callable[[Tensors], float] | None = None  # what no entry of dW, nor of any product on the way, exceeds
    halves: Callable[[Tensors], tuple[Tensor, Tensor]] | None = None  # whose Kronecker product dW is


def largest(value: Tensor) -> float:
    """The largest magnitude of all entries, in one pass; NaN if one is."""
    low, high = torch.aminmax(value)
    return max(abs(float(low)), abs(float(high)))


def _half_bound(t: Tensors, whole: str, core: str) -> float:
    """Of `whole`, or of `whole`_a @ `whole`_b, with a Tucker core or without."""
    if whole in t:
        return max(1.0, largest(t[whole]))  # the other half is made without it
    a, b = t[f"{whole}_a"], t[f"{whole}_b"]
    steps = [largest(a), largest(b) * len(b)]
    if core in t:
        steps.append(largest(t[core]) * len(a))
    return math.prod(max(1.0, step) for step in steps)


def _bound_of(first: str, first_core: str, second: str, second_core: str) -> Callable[[Tensors], float]:
    return lambda t: _half_bound(t, first, first_core) * _half_bound(t, second, second_core)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core [i, j, kh, kw] with a [i, out] and b [j, in] => [out, in, kh, kw]."""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


# ---------------------------------------------------------------- LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098)


def _loha_half(t: Tensors, i: int) -> Tensor:
    a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
    return _tucker(t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b.flatten(1)


def _loha(t: Tensors, weight: Tensor, alpha: float | None) -> Tensor:
    """(w1_a @ w1_b) * (w2_a @ w2_b), entry by entry."""
    return _loha_half(t, 1) * _loha_half(t, 2)


def _loha_factors(t: Tensors) -> tuple[Tensor, Tensor] | None:
    """Rank r^2: every column of one half times every column of the other (Khatri-Rao)."""
    a, b = t["hada_w1_a"], t["hada_w2_a"]
    if "hada_t1" in t or a.shape[1] * b.shape[1] >= min(len(a), t["hada_w1_b"].shape[1]):
        return None  # larger than dW, and of hostile shapes far larger
    up = torch.einsum("oi,oj->oij", a, b).flatten(1)
    return up, torch.einsum("in,jn->ijn", t["hada_w1_b"].flatten(1), t["hada_w2_b"].flatten(1)).flatten(0, 1)


# ---------------------------------------------------------------- LoKr (Yeh et al. 2023, arXiv 2309.14859)


def _lokr_half(t: Tensors, i: int) -> Tensor:
    if f"lokr_w{i}" in t:
        return t[f"lokr_w{i}"]
    a, b = t[f"lokr_w{i}_a"], t[f"lokr_w{i}_b"]
    return _tucker(t[f"lokr_t{i}"], a, b) if f"lokr_t{i}" in t else a @ b.flatten(1)


def _lokr_halves(t: Tensors) -> tuple[Tensor, Tensor]:
    return _lokr_half(t, 1), _lokr_half(t, 2)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """[o1, i1] and [o2, i2(, kh, kw)] => [o1 * o2, i1 * i2(, kh, kw)]. torch.kron fails where sides of 1 leave strides open."""
    (out, inside), (low, deep, *kernel) = one.shape, two.shape
    blocks = one.reshape(out, 1, inside, 1, *[1] * len(kernel)) * two[None, :, None]
    return blocks.reshape(out * low, inside * deep, *kernel)


def _lokr(t: Tensors, weight: Tensor, alpha: float | None) -> Tensor:
    """kron(w1, w2); over a kernel, w1 is 1 x 1."""
    return _kron(*_lokr_halves(t))


def _lokr_factors(t: Tensors) -> tuple[Tensor, Tensor] | None:
    """kron(w1, a @ b) = kron(w1, a) @ kron(1, b) = kron(1, a) @ kron(w1, b), whichever is narrower."""
    if "lokr_w2" in t or "lokr_t2" in t:
        return None
    one, a, b = _lokr_half(t, 1), t["lokr_w2_a"], t["lokr_w2_b"].flatten(1)
    out, inside = one.shape
    if min(out, inside) * a.shape[1] >= min(out * len(a), inside * b.shape[1]):
        return None  # larger than dW, and of hostile shapes far larger
    if inside <= out:
        return _kron(one, a), _kron(torch.eye(inside), b)
    return _kron(torch.eye(out), a), _kron(one, b)


# ---------------------------------------------------------------- OFT (Qiu et al. 2023, arXiv 2306.07280), BOFT (2311.06243)


def rotations(blocks: Tensor, limit: float) -> Tensor:
    """Cayley: R = (1 + Q)(1 - Q)^-1 with Q = B - B^T, whose norm over all blocks is held under `limit` (0: free)."""
    q = (blocks - blocks.transpose(-1, -2)).double()
    size = torch.linalg.vector_norm(q) + 1e-8
    q = q * min(1.0, float(limit / size)) if limit > 0 else q
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    try:
        return torch.linalg.solve(eye - q, eye + q, left=False)
    except torch.linalg.LinAlgError:  # entries so large that 1 is lost beside them
        raise AdapterError(f"OFT blocks {list(blocks.shape)} turn by nothing that can be computed") from None


def _oft(t: Tensors, weight: Tensor, alpha: float | None) -> Tensor:
    """R W - W: blocks turn groups of rows; butterflies turn them in stages, stage i over 2^i blocks. alpha * out limits Q."""
    if not weight.shape[0] == t["oft_blocks"].shape[-3] * t["oft_blocks"].shape[-1]:
        raise AdapterError(f"OFT blocks {list(t['oft_blocks'].shape)} do not fit a weight of {list(weight.shape)}")
    turns, flat = rotations(t["oft_blocks"], (alpha or 0.0) * len(weight)), weight.flatten(1).double()
    if turns.ndim == 3:
        turned = torch.einsum("knm,knc->kmc", turns, flat.unflatten(0, turns.shape[:2])).flatten(0, 1)
    else:
        turned = flat
        for stage, blocks in enumerate(turns):
            pairs = (-1, 2, 2**stage * turns.shape[-1] // 2)
            mixed = turned.unflatten(0, pairs).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, turns.shape[-1]))
            mixed = torch.einsum("bij,bjc->bic", blocks, mixed).flatten(0, 1)
            turned = mixed.unflatten(0, (-1, pairs[2], 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in t:
        turned = turned * t["rescale"].flatten()[:, None]
    return (turned - flat).float()


# ---------------------------------------------------------------- GLoRA (Chavan et al. 2023, arXiv 2306.07967)


def _glora(t: Tensors, weight: Tensor, alpha: float | None) -> Tensor:
    """W a1 a2 + b1 b2. LyCORIS once stored all four the other way round (W a2 a1 + b2 b1), which shapes tell."""
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if not glora_is_new({role: tuple(value.shape) for role, value in t.items()}):
        a1, a2, b1, b2 = a2, a1, b2, b1
    if "bm.weight" in t:
        own = torch.einsum("mnkl,im,nj->ijkl", t["bm.weight"], b1.flatten(1), b2.flatten(1))
    else:
        own = b1.flatten(1) @ b2.flatten(1)
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return mixed + own.reshape(weight.shape)


# ---------------------------------------------------------------- (IA)^3 (Liu et al. 2022, arXiv 2205.05638)


def _ia3(t: Tensors, weight: Tensor, alpha: float | None) -> Tensor:
    """W times a factor per input or output channel, less W."""
    side = 1 if bool(t["on_input"].item()) else 0
    if t["weight"].numel() != weight.shape[side]:
        raise AdapterError(f"IA3 factors {list(t['weight'].shape)} do not fit a weight of {list(weight.shape)}")
    return weight * t["weight"].reshape([-1 if i == side else 1 for i in range(weight.ndim)])


FORMS = {
    "LoHa": Form(_loha, ("hada_w1_a",), _loha_factors, bound=_bound_of("hada_w1", "hada_t1", "hada_w2", "hada_t2")),
    "LoKr": Form(
        _lokr,
        ("lokr_w1", "lokr_w1_a"),
        _lokr_factors,
        bound=_bound_of("lokr_w1", "lokr_t1", "lokr_w2", "lokr_t2"),
        halves=_lokr_halves,
    ),
    "OFT": Form(_oft, (), needs_base=True),
    "GLoRA": Form(_glora, ("a1.weight", "b1.weight"), needs_base=True),
    "IA3": Form(_ia3, ("weight",), needs_base=True),
}
