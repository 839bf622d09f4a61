"""Two adapters beside each other as updates: norms, distance and cosine of dW, by part, by block and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...families.names import part_of
from ..adapter import Adapter, check_kin
from ..strengths.grammar import block_of, names
from . import linalg
from .resize import check_plain


@dataclass(frozen=True)
class Row:
    """Some of the layers together: Frobenius norms, and the cosine of both updates (None where one is nothing)."""

    name: str
    a: float
    b: float
    difference: float
    cosine: float | None

    @property
    def apart(self) -> float:
        """||A - B|| over the larger of both norms: 0 for equal ones, 1 where one is nothing, up to 2 for opposites."""
        return self.difference / max(self.a, self.b) if max(self.a, self.b) else 0.0


def compare(a: Adapter, b: Adapter) -> list[Row]:
    """A row for all, then for each part, then for each block of the UNet. Exact: from factors where there are some.

    Raises AdapterError for updates that depend on the base, FamilyMismatchError for adapters of different families.
    """
    check_kin([a, b])
    paths = sorted(a.deltas.keys() | b.deltas.keys())
    products = {path: _products(path, a, b) for path in paths}
    groups: dict[str, list[str]] = {"all": paths}
    for path in paths:
        groups.setdefault(part_of(path), []).append(path)
    if family := a.model or b.model:
        own = [path for path in paths if part_of(path) == "unet"]
        groups |= {
            block: members for block in names(family) if (members := [path for path in own if block_of(family, path) == block])
        }
    return [_row(name, [products[path] for path in members]) for name, members in groups.items()]


compared = compare  # its name until 0.2


def _products(path: str, a: Adapter, b: Adapter) -> tuple[float, float, float]:
    """<A, A>, <B, B> and <A, B> of one layer."""
    one, other = a.deltas.get(path), b.deltas.get(path)
    for delta in filter(None, (one, other)):
        check_plain(path, delta)
    both = linalg.inner(one, other) if one and other else 0.0
    return (one.norm() ** 2 if one else 0.0), (other.norm() ** 2 if other else 0.0), both


def _row(name: str, products: Iterable[tuple[float, float, float]]) -> Row:
    aa, bb, ab = map(math.fsum, zip(*products, strict=True))
    cosine = ab / math.sqrt(aa * bb) if aa and bb else None
    return Row(name, math.sqrt(aa), math.sqrt(bb), math.sqrt(max(0.0, aa + bb - 2 * ab)), cosine)
