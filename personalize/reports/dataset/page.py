"""The report on a dataset as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...findings import Finding
from ..kit.page import template
from ..kit.page import write_page as write_html
from ..kit.pictures import data_url
from .base import BaseView
from .measure import DatasetStats, ImageStats
from .sheet import CELL, marks_of, shown_images, size_text, training_crop
from .summary import LEVEL, SIGNS, headline, layout


def write_page(stats: DatasetStats, found: Sequence[Finding], path: Path, view: BaseView | None = None) -> Path:
    """Write the page, with what the base makes of the pictures if that was looked at. Raises OutputError."""
    most = max(len(some) for some in stats.buckets.values())
    rows = [
        {"shape": shape, "count": len(some), "bar": len(some) / most, "cut": [1 - one.kept for one in some]}
        for shape, some in stats.buckets.items()
    ]
    cells = [_cell(stats, one, found) for one in shown_images(stats, found)]
    about: dict[str, Any] = {"headline": headline(stats), "layout": layout(stats), "signs": SIGNS, "levels": LEVEL}
    seen = view.reconstruction if view else None
    about |= {"kept": view.line if view else "", "autoencoder": _whole(seen.sheet) if seen else None}
    return write_html(path, template(Path(__file__).parent).render(stats=stats, found=found, rows=rows, cells=cells, **about))


def _whole(image: Image.Image) -> dict[str, Any]:
    """An image as the page shows it."""
    return {"src": data_url(image, quality=90), "size": image.size}


def _cell(stats: DatasetStats, one: ImageStats, found: Sequence[Finding]) -> dict[str, Any]:
    """What the page shows of an image."""
    crop, marks = training_crop(one, 2 * CELL), marks_of(one, found)
    return {
        "src": data_url(crop, quality=82),
        "size": crop.size,
        "name": stats.name(one.example.path),
        "about": size_text(one),
        "caption": one.example.caption,
        "marks": [(LEVEL[mark.level], mark.mark) for mark in marks],
        "level": LEVEL[marks[0].level] if marks else "",
    }
