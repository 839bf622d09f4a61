"""Updates that are read or computed when they are asked for: adapters larger than memory, one layer at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, TypeVar

from .delta import Delta, Shape

T = TypeVar("T")
_AHEAD = 3  # updates that wait to be used: enough that no thread waits long, at a few MB each


class OnDemand(Mapping[str, Delta]):
    """Path => update, made anew each time; paths are canonical, and shapes are known without it.

    `storage` is how the file that they come from keeps most of its weights: "fp16", ...; "" if they come from none.
    """

    def __init__(self, shapes: Mapping[str, Shape], make: Callable[[str], Delta], storage: str = "") -> None:
        self.shapes, self.storage = MappingProxyType(dict(sorted(shapes.items()))), storage
        self._make = make

    def __getitem__(self, path: str) -> Delta:
        if path not in self.shapes:
            raise KeyError(path)
        return self._make(path)

    def __contains__(self, path: object) -> bool:
        return path in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(deltas: Mapping[str, Delta]) -> Mapping[str, Shape]:
    """Path => the shape of its dW."""
    return deltas.shapes if isinstance(deltas, OnDemand) else {path: delta.shape for path, delta in deltas.items()}


def storage_of(deltas: Mapping[str, Delta]) -> str:
    """The storage dtype that keeps what their file had: its own, or fp32 for one that is not written, and for no file."""
    found = deltas.storage if isinstance(deltas, OnDemand) else ""
    return found if found in ("fp16", "bf16") else "fp32"


def map_deltas(
    deltas: Mapping[str, Delta], change: Callable[[str, Delta], Delta], paths: Iterable[str] | None = None
) -> Mapping[str, Delta]:
    """Each update, or those of `paths`, made into another of the same shape: at once, or on demand if `deltas` are."""
    chosen = deltas if paths is None else paths
    if isinstance(deltas, OnDemand):
        shapes = {path: deltas.shapes[path] for path in chosen}
        return OnDemand(shapes, lambda path: change(path, deltas[path]), deltas.storage)
    return {path: change(path, deltas[path]) for path in chosen}


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order; another thread makes the next few while one is used."""
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Any] = deque(thread.submit(next, rest, end) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, rest, end))
            yield item
