"""What the command's own process imports of diffusers and transformers: less than half of what they bring unasked.

Both import what is installed, used or not: peft, scipy, sklearn, torch's compiler with sympy, its sharding over machines; that
takes longer than torch itself. Here they do without, in their own ways of doing without: while they are imported, those
packages cannot be found, torch has no `distributed` (some builds have none), and marks for the compiler mark nothing. Behind that
all is as it was: whoever imports torch._dynamo, peft or scipy gets it, and a library that cannot be imported so is imported as
ever. For processes of our own alone: notebooks and UIs see both libraries whole. (torch's optimizers import the compiler at their
first step, in training too: two seconds of a run.)
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

from ..recipe.samplers import SAMPLERS

DYNAMO = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators that only the compiler reads
LATE_MODULE, LATE_CLASS = f"{DYNAMO}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"  # imported to be called, if ever
BROKEN = (ImportError, AttributeError, NameError, RuntimeError, TypeError)  # what the import of a library may end in

# Each scheduler looks at all classes that could be made of its config, and each class imports scipy.
OTHERS = ("DPMSolverSinglestep", "FlowMatchEulerDiscrete")
SCHEDULERS = tuple(f"{name}Scheduler" for name in dict.fromkeys([*(row.scheduler for row in SAMPLERS.values()), *OTHERS]))


class Library(NamedTuple):
    """What we use of a library, and what it is imported without."""

    used: tuple[str, ...]
    hidden: tuple[str, ...]
    late: tuple[str, ...] = ()  # imported when they are first used


LIBRARIES = {
    "diffusers": Library(
        ("UNet2DConditionModel", "AutoencoderKL", *SCHEDULERS),
        ("peft", "transformers"),
        ("scipy.stats", "scipy.integrate"),  # some samplers compute with them
    ),
    "transformers": Library(("CLIPTextModel", "CLIPTokenizer"), ("scipy", "sklearn")),
}


def import_only_what_is_used() -> None:
    """From now on this process imports of diffusers and transformers only what commands use."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds the libraries as ever, and has them loaded by `Lean`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        library = LIBRARIES.get(name)
        spec = PathFinder.find_spec(name, path, target) if library else None
        if library and spec and type(spec.loader) is SourceFileLoader:
            spec.loader = Lean(library, spec.loader)
        return spec


class Lean(SourceFileLoader):
    """Loads a library with what we use of it, and without the rest; where that fails, as ever."""

    def __init__(self, library: Library, loader: SourceFileLoader) -> None:
        super().__init__(loader.name, loader.path)
        self.library = library

    def exec_module(self, module: ModuleType) -> None:
        before = dict(vars(module))
        try:
            with without(self.library.hidden), without_compiler(), without_distributed(), imported_late(self.library.late):
                super().exec_module(module)
                for name in self.library.used:
                    getattr(sys.modules[self.name], name)  # it may have put another module in its place
        except BROKEN:
            for name in [name for name in sys.modules if name.startswith(f"{self.name}.")]:
                del sys.modules[name]
            vars(module).clear()
            vars(module).update(before)
            sys.modules[self.name] = module
            super().exec_module(module)


@contextlib.contextmanager
def modules_as(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Inside, names stand for these modules; None: it cannot be found, as if it were not installed."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in [name for name, module in modules.items() if sys.modules.get(name) is module]:
            del sys.modules[name]
            sys.modules.update({name: before[name]} if name in before else {})


def without(packages: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Inside, packages cannot be found."""
    return modules_as(dict.fromkeys(packages))


def without_compiler() -> contextlib.AbstractContextManager[None]:
    """Inside, a stand-in for torch._dynamo has nothing but marks, which mark nothing; unless that is imported already."""
    if DYNAMO in sys.modules:
        return contextlib.nullcontext()
    marks, late = ModuleType(DYNAMO), ModuleType(LATE_MODULE)
    vars(marks).update(dict.fromkeys(MARKS, leave_unmarked))
    vars(late)[LATE_CLASS] = lambda *args: getattr(importlib.import_module(LATE_MODULE), LATE_CLASS)(*args)
    return modules_as({DYNAMO: marks, LATE_MODULE: late})


def leave_unmarked(function: Any = None, *args: Any, **options: Any) -> Any:
    """What the compiler's decorators make of a function where nothing is compiled: itself."""
    return leave_unmarked if function is None else function


@contextlib.contextmanager
def without_distributed() -> Iterator[None]:
    """Inside, torch says that it was built without `distributed`."""
    import torch.distributed

    before = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = before


class Late(ModuleType):
    """A module that is imported when somebody first asks it for something."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def imported_late(modules: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Inside, modules are imported by name alone."""
    return modules_as({name: Late(name) for name in modules})
