"""One self-contained HTML page from a jinja template: css, scripts and pictures are inside, nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ...io import write_text
from ...text import compact, duration, readable

PALETTE = Path(__file__).parent / "palette.css"
BUDGET = 3_000_000  # bytes of a page that still travels by mail

T = TypeVar("T")


@cache
def template(folder: Path) -> Template:
    """`page.html.j2` in a folder. Its `page.css`, behind the palette, and `page.js`, if they exist, are `css` and `js`.

    All values are escaped, and an undefined one is an error. Filters: `figure`, `duration` (of seconds), `size` (of bytes).
    """
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.loader = FileSystemLoader([folder, Path(__file__).parent])
    env.filters |= {"figure": compact, "duration": duration, "size": file_size}
    for part, before in (("css", PALETTE.read_text(encoding="utf-8")), ("js", "")):
        if (path := folder / f"page.{part}").is_file():
            env.globals[part] = Markup(before + path.read_text(encoding="utf-8"))
    return env.get_template("page.html.j2")


def file_size(count: float) -> str:
    """Bytes in at most two digits: `1 MB`, `12 GB`."""
    return readable(count, short=True)


def render_within(budget: int, page: Template, values: Iterable[Callable[[], dict[str, Any]]]) -> str:
    """The first page that is no longer than `budget` characters, or else the last."""
    html = ""
    for make in values:
        html = page.render(make())
        if len(html) <= budget:
            break
    return html


def write_page(path: Path, html: str) -> Path:
    """Write a page whole or not at all; a lone surrogate in a caption becomes a question mark. Raises OutputError."""
    return write_text(path, html.encode("utf-8", "replace").decode())
