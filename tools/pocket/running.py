"""One resumable training loop for every stage of pretraining: seeded batches, warm-up and decay, EMA, a log, atomic state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from personalize.io import atomic

Item = TypeVar("Item")  # what a stage's batch is


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    decay: float = 0.3  # last share of the steps over which the learning rate falls to nothing
    ema: float = 0.999
    weight_decay: float = 0.01
    muon: bool = True  # for matrices and convolutions
    save_every: int = 250
    log_every: int = 50

    def rate(self, step: int) -> float:
        """The learning rate at a step: warm-up, a plateau, a linear fall."""
        falling = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, falling)


class Averaged:
    """An exponential moving average of a model's parameters, warmed up so that early weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model's weights."""
        keep = min(self.decay, (1 + step) / (10 + step))
        ours = list(self.weights.values())
        torch._foreach_lerp_(ours, [p.detach() for p in model.parameters()], 1 - keep)


def write_state(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Save tensors and facts so that a kill at any moment leaves a whole state: one file, then a rename."""
    with atomic(folder / "state.safetensors") as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"about": json.dumps(about)})


def read_about(file: Path) -> dict:
    """The facts stored in a state's header."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"])


class Mixed:
    """Muon (Jordan et al. 2024) for matrices and convolutions, AdamW for embeddings, norms and biases."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        named = dict(model.named_parameters())
        wide = {name: p for name, p in named.items() if plan.muon and is_wide(name, p)}
        self.wide = list(wide.values())
        self.flat = [nn.Parameter(p.data.view(len(p), -1)) for p in self.wide]  # Muon takes matrices: views of the same storage
        rest = {name: p for name, p in named.items() if name not in wide}
        adam = torch.optim.AdamW(rest.values(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.halves: list[tuple[torch.optim.Optimizer, float]] = [(adam, 0.5)]
        self.slots: dict[str, tuple[torch.optim.Optimizer, nn.Parameter]] = {name: (adam, p) for name, p in rest.items()}
        if wide:
            muon = torch.optim.Muon(self.flat, lr=plan.lr, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.halves.append((muon, 1.0))
            self.slots |= {name: (muon, p) for name, p in zip(wide, self.flat, strict=True)}

    def step(self, rate: float) -> None:
        """One update at a learning rate."""
        for matrix, p in zip(self.flat, self.wide, strict=True):
            matrix.grad = None if p.grad is None else p.grad.view(len(p), -1)
        for half, share in self.halves:
            half.param_groups[0]["lr"] = rate * share
            half.step()

    def tensors(self) -> dict[str, Tensor]:
        """The moments of every parameter, by name."""
        state = {(name, key): value for name, (half, p) in self.slots.items() for key, value in half.state[p].items()}
        return {
            f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
            for (name, key), value in state.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            half, p = self.slots[name]
            half.state[p][kind] = value.to(p.device) if value.dim() else value


def is_wide(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix or a convolution whose directions are worth evening out."""
    return p.ndim >= 2 and min(len(p), p[0].numel()) >= 16 and "embedding" not in name


def team() -> tuple[int, int]:
    """Rank and number of the processes that train one model together; (0, 1) of one alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def join_team(rank: int, count: int, meeting: Path) -> None:
    """Become one of `count` processes that meet at a file not yet there, each with its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    distributed.init_process_group("gloo", f"file://{meeting.resolve()}", rank=rank, world_size=count)


def work_in_team(rank: int, count: int, meeting: Path, work: Callable[[Item], None], item: Item) -> None:
    """What one of `count` processes that `torch.multiprocessing.spawn` starts does: meet the others, work, and part."""
    join_team(rank, count, meeting)
    work(item)
    distributed.destroy_process_group()


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean of all gradients, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients) / team()[1]
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def _pack(model: nn.Module, average: Averaged, optimizer: Mixed) -> dict[str, Tensor]:
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"ema/{name}": t for name, t in average.weights.items()}
    return tensors | {f"optimizer/{key}": t for key, t in optimizer.tensors().items()}


@torch.no_grad()
def _unpack(tensors: dict[str, Tensor], model: nn.Module, average: Averaged, optimizer: Mixed) -> None:
    for name, p in model.named_parameters():
        p.copy_(tensors[f"model/{name}"])
        average.weights[name].copy_(tensors[f"ema/{name}"])
    optimizer.restore({key.removeprefix("optimizer/"): t for key, t in tensors.items() if key.startswith("optimizer/")})


def run(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    batches: Callable[[int], Iterator[Item]],
    loss_of: Callable[[Item, int], Tensor],
    picture: Callable[[dict[str, Tensor], int], None] | None = None,
) -> dict[str, Tensor]:
    """Train a stage to its end and return the averaged weights. Run again after a kill, it goes on from the last state.

    `batches(start)` yields the batches from a step on; `loss_of(batch, step)` is a scalar; `picture(weights, step)` may
    draw a sample grid at every save. Of a team, each process has its own part of a batch, and the first one writes.
    """
    rank, count = team()
    folder.mkdir(parents=True, exist_ok=True)
    optimizer, average, start, seen = Mixed(model, plan), Averaged(model, plan.ema), 0, 0.0
    if (folder / "state.safetensors").exists():
        about = read_about(folder / "state.safetensors")
        start, seen = about["step"], about["seconds"]
        _unpack(load_file(folder / "state.safetensors"), model, average, optimizer)
        print(f"{folder.name}: resuming at step {start}", flush=True)
    began, total = time.time(), torch.zeros(())
    stream = batches(start)
    for step in range(start, plan.steps):
        model.zero_grad()
        loss = loss_of(next(stream), step)
        loss.backward()
        if count > 1:
            average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(plan.rate(step))
        average.update(model, step)
        total = total + loss.detach().cpu()
        done, seconds = step + 1, seen + time.time() - began
        if rank:
            continue
        if done % plan.log_every == 0:
            record = {
                "step": done,
                "loss": round(float(total) / plan.log_every, 5),
                "images": done * plan.batch,
                "seconds": round(seconds),
            }
            print(folder.name, record, flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            total = torch.zeros(())
        if done % plan.save_every == 0 or done == plan.steps:
            write_state(folder, _pack(model, average, optimizer), {"step": done, "seconds": seconds})
            if picture:
                picture(average.weights, done)
    return average.weights
