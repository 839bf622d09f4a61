"""What an adapter adds to one weight. Every kind answers `delta(W) -> dW`; most need no W.

LowRank     LoRA, also from a convolution's Tucker core: two factors, which add up by concatenation
Dense       dW itself: of full updates, norms, biases, and of sums that no small factors hold
Structured  every other kind: LoHa, LoKr, and OFT, GLoRA, IA3, which depend on the base's W
Decomposed  DoRA: any of these, brought to learned norms; depends on W

How dW comes from tensors stands in kinds/, one file per kind; here is what can be done with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ..errors import AdapterError
from ..families.family import Shape
from ..families.names import same
from .kinds import ALPHA, DORA, DOWN, UP, Kind, MisfitError, dora, lora, row
from .kinds.kind import largest, shapes_of


class Delta(Protocol):
    """An immutable update of one weight, in fp32 on the CPU."""

    @property
    def shape(self) -> Shape:
        """Of dW: [out, in(, kh, kw)], or [c] of a norm or a bias."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether dW depends on the weight that it is added to."""
        ...

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """dW in fp32. Raises AdapterError if it depends on the base's weight and none is given."""
        ...

    def low_rank(self) -> LowRank | None:
        """The same dW as two factors, if they are smaller than dW; exact."""
        ...

    def norm(self) -> float:
        """Frobenius norm of dW; of what is stored, where dW depends on the base."""
        ...

    def finite(self) -> bool:
        """Whether no entry of dW can be NaN or beyond fp32."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """The tensors of a file, by role."""
        ...

    def __mul__(self, weight: float) -> Delta: ...

    def __add__(self, other: Delta) -> Delta: ...


def add(a: Delta, b: Delta) -> Delta:
    """The exact sum. Factors are put side by side while that is smaller than dW; else dW is made.

    Raises AdapterError for shapes that differ, and for updates that depend on the base (Adapter.resolve makes them plain).
    """
    if a.shape != b.shape:
        raise AdapterError(f"updates of shapes {list(a.shape)} and {list(b.shape)} cannot be added")
    for one in (a, b):
        if one.needs_base:
            raise AdapterError(f"{one!r} depends on the base's weights and cannot be added as it is", "name the base: --base")
    x, y = a.low_rank(), b.low_rank()
    if x and y and (x.rank + y.rank <= min(sides(a.shape)) or (isinstance(a, LowRank) and isinstance(b, LowRank))):
        p, q = x.with_alpha(x.rank), y.with_alpha(y.rank)
        return LowRank.of(torch.cat([p.up, q.up], 1), torch.cat([p.down, q.down], 0), p.rank + q.rank)
    return Dense(a.delta() + b.delta())


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """dW = alpha / rank * up @ down (Hu et al. 2021, https://arxiv.org/abs/2106.09685); its own fp32 copy of the factors.

    up is [out, rank] with down [rank, in] on a linear layer, or [out, rank, 1, 1] with [rank, in, kh, kw] on a convolution.
    Raises AdapterError if they do not fit each other.
    """

    up: Tensor
    down: Tensor
    alpha: float

    def __post_init__(self) -> None:
        try:
            lora.shape({UP: tuple(self.up.shape), DOWN: tuple(self.down.shape)})
        except MisfitError:
            what = f"low-rank factors {list(self.up.shape)} and {list(self.down.shape)} do not fit each other"
            raise AdapterError(what) from None
        object.__setattr__(self, "up", _fp32_copy(self.up))
        object.__setattr__(self, "down", _fp32_copy(self.down))
        object.__setattr__(self, "alpha", float(self.alpha))

    @classmethod
    def of(cls, up: Tensor, down: Tensor, alpha: float) -> LowRank:
        """Of fp32 factors that fit each other and that nobody will change: they are not copied."""
        made = object.__new__(cls)
        for name, value in (("up", up), ("down", down), ("alpha", float(alpha))):
            object.__setattr__(made, name, value)
        return made

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What multiplies up @ down."""
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def needs_base(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"LowRank({list(self.shape)}, rank={self.rank}, alpha={self.alpha:g})"

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return lora.delta({UP: self.up, DOWN: self.down}, None, self.alpha)

    def low_rank(self) -> LowRank:
        return self

    def finite(self) -> bool:
        """Judged by the largest entry of each factor, so that no product on the way overflows."""
        return _within_fp32(self.alpha, self.rank, largest(self.up), largest(self.down))

    def stored(self) -> dict[str, Tensor]:
        return {UP: self.up, DOWN: self.down, ALPHA: torch.tensor(self.alpha)}

    def with_alpha(self, alpha: float) -> LowRank:
        """The same dW under another alpha (not 0): their ratio goes into `up`."""
        return self if alpha == self.alpha else LowRank.of(self.up * (self.alpha / alpha), self.down, alpha)

    def __mul__(self, weight: float) -> LowRank:
        if weight == 1:
            return self
        return LowRank.of(self.up * weight, self.down, self.alpha)  # not into alpha: tools read alpha 0 as "alpha = rank"

    def __add__(self, other: Delta) -> Delta:
        return add(self, other)

    def norm(self) -> float:
        """In fp64, from the triangles of both factors: exact, and dW is never formed."""
        return abs(self.scale) * float(torch.linalg.norm(_triangle(self.up) @ _triangle(self.down.transpose(0, 1)).T))


@dataclass(frozen=True, eq=False, repr=False)
class Dense:
    """dW itself, of any shape; its own fp32 copy."""

    weight: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _fp32_copy(self.weight))

    @property
    def shape(self) -> Shape:
        return tuple(self.weight.shape)

    @property
    def needs_base(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Dense({list(self.shape)})"

    def delta(self, weight: Tensor | None = None) -> Tensor:
        return self.weight.clone()

    def low_rank(self) -> None:
        return None

    def norm(self) -> float:
        return frobenius(self.weight)

    def finite(self) -> bool:
        return bool(self.weight.isfinite().all())

    def stored(self) -> dict[str, Tensor]:
        return {"diff": self.weight}

    def __mul__(self, weight: float) -> Dense:
        return Dense(self.weight * weight)

    def __add__(self, other: Delta) -> Delta:
        return add(self, other)


@dataclass(frozen=True, eq=False, repr=False)
class Structured:
    """Named tensors, and the kind that makes dW of them: a row of `kinds`, such as "loha"."""

    kind: str
    tensors: Mapping[str, Tensor]  # by role
    alpha: float | None  # None: no scale
    shape: Shape  # of dW
    strength: float = 1.0  # of kinds that are not linear in their tensors (OFT)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind.lower())
        object.__setattr__(self, "tensors", MappingProxyType({role: _fp32_copy(value) for role, value in self.tensors.items()}))

    @property
    def row(self) -> Kind:
        return row(self.kind)

    @property
    def needs_base(self) -> bool:
        return self.row.needs_base

    @property
    def scale(self) -> float:
        """What multiplies what `factors`, `bound` and `halves` of the kind speak of."""
        return self.strength * self.row.scale(shapes_of(self.tensors), self.alpha)

    def __repr__(self) -> str:
        return f"{self.row.title}({list(self.shape)})"

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if self.needs_base and weight is None:
            raise AdapterError(f"{self!r} depends on the base's weights", "name the base: --base")
        base = _matching_weight(weight, self.shape) if self.needs_base and weight is not None else None
        update = self.row.delta(self.tensors, base, self.alpha).reshape(self.shape if base is None else base.shape)
        return update if self.strength == 1 else self.strength * update

    def low_rank(self) -> LowRank | None:
        factors = self.row.factors(self.tensors) if self.row.factors else None
        if factors is None or factors[0].shape[1] >= min(sides(self.shape)):
            return None
        up, down = factors
        rank = up.shape[1]
        ones = [1] * len(self.shape[2:])
        return LowRank(up.reshape(self.shape[0], rank, *ones), down.reshape(rank, *self.shape[1:]), self.scale * rank)

    @property
    def factor_rank(self) -> int:
        """That of `low_rank`, told from shapes if the kind can; 0 if there are no such factors."""
        if not self.row.factor_rank:
            pair = self.low_rank()
            return pair.rank if pair else 0
        rank = self.row.factor_rank(shapes_of(self.tensors))
        return rank if rank < min(sides(self.shape)) else 0

    def norm(self) -> float:
        if self.needs_base:
            return abs(self.strength) * math.hypot(*(frobenius(value) for value in self.tensors.values()))
        if self.row.halves:  # ||kron(a, b)|| = ||a|| ||b||
            exact = {role: value.double() for role, value in self.tensors.items()}
            return abs(self.scale) * math.prod(map(frobenius, self.row.halves(exact)))
        if factored := self.low_rank():
            return factored.norm()
        return frobenius(self.delta())

    def finite(self) -> bool:
        """Judged by the largest entry of each tensor: dW is not made."""
        whole = all(bool(value.isfinite().all()) for value in self.tensors.values())
        return whole and _within_fp32(self.scale, self.row.bound(self.tensors) if self.row.bound else 1.0)

    def stored(self) -> dict[str, Tensor]:
        if self.strength != 1:
            raise AdapterError(f"{self!r} cannot be stored at a strength of {self.strength:g}", "name the base: --base")
        alpha = self.row.unset_alpha if self.alpha is None else self.alpha
        return dict(self.tensors) | ({} if alpha is None else {ALPHA: torch.tensor(float(alpha))})

    def __mul__(self, weight: float) -> Structured:
        if not self.row.linear_in:
            return Structured(self.kind, self.tensors, self.alpha, self.shape, self.strength * weight)
        scaled = {role: value * weight if role in self.row.linear_in else value for role, value in self.tensors.items()}
        return Structured(self.kind, scaled, self.alpha, self.shape)

    def __add__(self, other: Delta) -> Delta:
        return add(self, other)


@dataclass(frozen=True, eq=False, repr=False)
class Decomposed:
    """DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): dW = strength * (m * W' / ||W'|| - W) with W' = W + inner.

    `magnitude` is [1, in, 1..] for norms of columns, which UIs read, or [out, 1..] for norms of rows (peft, LyCORIS' wd_on_out).
    """

    inner: Delta
    magnitude: Tensor
    strength: float = 1.0
    needs_base: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "magnitude", _fp32_copy(self.magnitude))
        out, inside = self.inner.shape[:2]
        if tuple(self.magnitude.shape[:2]) not in ((1, inside), (out, 1)) or set(self.magnitude.shape[2:]) - {1}:
            raise AdapterError(
                f"magnitudes of shape {list(self.magnitude.shape)} do not fit a weight of {list(self.inner.shape)}"
            )

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def __repr__(self) -> str:
        return f"DoRA({self.inner!r})"

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            raise AdapterError(f"{self!r} depends on the base's weights", "name the base: --base")
        base = _matching_weight(weight, self.shape)
        return self.strength * dora.decompose(base, self.inner.delta(base).reshape(base.shape), self.magnitude)

    def low_rank(self) -> None:
        return None

    def norm(self) -> float:
        return abs(self.strength) * math.hypot(*(frobenius(value) for value in self.stored_tensors().values()))

    def finite(self) -> bool:
        return self.inner.finite() and bool(self.magnitude.isfinite().all())

    def stored_tensors(self) -> dict[str, Tensor]:
        """What a file holds, at strength 1."""
        return self.inner.stored() | {DORA: self.magnitude}

    def stored(self) -> dict[str, Tensor]:
        if self.strength != 1:
            raise AdapterError(f"{self!r} cannot be stored at a strength of {self.strength:g}", "name the base: --base")
        return self.stored_tensors()

    def __mul__(self, weight: float) -> Decomposed:
        return Decomposed(self.inner, self.magnitude, self.strength * weight)

    def __add__(self, other: Delta) -> Delta:
        return add(self, other)


def kind_name(delta: Delta) -> str:
    """A delta's kind, as people call it."""
    named = {LowRank: "a LoRA", Decomposed: "a DoRA"}
    return delta.row.title if isinstance(delta, Structured) else named.get(type(delta), "a full update")


def as_low_rank(delta: Delta) -> LowRank:
    """The same dW of a matrix or convolution as two factors whatever their size: beside a full update stands a unit matrix."""
    if factored := delta.low_rank():
        return factored
    full, ones = delta.delta(), [1] * (len(delta.shape) - 2)
    out, inside = sides(delta.shape)
    if out <= inside:
        return LowRank(torch.eye(out).reshape(out, out, *ones), full, out)
    return LowRank(full.reshape(out, inside, *ones), torch.eye(inside).reshape(inside, *delta.shape[1:]), inside)


def _matching_weight(weight: Tensor, shape: Shape) -> Tensor:
    """The base's weight in fp32. Raises AdapterError if it is of another shape than dW."""
    if not same(shape, tuple(weight.shape)):
        raise AdapterError(f"an update of {list(shape)} does not fit a weight of {list(weight.shape)}", "name the right base")
    return weight.detach().to("cpu", torch.float32)


def _fp32_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def sides(shape: Shape) -> tuple[int, int]:
    """An update of this shape as a matrix: [out, in * kh * kw]; a vector is a column."""
    return shape[0], math.prod(shape[1:])


def _within_fp32(*factors: float) -> bool:
    """Whether no product of some of these is beyond fp32, or NaN."""
    return math.prod(1.0 if abs(one) < 1 else abs(one) for one in factors) < torch.finfo(torch.float32).max


def frobenius(value: Tensor) -> float:
    """The norm of all entries, in fp64."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _triangle(factor: Tensor) -> Tensor:
    """R of the QR of a factor seen as [anything, rank]."""
    rows = factor.transpose(0, 1).flatten(1).T.double()
    return torch.linalg.qr(rows, mode="r").R
