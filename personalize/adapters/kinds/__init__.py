"""Kinds of updates: one file each, rows of `registry.table("kinds")`, where those of other packages come in too.

    lora.py   LoRA, on linear layers and convolutions, with a Tucker core too (LoCon)
    loha.py   LoHa: the entrywise product of two low-rank matrices
    lokr.py   LoKr: a Kronecker product
    sparse.py LoRA and a sparse rest (LyCORIS' extraction)
    oft.py    OFT and BOFT: rotations of the base's weight
    glora.py  GLoRA: a low-rank change of the base's weight, and a low-rank update
    ia3.py    (IA)^3: a factor for each channel of the base's weight
    full.py   dW as it is: of weights and of norms
    dora.py   DoRA: learned norms on top of another kind

A file's tensors tell their kind by their roles (`kind_of`), and a row does the rest. No torch before dW is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...families.family import Shape
from ...registry import table
from .kind import ALPHA as ALPHA
from .kind import BIASES as BIASES
from .kind import DORA as DORA
from .kind import DOWN as DOWN
from .kind import INTEGERS as INTEGERS
from .kind import KOHYA_ONLY as KOHYA_ONLY
from .kind import MAGNITUDE as MAGNITUDE
from .kind import MAX_ENTRIES as MAX_ENTRIES
from .kind import NUMBERS as NUMBERS
from .kind import UP as UP
from .kind import UP_BIAS as UP_BIAS
from .kind import Kind as Kind
from .kind import MisfitError as MisfitError
from .kind import Shapes, check
from .kind import Size as Size


def row(name: str) -> Kind:
    """A kind by the name of its row: "lora", "loha", ... Raises RecipeError for one that is none."""
    found: Kind = table("kinds")[name]
    return found


def rows() -> Mapping[str, Kind]:
    """Every kind, by the name of its row."""
    return table("kinds")


def trainable() -> dict[str, Kind]:
    """The kinds that can be trained, by what `--kind` calls them."""
    return {kind.trained_as or name: kind for name, kind in rows().items() if kind.start}


def roles() -> frozenset[str]:
    """Every role that a tensor of a file can have."""
    return frozenset(BIASES).union(*(kind.roles for kind in rows().values()))


def kind_of(found: Mapping[str, object]) -> str:
    """The row whose tensors these are, by their roles; "" if they are none's, or if one is missing."""
    weights = {role: value for role, value in found.items() if role not in BIASES}
    return next((name for name, kind in rows().items() if not kind.on_top and kind.complete(weights)), "")


def name_of(name: str, found: Mapping[str, object]) -> str:
    """A kind with these tensors, as people call it: "LoRA", "LoHa + DoRA", ...; "" for no kind."""
    return row(name).name(found) if name else ""


def hint_of(role: str) -> str:
    """The kind that a lone tensor speaks of, as people call it; "" if it speaks of none."""
    by_order = sorted(rows().values(), key=lambda kind: not kind.on_top)
    return next((kind.title for kind in by_order if role in kind.roles and role != ALPHA), "")


def shape_of(name: str, shapes: Shapes) -> Shape:
    """The shape of dW, once all tensors are known to fit each other; (-1,) for no kind. Raises MisfitError.

    A few bytes of factors can claim a dW of many gigabytes: what no model has is refused.
    """
    try:
        whole = row(name).shape(shapes) if name else (-1,)
        for role, size in shapes.items():
            check(role in NUMBERS or (0 not in size and (len(size) == 1 or role not in BIASES)), shapes, role)
    except (LookupError, ValueError) as error:
        raise error if isinstance(error, MisfitError) else MisfitError("its tensors do not fit each other") from None
    if abs(math.prod(whole)) > MAX_ENTRIES:
        raise MisfitError(f"it claims an update of shape {list(whole)}, larger than any model's weight")
    return whole
