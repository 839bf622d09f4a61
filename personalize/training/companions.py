"""What a run leaves beside its adapter: of whole weights, the model in its base's layout, and the LoRA nearest to it; of words
that learn beside an adapter, an embedding of each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.embedding import Embedding
from ..adapters.ops.bake import bake
from ..adapters.ops.resize import resize
from ..io import disk_error
from .events import Derived, Event
from .preflight import RunPlan


def write_companions(plan: RunPlan, step: int) -> Iterator[Event]:
    """Write both of the adapter that a run has ended with, the model streamed. Raises OutputError where the disk refuses."""
    adapter, run = Adapter.load(plan.run.adapter), plan.run
    path, rounded = write_model(plan.base.path, adapter, run.folder / f"{run.name}-model")
    yield run.record(Derived(step, run.relative(path), "the model, in the layout of its base", rounded))
    rank = plan.recipe.adapter.rank
    small, report = resize(adapter, "rank", rank)
    lora = small.save(run.folder / f"{run.name}-lora.safetensors", plan.recipe.dialect)
    yield run.record(Derived(step, run.relative(lora), f"LoRA of rank {rank}", report.error))


def write_words(plan: RunPlan, step: int) -> Iterator[Event]:
    """Write each word that the adapter brings as an embedding of its own, by the name that UIs know it by. Raises OutputError."""
    adapter, run = Adapter.load(plan.run.adapter), plan.run
    for path, word in Embedding.from_words(adapter.words, run.folder / "embeddings"):
        count = f"{word.tokens} vector{'s' * (word.tokens > 1)}"
        yield run.record(Derived(step, run.relative(word.save(path)), f"the word {path.stem} alone, {count}", 0.0))


def write_model(base: Path, adapter: Adapter, path: Path) -> tuple[Path, float]:
    """The base with an adapter in its weights, in the place of an earlier one; and the share of dW that its dtype rounds off."""
    aside = path.with_name(f".{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        report = bake(base, [(adapter, 1.0)], aside)
        assert report.path
        made = report.path.with_name(report.path.name.removeprefix("."))
        if made.is_dir():
            shutil.rmtree(made)
        report.path.replace(made)
    except OSError as error:
        raise disk_error(path, error, "another --output") from error
    return made, report.error
