"""How many bytes tensors hold while code runs: of real tensors, or of fake ones that are nothing but shapes.

Every operation passes by here, and each storage is counted from the operation that made it until it is gone. What kernels
take for themselves while they run is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """Bytes held now and at most, and how often the host waited for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.waits = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count what these tensors hold; a storage that several share counts once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))  # type: ignore[misc]
                self.now += size
                self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


@contextlib.contextmanager
def counting(*there: Iterable[Tensor]) -> Iterator[Count]:
    """Inside, bytes are counted; those of tensors that are there already count from the beginning."""
    with Count() as count:
        for tensors in there:
            count.add(tensors)
        yield count


def tensors_of(models: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for model in models:
        yield from model.parameters()
        yield from model.buffers()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold together."""
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())
