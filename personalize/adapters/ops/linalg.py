"""Singular values and vectors of updates. Low-rank ones are never multiplied out; everything inside is fp64.

Of factors up [out, r] and down [r, in]: QR of both, then the SVD of the r x r core that their triangles make. That is the exact
truncated SVD at the cost of r x r: 1 ms for rank 32 on [1280, 1280], where the SVD of dW takes 0.6 s. The QR is that of Cholesky,
which is nothing but products, where a factor's ranks are apart enough for it, and else that of Householder. fp64 costs
twice the time of fp32 and is worth it: singular values to 4e-14 instead of 5e-7.

The SVD of a Kronecker product (LoKr) is the Kronecker product of both halves' SVDs (Van Loan 2000, "The ubiquitous Kronecker
product"), whose largest values are picked out: exact, a millisecond for any layer of SD 1.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..delta import Delta, LowRank, Structured
from ..delta import sides as sides

# From here on a matrix is sketched if the wanted rank is an eighth of it or less. With as many spare columns as wanted ones and
# four power iterations the error of merges at rank 64 was 1.0003 (TIES) to 1.001 (DARE: noise has no few directions) of the
# smallest possible, in a half to a sixth of the time of `leading_svd`.
_LARGE, _FEW, SPARE, ITERATIONS = 512, 8, 16, 4
_APART = 1e3  # the square of the inverse of a factor with scaled rows: Cholesky's Q is then orthonormal to 1e-12


class Svd(NamedTuple):
    """A = u * s @ v + what is left out: u [out, k], s [k] falling, v [k, in] in fp64; `rest` is the norm of what is left out.

    Where a rank was asked of factors, u and v are cut to it, and s tells all.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    rest: float = 0.0


def factors(pair: LowRank) -> tuple[Tensor, Tensor]:
    """up [out, r] with the scale in it and down [r, in * kh * kw], fp64."""
    up, down = pair.up.flatten(1).double(), pair.down.flatten(1).double()
    return up if pair.scale == 1 else pair.scale * up, down


def svd(delta: Delta, rank: int | None = None) -> Svd:
    """Of an update that does not need its base: exact from its halves or factors, if any, else of dW as `of_matrix` does."""
    if halves := svds_of_halves(delta):
        return of_kronecker(*halves, rank)
    if pair := delta.low_rank():
        return of_factors(*factors(pair), rank)
    return of_matrix(delta.delta().reshape(sides(delta.shape)), rank)


def of_factors(up: Tensor, down: Tensor, rank: int | None = None) -> Svd:
    """Of up @ down, exact; k = min(out, r, in), or the first `rank` vectors beside all values."""
    return core_of(up, down).svd(rank)


class Core(NamedTuple):
    """A product of two factors as left^T @ right of matrices with orthonormal rows behind their triangles."""

    left: Lq
    right: Lq

    def values(self) -> Tensor:
        """All singular values, falling."""
        return torch.linalg.svdvals(self.left.triangle.T @ self.right.triangle)

    def svd(self, rank: int | None = None) -> Svd:
        """All singular values, and all vectors or the first `rank`."""
        u, s, v = torch.linalg.svd(self.left.triangle.T @ self.right.triangle, full_matrices=False)
        return Svd(self.left.span(u[:, :rank].T).T, s, self.right.span(v[:rank]))


def core_of(up: Tensor, down: Tensor) -> Core:
    """Of up [out, r] @ down [r, in]."""
    return Core(lq(up.double().T), lq(down.double()))


class Lq(NamedTuple):
    """A matrix [r, n] as triangle @ Q with orthonormal rows of Q: these are `rows`, or where `solve` says so triangle^-1 rows."""

    rows: Tensor
    triangle: Tensor
    solve: bool

    def span(self, x: Tensor) -> Tensor:
        """x [k, r] @ Q."""
        x = torch.linalg.solve_triangular(self.triangle, x, upper=False, left=False) if self.solve else x
        return x @ self.rows


def lq(matrix: Tensor) -> Lq:
    """By Cholesky, whose error is that of Householder times the square of the condition of the scaled rows: where a bound on that
    is small enough, else by Householder (Yamamoto et al. 2015, Roundoff error analysis of the CholeskyQR2 algorithm)."""
    gram = matrix @ matrix.T
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
        if float(inverse.square().sum(0) @ gram.diagonal()) < _APART:  # NaN is not
            return Lq(matrix, lower, solve=True)
    q, r = torch.linalg.qr(matrix.T)
    return Lq(q.T, r.T, solve=False)


def of_kronecker(one: Svd, two: Svd, rank: int | None = None) -> Svd:
    """Of kron(one [a, b], two [c, d]): [a * c, b * d]; exact: all of it, or the first `rank`."""
    (u, s, v, _), (w, t, x, _) = one, two
    products = torch.outer(s, t).flatten()
    order = products.argsort(descending=True, stable=True)
    i, j = order[:rank] // len(t), order[:rank] % len(t)
    left = (u[:, i][:, None] * w[:, j][None]).flatten(0, 1)
    right = (v[i][:, :, None] * x[j][:, None]).flatten(1)
    return Svd(left, products[order[:rank]], right, float(torch.linalg.norm(products[order[len(i) :]])))


def svds_of_halves(delta: Delta) -> tuple[Svd, Svd] | None:
    """Of both matrices whose Kronecker product dW is, with the scale in the first; None for other kinds. A half that is a product
    of thin factors is not formed."""
    if not isinstance(delta, Structured) or not delta.row.halves:
        return None
    tensors = {role: value.double() for role, value in delta.tensors.items()}
    halves = delta.row.thin(tensors) if delta.row.thin else [(half.flatten(1),) for half in delta.row.halves(tensors)]
    (one, *more), two = halves
    return _svd_of_product(delta.scale * one, *more), _svd_of_product(*two)


def _svd_of_product(one: Tensor, other: Tensor | None = None) -> Svd:
    """Of one matrix, or of the product of two thin ones, without the values that are nothing but rounding."""
    return _drop_rounding(Svd(*torch.linalg.svd(one, full_matrices=False)) if other is None else of_factors(one, other))


def _drop_rounding(parts: Svd) -> Svd:
    """An SVD without the values that are nothing but rounding: a product of two matrices may have many."""
    u, s, v, _ = parts
    kept = slice(0, max(1, int((s > s[0] * max(u.shape[0], v.shape[1]) * torch.finfo(s.dtype).eps).sum())))
    return Svd(u[:, kept], s[kept], v[kept])


def halves_of(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Two matrices in fp64 whose Kronecker product dW is, with the scale in the first; None for other kinds."""
    if not isinstance(delta, Structured) or not delta.row.halves:
        return None
    one, two = delta.row.halves({role: value.double() for role, value in delta.tensors.items()})
    return delta.scale * one, two.flatten(1)


def of_matrix(matrix: Tensor, rank: int | None = None) -> Svd:
    """Of a dense matrix: all of it, or the first `rank` by the cheapest way that is good enough, with the rest measured."""
    small = min(matrix.shape)
    if rank is None or 2 * rank > small:
        return full_svd(matrix)
    return sketch(matrix, rank) if is_worth_a_sketch(small, rank) else leading_svd(matrix, rank)


def is_worth_a_sketch(small: int, rank: int) -> bool:
    """Whether a matrix whose smaller side is this is large enough, and the rank low enough."""
    return small > _LARGE and _FEW * rank <= small


def full_svd(matrix: Tensor) -> Svd:
    """All singular values of a matrix, by LAPACK."""
    if matrix.shape[0] < matrix.shape[1]:
        return _transpose(full_svd(matrix.T))  # wide ones take LAPACK four times as long
    return Svd(*torch.linalg.svd(matrix.double(), full_matrices=False))


def leading_svd(matrix: Tensor, rank: int) -> Svd:
    """The first `rank` through the eigenvectors of A A^T: right to 1e-8 of the largest value, in a fraction of the time."""
    if matrix.shape[0] > matrix.shape[1]:
        return _transpose(leading_svd(matrix.T, rank))
    matrix = matrix.double()
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors  # rising
    return _project(matrix, vectors[:, -rank:], rank)


def sketch(matrix: Tensor, rank: int, iterations: int = ITERATIONS) -> Svd:
    """The first `rank`, nearly, by randomized subspace iteration (Halko et al. 2009, https://arxiv.org/abs/0909.4061).

    Draws the same numbers each time. `rest` is what it really left out, not an estimate.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return _transpose(sketch(matrix.T, rank, iterations))
    width = min(rank + max(rank, SPARE), *matrix.shape)
    draw = torch.Generator().manual_seed(0)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=draw, dtype=matrix.dtype)
    for _ in range(iterations):
        basis = matrix @ _orthonormal(matrix.T @ _orthonormal(basis))
    return _project(matrix.double(), _orthonormal(basis.double()), rank)


def singular_values(delta: Delta) -> Tensor:
    """Singular values only, falling, fp64; without factors right to 1e-8 of the largest."""
    if halves := svds_of_halves(delta):
        return torch.outer(*(half.s for half in halves)).flatten().sort(descending=True).values
    if not (pair := delta.low_rank()):
        matrix = delta.delta().reshape(sides(delta.shape)).double()
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        return torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp(min=0).sqrt()
    return core_of(*factors(pair)).values()


def inner(a: Delta, b: Delta) -> float:
    """<dW_a, dW_b>, from the factors if both have some. Shapes must be the same."""
    x, y = a.low_rank(), b.low_rank()
    if not (x and y):
        return float((a.delta().double() * b.delta()).sum())
    (up, down), (other_up, other_down) = factors(x), factors(y)
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def low_rank(parts: Svd, shape: tuple[int, ...], rank: int | None = None) -> LowRank:
    """The first `rank` as an update of this shape, [out, in] or [out, in, kh, kw], alpha = rank.

    The singular values go half into each side: both then have about the same size, which is kindest to fp16.
    """
    kept, root = slice(0, rank), parts.s[:rank].sqrt()
    up, down = parts.u[:, kept] * root, root[:, None] * parts.v[kept]
    ones = [1] * len(shape[2:])
    return LowRank(up.reshape(shape[0], len(root), *ones), down.reshape(len(root), *shape[1:]), len(root))


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _project(matrix: Tensor, basis: Tensor, rank: int) -> Svd:
    """What of a matrix lies in the span of an orthonormal basis [out, >= rank], cut to `rank`; the rest by Pythagoras."""
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    rest = float((matrix.square().sum() - s[:rank].square().sum()).clamp(min=0).sqrt())
    return Svd(basis @ u[:, :rank], s[:rank], v[:rank], rest)


def _transpose(parts: Svd) -> Svd:
    return Svd(parts.v.T, parts.s, parts.u.T, parts.rest)
