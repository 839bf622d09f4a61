"""A sum of updates as a matrix that is never made: each is two factors, or two halves of a Kronecker product (LoKr).

A product with a thin matrix costs what the pieces do: for a LoKr on a 3x3 convolution of 1280 channels a thirtieth of dW's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..delta import Delta, Structured
from . import linalg


class Piece(NamedTuple):
    """a @ b, or with `kron` the Kronecker product of a and b."""

    a: Tensor
    b: Tensor
    kron: bool

    @property
    def T(self) -> Piece:
        return Piece(self.a.T, self.b.T, True) if self.kron else Piece(self.b.T, self.a.T, False)

    def times(self, x: Tensor) -> Tensor:
        """The product with x [in, k]: [out, k]."""
        if not self.kron:
            return self.a @ (self.b @ x)
        inner = self.b @ x.unflatten(0, (self.a.shape[1], self.b.shape[1]))  # [b's columns of a, c, k]
        return (self.a @ inner.flatten(1)).unflatten(1, inner.shape[1:]).flatten(0, 1)

    def dot(self, other: Piece) -> float:
        """The sum of all entries' products with another's. Two Kronecker products must be of the same halves."""
        if self.kron and other.kron:
            return float((self.a * other.a).sum()) * float((self.b * other.b).sum())
        if self.kron:
            return other.dot(self)
        return float((other.T.times(self.a).T * self.b).sum())


def pieces_of(deltas: Sequence[Delta]) -> list[Piece] | None:
    """The updates as pieces; None if one has none, or if there is nothing to gain because all are factors."""
    if not any(isinstance(delta, Structured) and delta.row.halves for delta in deltas):
        return None
    found = []
    for delta in deltas:
        if pair := delta.low_rank():
            found.append(Piece(*linalg.factors(pair), False))
        elif isinstance(delta, Structured) and (halves := linalg.halves_of(delta)):
            found.append(Piece(*halves, True))
        else:
            return None
    sizes = {(piece.a.shape, piece.b.shape) for piece in found if piece.kron}
    return found if len(sizes) == 1 else None


def as_one_product(deltas: Sequence[Delta], weights: Sequence[float]) -> Structured | None:
    """The weighted sum as one Kronecker product (LoKr), exactly: where all share one of their two halves; None for others."""
    pairs = [delta.row.halves(delta.tensors) for delta in deltas if isinstance(delta, Structured) and delta.row.halves]
    if not pairs or len(pairs) < len(deltas) or len({(a.shape, b.shape) for a, b in pairs}) > 1:
        return None
    scales = [w * delta.scale for w, delta in zip(weights, deltas, strict=True) if isinstance(delta, Structured)]
    (a, b), whole = pairs[0], torch.zeros(())
    if all(torch.equal(one, a) for one, _ in pairs):
        b = sum((s * half.double() for s, (_, half) in zip(scales, pairs, strict=True)), whole).float()
    elif all(torch.equal(other, b) for _, other in pairs):
        a = sum((s * half.double() for s, (half, _) in zip(scales, pairs, strict=True)), whole).float()
    else:
        return None
    return Structured("lokr", {"lokr_w1": a, "lokr_w2": b}, None, deltas[0].shape)


def sketch(pieces: Sequence[Piece], rank: int) -> linalg.Svd:
    """The first `rank` singular values of the sum, nearly, as `linalg.sketch` finds them; `rest` is what is really left out."""
    quick = [Piece(piece.a.float(), piece.b.float(), piece.kron) for piece in pieces]  # a basis need not be more exact
    turned = [piece.T for piece in quick]
    columns = turned[0].a.shape[0] * (turned[0].b.shape[0] if turned[0].kron else 1)
    draw = torch.Generator().manual_seed(0)
    basis = _times(quick, torch.randn(columns, rank + max(rank, linalg.SPARE), generator=draw))
    for _ in range(linalg.ITERATIONS):
        basis = _times(quick, torch.linalg.qr(_times(turned, torch.linalg.qr(basis).Q)).Q)
    basis = torch.linalg.qr(basis.double()).Q
    u, s, v = torch.linalg.svd(_times([piece.T for piece in pieces], basis).T, full_matrices=False)
    square = sum(one.dot(other) for one in pieces for other in pieces)
    return linalg.Svd(basis @ u[:, :rank], s[:rank], v[:rank], max(0.0, square - float(s[:rank].square().sum())) ** 0.5)


def _times(pieces: Sequence[Piece], x: Tensor) -> Tensor:
    total = pieces[0].times(x)
    for piece in pieces[1:]:
        total = total + piece.times(x)
    return total
