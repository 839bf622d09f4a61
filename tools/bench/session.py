"""How soon a loaded session draws: CPU seconds from a request to its first step, and of a step, by stack of adapters.

The first time a session draws with a stack, later times, and what a step costs then. Of all rounds the least counts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch

from personalize.adapters.adapter import Adapter
from personalize.inference.events import Progress
from personalize.inference.library import Library
from personalize.inference.request import Request
from personalize.inference.session import Session
from personalize.models.model import Base
from personalize.models.threads import few_threads
from personalize.recipe.fields import AdapterSpec
from personalize.tuning.attach import attach

from ..pocket.proof.figures import markdown

HEADS = ("adapters", "ready, first time (s)", "ready again (s)", "a step (s)")
STEPS = 4
Laps = tuple[float, float]  # seconds until the first step begins, and of a step


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--base", default="pocket", help="what draws")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--many", type=int, default=20, help="adapters in the tallest stack")
    parser.add_argument("--rounds", type=int, default=3, help="how often each stack draws; the least counts")


def main(options: argparse.Namespace) -> None:
    """Time and print."""
    base = Base.load(options.base)
    adapters = {f"a{i}": random_lora(base, options.rank, i) for i in range(options.many)}
    every = " ".join(f"<lora:{name}:{1 / options.many:.2f}>" for name in adapters)
    stacks = {"none": "", "one": "<lora:a0:0.8>", f"{options.many}": every, "one that moves": "<lora:a0:0@0,1@1>"}
    with few_threads(base):
        laps_of(Session(base), "a cat")  # what torch prepares
        rows = []
        for title, tags in stacks.items():
            sessions = [Session(base, Library(adapters)) for _ in range(options.rounds)]
            first = [laps_of(session, f"a cat {tags}") for session in sessions]
            again = [laps_of(session, f"a dog {tags}") for session in sessions]
            rows.append(cells(title, first, again))
            print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(HEADS, rows))


def random_lora(base: Base, rank: int, seed: int) -> Adapter:
    """A LoRA of the denoiser with values."""
    draw = torch.Generator().manual_seed(seed)
    with attach(base, AdapterSpec(rank=rank), seed=seed) as attached, torch.no_grad():
        for own in attached.parameters().values():
            for name, parameter in own.items():
                if name.endswith(".up"):
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
        return attached.snapshot()


def laps_of(session: Session, prompt: str) -> Laps:
    """Draw one picture; the first of its steps is no longer than the others, so what it takes more is the start."""
    times = [time.thread_time()]
    for event in session.draw([Request.parse(prompt.strip(), steps=STEPS)]):
        if isinstance(event, Progress):
            times.append(time.thread_time())
    first, *others = (end - start for start, end in itertools.pairwise(times))
    step = min(others)
    return max(0.0, first - step), step


def cells(title: str, first: Sequence[Laps], again: Sequence[Laps]) -> tuple[str, ...]:
    """A row of the table.

    >>> cells("one", [(0.1, 0.05), (0.2, 0.04)], [(0.02, 0.05), (0.03, 0.03)])
    ('one', '0.100', '0.020', '0.0300')
    """
    return (title, f"{min(first)[0]:.3f}", f"{min(again)[0]:.3f}", f"{min(step for _, step in again):.4f}")
