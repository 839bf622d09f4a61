"""Our merge and resize beside kohya's sd-scripts and peft: time, memory, and error against the dense answer in fp64.

Each tool runs as its own process, one after the other and several rounds of it, with the same files, threads and environment.
Tools that take the SVD of dW would need most of an hour for a whole SDXL file: they and ours get the same sample of its layers,
and only then is their time for the whole file extrapolated, by the number of layers, and called so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.errors import DataError, TrainingError
from personalize.io import write_text

from ..pocket.proof.figures import FIGURES, machine, markdown, show_table
from . import pairs, peers
from .peers import Tool

HOLLOW = 10**9  # bytes of the file that is only looked at

METER = """import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([code, seconds, used.ru_utime + used.ru_stime, peak]), file=open(sys.argv[1], "w"))
"""  # a small process in between: a child's peak memory begins with that of the process that started it


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds on the clock, of both cores' time, and the bytes that were resident at its worst."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Result:
    """A tool's least cost in all rounds, for one size of input."""

    tool: str
    task: str
    layers: int
    inputs: int  # bytes
    cost: Cost
    start: Cost  # of the same program when it does nothing
    error: float | None
    whole: bool = True  # whether it was run on all layers too


@dataclass(frozen=True)
class Goal:
    """What was wanted, and what was measured."""

    name: str
    wanted: str
    measured: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        return self.name, self.wanted, self.measured, "yes" if self.met else "NO"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told."""
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts (without: its scripts are left out)")
    parser.add_argument("--family", default="sdxl", help="whose layers the adapters have")
    parser.add_argument("--rank", type=int, default=32, help="of both adapters")
    parser.add_argument("--modules", type=int, default=48, help="layers in the sample for tools that take the SVD of dW")
    parser.add_argument("--checked", type=int, default=8, help="layers whose answer is computed in dense fp64")
    parser.add_argument("--only", default="", help="tools whose name contains one of these, by comma; ours always run")
    parser.add_argument("--rounds", type=int, default=3, help="of which the least is told; 1 for what takes the SVD of dW")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="folder for the adapters and what becomes of them")
    parser.add_argument("--to", type=Path, default=FIGURES, help="folder for algebra.md and algebra.json")


# ---------------------------------------------------------------- running


def run(command: Sequence[str], folder: Path, cwd: Path | None = None, **more: str) -> Cost:
    """What a command takes, with `more` in its environment. Raises TrainingError if it fails; its words are in last.log."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} | more
    told, log = folder / "cost.json", folder / "last.log"
    with log.open("w") as out:
        meter = [sys.executable, "-I", "-S", "-c", METER, str(told), *command]
        subprocess.run(meter, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd, check=True)
    code, *cost = json.loads(told.read_text())
    if code:
        raise TrainingError(f"{Path(command[0]).name} ended with {code}", f"its output is in {log}")
    return Cost(*cost)


def least(costs: Sequence[Cost]) -> Cost:
    """The run that was disturbed least."""
    return min(costs, key=lambda cost: cost.cpu)


@dataclass(frozen=True)
class Job:
    """A tool on files."""

    tool: Tool
    files: tuple[Path, ...]
    output: Path
    layers: int

    @property
    def command(self) -> list[str]:
        return self.tool.command([str(file) for file in self.files], str(self.output))


def jobs(chosen: Sequence[Tool], whole: Sequence[Path], sample: Sequence[Path], count: int, options: Any) -> list[Job]:
    """All that is to be run: dense tools on the sample, the others on whole files, and beside dense ones on the sample too."""
    found = []
    dense = {tool.task for tool in chosen if tool.dense}
    for tool in chosen:
        places = ([sample] if tool.task in dense else []) + ([] if tool.dense else [whole])
        for files in places:
            files = files[: peers.tasks(options.rank)[tool.task].files]
            layers = count if files[0] in whole else options.modules
            name = "".join(letter if letter.isalnum() else "-" for letter in f"{tool.name} {layers}")
            found.append(Job(tool, tuple(files), options.work / f"{name}.safetensors", layers))
    return found


def costs_of(work: Sequence[Job], rounds: int, folder: Path) -> dict[int, list[Cost]]:
    """Number of the job => its costs; round by round, so that all meet the same neighbours."""
    costs: dict[int, list[Cost]] = {i: [] for i in range(len(work))}
    for turn in range(rounds):
        for i, job in enumerate(work):
            if turn == 0 or not job.tool.dense:
                cost = run(job.command, folder)
                costs[i].append(cost)
                print(f"{job.tool.name}, {job.layers} layers: {cost.wall:.1f} s, {cost.cpu:.1f} s CPU", flush=True)
    return costs


def starts(work: Sequence[Job], rounds: int, folder: Path) -> dict[tuple[str, ...], Cost]:
    """What each program takes to do nothing."""
    programs = dict.fromkeys(job.tool.start for job in work)
    return {start: least([run(start, folder) for _ in range(rounds)]) if start else Cost(0, 0, 0) for start in programs}


def run_and_compare(work: Sequence[Job], options: Any, names: Sequence[str]) -> Iterator[Result]:
    """Run everything, then compare."""
    began = starts(work, options.rounds, options.work)
    costs = costs_of(work, options.rounds, options.work)
    row, known = pairs.family(options.family), {}
    for i, job in enumerate(work):
        task = peers.tasks(options.rank)[job.tool.task]
        if job.tool.task not in known:
            known[job.tool.task] = pairs.answers(job.files, names, task.rank)
        inputs = sum(file.stat().st_size for file in job.files)
        error = _error(job, known[job.tool.task], row)
        cost, start = least(costs[i]), began[job.tool.start]
        yield Result(job.tool.name, job.tool.task, job.layers, inputs, cost, start, error, not job.tool.dense)


def _error(job: Job, wanted: Mapping[str, Tensor], row: Any) -> float | None:
    return pairs.error(job.output, wanted, row) if job.tool.judged else None


# ---------------------------------------------------------------- telling

HEADS = ("tool", "layers", "seconds", "CPU seconds", "of them start", "all layers", "peak", "of inputs", "error")


def cells(result: Result, count: int) -> tuple[str, ...]:
    """A row of a task's table."""
    cost, mark = result.cost, "" if result.layers == count else "≈ "
    whole = "–" if result.whole and mark else f"{mark}{seconds_for_layers(result, count):.1f}"
    seconds = [f"{x:.1f}" for x in (cost.wall, cost.cpu, result.start.cpu)]
    error = "–" if result.error is None else f"{result.error:.1e}"
    memory = f"{cost.peak / 1e6:.0f} MB", f"{cost.peak / result.inputs:.2f}x"
    return result.tool, str(result.layers), *seconds, whole, *memory, error


def seconds_for_layers(result: Result, count: int) -> float:
    """CPU seconds for all layers: as measured, or what is not start times as many layers."""
    return result.start.cpu + max(0.0, result.cost.cpu - result.start.cpu) * count / result.layers


def goals(results: Sequence[Result], shown: Cost, size: int, count: int) -> list[Goal]:
    """What the figures say to what was asked for."""
    whole = {(one.task, one.tool): one for one in results if one.layers == count}
    ours = {task: one for (task, tool), one in whole.items() if tool.startswith("personalize")}
    found = []
    for one in results:
        if one.task in ours and one.layers < count and not one.tool.startswith("personalize") and one.error is not None:
            found += _beside(one, ours[one.task], count)
    if ours.get("concat"):
        found += _concat(ours["concat"], whole)
    name = f"show of a file of {size / 1e9:.1f} GB"
    return [*found, Goal(name, "well under 1 s", f"{shown.wall:.2f} s", shown.wall < 0.5)]


def _beside(theirs: Result, ours: Result, count: int) -> list[Goal]:
    """Beside a tool that takes the SVD of dW: CPU seconds for all layers, start and all; and errors on the same layers."""
    if theirs.start.cpu > theirs.cost.cpu / 2 or ours.error is None or theirs.error is None:
        return []
    times = seconds_for_layers(theirs, count) / ours.cost.cpu
    errors = f"{ours.error:.1e} beside {theirs.error:.1e}"
    return [
        Goal(f"{theirs.task}: faster than {theirs.tool}, all layers", ">= 100x", f"≈ {times:.0f}x", times >= 100),
        Goal(f"{theirs.task}: error beside {theirs.tool}", "not larger", errors, ours.error <= theirs.error),
    ]


def _concat(ours: Result, whole: Mapping[tuple[str, str], Result]) -> list[Goal]:
    found = []
    spent = ours.cost.wall - ours.start.wall
    if disk := whole.get(("concat", "cat A B > C, sync")):
        told = f"{spent:.1f} s beside {disk.cost.wall:.1f} s"
        found.append(Goal("concat: start aside, beside a copy of the bytes", "<= 2x", told, spent <= 2 * disk.cost.wall))
    share = ours.cost.peak / ours.inputs
    return [*found, Goal("concat: peak memory, of the inputs' bytes", "< 1.5x", f"{share:.2f}x", share < 1.5)]


def publish(options: Any, about: Mapping[str, Any], results: Sequence[Result], wanted: Sequence[Goal], count: int) -> None:
    """Print the tables and write them to algebra.md and algebra.json."""
    parts = ["# Merge and resize, beside other tools\n", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for name, task in peers.tasks(options.rank).items():
        if rows := [cells(one, count) for one in results if one.task == name]:
            show_table(task.title, HEADS, rows)
            parts += [f"## {task.title}\n", markdown(HEADS, rows)]
    rows = [goal.cells() for goal in wanted]
    show_table("Goals", ("goal", "wanted", "measured", "met"), rows)
    parts += ["## Goals\n", markdown(("goal", "wanted", "measured", "met"), rows)]
    write_text(options.to / "algebra.md", "\n".join(parts))
    data = {"about": about, "results": [asdict(one) for one in results], "goals": [asdict(goal) for goal in wanted]}
    write_text(options.to / "algebra.json", json.dumps(data, indent=1) + "\n")
    print(f"written: {options.to / 'algebra'}.md and .json")


def about_tables(options: Any, count: int, whole: Sequence[Path]) -> dict[str, Any]:
    """What one must know to read the tables."""
    a, b = pairs.WEIGHTS
    return {
        "adapters": f"two of {count} layers of {options.family} (all that kohya's trainer targets), rank {options.rank}, fp16, "
        f"{whole[0].stat().st_size / 1e6:.0f} MB each, seed {options.seed}; singular values fall as 1/n; merged at {a} and {b}",
        "machine": f"{machine()}; OMP_WAIT_POLICY=PASSIVE for all",
        "seconds": f"of the whole command, the least of {options.rounds} rounds (tools that take the SVD of dW: one); "
        "of them start: the same program when it only loads what it imports; all layers: measured, or with ≈ extrapolated by "
        f"the number of layers from {options.modules} that are spread evenly over all sizes",
        "memory": "the most that was resident at once, Python and torch and mapped files included",
        "error": "of the result as a file, ||dW - answer|| / ||answer||, the answer in dense fp64 by LAPACK on "
        f"{options.checked} layers spread over all sizes; resize and rank-{options.rank} merges write fp32 (kohya's merge_lora "
        "and peft's linear: fp16), concatenation fp16",
        "kohya": "run with empty stand-ins for what it imports and does not use here: " + ", ".join(peers.STAND_INS)
        if options.kohya
        else "not run",
        "peft": "on a base of layers without memory of their own; its own reading and writing is safetensors'",
    }


def main(options: Any) -> None:
    """Make the adapters, run all tools, compare, publish."""
    if options.kohya and not (options.kohya / "networks" / "resize_lora.py").is_file():
        raise DataError(f"{options.kohya} is no checkout of sd-scripts", "it has networks/resize_lora.py")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    row = pairs.family(options.family)
    shapes = pairs.targets(row)
    whole = pairs.write_pair(options.work, row, options.rank, options.seed)
    names = pairs.spread(shapes, options.modules)
    options.modules = len(names)
    sample = [pairs.write_sample(file, file.with_name(f"{file.stem}-{len(names)}.safetensors"), names) for file in whole]
    words = [word.strip() for word in options.only.split(",")]
    every = peers.tools(options.work, options.kohya and options.kohya.resolve(), options.rank)
    chosen = [tool for tool in every if "personalize" in tool.name or any(word in tool.name for word in words)]
    work = jobs(chosen, whole, sample, len(shapes), options)
    checked = pairs.spread({name: shapes[name] for name in names}, options.checked)
    about = about_tables(options, len(shapes), whole)
    torch.set_num_threads(1)  # of the answers' SVDs: beside busy neighbours several threads take much longer
    results = list(run_and_compare(work, options, checked))
    hollow = pairs.hollow(options.work / "hollow.safetensors", row, HOLLOW)
    show = [sys.executable, "-m", "personalize", "show", str(hollow)]
    shown = least([run(show, options.work) for _ in range(options.rounds)])
    publish(options, about, results, goals(results, shown, HOLLOW, len(shapes)), len(shapes))
