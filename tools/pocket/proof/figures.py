"""A figure stands between its floor and its ceiling, and may have a goal. Tables of them: on the screen, in Markdown, in JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from personalize.io import write_text

FIGURES = Path("docs/figures")


@dataclass(frozen=True)
class Figure:
    """One measured number. Shares are in 0..1 and shown in per cent."""

    name: str
    floor: float | None
    value: float
    ceiling: float | None
    goal: str = ""  # in words
    met: bool | None = None  # None where there is no goal
    unit: str = "%"

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        verdict = {None: "", True: "yes", False: "NO"}[self.met]
        return self.name, *(show(x, self.unit) for x in (self.floor, self.value, self.ceiling)), self.goal, verdict


def show(x: float | None, unit: str) -> str:
    """A number with its unit: `91.5 %`, `42.0 s`, or a dash."""
    if x is None:
        return "–"
    return f"{100 * x:.1f} %" if unit == "%" else f"{x:.3f}" if not unit else f"{x:.1f} {unit}"


def share(value: float, ceiling: float) -> float:
    """How much of what is possible was reached."""
    return value / ceiling if ceiling else 0.0


def gap_closed(floor: float, value: float, ceiling: float) -> float:
    """How much of the gap between floor and ceiling was closed."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else 0.0


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but its first column are set to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


HEADS = ("figure", "floor", "value", "ceiling", "goal", "met")


class Line(Protocol):
    """A dataclass that is the row of a table."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def cells(self) -> tuple[str, ...]: ...


Tables = Mapping[str, Sequence[Line]]


def publish(
    folder: Path,
    name: str,
    title: str,
    about: Mapping[str, Any],
    tables: Tables,
    data: Any = None,
    heads: Sequence[str] = HEADS,
) -> None:
    """Print tables of figures and write them to `NAME.md` and `NAME.json`, with how they were made."""
    parts = [f"# {title}\n", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for head, figures in tables.items():
        rows = [figure.cells() for figure in figures]
        show_table(head, heads, rows)
        parts += [f"## {head}\n", markdown(heads, rows)]
    write_text(folder / f"{name}.md", "\n".join(parts))
    figures_json = {head: [asdict(figure) for figure in figures] for head, figures in tables.items()}
    write_text(folder / f"{name}.json", json.dumps({"about": about, "figures": figures_json, "data": data}, indent=1) + "\n")
    print(f"written: {folder / name}.md and .json")


def machine() -> str:
    """What the seconds were measured on, and how busy it was."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} torch threads{load}"
