"""What this tree made slower or faster beside a commit: commands of both, one after the other, their CPU seconds and their wall.

Both run on the same interpreter with one thread. Of each command the least of all rounds counts: neighbours only add.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from personalize.errors import RecipeError, TrainingError

from ..pocket.proof.figures import markdown
from . import pairs
from .algebra import Cost, least, run

HERE = Path(__file__).resolve().parents[2]
TRAIN = "--choose none --sample-every 0 --sample-seeds 0 --warmup 0 --checkpoint-every 0"
GENERATE = 'generate --base pocket "a red cat" --steps'
HEADS = ("", "CPU s then", "CPU s now", "ratio", "wall s then", "wall s now", "ratio")
Spent = tuple[float, float]  # seconds of CPU, and of the clock


@dataclass(frozen=True)
class Row:
    """Something that is timed: a command, without what another one takes that does less, shared among so many."""

    command: str  # {data}: sample data, {work}: a folder of this run alone, {a} and {b}: two adapters of SDXL
    less: str = ""
    parts: int = 1


def training(command: str, steps: int) -> str:
    """A command that trains for so many steps, and does as little as it can besides."""
    return f"{command} --class cat --preset pocket-subject --steps {steps} {TRAIN} --output {{work}}"


SUBJECT, FOLDERS = "train {data}/subject --trigger zwx", "batch {data}"
ROWS = {
    "start": Row(f"{GENERATE} 1 --output {{work}}"),
    "image": Row(f"{GENERATE} 24 --seeds 0,1,2,3,4,5,6,7 --output {{work}}", f"{GENERATE} 1 --output {{work}}", 8),
    "step": Row(training(SUBJECT, 14), training(SUBJECT, 2), 12),
    "fleet's step": Row(training(FOLDERS, 8), training(FOLDERS, 2), 6),
    "merge": Row("merge {a}:0.7 {b}:0.5 --output {work}/merged.safetensors"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--against", default="HEAD", metavar="COMMIT", help="whose speed this tree is held against")
    parser.add_argument("--rounds", type=int, default=2, help="how often each command runs; the least counts")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS, help="some of the rows")


def main(options: argparse.Namespace) -> None:
    """Time and print. Raises RecipeError for a commit that is none."""
    with tempfile.TemporaryDirectory() as name, tree_of(options.against, Path(name) / "then") as then:
        work = Path(name)
        a, b = pairs.write_pair(work, pairs.family("sdxl"), 32, 0) if "merge" in options.only else (work, work)
        words = {"data": str(HERE / "sample_data"), "a": str(a), "b": str(b), "work": str(work / "out")}
        rows = []
        for title in options.only:
            row = ROWS[title]
            commands = [command.format(**words) for command in (row.command, row.less) if command]
            rows.append(cells(title, *compare(commands, row.parts, (then, HERE), work / "out", options.rounds)))
            print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(HEADS, rows))


@contextlib.contextmanager
def tree_of(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a folder of their own. Raises RecipeError for a commit that is none."""
    git = ["git", "-C", str(HERE), "worktree"]
    made = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if made.returncode:
        raise RecipeError(f"--against {commit}: {made.stderr.strip().splitlines()[-1]}", "git log --oneline lists commits")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def compare(commands: Sequence[str], parts: int, trees: Sequence[Path], out: Path, rounds: int) -> list[Spent]:
    """What the first command takes without the second, shared among so many, in each tree; all run in turns."""
    costs: dict[tuple[Path, str], list[Cost]] = {}
    for _, command, tree in itertools.product(range(rounds), commands, trees):
        costs.setdefault((tree, command), []).append(cost(tree, command, out))
    found = []
    for tree in trees:
        whole, *less = (least(costs[tree, command]) for command in commands)
        cpu, wall = whole.cpu - sum(one.cpu for one in less), whole.wall - sum(one.wall for one in less)
        found.append((cpu / parts, wall / parts))
    return found


def cost(tree: Path, command: str, out: Path) -> Cost:
    """What a command of a tree takes, from its process's start to its end. Raises RecipeError if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = [sys.executable, "-m", "personalize", *shlex.split(command)]
    try:
        return run(words, out.parent, cwd=out, PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
    except TrainingError as error:
        said = (out.parent / "last.log").read_text(errors="replace")[-500:]
        raise RecipeError(f"{command} failed in {tree}: {said}", "does that commit know it?") from error


def cells(title: str, then: Spent, now: Spent) -> tuple[str, ...]:
    """A row of the table; a ratio above 1 is faster now.

    >>> cells("step", (0.2, 0.3), (0.1, 0.1))
    ('step', '0.20', '0.10', '2.00', '0.30', '0.10', '3.00')
    """
    both = [(f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}" if b > 0 else "–") for a, b in zip(then, now, strict=True)]
    return (title, *both[0], *both[1])
