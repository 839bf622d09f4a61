"""Benchmarks of a GPU: rows that are measured one after the other, kept after each, and gone on with by the same call."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from personalize.errors import TrainingError
from personalize.io import write_text

from ..pocket.proof.figures import FIGURES

Row = dict[str, Any]
Case = tuple[Any, ...]


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What all of them can be told."""
    parser.add_argument("--minutes", type=float, default=7, help="no row is begun later than this; the same call again goes on")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU: a test of this benchmark")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--to", type=Path, default=FIGURES, help=f"folder for {name}.md and {name}.json")


def device_of(options: argparse.Namespace) -> torch.device:
    """The GPU, or the CPU for a tiny test. Raises TrainingError where there is no GPU."""
    if not options.tiny and not torch.cuda.is_available():
        raise TrainingError("there is no GPU here, and nothing was measured", "--tiny shows on a CPU that the benchmark runs")
    return torch.device("cpu" if options.tiny else "cuda")


def machine(device: torch.device) -> dict[str, Any]:
    """What rows must have in common to stand in one table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}


def measure(
    options: argparse.Namespace,
    path: Path,
    about: dict[str, Any],
    cases: Iterable[Case],
    row_of: Callable[..., Row],
    publish: Callable[[Sequence[Row]], str],
) -> None:
    """Measure what was not measured yet, and keep it in `path`. `publish` writes a page of all rows, and says what to print."""
    rows = [] if options.fresh else kept_rows(path, about)
    began, done = time.monotonic(), {tuple(row["case"]) for row in rows}
    for case in cases:
        if case in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; the same call again goes on with {' '.join(map(str, case))}")
            break
        rows.append({"case": list(case), **row_of(*case)})
        options.to.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        print(publish(rows), flush=True)


def kept_rows(path: Path, about: dict[str, Any]) -> list[Row]:
    """Rows of earlier calls on the same machine."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found["rows"] if found.get("about") == about else []


def tidy(device: torch.device) -> None:
    """Give back what a row held."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
