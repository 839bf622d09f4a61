"""What the page shows, in the order it shows it: run folder values -> template values."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from . import usage
from .curves import bars, panels
from .figures import meter
from .pictures import inliner
from .read import Run, number
from .samples import (
    Sides,
    before_and_after,
    checkpoint_grid,
    example_prompt,
    main_pair,
    strength_grid,
    training_picture_count,
    training_pictures,
)
from .selection import selection
from .settings import changed_settings, date_and_time, environment, training_seconds, warnings
from .verdict import autoencoder, verdict


def page_values(run: Run, sides: Sides, live: bool = False) -> dict[str, Any]:
    """Everything that the template needs."""
    inline = inliner(run.folder)
    pairs = before_and_after(run, inline, sides.large)
    prompt = example_prompt(run)
    return {
        "run": run,
        "live": live,
        "finish": usage.finish_command(run),
        "base": PurePath(str(run.recipe.get("base") or "")).name,
        "subject": f"{run.trigger} {run.class_name}".strip(),
        "adapter_bytes": run.adapter.stat().st_size if run.adapter else None,
        "images": training_picture_count(run),
        "inputs": training_pictures(run, inline, sides.large),
        "pairs": pairs,
        "hero": main_pair(pairs),
        "verdict": verdict(run, inline),
        "autoencoder": autoencoder(run, inline),
        "choice": selection(run),
        "growth": checkpoint_grid(run, inline, sides.cell),
        "sweep": strength_grid(run, inline, sides.cell),
        "panels": panels(run.steps),
        "bars": bars(run.started.get("rates"), int(number(run.recipe.get("steps")) or 0)),
        "saved": sorted({record["step"] for record in run.saved}),
        "meters": [meter(row) for row in run.metrics],
        "settings": changed_settings(run.recipe),
        "warnings": warnings(run),
        "machine": environment(run),
        "seconds": training_seconds(run),
        "started": date_and_time(run.started.get("time")),
        "uses": usage.programs(run, prompt),
        "command": usage.generate_command(run, prompt) if run.adapter else "",
    }
