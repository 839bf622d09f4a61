"""The model card of a base that was pretrained here: what it learned from, and how long."""

from __future__ import annotations

import argparse
import json

import torch

from .pool import INDIVIDUALS, LOOKS
from .world import BACKGROUNDS, COLOURS, OBJECTS, STYLES

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# pocket

Stable Diffusion in miniature: the same classes and folder layout as SD 1.5 at {size} px, trained from nothing on drawn scenes.

- **Data**: {pool:,} images (in the last run) of the world in `tools/pocket/world.py` ({objects} objects,
  {colours} colours, {places} places, {styles} styles; some combinations held out), each with one caption.
  {individuals:.0%} show an invented individual, {looks:.0%} an invented look; none of the benchmark's.
  Nothing else: no photographs, no scraped images.
- **Objective**: {objective}; 10 % of captions dropped; averaged weights.
- **Made by** `python -m tools.pocket.pretrain --work DIR`, on {cores}{again}; stage by stage:

| run | stage | steps | images seen | seconds | last loss |
|---|---|---|---|---|---|
{rows}

How well it follows prompts is measured by `python -m tools.pocket.proof base`: docs/figures/base.md.
"""


def card(options: argparse.Namespace, objective: str) -> str:
    """The model card: data, objective, steps and losses, after those of the base that training started from."""
    before = (options.start / "README.md").read_text().splitlines() if options.start else []
    rows = [line for line in before if line.startswith("| ") and line[2].isdigit()]
    this = 1 + max((int(row.split("|")[1]) for row in rows), default=0)
    logs = {file.parent.name: json.loads(file.read_text().splitlines()[-1]) for file in sorted(options.work.glob("*/log.jsonl"))}
    rows += [
        f"| {this} | {name} | {log['step']:,} | {log['images']:,} | {log['seconds']:,} | {log['loss']} |"
        for name, log in logs.items()
    ]
    counts = {"objects": len(OBJECTS), "colours": len(COLOURS), "places": len(BACKGROUNDS), "styles": len(STYLES)}
    again = f", and again with `--start`: {this} runs" if before else ""
    shares = {"individuals": INDIVIDUALS, "looks": LOOKS}
    about = {"size": options.size, "pool": options.pool, "rows": "\n".join(rows), "objective": objective}
    cores = "CPU cores" if options.device == "cpu" else f"a GPU, {torch.cuda.get_device_name(options.device)}"
    return CARD.format(again=again, cores=cores, **about, **shares, **counts)
