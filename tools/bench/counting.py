"""What a step launches: operations, waits for the device, and bytes, phase by phase, of real tensors or of fake ones."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

clip_grad: Any = importlib.import_module("torch.nn.utils.clip_grad")  # the module behind the function's name
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
READS = ("tolist", "cpu", "numpy")  # methods that wait for a GPU, and that a CPU answers without any operation
Patch = tuple[Any, str, str]  # an owner, its method, and the phase that everything inside belongs to


class Work(TorchDispatchMode):
    """Counts of one phase after the other. Without `values`, what the host reads is zero: fake tensors hold nothing."""

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        self.values, self.phase = values, "forward"
        self.ops, self.bytes, self.names = Counter[str](), Counter[str](), Counter[str]()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.waits += name in WAITS
        if name == "_local_scalar_dense" and not self.values:
            return args[0].dtype.is_floating_point * 0.0 or 0
        result = func(*args, **(kwargs or {}))
        read, made = tensors((args, kwargs)), tensors(result)
        if name not in ALLOCATIONS and name not in WAITS and launches(func, read, made):
            self.ops[self.phase] += 1
            self.names[name] += 1
            self.bytes[self.phase] += sum(map(bytes_touched, [*read, *made]))
        return result

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain values; the most frequent operations first."""
        return {"ops": dict(self.ops), "bytes": dict(self.bytes), "waits": self.waits, "names": dict(self.names.most_common())}


def tensors(tree: Any) -> list[Tensor]:
    """Those in arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def launches(func: Any, read: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Whether an operation computes anything: one that changes nothing and makes no new storage is a view."""
    if func._schema.is_mutable:
        return True
    there = {one.untyped_storage()._cdata for one in read}
    return any(one.untyped_storage()._cdata not in there for one in made)


def bytes_touched(tensor: Tensor) -> int:
    """Bytes of a tensor, once where a row is shown many times."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextlib.contextmanager
def phases(work: Work, patches: Sequence[Patch]) -> Iterator[None]:
    """Inside, what methods do belongs to their phase, and what the host reads counts as a wait."""
    reads = [(Tensor, name, waiting(work, getattr(Tensor, name))) for name in READS]
    reads.append((FakeTensor, "tolist", reads[0][2]))
    inside = [(owner, name, belonging(work, phase, getattr(owner, name))) for owner, name, phase in patches]
    new = [*reads, *inside, (clip_grad, "_has_foreach_support", lambda *_, **__: True)]  # as on a GPU; fakes are not known there
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, method in new:
        setattr(owner, name, method)
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def belonging(work: Work, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method, all of whose operations are of a phase."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        before, work.phase = work.phase, phase
        try:
            return method(*args, **kwargs)
        finally:
            work.phase = before

    return inside


def waiting(work: Work, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that reads a tensor on the host: one wait; zeros where there is nothing to read."""

    def inside(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        work.waits += 1
        with _disable_current_modes():
            real = tensor if work.values else torch.zeros(tensor.shape, dtype=tensor.dtype)
            return method(real, *args, **kwargs)

    return inside
