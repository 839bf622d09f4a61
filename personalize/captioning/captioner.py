"""What a captioner is: a row that knows its models by their files, opens one, and says what images show.

Rows import torch and transformers when one is opened: who only asks what a folder holds needs neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError, RecipeError
from ..text import first_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

AUTO = "auto"
Say = Callable[[Sequence["Image.Image"]], list[str]]  # RGB images => a caption each, as plain text; "" where nothing is clear


@dataclass(frozen=True)
class Manner:
    """How images are captioned. What is None is for the captioner to choose; a row says which of these it heeds."""

    prompt: str | None = None  # what the model is asked, or how its sentence begins
    threshold: float | None = None  # how likely what is said must be, 0 to 1
    character_threshold: float | None = None  # the same of names of characters
    device: str | None = None
    precision: str | None = None

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where a model computes, and in what. Raises RecipeError for a device that there is not."""
        from ..models.model import usable_device
        from ..models.precision import dtype_of, precision_on

        device = usable_device(self.device or AUTO)
        return device, dtype_of(precision_on(device, self.precision or AUTO))


@dataclass(frozen=True)
class Captioner:
    """A row of the table `captioners`. `open` raises BaseModelError for a model that is broken or not to be trusted."""

    title: str  # what it says, for people
    recognise: Callable[[Path], bool]  # whether a folder holds a model of this kind
    open: Callable[[Path, Manner], Say]
    defaults: Manner  # what it heeds of a manner is not None

    def fill(self, manner: Manner) -> Manner:
        """A manner with the captioner's own defaults. Raises RecipeError for what it would not heed."""
        given = {one.name: value for one in fields(Manner) if (value := getattr(manner, one.name)) is not None}
        for name in given:
            if getattr(self.defaults, name) is None:
                raise RecipeError(f"{self.title} takes no --{name.replace('_', '-')}", "leave it out, or name another --with")
        return replace(self.defaults, **given)


@contextlib.contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Inside, transformers opens what lies in a folder, quietly; what goes wrong is a BaseModelError."""
    from ..models.folder import BROKEN
    from ..models.model import quiet

    try:
        with quiet():
            yield
    except BROKEN as error:
        raise BaseModelError(f"{folder} cannot be opened: {first_line(error)}", "is the download complete?") from error


def load_with_processor(folder: Path, kinds: Mapping[Any, Any], processor: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A frozen model, of the class that one of transformers' mappings has for its config, and what makes its inputs.

    Safetensors alone are opened, and no code that comes with a model is run. Raises BaseModelError for other weights.
    """
    from transformers import AutoConfig

    from ..models.folder import check_weights, load_by_library

    check_weights(folder)
    told: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **told)
    maker = processor.from_pretrained(folder, **told)
    return load_by_library(kinds[type(config)], folder, dtype).eval().requires_grad_(False), maker
