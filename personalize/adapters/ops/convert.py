"""An adapter as another kind: LoRA, exactly where a kind has factors and else with its error told, or dW itself."""

from __future__ import annotations

from ...errors import AdapterError
from ..adapter import Adapter
from ..delta import Delta, Dense
from ..lazy import map_deltas
from .report import Line, Report
from .resize import can_factor, check_plain, cut_to_rank, keep_as_is, rank_of

USUAL = 32  # the rank of what has no factors of its own


def convert(adapter: Adapter, kind: str | None = None, rank: int | None = None) -> tuple[Adapter, Report | None]:
    """The adapter with all its matrices and convolutions as `kind`, and what that lost; no kind and no rank leaves it as it is.

    lora: LoHa and LoKr become factors exactly where those are smaller than dW and no `rank` is given; the rest is cut by SVD.
    full: dW itself, exact. Norms and biases stay. Raises AdapterError for updates that depend on the base, by name.
    """
    if kind is None and rank is None:
        return adapter, None
    if kind == "full":
        if rank:
            raise AdapterError("a full update has no rank", "leave --rank out, or convert --to lora")
        return adapter.with_deltas(map_deltas(adapter.deltas, _as_full)), None
    done = {path: _as_lora(path, delta, rank) for path, delta in adapter.deltas.items()}
    lines = tuple(line for _, line in done.values())
    return adapter.with_deltas({path: delta for path, (delta, _) in done.items()}), Report(lines)


converted = convert  # its name until 0.2


def _as_full(path: str, delta: Delta) -> Dense:
    check_plain(path, delta)
    return Dense(delta.delta())


def _as_lora(path: str, delta: Delta, rank: int | None) -> tuple[Delta, Line]:
    check_plain(path, delta)
    if not can_factor(delta):
        return keep_as_is(path, delta)
    if (rank is None or rank_of(delta) <= rank) and (exact := delta.low_rank()):
        return keep_as_is(path, exact)
    return cut_to_rank(path, delta, rank or USUAL)
