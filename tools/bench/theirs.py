"""Run as a program: another trainer's script, as it is, on models that are nothing but shapes; its steps are counted.

    python theirs.py RESULT.json SCRIPT its own arguments ...

Weights are not loaded: `from_pretrained` reads the configs alone. A step lasts from accelerate's `accumulate` to its `log`, which
the script calls once each, so it holds everything between a batch and the progress bar. On a GPU, AdamW and clipping go over
all tensors at once (torch's foreach), and the optimizer's own step counters lie on the host; so it is here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import accelerate.optimizer
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

from personalize.training.memory.estimate import solidify
from tools.bench.counting import Work, phases

STEPS = 2  # the first makes the optimizer's moments


class Enough(Exception):
    """All steps that are wanted are counted."""


def install(result: Path) -> None:
    """Make models of shapes, and count the last step."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    steps: list[Work] = []
    inside = contextlib.ExitStack()
    accelerator = accelerate.Accelerator
    patches = [
        (AutoencoderKL, "encode", "encoders"),
        (CLIPTextModel, "forward", "encoders"),
        (accelerator, "backward", "backward"),
        (accelerator, "clip_grad_norm_", "update"),
        (accelerate.optimizer.AcceleratedOptimizer, "step", "update"),
        (accelerate.optimizer.AcceleratedOptimizer, "zero_grad", "update"),
    ]

    @contextlib.contextmanager
    def accumulate(self: Any, *models: Any) -> Iterator[None]:
        steps.append(Work(values=False))
        for context in (phases(steps[-1], patches), fake, steps[-1]):
            inside.enter_context(context)
        with accumulated(self, *models):
            yield

    def log(self: Any, *_: Any, **__: Any) -> None:
        inside.close()
        if len(steps) == STEPS:
            result.write_text(json.dumps(steps[-1].as_dict()), encoding="utf-8")
            raise Enough

    def of_shapes(cls: Any, path: str, *, subfolder: str, **_: Any) -> Any:
        with torch.device("meta"):
            if cls is CLIPTextModel:
                return cls(CLIPTextConfig.from_pretrained(path, subfolder=subfolder)).eval()
            return cls.from_config(cls.load_config(path, subfolder=subfolder)).eval()

    def to(self: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
        if dtype is not None:
            torch.nn.Module.to(self, dtype)
            if not isinstance(self, UNet2DConditionModel):
                there(self)
        return self

    def add_adapter(self: Any, config: Any) -> None:
        added(self, config)
        there(self)  # before the optimizer takes its parameters

    def there(model: Any) -> None:
        with fake:
            solidify([model])

    accumulated, added = accelerator.accumulate, UNet2DConditionModel.add_adapter
    accelerator.accumulate, accelerator.log = accumulate, log
    UNet2DConditionModel.add_adapter = add_adapter
    for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        cls.from_pretrained, cls.to = classmethod(of_shapes), to
    as_on_a_gpu()


def as_on_a_gpu() -> None:
    """Let AdamW choose as it does on a GPU."""
    adam: Any = importlib.import_module("torch.optim.adam")
    adam._default_to_fused_or_foreach = lambda *_, **__: (False, True)
    adam._get_value = lambda _: 1.0


def main() -> None:
    result, script = Path(sys.argv[1]), sys.argv[2]
    install(result)
    sys.argv = sys.argv[2:]
    with contextlib.suppress(Enough):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
