"""Whether an adapter fits a base: a model that is loaded, or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import AdapterError, FamilyMismatchError
from ..families.family import Shape
from ..families.names import same
from ..formats.header import short
from .adapter import Adapter


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
    raise (AdapterError if adapter.family in (family, "unknown") else FamilyMismatchError)(
        f"{what} updates differ, e.g. {path} is {list(adapter.shapes[path])} there and here it {here}",
        "use the base it was trained on",
    )
