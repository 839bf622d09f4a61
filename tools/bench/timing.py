"""Run as a program: another trainer's script, as it is; its steps are timed.

    python timing.py RESULT.json WARM SECONDS SCRIPT its own arguments ...

A step lasts from one of accelerate's `accumulate` to the next, which scripts call once each, so it holds all that a step takes:
their data loader, and what they encode anew. The first WARM steps are not timed.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch


class Enough(BaseException):
    """Steps were timed long enough. No script can take it for an error of its own."""


class Clock:
    """Counts steps, and ends the script when enough of them are timed."""

    def __init__(self, result: Path, warm: int, seconds: float) -> None:
        self.result, self.warm, self.seconds = result, warm, seconds
        self.steps, self.began = 0, 0.0

    def tick(self) -> None:
        """A step begins."""
        gpu = torch.cuda.is_available()
        if self.steps == self.warm:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        elif self.steps > self.warm and time.perf_counter() - self.began >= self.seconds:
            if gpu:
                torch.cuda.synchronize()
            spent = (time.perf_counter() - self.began) / (self.steps - self.warm)
            told = {"seconds": spent, "bytes": torch.cuda.max_memory_allocated() if gpu else None}
            self.result.write_text(json.dumps(told), encoding="utf-8")
            raise Enough
        self.steps += 1


def main() -> None:
    result, warm, seconds, script = sys.argv[1:5]
    clock = Clock(Path(result), int(warm), float(seconds))
    accumulated = accelerate.Accelerator.accumulate

    def accumulate(self: Any, *models: Any) -> Any:
        clock.tick()
        return accumulated(self, *models)

    accelerate.Accelerator.accumulate = accumulate
    sys.path.insert(0, str(Path(script).parent))  # where a script's own modules are
    sys.argv = sys.argv[4:]
    with contextlib.suppress(Enough):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
