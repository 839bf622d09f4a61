"""An adapter as another kind: LoRA, exactly where a kind has factors and else with its error told, or dW itself."""

from __future__ import annotations

from ...errors import AdapterError
from ..adapter import Adapter
from ..delta import Delta, Dense
from ..lazy import mapped
from .resize import Line, Report, check_plain, divisible, shortened, untouched

USUAL = 32  # the rank of what has no factors of its own


def converted(adapter: Adapter, kind: str | None = None, rank: int | None = None) -> tuple[Adapter, Report | None]:
    """The adapter with all its matrices and convolutions as `kind`, and what that lost; no kind and no rank leaves it as it is.

    lora: LoHa and LoKr become factors exactly where those are smaller than dW and no `rank` is given; the rest is cut by SVD.
    full: dW itself, exact. Norms and biases stay. Raises AdapterError for updates that depend on the base, by name.
    """
    if kind is None and rank is None:
        return adapter, None
    if kind == "full":
        if rank:
            raise AdapterError("a full update has no rank", "leave --rank out, or convert --to lora")
        return Adapter(mapped(adapter.deltas, _dense), adapter.metadata), None
    done = {path: _factored(path, delta, rank) for path, delta in adapter.deltas.items()}
    lines = tuple(line for _, line in done.values())
    return Adapter({path: delta for path, (delta, _) in done.items()}, adapter.metadata), Report(lines)


def _dense(path: str, delta: Delta) -> Dense:
    check_plain(path, delta)
    return Dense(delta.delta())


def _factored(path: str, delta: Delta, rank: int | None) -> tuple[Delta, Line]:
    check_plain(path, delta)
    if not divisible(delta):
        return untouched(path, delta)
    exact = delta.low_rank()
    if exact and (rank is None or exact.rank <= rank):
        return untouched(path, exact)
    return shortened(path, exact or delta, rank or USUAL)
