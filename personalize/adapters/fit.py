"""Whether an adapter fits a base: a model that is loaded, or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import AdapterError, FamilyMismatchError
from ..families.family import Shape
from ..families.names import same
from ..formats.header import short
from .adapter import Adapter
from .strengths.grammar import PARTS

SHORT = {part: name for name, part in PARTS.items()}  # as people type them


def check_parts(adapter: Adapter, parts: Collection[str], name: str) -> None:
    """Raise AdapterError unless the base `name` has every part of the model that the adapter changes."""
    if lacking := [part for part in adapter.parts if part not in parts]:
        has = f"it has {' and '.join(parts)} alone"
        hint = f"leave it out: FILE:{':'.join(f'{SHORT.get(part, part)}=0' for part in lacking)}"
        raise MissingPartError(f"{name} has no {' and no '.join(lacking)}, which the adapter changes: {has}", hint)


class MissingPartError(AdapterError):
    """A base lacks parts that an adapter changes."""


def check_fit(adapter: Adapter, shapes: Mapping[str, Shape], name: str, family: str) -> None:
    """Raise unless the base has a parameter of the same shape for every update.

    `shapes` are those of the base's parameters, by canonical path; those that the adapter does not change may be left out.
    `name` and `family` are the base's. Raises FamilyMismatchError; AdapterError if the adapter's family is the same or unknown.
    """
    wrong = [path for path, shape in adapter.shapes.items() if path not in shapes or not same(shape, shapes[path])]
    if not wrong:
        return
    path = wrong[0]
    here = f"is {list(shapes[path])}" if path in shapes else "does not exist"
    called = f"{short(adapter.metadata['ss_output_name'])} " if adapter.metadata.get("ss_output_name") else ""
    what = f"the adapter {called}({adapter.family}) does not fit {name} ({family}): {len(wrong)} of {len(adapter.deltas)}"
    raise (AdapterError if family in adapter.family.split(" or ") or adapter.family == "unknown" else FamilyMismatchError)(
        f"{what} updates differ, e.g. {path} is {list(adapter.shapes[path])} there and here it {here}",
        "use the base it was trained on",
    )
