"""`Kind`: a row that says all about one kind of update, from the tensors of a file to dW and its training; and what rows share.

Roles are spelled as kohya and LyCORIS spell them behind a module's name; other dialects are translated to these. Importing a
row imports no torch: `describe` reads files without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from ...families.family import Shape

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    Tensors = Mapping[str, Tensor]  # by role

Shapes = Mapping[str, Shape]  # role -> shape
UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
KOHYA_ONLY = (UP, DOWN, MID)  # LoRA's roles as kohya spells them; diffusers and peft have words of their own
DORA, MAGNITUDE = "dora_scale", "lora_magnitude_vector"  # the norms of W + dW as LyCORIS stores them, and as peft does: [out]
SCALED = (ALPHA, DORA)
INDICES, VALUES, SIZE = "bias_indices", "bias_values", "bias_size"  # of what a sparse matrix adds to dW, no bias of the layer
INTEGERS = (INDICES, SIZE)
NUMBERS = (ALPHA, "on_input")  # roles that are one number, which no training changes
UP_BIAS = "lora_up.bias"  # of peft's `lora_bias`: alpha / rank times it is the update of the layer's bias
BIASES = ("diff_b", "b_norm", UP_BIAS)  # updates of a bias, beside or without one of the weight
MAX_ENTRIES = 1 << 26  # of one dW; the largest weights that adapters change hold 66 M (Flux), 42 M (SDXL's refiner)
MAX_KERNEL = 7  # of a Tucker core, in each direction


class MisfitError(ValueError):
    """Tensors of one module that do not fit each other."""


class Forward(Protocol):
    """A layer with its update, for training: `out` is `layer(x)`, and may be changed in place."""

    def __call__(self, layer: nn.Module, x: Tensor, out: Tensor, tensors: Tensors, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Size:
    """How large an update is made when training starts; each kind goes by what it has."""

    rank: int = 8
    factor: int = 8  # of LoKr: one side of its first half, at most; 0: both halves as square as can be
    whole: bool = False  # of LoKr: no half is factored
    block: int = 0  # of OFT: the rows that a block turns, at most; 0: as many as the rank says


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of update: one row of `registry.table("kinds")`.

    `delta(tensors, W, alpha)` is the one formula of dW, for reading, merging, baking and training: differentiable in `tensors`,
    with the scale in it, of the shape that `shape` tells or of W's. `W` is the base's weight; None unless `needs_base`.
    """

    title: str  # as people call it
    needs: tuple[str, ...]  # of each, one of the roles that `|` parts
    may: tuple[str, ...]
    shape: Callable[[Shapes], Shape]  # of dW: -1 where the file does not tell, flat over a kernel if stored so
    rank: Callable[[Shapes], int]  # 0: full
    delta: Callable[[Tensors, Tensor | None, float | None], Tensor]
    linear_in: tuple[str, ...] = ()  # roles that carry a strength: all of them times s is dW times s; none if no tensors do that
    needs_base: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # role => how people call the kind where that tensor is there
    alpha_scales: bool = True  # alpha / rank multiplies dW; False: alpha means something else, and so does no alpha
    unset_alpha: float | None = None  # what is written for an alpha that is not set
    on_top: bool = False  # changes what another kind makes, whose tensors stand beside its own
    factors: Callable[[Tensors], tuple[Tensor, Tensor] | None] | None = None  # [out, r] @ [r, in * kh * kw] = dW / scale
    factor_rank: Callable[[Shapes], int] | None = None  # r of `factors`, without making them; 0 where they are None
    bound: Callable[[Tensors], float] | None = None  # what no entry of dW / scale, nor of any product on the way, exceeds
    halves: Callable[[Tensors], tuple[Tensor, Tensor]] | None = None  # whose Kronecker product dW / scale is
    thin: Callable[[Tensors], Sequence[tuple[Tensor, ...]]] | None = None  # each of `halves` [o, i], or two factors of it
    rows: tuple[str, ...] = ()  # roles whose rows are those of dW, or of equal parts of it; none: no rows of dW can be told apart
    whole: tuple[str, ...] = ()  # roles beside which that is not so
    start: Callable[[Tensor, Size, Generator], dict[str, Tensor]] | None = None  # W => dW = 0; None: it is not trained
    forward: Forward | None = None  # where that is cheaper than a layer with W + dW
    settings: tuple[str, ...] = ()  # of the recipe that it has beside rank and alpha: `rslora`, `lora_plus`, `lokr_factor`, ...
    trained_as: str = ""  # what `--kind` calls it, where that is another word than the row's

    @cached_property
    def roles(self) -> frozenset[str]:
        """Every role of this kind."""
        return frozenset(role for group in self.needs for role in group.split("|")).union(self.may)

    @property
    def has_alpha(self) -> bool:
        """Whether its files say by an alpha how strong it is."""
        return self.alpha_scales and (self.on_top or ALPHA in self.roles)

    def complete(self, found: Mapping[str, object]) -> bool:
        """Whether no needed tensor is missing, and none belongs to another kind."""
        return found.keys() <= self.roles and all(any(role in found for role in group.split("|")) for group in self.needs)

    def name(self, found: Mapping[str, object]) -> str:
        """How people call it with these tensors: with DoRA's magnitudes, a LoRA is a DoRA."""
        return next((name for role, name in self.names.items() if role in found), self.title)

    def can_be_cut(self, shapes: Shapes, count: int) -> bool:
        """Whether tensors of these shapes are so many updates below each other, each of this kind."""
        own = [shapes[role] for role in self.rows if role in shapes]
        return bool(own) and not shapes.keys() & set(self.whole) and all(size and size[0] % count == 0 for size in own)

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """What `delta` multiplies the product of the tensors by."""
        return ratio(self.rank(shapes), alpha) if self.alpha_scales else 1.0


def ratio(rank: int, alpha: float | None) -> float:
    """alpha / rank, and 1 without an alpha or a rank."""
    return alpha / rank if alpha is not None and rank else 1.0


def shapes_of(tensors: Tensors) -> dict[str, Shape]:
    """Role => shape."""
    return {role: tuple(value.shape) for role, value in tensors.items()}


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)


def parameters(shapes: Shapes) -> int:
    """How many numbers are stored, alphas and flags aside."""
    return sum(math.prod(shape) for role, shape in shapes.items() if role not in NUMBERS)


# ---------------------------------------------------------------- shapes that several kinds have


def check(fits: bool, shapes: Shapes, *roles: str) -> None:
    """Raises MisfitError, which names these roles with their shapes, unless they fit."""
    if not fits:
        listed = " and ".join(f"{role} {list(shapes[role])}" for role in roles if role in shapes)
        raise MisfitError(f"{listed}: such shapes make no update")


def product(shapes: Shapes, a: str, b: str) -> Shape:
    """The shape of a @ b for [o, r(, 1, 1)] and [r, i(, kh, kw)]."""
    left, right = shapes[a], shapes[b]
    fits = len(left) >= 2 <= len(right) and left[1] == right[0] and 0 not in left + right and set(left[2:]) <= {1}
    if not fits or (left[2:] and not right[2:]):
        raise MisfitError(f"{b} of shape {list(right)} does not fit its other half {list(left)}")
    return (left[0], *right[1:])


def flat_product(shapes: Shapes, a: str, b: str) -> Shape:
    """That of [o, r] and [r, i * kh * kw]."""
    check(len(shapes[a]) == 2 == len(shapes[b]), shapes, a, b)
    return product(shapes, a, b)


def tucker_shape(shapes: Shapes, core: str, out: int, inside: int, *others: str) -> Shape:
    """[out, inside, kh, kw] of a core [r, r, kh, kw]. Larger kernels than any model's would make much of small files."""
    size = shapes[core]
    check(len(size) == 4 and size[0] == size[1] and 0 not in size and max(size[2:]) <= MAX_KERNEL, shapes, core, *others)
    return (out, inside, *size[2:])


def half_shape(shapes: Shapes, half: str, core: str) -> Shape:
    """That of `half`_a and `half`_b: flat, or with a Tucker core between [r, out] and [r, in]."""
    a, b = f"{half}_a", f"{half}_b"
    if core not in shapes:
        return flat_product(shapes, a, b)
    (p, out), (q, inside) = shapes[a], shapes[b]
    check((p, q) == shapes[core][:2] and 0 not in (out, inside), shapes, core, a, b)
    return tucker_shape(shapes, core, out, inside, a, b)


def inner(role: str) -> Callable[[Shapes], int]:
    """The first side of a tensor, as a rank."""
    return lambda shapes: shapes[role][0]


def no_rank(shapes: Shapes) -> int:
    """0: the update is full."""
    return 0


# ---------------------------------------------------------------- halves of LoHa and LoKr


def half(tensors: Tensors, half: str, core: str) -> Tensor:
    """`half`_a @ `half`_b, flat over a kernel; [out, in, kh, kw] with a Tucker core [i, j, kh, kw], a [i, out] and b [j, in]."""
    import torch

    a, b = tensors[f"{half}_a"], tensors[f"{half}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", tensors[core], a, b) if core in tensors else a @ b.flatten(1)


def bound_of(*halves: tuple[str, str]) -> Callable[[Tensors], float]:
    """A bound on every product of halves, each with its core or without."""
    return lambda tensors: math.prod(_half_bound(tensors, half, core) for half, core in halves)


def _half_bound(tensors: Tensors, half: str, core: str) -> float:
    if half in tensors:
        return max(1.0, largest(tensors[half]))  # the other half is made without it
    a, b = tensors[f"{half}_a"], tensors[f"{half}_b"]
    steps = [largest(a), largest(b) * len(b)]
    if core in tensors:
        steps.append(largest(tensors[core]) * len(a))
    return math.prod(max(1.0, step) for step in steps)


def largest(value: Tensor) -> float:
    """The largest magnitude of all entries, in one pass; NaN if one is."""
    low, high = value.aminmax()
    return max(abs(float(low)), abs(float(high)))
