"""docs/kinds.md: what each program makes of a file of each kind that is trained, for each base family, made by writing them.

`python -m tools.kinds > docs/kinds.md`. A file of each kind, of a family's true layer shapes (attention, feed-forward,
convolutions, text encoders), is written under the export contract, and the hosts' own rules are asked what they find in it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

from personalize.adapters import dialects, hosts, kinds
from personalize.adapters.adapter import Adapter
from personalize.adapters.delta import Delta, Dense
from personalize.adapters.kinds import Kind, Size
from personalize.adapters.kinds.full import NORM
from personalize.families.family import Family, Shape, weights
from personalize.families.names import ROWS, claims, part_of
from personalize.formats.header import read_header
from personalize.tuning.dense import BIAS
from personalize.tuning.targets import begin

TARGETS = ("attention", "feedforward", "conv")
FAMILIES = ("pocket", "sd1", "sd2", "sdxl")
HEAD = """# Kinds, bases and programs

What each program makes of the file that `train --kind` writes, by its own rules of names and kinds (`adapters/hosts.py`). Made by
`python -m tools.kinds > docs/kinds.md`, which writes a file of each kind with every layer of attention, feed-forward and
convolutions in the family's true shapes, text encoders among them; `personalize doctor FILE` says the same of any file. "-": it
has no such base. OFT's alpha is 0 in these files: no rotation is limited. `full` is left out: its file is as large as the model,
and holds `diff`, which A1111, ComfyUI and Forge read ([adapters.md](adapters.md#which-program-loads-what)), beside norms. So is
`embedding`, which changes no layer: all four read its vectors ([adapters.md](adapters.md#words)).
"""
KINDS = [name for name in kinds.trainable() if name != "full"]


def shapes_of(family: Family, kind: Kind) -> dict[str, Shape]:
    """The layers of a family that a kind changes: path => shape of the weight, or of a norm and its bias."""
    every = weights(family)
    if kind is NORM:
        norms = [path for path, shape in every.items() if len(shape) == 1 and not path.endswith(BIAS)]
        return {path: every[path] for norm in norms for path in (norm, norm + BIAS) if path in every}
    named = {row.part: [row.targets[name] for name in TARGETS if name in row.targets] for row in family.networks}
    found = {path: shape for path, shape in every.items() if len(shape) > 1}
    return {path: shape for path, shape in found.items() if any(re.fullmatch(one, path) for one in named[part_of(path)])}


def start_of(family: Family, kind: Kind) -> Iterator[tuple[str, Delta]]:
    """A new update of each of these layers."""
    generator, alpha = torch.Generator().manual_seed(0), 1.0 if kind.has_alpha else None
    for path, shape in shapes_of(family, kind).items():
        weight = torch.ones(()).expand(shape)
        yield path, Dense(torch.zeros(shape)) if kind is NORM else begin(kind, weight, Size(1), alpha, generator)


@cache
def slots_of(family: str, kind: str) -> Mapping[str, dialects.Slot]:
    """What a written file of a kind holds, as its reader finds it."""
    row = ROWS[family]
    with tempfile.TemporaryDirectory() as folder:
        start = dict(start_of(row, kinds.trainable()[kind]))
        path = Adapter(start, claims(row)).save(Path(folder) / "a", dtype="fp16")
        return dialects.read_keys(read_header(path)).slots


def cell(family: str, kind: str, host: hosts.Host) -> str:
    """How much of a file a host takes, and what it does otherwise."""
    row, slots = ROWS[family], slots_of(family, kind)
    if family not in host.families:
        return "-"
    if host not in hosts.readers("kohya", row, slots):
        return "no"
    ignored = hosts.ignored_layers(host, "kohya", row, slots)
    if len(ignored) == len(slots):
        return "no"
    taken = "yes" if not ignored else f"{len(slots) - len(ignored)} of {len(slots)} layers"
    notes = [text.removeprefix(f"{host.name} ") for text in hosts.departures(host, slots)]
    return "; ".join([taken, *notes])


def table(family: str) -> str:
    """One family's: a row for each kind, a column for each host."""
    named = [host.name for host in hosts.HOSTS]
    lines = [
        f"\n## {ROWS[family].title}\n",
        f"| `--kind` | layers | {' | '.join(named)} |",
        f"| --- | --- |{' --- |' * len(named)}",
    ]
    for kind in KINDS:
        cells = " | ".join(cell(family, kind, host) for host in hosts.HOSTS)
        lines.append(f"| `{kind}` | {len(slots_of(family, kind))} | {cells} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/kinds.md."""
    return HEAD + "".join(map(table, FAMILIES))


if __name__ == "__main__":
    print(page(), end="")
