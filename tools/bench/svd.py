"""Whether the algebra pays on a GPU: two adapters merged and cut, by QR and the SVD of a small core, beside the CPU."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from personalize.adapters.ops import linalg
from personalize.io import write_text

from ..pocket.proof.figures import markdown
from . import pairs, resuming
from .resuming import Row
from .throughput import time_steps

HEADS = ("out x in", "layers", "CPU", "GPU, one by one", "GPU, together", "there and back", "CPU / GPU", "difference")
TOGETHER = 32  # layers at most in one batch


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--family", default="sdxl", help="whose layers")
    parser.add_argument("--rank", type=int, default=32, help="of both adapters, and of the result")
    parser.add_argument("--seconds", type=float, default=1, help="so long each way is timed for a row")
    resuming.add_options(parser, "svd")


def main(options: argparse.Namespace) -> None:
    """Time what was not timed yet, by shape of layer; publish after every row. Raises TrainingError where there is no GPU."""
    device = resuming.device_of(options)
    about = resuming.machine(device) | {"rank": options.rank, "family": options.family, "threads": torch.get_num_threads()}
    groups = Counter(linalg.sides(shape) for shape in pairs.targets(pairs.family(options.family)).values())

    def row(out: int, inside: int) -> Row:
        return row_of(out, inside, groups[out, inside], options.rank, options.seconds, device)

    def page(rows: Sequence[Row]) -> str:
        publish(options, about, rows)
        return " ".join(cells(rows[-1]))

    resuming.measure(options, options.to / "svd.json", about, sorted(groups), row, page)


# ---------------------------------------------------------------- measuring


def row_of(out: int, inside: int, count: int, rank: int, seconds: float, device: torch.device) -> Row:
    """Seconds per layer of each way, and how far their dW are apart."""
    draw = torch.Generator().manual_seed(0)
    n = min(count, TOGETHER)
    up, down = (torch.randn(n, *shape, generator=draw).half() for shape in ((out, 2 * rank), (2 * rank, inside)))
    here, cpu = (up.to(device), down.to(device)), torch.device("cpu")
    ways: Mapping[str, tuple[Callable[[], object], torch.device, int]] = {
        "cpu": (lambda: cut(up[0], down[0], rank), cpu, 1),
        "each": (lambda: cut(here[0][0], here[1][0], rank), device, 1),
        "together": (lambda: cut(*here, rank), device, n),
        "moved": (lambda: [side.cpu() for side in (up.to(device), down.to(device))], device, n),
    }
    told = {name: time_steps(take, seconds, where)[0] / layers for name, (take, where, layers) in ways.items()}
    one, other = cut(up[0], down[0], rank), [side.cpu() for side in cut(*here, rank)]
    gap = one[0] @ one[1] - other[0][0] @ other[1][0]
    return {"count": count, **told, "gap": float(gap.norm() / (one[0] @ one[1]).norm())}


def cut(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of up @ down cut to a rank, as `linalg.of_factors` does it: [out, r] and [r, in], or n of both."""
    if up.ndim == 2:
        parts = linalg.of_factors(up, down)
        u, s, v = parts.u, parts.s, parts.v
    else:
        left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().mT)
        u, s, v = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        u, v = left.Q @ u, v @ right.Q.mT
    return u[..., :rank] * s[..., None, :rank], v[..., :rank, :]


# ---------------------------------------------------------------- what is told


def cells(row: Row) -> list[str]:
    """A row of the table; milliseconds per layer."""
    spent = [f"{1e3 * row[name]:.2f}" for name in ("cpu", "each", "together", "moved")]
    out, inside = row["case"]
    return [f"{out} x {inside}", f"{row['count']}", *spent, f"{gain(row):.1f}", f"{row['gap']:.0e}"]


def gain(row: Row) -> float:
    """How many times faster the better way on the GPU is, with the way there and back."""
    return float(row["cpu"] / (min(row["each"], row["together"]) + row["moved"]))


def publish(options: argparse.Namespace, about: Mapping[str, object], rows: Sequence[Row]) -> None:
    """svd.md."""
    cpu, gpu = (sum(row["count"] * row["cpu"] / times(row) for row in rows) for times in (lambda _: 1, gain))
    layers = sum(row["count"] for row in rows)
    page = f"""# The algebra on a GPU

Two adapters of rank {options.rank} side by side, cut to rank {options.rank} again: QR of both factors, SVD of the core, in fp64.
Milliseconds per layer; together: one batch of up to {TOGETHER} layers of a shape; there and back: fp16 factors to the GPU and
back. Then the CPU's time by that of the GPU's better way with the way there and back, and how far the two dW are apart.

- machine: {about["device"]}, torch {about["torch"]}, {about["threads"]} threads on the CPU
- layers: all of {options.family} that kohya's trainer targets
- these {layers} layers: {cpu:.2f} s on the CPU, {gpu:.2f} s on the GPU; reading and writing files not counted
- command: python -m tools.bench svd{" --tiny" if options.tiny else ""}

"""
    write_text(options.to / "svd.md", page + markdown(HEADS, [cells(row) for row in rows]))
