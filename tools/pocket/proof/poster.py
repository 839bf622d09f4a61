"""One picture of a run for the README: the same prompts without and with the adapter, and what it learned from.

python -m tools.pocket.proof.poster runs/demo docs/figures/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from personalize.inference.sheet import contact_sheet as grid
from personalize.training.rundir import Run

SIDE = 192  # pixels of one cell


def poster(folder: Path) -> Image.Image:
    """Three rows: the base, the adapter, the training pictures; a column per prompt, with the first seed."""
    history = Run(folder, "").history()
    started = next(record for record in history if record["event"] == "started")
    samples = [record for record in history if record["event"] == "sample"]
    last, seed = max(record["step"] for record in samples), samples[0]["seed"]
    after = [record for record in samples if record["step"] == last and record["seed"] == seed]
    before = [next(b for b in samples if b["base"] and (b["prompt"], b["seed"]) == (a["prompt"], seed)) for a in after]
    lessons = [Path(image["path"]) for image in started["images"]][: len(after)]
    files = [*(folder / record["path"] for record in (*before, *after)), *lessons]
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB").resize((64, 64), Image.Resampling.BOX))
    heads = [record["prompt"] for record in after]
    return grid(pictures, len(after), rows=["the base", "with the adapter", "what it learned from"], heads=heads, side=SIDE)


if __name__ == "__main__":
    Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
    poster(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
