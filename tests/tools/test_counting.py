"""What a training step launches, held to a number: at batch 1 on a GPU each operation costs its launch, so none comes unseen."""

from __future__ import annotations

import pytest
import torch

from personalize.training.memory.ladder import ComputePlan
from tools.bench import memory, pairs, step, throughput
from tools.bench.counting import Work, phases

SIDE = 128  # pixels; the deepest level has more than one position
# Family, precision => operations of a step (rank 8 on attention layers, batch 1). Lower a number where a step has become shorter.
MOST = {("sd1", "bfloat16"): 1691, ("sd1", "float32"): 2252, ("sdxl", "bfloat16"): 5122}
SLACK = 10  # operations that torch may save by itself


@pytest.mark.parametrize(("family", "precision"), MOST)
def test_a_step_takes_no_more_operations_than_it_did(family: str, precision: str) -> None:
    configs = memory.configs_of(pairs.narrow(pairs.family(family)), SIDE)
    plan = ComputePlan(precision, channels_last=precision != "float32", joined=precision != "float32")  # as on a GPU
    take = throughput.trainer(configs, step.recipe_of(1, 8), plan, torch.device("cpu"))
    take()  # the first makes the optimizer's moments
    with phases(work := Work(), step.OURS), work:
        take()
    count, most = sum(work.ops.values()), MOST[family, precision]
    assert count <= most, f"{count - most} more than before, of {work.names.most_common()}"
    assert count > most - SLACK, f"a step has become shorter: write {count} for {most} above, and anew docs/figures/step.md"
    assert work.waits == 1, "the losses are read once a step"
