"""What the command's own process imports of torch, diffusers and transformers: less than half of what they bring unasked.

They import what is installed, used or not: peft, accelerate, scipy, sklearn, every model that they have, torch's compiler with
sympy, its sharding over machines; that takes longer than torch itself. Here they do without, in their own ways of doing without:
while they are imported, those packages cannot be found, torch has no `distributed` (some builds have none), and marks for the
compiler and for documentation mark nothing. Packages that only gather names do not do so until somebody asks for one that is not
known here, and what only the compiler needs of torch waits until somebody imports it.

Behind that all is as it was: whoever imports torch._dynamo, peft or scipy gets it, and a library that cannot be imported so is
imported as ever. For processes of our own alone: notebooks and UIs see the libraries whole. (torch's optimizers import the
compiler at their first step, in training too: two seconds of a run.)
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from ..recipe.samplers import SAMPLERS

DYNAMO = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")  # decorators that only the compiler reads
LATE_MODULE, LATE_CLASS = f"{DYNAMO}._trace_wrapped_higher_order_op", "TransformGetItemToIndex"  # imported to be called, if ever
BROKEN = (ImportError, AttributeError, NameError, RuntimeError, TypeError)  # what the import of a library may end in
TORCH = "2.13."  # whose insides are known here; no torch can be imported a second time, so others are imported as ever

# Each scheduler looks at all classes that could be made of its config, and each class imports scipy.
OTHERS = ("DPMSolverSinglestep", "FlowMatchEulerDiscrete")
SCHEDULERS = tuple(f"{name}Scheduler" for name in dict.fromkeys([*(row.scheduler for row in SAMPLERS.values()), *OTHERS]))


def leave_unmarked(function: Any = None, *args: Any, **options: Any) -> Any:
    """What decorators that nobody reads the marks of make of a function: itself."""
    return leave_unmarked if function is None else function


def find_transformers(*_: Any) -> ModuleType:
    """The library itself, for a part of it that would import it by its path."""
    return sys.modules["transformers"]


class Library(NamedTuple):
    """What we use of a library, and what it is imported without."""

    used: tuple[str, ...] = ()  # names in it
    hidden: tuple[str, ...] = ()
    late: tuple[str, ...] = ()  # imported when they are first used
    instead: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # module => name in it => what stands there meanwhile


LIBRARIES = {
    "torch": Library(late=("torch._meta_registrations", "torch.export")),
    "diffusers": Library(
        ("UNet2DConditionModel", "AutoencoderKL", *SCHEDULERS),
        ("peft", "transformers", "accelerate"),
        ("scipy.stats", "scipy.integrate", "requests"),  # some samplers compute with scipy
        {"importlib.metadata": {"packages_distributions": dict}},  # which looks at every file that is installed
    ),
    "transformers": Library(
        ("CLIPTextModel", "CLIPTokenizer"),
        ("scipy", "sklearn", "accelerate", "jinja2", "psutil"),
        instead={"transformers.utils": {"auto_docstring": leave_unmarked, "direct_transformers_import": find_transformers}},
    ),
}
# Packages that gather names, and in which of their modules some are that we use.
HOLLOW: dict[str, Mapping[str, str]] = {
    "torch._prims": {},
    "diffusers.models.autoencoders": {},
    "diffusers.models.transformers": {},
    "diffusers.models.unets": {},
    "transformers": {
        "CLIPModel": "models.clip.modeling_clip",
        "CLIPTextModel": "models.clip.modeling_clip",
        "CLIPTextModelWithProjection": "models.clip.modeling_clip",
        "CLIPTokenizer": "models.clip.tokenization_clip",
    },
    "transformers.models": {},
}
# Modules of torch that import each other in a circle => the one that comes first where it is not late.
FIRST = dict.fromkeys(("torch._decomp", "torch._refs"), "torch._meta_registrations")
NEEDED = "torch._prims.rng_prims"  # without which torch makes no generators; whoever is late would have brought it


def import_only_what_is_used() -> None:
    """From now on this process imports of these libraries only what commands use."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds modules as ever, and has some of them loaded otherwise."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        loader = LOADERS.get(name)
        if not loader or FIRST.get(name) in sys.modules or (name.startswith("torch") and not known_torch()):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader:
            spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


@functools.cache
def known_torch() -> bool:
    """Whether torch is one whose insides are known here."""
    return version("torch").startswith(TORCH)


class Lean(SourceFileLoader):
    """Loads a library with what we use of it, and without the rest; where that fails, as ever."""

    def exec_module(self, module: ModuleType) -> None:
        before, library = dict(vars(module)), LIBRARIES[self.name]
        with pause_collection():
            if self.name == "torch":
                with imported_late(library.late):
                    super().exec_module(module)
                importlib.import_module(NEEDED)
                return
            try:
                with without(library.hidden), without_compiler(), without_distributed(), imported_late(library.late):
                    self._import_used(module, library)
            except BROKEN:
                for name in [name for name in sys.modules if name.startswith(f"{self.name}.")]:
                    del sys.modules[name]
                module.__class__ = ModuleType
                vars(module).clear()
                vars(module).update(before)
                sys.modules[self.name] = module
                super().exec_module(module)

    def _import_used(self, module: ModuleType, library: Library) -> None:
        """Run a library's own code, unless it is hollow, and import what we use of it."""
        if self.name in HOLLOW:
            HollowLoader.exec_module(self, module)  # type: ignore[arg-type]
        with with_other_values(library.instead):
            if self.name not in HOLLOW:
                super().exec_module(module)
            for name in library.used:
                getattr(sys.modules[self.name], name)  # it may have put another module in its place


class HollowLoader(SourceFileLoader):
    """Loads a package without running its own code."""

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = Hollow


class Hollow(ModuleType):
    """A package whose own code runs when somebody asks for a name that is not known to be in one of its modules."""

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
        if name == "__version__":
            return version(own)
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        if sys.modules[own] is not self:  # its own code put another module in its place
            return getattr(sys.modules[own], name)
        if name in HOLLOW[own]:
            return getattr(importlib.import_module(f"{own}.{HOLLOW[own][name]}"), name)
        if PathFinder.find_spec(f"{own}.{name}", self.__path__):
            return importlib.import_module(f"{own}.{name}")
        return getattr(run_own_code(self), name)


def run_own_code(package: ModuleType) -> ModuleType:
    """A hollow package as it is without us."""
    name, loader = package.__name__, package.__loader__
    assert isinstance(loader, SourceFileLoader)
    package.__class__ = ModuleType
    SourceFileLoader.exec_module(loader, package)
    if sys.modules[name] is not package:
        package.__class__ = Hollow  # for those who hold it still
    return sys.modules[name]


class Second(SourceFileLoader):
    """Loads a module by way of another one, which imports it."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        importlib.import_module(FIRST[spec.name])
        return sys.modules.get(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It ran when it was imported."""


LOADERS: dict[str, type[SourceFileLoader]] = {
    **dict.fromkeys(HOLLOW, HollowLoader),
    **dict.fromkeys(LIBRARIES, Lean),
    **dict.fromkeys(FIRST, Second),
}


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Inside, nothing is looked through for garbage; nor is what is there then, ever again: modules stay."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


@contextlib.contextmanager
def with_other_values(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, names in modules stand for other values; those that are not there are nowhere missed."""
    with contextlib.ExitStack() as undo:
        for name, values in modules.items():
            module = importlib.import_module(name)
            for key in values.keys() & vars(module).keys():
                undo.callback(setattr, module, key, vars(module)[key])
                setattr(module, key, values[key])
        yield


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
