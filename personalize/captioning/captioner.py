"""What a captioner is: a row that knows its models by their files, opens one, and says what images show.

Rows import torch and transformers when one is opened: who only asks what a folder holds needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError

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
