"""Kinds of updates as files store them: which tensors (roles) each has, and what their shapes alone tell. Rows; no torch.

Roles are spelled as kohya and LyCORIS spell them behind a module's name; other dialects are translated to these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...families.names import Shape

Shapes = Mapping[str, Shape]  # role -> shape
UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
DORA, MAGNITUDE = "dora_scale", "lora_magnitude_vector"  # the norms of W + dW as LyCORIS stores them, and as peft does: [out]
NUMBERS = (ALPHA, "on_input")  # roles that are one number
BIASES = ("diff_b", "b_norm")  # updates of a bias, beside or without one of the weight
MAX_ENTRIES = 1 << 26  # of one dW; the largest weights that adapters change hold 66 M (Flux), 42 M (SDXL's refiner)
MAX_KERNEL = 7  # of a Tucker core, in each direction


class MisfitError(ValueError):
    """Tensors of one module that do not fit each other."""


@dataclass(frozen=True)
class Kind:
    """A kind of update. `shape` is that of dW: -1 where the file does not tell, flat over a kernel where it is stored flat."""

    name: str
    needs: tuple[str, ...]  # of each, one of the roles that `|` parts
    may: tuple[str, ...]
    shape: Callable[[Shapes], Shape]  # raises MisfitError
    rank: Callable[[Shapes], int]  # 0: full

    @property
    def roles(self) -> tuple[str, ...]:
        """Every role of this kind."""
        return (*(role for group in self.needs for role in group.split("|")), *self.may)

    def whole(self, found: Mapping[str, object]) -> bool:
        """Whether no needed tensor is missing, and none belongs to another kind."""
        return all(any(role in found for role in group.split("|")) for group in self.needs) and not found.keys() - set(self.roles)


def _check(fits: bool, shapes: Shapes, *roles: str) -> None:
    if not fits:
        listed = " and ".join(f"{role} {list(shapes[role])}" for role in roles if role in shapes)
        raise MisfitError(f"{listed}: such shapes make no update")


def _product(shapes: Shapes, a: str, b: str) -> Shape:
    """The shape of a @ b for [o, r(, 1, 1)] and [r, i(, kh, kw)]."""
    left, right = shapes[a], shapes[b]
    fits = len(left) >= 2 <= len(right) and left[1] == right[0] and 0 not in left + right and set(left[2:]) <= {1}
    if not fits or (left[2:] and not right[2:]):
        raise MisfitError(f"{b} of shape {list(right)} does not fit its other half {list(left)}")
    return (left[0], *right[1:])


def _flat_product(shapes: Shapes, a: str, b: str) -> Shape:
    """That of [o, r] and [r, i * kh * kw]."""
    _check(len(shapes[a]) == 2 == len(shapes[b]), shapes, a, b)
    return _product(shapes, a, b)


def _tucker(shapes: Shapes, core: str, out: int, inside: int, *others: str) -> Shape:
    """[out, inside, kh, kw] of a core [r, r, kh, kw]. Larger kernels than any model's would make much of small files."""
    size = shapes[core]
    _check(len(size) == 4 and size[0] == size[1] and 0 not in size and max(size[2:]) <= MAX_KERNEL, shapes, core, *others)
    return (out, inside, *size[2:])


def _lora(shapes: Shapes) -> Shape:
    """[out, in(, kh, kw)]; with a Tucker core in the middle, the kernel is the core's."""
    up, down = shapes[UP], shapes[DOWN]
    if MID not in shapes:
        if len(up) not in (2, len(down)) or len(down) not in (2, 4):
            raise MisfitError(f"{DOWN} of shape {list(down)} does not fit its other half {list(up)}")
        return _product(shapes, UP, DOWN)
    whole = _tucker(shapes, MID, _product(shapes, UP, MID)[0], down[1], UP, DOWN)
    _check(_product({**shapes, MID: shapes[MID][:2]}, MID, DOWN)[2:] in ((), (1, 1)), shapes, MID, DOWN)
    return whole


def _loha(shapes: Shapes) -> Shape:
    """Both halves are [out, in * kh * kw], or with Tucker cores [r, r, kh, kw] between [r, out] and [r, in]."""
    halves = []
    _check(("hada_t1" in shapes) == ("hada_t2" in shapes), shapes, "hada_t1", "hada_t2")
    for i in (1, 2):
        a, b, core = f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}"
        halves.append(_cored(shapes, a, b, core) if core in shapes else _flat_product(shapes, a, b))
    if halves[0] != halves[1]:
        raise MisfitError(f"hada_w1 makes {list(halves[0])} and hada_w2 {list(halves[1])}")
    return halves[0]


def _cored(shapes: Shapes, a: str, b: str, core: str) -> Shape:
    """A core between [r, out] and [r, in]."""
    (p, out), (q, inside) = shapes[a], shapes[b]
    _check((p, q) == shapes[core][:2] and 0 not in (out, inside), shapes, core, a, b)
    return _tucker(shapes, core, out, inside, a, b)


def _lokr_half(shapes: Shapes, i: int) -> Shape:
    whole, a, b, core = f"lokr_w{i}", f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}"
    if whole in shapes:
        _check(len(shapes[whole]) >= 2 and 0 not in shapes[whole] and not shapes.keys() & {a, b, core}, shapes, whole, a, b, core)
        return shapes[whole]
    return _cored(shapes, a, b, core) if core in shapes else _flat_product(shapes, a, b)


def _lokr(shapes: Shapes) -> Shape:
    """kron(w1 [o1, i1], w2 [o2, i2(, kh, kw)]), w2 flat over the kernel where it is factored without a Tucker core."""
    (out, inside, *more), (low, *rest) = _lokr_half(shapes, 1), _lokr_half(shapes, 2)
    _check(not more, shapes, "lokr_w1")
    return (out * low, inside * rest[0], *rest[1:])


def _lokr_rank(shapes: Shapes) -> int:
    """The inner side of the half that is factored; 0, and then no scale, if both are whole."""
    return next((shapes[b][0] for b in ("lokr_w2_b", "lokr_w1_b") if b in shapes), 0)


def _oft(shapes: Shapes) -> Shape:
    """Blocks [blocks, size, size], or [stages, blocks, size, size] of butterflies: only `out` can be told."""
    *stages, blocks, size, other = shapes["oft_blocks"]
    if size != other:
        raise MisfitError(f"oft_blocks of shape {list(shapes['oft_blocks'])} are not square")
    _check(len(stages) <= 1 and 0 not in shapes["oft_blocks"], shapes, "oft_blocks")
    for count in stages:  # stage i swaps halves over 2^i blocks
        _check(size % 2 == 0 and count <= blocks.bit_length() and blocks % 2 ** (count - 1) == 0, shapes, "oft_blocks")
    _check(math.prod(shapes.get("rescale", (blocks * size,))) == blocks * size, shapes, "oft_blocks", "rescale")
    return (blocks * size, -1)


def _glora(shapes: Shapes) -> Shape:
    """That of b1 @ b2, or of b2 @ b1 in old files; a1 @ a2 is [in, in]."""
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    a, b, c, d = names if glora_is_new(shapes) else (names[1], names[0], names[3], names[2])
    if "bm.weight" in shapes:
        _check(c == "b1.weight", shapes, "bm.weight", c, d)
        whole = _lora({UP: shapes[c], MID: shapes["bm.weight"], DOWN: shapes[d]})
    else:
        whole = _product(shapes, c, d)
    _check(_product(shapes, a, b)[:2] == (whole[1], whole[1]) and set(shapes[b][2:]) <= {1}, shapes, a, b, c, d)
    return whole


def glora_is_new(shapes: Shapes) -> bool:
    """On a square weight both orders fit: then the rank, which is smaller than the width, tells."""
    (out, inner, *_), (other, inside, *_) = shapes["b1.weight"], shapes["b2.weight"]
    return inner == other and (inside != out or out >= inner)


def _glora_rank(shapes: Shapes) -> int:
    return shapes["b2.weight" if glora_is_new(shapes) else "b1.weight"][0]


def _ia3(shapes: Shapes) -> Shape:
    """One factor for each input or output: neither can be told."""
    _check(math.prod(shapes["weight"]) > 0, shapes, "weight")
    return (-1, -1)


def _as_is(role: str, dimensions: tuple[int, ...]) -> Callable[[Shapes], Shape]:
    def shape(shapes: Shapes) -> Shape:
        _check(len(shapes[role]) in dimensions and 0 not in shapes[role], shapes, role)
        return shapes[role]

    return shape


def _inner(role: str) -> Callable[[Shapes], int]:
    return lambda shapes: shapes[role][0]


SCALED = (ALPHA, DORA)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("LoRA", (UP, DOWN), (MID, MAGNITUDE, *SCALED), _lora, _inner(DOWN)),
        Kind(
            "LoHa",
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            ("hada_t1", "hada_t2", *SCALED),
            _loha,
            _inner("hada_w1_b"),
        ),
        Kind(
            "LoKr",
            ("lokr_w1|lokr_w1_a", "lokr_w2|lokr_w2_a"),
            ("lokr_w1_b", "lokr_w2_b", "lokr_t2", *SCALED),
            _lokr,
            _lokr_rank,
        ),
        Kind("OFT", ("oft_blocks",), ("rescale", ALPHA), _oft, lambda shapes: shapes["oft_blocks"][-1]),
        Kind(
            "GLoRA",
            ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
            ("bm.weight", *SCALED),
            _glora,
            _glora_rank,
        ),
        Kind("IA3", ("weight", "on_input"), (), _ia3, lambda shapes: 0),
        Kind("full", ("diff",), (), _as_is("diff", (1, 2, 3, 4, 5)), lambda shapes: 0),
        Kind("norm", ("w_norm",), (), _as_is("w_norm", (1,)), lambda shapes: 0),
    )
}
ROLES = frozenset(role for kind in KINDS.values() for role in kind.roles) | frozenset(BIASES)


def kind_of(found: Mapping[str, object]) -> str:
    """The kind whose tensors these are, by their roles; "" if they are none's, or if one is missing."""
    weights = {role: value for role, value in found.items() if role not in BIASES}
    return next((name for name, kind in KINDS.items() if kind.whole(weights)), "")


def shape(kind: str, shapes: Shapes) -> Shape:
    """The shape of dW, once all tensors are known to fit each other. Raises MisfitError.

    A few bytes of factors can claim a dW of many gigabytes: what no model has is refused.
    """
    try:
        whole = KINDS[kind].shape(shapes) if kind else (-1,)
        for role, size in shapes.items():
            _check(role in NUMBERS or (0 not in size and (len(size) == 1 or role not in BIASES)), shapes, role)
    except (LookupError, ValueError) as error:
        raise error if isinstance(error, MisfitError) else MisfitError("its tensors do not fit each other") from None
    if abs(math.prod(whole)) > MAX_ENTRIES:
        raise MisfitError(f"it claims an update of shape {list(whole)}, larger than any model's weight")
    return whole


def hinted(role: str) -> str:
    """The kind that a lone tensor speaks of."""
    if role in (DORA, MAGNITUDE):
        return "DoRA"
    return next((name for name, kind in KINDS.items() if role in kind.roles and role != ALPHA), "")


def name_of(kind: str, found: Mapping[str, object]) -> str:
    """A kind as people call it: with DoRA's magnitudes, a LoRA is a DoRA; butterflies of OFT are BOFT."""
    if DORA in found or MAGNITUDE in found:
        return "DoRA" if kind == "LoRA" else f"{kind} + DoRA"
    return "LoCon (Tucker)" if MID in found else kind


def scale(kind: str, shapes: Shapes, alpha: float | None) -> float:
    """What multiplies the product of the factors: alpha / rank, and 1 without an alpha or a rank."""
    rank = KINDS[kind].rank(shapes)
    return alpha / rank if alpha is not None and rank and kind != "OFT" else 1.0


def parameters(shapes: Shapes) -> int:
    """How many numbers are stored, alphas and flags aside."""
    return sum(math.prod(shape) for role, shape in shapes.items() if role not in NUMBERS)
