"""How many of a CPU's cores a base model computes with.

The layers of a small base are done before a second thread has woken up: on two cores of a shared machine, `personalize train` and
`generate` took 1.6 to 2.7 times as long with OMP_NUM_THREADS=2 as with 1.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator

import torch

from .model import Base, numel

SMALL = 100_000_000  # values of all models of a base; the embedded base has 15 million, Stable Diffusion 1.5 a billion
_sizes: weakref.WeakKeyDictionary[Base, int] = weakref.WeakKeyDictionary()
_inside = threading.local()  # torch's number of threads is each thread's own


@contextlib.contextmanager
def few_threads(base: Base) -> Iterator[None]:
    """Inside, this thread computes with one core if `base` is small and OMP_NUM_THREADS says nothing else.

    Blocks may overlap in any order, as those of iterators do: the last one that ends gives the other cores back.
    """
    if not is_small(base) or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    if not getattr(_inside, "blocks", 0):
        _inside.blocks, _inside.before = 0, torch.get_num_threads()
    _inside.blocks += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _inside.blocks -= 1
        if not _inside.blocks:
            torch.set_num_threads(_inside.before)


def is_small(base: Base, device: torch.device | None = None) -> bool:
    """Whether one core is fastest with a base where it is, or on another device."""
    return (device or base.device).type == "cpu" and size(base) <= SMALL


def size(base: Base) -> int:
    """Values of all models of a base; counted once, for adapters are none of them."""
    if base not in _sizes:
        _sizes[base] = sum(numel(module) for model in base.models.values() for module in model.modules())
    return _sizes[base]
